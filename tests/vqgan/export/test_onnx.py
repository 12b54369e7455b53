"""format=onnx: graphs for onnxruntime, for any number and size of images."""

from pathlib import Path
from typing import Any

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.exports import PYRAMID, make_trained, needs_onnx, write_format
from vqgan.export.base import make_examples
from vqgan.export.onnx import MAX_BYTES, ONNXExporter, open_session


@needs_onnx
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(
    "words",
    [
        ["quantizer=ema", "quantizer.entropy.weight=0.1", "quantizer.cosine=true"],
        ["quantizer=residual", "quantizer@quantizer.inner=gumbel", "data.channels=1"],
        ["quantizer=fsq"],
        ["quantizer=bsq", *PYRAMID, "+model.pixels=[0,1]"],
        ["quantizer=ema", "data.channels=5", "data.image_size=[24,16]", "model.grid=[6,4]"],
        ["quantizer=ema", "data.channels=2", "data.image_size=[20,16]", "model.grid=[5,4]"],
    ],
    ids=" ".join,
)
@torch.no_grad()
def test_both_graphs_are_the_tokenizer_at_any_size(words: list[str], tmp_path: Path) -> None:
    tokenizer = make_trained(*words)
    folder = write_format(ONNXExporter(), tokenizer, tmp_path)
    figures = ONNXExporter().verify(tokenizer, folder, make_examples(tokenizer))
    assert figures["equal_codes"] == 1
    assert figures["largest_difference"] < 1e-5
    encode, decode = open_session(folder / "encoder.onnx"), open_session(folder / "decoder.onnx")
    f, channels = tokenizer.f, tokenizer.encoder.channels
    for batch, rows, columns in ((1, 2, 2), (3, 5, 2)):
        images = torch.rand(batch, channels, rows * f, columns * f) * 2 - 1
        indices = encode(images)
        assert indices.dtype == torch.int64
        assert torch.equal(indices, tokenizer.indices(images))
        assert decode(indices).shape == images.shape
    with torch.no_grad():
        tokenizer.decoder.last.bias += 0.01  # type: ignore[operator]
    with pytest.raises(InputError, match="format=onnx was written and read back, and its pictures"):
        ONNXExporter().verify(tokenizer, folder, make_examples(tokenizer))


def test_a_missing_library_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> Any:
        return None if name == "onnxscript" else name

    monkeypatch.setattr("vqgan.export.onnx.find_spec", find_spec)
    with pytest.raises(InputError, match=r'needs onnxscript; pip install "codegrid\[onnx\]"'):
        ONNXExporter().check(make_trained())


def test_weights_beyond_the_size_of_a_file_are_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vqgan.export.onnx.find_spec", bool)
    tokenizer = make_trained()
    ONNXExporter().check(tokenizer)
    tokenizer.large = torch.nn.Parameter(torch.empty(MAX_BYTES // 4, device="meta"))
    with pytest.raises(InputError, match=r"and these weights are 2\.0; use format=pt2"):
        ONNXExporter().check(tokenizer)
