"""taming-transformers' GumbelVQ: a convolution gives the logits of the codes."""

from dataclasses import replace

from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.options import read_quantizer
from vqgan.formats.pyramid_names import require
from vqgan.formats.taming import has_taming_names, plan_taming, read_networks

EMBEDDING = "quantize.embed.weight"
PROJECTION = "quantize.proj"


class TamingGumbel(Format):
    """The most likely code is taken. The public code draws one, also when it is not training."""

    title = "taming-transformers' GumbelVQ"

    def recognises(self, file: PublicFile) -> bool:
        quantizer = {EMBEDDING, f"{PROJECTION}.weight", f"{PROJECTION}.bias"}
        return has_taming_names(file) and file.tensors.keys() >= quantizer

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        K, dim = require(file, EMBEDDING).shape
        kl_weight = file.settings.get("kl_weight")
        is_weight = isinstance(kl_weight, int | float) and not isinstance(kl_weight, bool)
        loss = {"kl_weight": kl_weight} if is_weight else {}
        quantizer = read_quantizer("gumbel", K=K, dim=dim, kmeans=False, **loss)
        codes = {
            "codebook": EMBEDDING,
            "logits.weight": f"{PROJECTION}.weight",
            "logits.bias": f"{PROJECTION}.bias",
        }
        plan = plan_taming(file, choices, read_networks(file), quantizer, codes)
        remark = "its own code draws codes at random; here the most likely ones are taken"
        return replace(plan, remarks=(*plan.remarks, remark))
