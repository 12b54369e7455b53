"""Small tokenizers with weights that do something, and the files of their exports."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.export import ExportedProgram

from tests.helpers.configs import SMALL, compose_plain
from vqgan.export.base import Exporter, to_json
from vqgan.export.discover import choose_exporters
from vqgan.export.onnx import LIBRARIES, ONNXExporter
from vqgan.export.origin import Origin
from vqgan.export.pt2 import PT2Exporter
from vqgan.export.writing import write_export
from vqgan.load import build_tokenizer
from vqgan.tokenizer import Tokenizer

needs_onnx = pytest.mark.skipif(
    any(find_spec(library) is None for library in LIBRARIES),
    reason="onnx, onnxscript or onnxruntime is not installed",
)

OPERATORS: dict[int, Any] = {}  # of ONNX, by opset
GRAPHS = [PT2Exporter, pytest.param(ONNXExporter, marks=needs_onnx)]  # formats that trace
PYRAMID = ["model=pyramid", "model.width=32", "model.z_channels=8", "model.mults=[1,1,1]"]


def compose_small(*words: str) -> dict[str, Any]:
    """The config of a small tokenizer."""
    lattice = {"quantizer=fsq", "quantizer=lfq", "quantizer=bsq"} & set(words)
    small = [word for word in SMALL if not (lattice and word.startswith("quantizer.dim"))]
    return compose_plain(*small, *words)


def make_trained(*words: str) -> Tokenizer:
    """A small tokenizer with the start of training and some noise on its weights, so that no layer is without effect."""
    config = compose_small(*words)
    tokenizer = build_tokenizer(config["model"], config["quantizer"]).eval()
    generator = torch.Generator().manual_seed(0)
    encoder = tokenizer.encoder
    images = torch.randn(64, encoder.channels, *encoder.image_size, generator=generator)
    tokenizer.initialise(images)
    with torch.no_grad():
        for p in tokenizer.parameters():
            p += torch.randn(p.shape, generator=generator) / 20
    return tokenizer


def write_format(exporter: Exporter, tokenizer: Tokenizer, folder: Path) -> Path:
    """The files of one format alone, with the part of config.json that they need."""
    folder.mkdir(exist_ok=True)
    for name, content in exporter.encode_files(tokenizer).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    (folder / "config.json").write_bytes(to_json(exporter.describe(tokenizer)))
    return folder


def share_programs(
    programs: Mapping[str, ExportedProgram], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Let both formats write these programs of a tokenizer, as tracing takes most of the time of an export."""
    for name in ("pt2", "onnx"):
        monkeypatch.setattr(f"vqgan.export.{name}.export_graphs", lambda tokenizer: programs)
    share_operators(monkeypatch)


def share_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.onnx.export lists all operators of ONNX anew for each graph, which takes a second; here it lists them once."""
    if find_spec("onnxscript") is None:
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    list_anew = ONNXRegistry.from_torchlib

    def list_once(opset_version: int) -> Any:
        if opset_version not in OPERATORS:
            OPERATORS[opset_version] = list_anew(opset_version)
        return OPERATORS[opset_version]

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", staticmethod(list_once))


def export_folder(
    folder: Path, *words: str, formats: str = "safetensors", **data: Any
) -> Tokenizer:
    """The whole folder of stage=export of a small tokenizer, whose images were read by these settings of `data`."""
    tokenizer = make_trained(*words)
    config = compose_small(*words)
    config["data"] |= data
    exporters = choose_exporters(formats.split(","))
    write_export(tokenizer, Origin("photos", config), exporters, "mit", folder, "stage: export\n")
    return tokenizer
