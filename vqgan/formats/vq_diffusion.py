"""VQ-Diffusion's PatchVQGAN: taming's networks and names, a codebook of running means."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from codegrid.engine.errors import InputError
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.public_config import read_section
from vqgan.formats.pyramid_names import require
from vqgan.formats.taming import has_taming_names, plan_taming

MEANS = "quantize.embedding"  # a buffer, not the weight of a layer
COUNTS = "quantize.cluster_size"
SUMS = "quantize.embedding_avg"


class PatchVQGAN(Format):
    """A codebook of running means, of which the nearest is chosen."""

    title = "VQ-Diffusion's PatchVQGAN"

    def recognises(self, file: PublicFile) -> bool:
        return has_taming_names(file) and file.tensors.keys() >= {MEANS, COUNTS, SUMS}

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        K, dim = require(file, MEANS).shape
        quantizer = read_quantizer("ema", K=K, dim=dim, kmeans=False)
        codes = {"codebook": MEANS, "counts": COUNTS, "sums": SUMS}
        config = read_section(file.settings, "encoder_config", "params")
        check_rules(file, config)
        plan = plan_taming(file, choices, config, quantizer, codes)

        def scale_counts(counts: Tensor) -> Tensor:
            """Running counts as this project has them, 1 on average and above 0."""
            counts = counts.float()
            return (counts * (K / counts.sum().clamp(min=1e-12))).clamp(min=1e-6)

        def multiply_codes(_: Tensor) -> Tensor:
            """Sums that give the codes when they are divided by the counts; upstream smooths the counts first."""
            return file.tensors[MEANS].float() * scale_counts(file.tensors[COUNTS])[:, None]

        transforms = {"quantizer.counts": scale_counts, "quantizer.sums": multiply_codes}
        return replace(plan, transforms=transforms)


def check_rules(file: PublicFile, config: Mapping[str, Any]) -> None:
    """Raise InputError for what this program's class can do beside, and no published model does."""
    distance = file.settings.get("quantizer_dis_type", "euclidean")
    if distance != "euclidean":
        raise InputError(
            f"the config of {file.source} says quantizer_dis_type={distance}; only euclidean can be imported"
        )
    if config.get("scale_by_2") is not None:
        raise InputError(
            f"the config of {file.source} says scale_by_2={config['scale_by_2']}; only networks that halve the image between all "
            "levels, which have scale_by_2=null, can be imported"
        )
