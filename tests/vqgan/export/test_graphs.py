"""The formats that are graphs, pt2 and onnx, are the tokenizer for any number and size of images."""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from codegrid.engine.errors import InputError
from tests.helpers.exports import GRAPHS, PYRAMID, make_trained, share_programs, write_format
from vqgan.export.base import Exporter, make_examples
from vqgan.export.graphs import export_graphs
from vqgan.export.onnx import open_session
from vqgan.tokenizer import Tokenizer

SHALLOW = "model.decoder.depth=1"  # the number of layers is what takes the time


@lru_cache(maxsize=1)
def trace(*words: str) -> tuple[Tokenizer, dict[str, ExportedProgram]]:
    """A tokenizer and its programs, traced once for both formats."""
    tokenizer = make_trained(*words)
    return tokenizer, export_graphs(tokenizer)


def open_graph(folder: Path, name: str) -> Callable[[Tensor], Tensor]:
    """The function "encoder" or "decoder" of an export in either format."""
    if (folder / f"{name}.onnx").exists():
        return open_session(folder / f"{name}.onnx")
    return torch.export.load(folder / f"{name}.pt2").module()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("exporter", GRAPHS)
@pytest.mark.parametrize(
    "words",
    [
        ["quantizer=ema", "quantizer.entropy.weight=0.1", "quantizer.cosine=true", "data.channels=5", "data.image_size=[24,16]",
         "model.grid=[6,4]", SHALLOW],
        ["quantizer=residual", "quantizer@quantizer.inner=gumbel", "data.channels=1", SHALLOW],
        ["quantizer=fsq", "data.channels=2", "data.image_size=[20,16]", "model.grid=[5,4]", SHALLOW],
        ["quantizer=bsq", *PYRAMID, "model.mults=[1,1]", "model.grid=8", "+model.pixels=[0,1]"],
    ],
    ids=" ".join,
)  # fmt: skip
@torch.no_grad()
def test_both_graphs_are_the_tokenizer_at_any_size(
    words: list[str], exporter: type[Exporter], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, programs = trace(*words)
    share_programs(programs, monkeypatch)
    folder = write_format(exporter(), tokenizer, tmp_path)
    figures = exporter().verify(tokenizer, folder, make_examples(tokenizer))
    assert figures["equal_codes"] == 1
    assert figures["largest_difference"] < 1e-5
    encode, decode = open_graph(folder, "encoder"), open_graph(folder, "decoder")
    f, channels = tokenizer.f, tokenizer.encoder.channels
    for batch, rows, columns in ((1, 2, 2), (3, 5, 2)):
        images = torch.rand(batch, channels, rows * f, columns * f) * 2 - 1
        indices = encode(images)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, tokenizer.indices(images))
        assert decode(indices).shape == images.shape
    other = deepcopy(tokenizer)
    other.decoder.last.bias += 0.01  # type: ignore[operator]
    sentence = f"format={exporter.name} was written and read back, and its pictures"
    with pytest.raises(InputError, match=sentence):
        exporter().verify(other, folder, make_examples(other))
