"""format=safetensors: the weights under this program's names, one table of codes, and a decoder that needs nothing else."""

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from codegrid.data.shown import choose_shown
from codegrid.engine.errors import InputError
from vqgan.export.base import Example, Exporter, compare_pictures
from vqgan.export.layers import describe_decoding
from vqgan.formats.codegrid import TABLE
from vqgan.quantizers.base import Quantizer
from vqgan.quantizers.product import Product
from vqgan.quantizers.residual import Residual
from vqgan.tokenizer import Tokenizer

MODEL_WEIGHTS = "model.safetensors"
DECODER = Path(__file__).with_name("decoder.py")
MAX_TABLE = 2**30  # numbers


class SafetensorsExporter(Exporter):
    name = "safetensors"
    is_read_back = True
    usage = """\
`decoder.py` needs torch and safetensors alone. From indices to pictures:

```python
from decoder import PictureDecoder

pictures = PictureDecoder()(indices)   # int64 (B, h, w), (B, h, w, num_codebooks) or (B, 1, L) -> float32 (B, C, H, W) in [-1, 1]
```

or `python decoder.py codes.safetensors pictures`, for the files of `stage=extract export=safetensors`: PNG files of the channels
that `shown` of `config.json` names. The tensor `codes` of
`model.safetensors` has the vectors of all codes, (num_codebooks, K, dim)."""

    def check(self, tokenizer: Tokenizer) -> None:
        describe_decoding(tokenizer)
        check_table(tokenizer.quantizer)

    def encode_files(self, tokenizer: Tokenizer) -> dict[str, bytes]:
        tensors = {
            name: value.contiguous().clone() for name, value in tokenizer.state_dict().items()
        }
        tensors[TABLE] = fold_codes(tokenizer.quantizer).contiguous()
        metadata = {"format": "pt"}  # which other libraries ask for
        return {MODEL_WEIGHTS: save(tensors, metadata), DECODER.name: DECODER.read_bytes()}

    def describe(self, tokenizer: Tokenizer) -> dict[str, Any]:
        shown = choose_shown(tokenizer.encoder.channels, tokenizer.rules.show)
        return {"decoder": describe_decoding(tokenizer), "shown": list(shown)}

    def verify(self, tokenizer: Tokenizer, folder: Path, examples: list[Example]) -> dict[str, Any]:
        weights, expected = load_file(folder / MODEL_WEIGHTS), tokenizer.state_dict()
        different = [name for name in expected if not torch.equal(weights[name], expected[name])]
        if different:
            raise InputError(f"{folder / MODEL_WEIGHTS} has not kept {', '.join(different[:10])}")
        decode = load_decoder(folder / DECODER.name).PictureDecoder(folder)
        differences = [
            compare_pictures(self.name, decode(each.chosen), each.decoded.clamp(-1, 1))
            for each in examples
        ]
        return {"largest_difference": max(differences)}


def load_decoder(file: Path) -> Any:
    """The module in an exported decoder.py, without the folder of bytecode that an import would leave beside it."""
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    exec(compile(file.read_text(), str(file), "exec"), module.__dict__)
    return module


def check_table(quantizer: Quantizer) -> None:
    """Raise InputError if the codes of a quantizer can't be one table."""
    if quantizer.num_codebooks > 1 and not isinstance(quantizer, Product | Residual):
        raise InputError(
            f"format=safetensors adds the codes of a position, and how {type(quantizer).__name__} joins its "
            f"{quantizer.num_codebooks} is not known; use format=onnx or pt2"
        )
    size = quantizer.num_codebooks * (quantizer.K or 0) * quantizer.dim
    if size > MAX_TABLE:
        raise InputError(
            f"format=safetensors has all codes in one table, and quantizer.K={quantizer.K} codes of {quantizer.dim} numbers "
            f"are {size / 1e9:,.0f} billion; use format=onnx or pt2, which compute them"
        )


def fold_codes(quantizer: Quantizer) -> Tensor:
    """All codes as vectors (num_codebooks, K, dim) whose sum over the codebooks is z_q, to the bit; of a multiscale quantizer
    (1 or scales, K, dim), which `Scales.add` adds up."""
    codes = quantizer.codebooks()
    if not isinstance(quantizer, Product):
        return codes
    num_codebooks, K, width = codes.shape
    folded = codes.new_zeros(num_codebooks, K, num_codebooks * width)
    for i, own in enumerate(codes):
        folded[i, :, i::num_codebooks] = own  # channel c belongs to codebook c mod num_codebooks
    return folded
