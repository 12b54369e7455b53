"""IBQ (SEED-Voken): taming's networks and names; the code with the largest inner product is chosen."""

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.pyramid_names import CODEBOOK, require
from vqgan.formats.taming import (
    choose_code_score,
    has_taming_names,
    is_muse,
    plan_taming,
    read_code_score,
    read_networks,
)


class PublicIBQ(Format):
    """A codebook of which the code with the largest inner product is chosen."""

    title = "SEED-Voken's IBQ"

    def recognises(self, file: PublicFile) -> bool:
        has_codes = has_taming_names(file) and CODEBOOK in file.tensors
        return has_codes and read_code_score(file) == "inner_product" and not is_muse(file)

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        K, dim = require(file, CODEBOOK).shape
        settings = read_quantizer("ibq", K=K, dim=dim, kmeans=False)
        quantizer = {**settings, "score": choose_code_score(file, choices)}
        return plan_taming(file, choices, read_networks(file), quantizer, {"codebook": CODEBOOK})
