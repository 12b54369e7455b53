"""format=onnx: what it can not write is a sentence. Its graphs are in test_graphs.py."""

from typing import Any

import pytest
import torch

from codegrid.engine.errors import InputError
from tests.helpers.exports import make_trained
from vqgan.export.onnx import MAX_BYTES, ONNXExporter


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
