"""Choosing the format of a public file, and putting its weights in place."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vqgan.formats
from codegrid.engine.errors import InputError
from tests.helpers.configs import compose_plain
from vqgan.formats import load
from vqgan.formats.base import Choices, Format, Plan, PublicFile
from vqgan.formats.load import choose_format, list_formats, load_public, make_choices
from vqgan.load import build_tokenizer

CHOICES = Choices(image_size=(16, 16), channels=3)
SMALL = ["model.grid=4", "model.width=8", "quantizer=vq", "quantizer.K=16", "quantizer.dim=8"]


def describe_small() -> dict[str, Any]:
    return compose_plain("stage=vqgan", "data.image_size=16", "model.start=random", *SMALL)


class Prefixed(Format):
    """This program's own networks, with `public.` before each name."""

    title = "a format of this test"

    def recognises(self, file: PublicFile) -> bool:
        return "public.quantizer.codebook" in file.tensors

    def plan(self, file: PublicFile, choices: Choices) -> Plan:
        config = describe_small()
        tokenizer = build_tokenizer(config["model"], config["quantizer"])
        names = {name: f"public.{name}" for name, _ in tokenizer.named_parameters()}
        transposed = {"quantizer.codebook": lambda codes: codes.t()}
        statistics = frozenset({"public.counter"})
        return Plan(config["model"], config["quantizer"], names, transposed, statistics)


class Twin(Prefixed):
    title = "its twin"


@pytest.fixture
def tensors(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """The weights of a file that Prefixed alone recognises, with codes as columns."""
    monkeypatch.setattr(load, "list_formats", lambda: [Prefixed()])
    config = describe_small()
    tokenizer = build_tokenizer(config["model"], config["quantizer"])
    weights = {f"public.{name}": value.detach() for name, value in tokenizer.named_parameters()}
    return weights | {"public.quantizer.codebook": weights["public.quantizer.codebook"].T}


def load_weights(tensors: Mapping[str, Tensor]) -> load.Imported:
    return load_public(PublicFile("weights.ckpt", tensors), CHOICES)


def test_every_weight_arrives_transformed_where_its_plan_says(tensors: dict[str, Tensor]) -> None:
    imported = load_weights({**tensors, "public.counter": torch.tensor(3)})
    assert imported.title == "a format of this test"
    assert not imported.tokenizer.training
    for name, value in imported.tokenizer.named_parameters():
        public = tensors[f"public.{name}"]
        assert torch.equal(value, public.T if name == "quantizer.codebook" else public)


def test_a_linear_layer_fills_a_convolution_of_side_1(tensors: dict[str, Tensor]) -> None:
    name = "public.into.weight"
    flat = tensors[name][:, :, 0, 0].half()
    imported = load_weights({**tensors, name: flat})
    assert torch.equal(imported.tokenizer.into.weight[:, :, 0, 0], flat.float())  # type: ignore[union-attr, index]


def test_each_weight_is_read_once(tensors: dict[str, Tensor]) -> None:
    reads: list[str] = []

    class Lazy(dict[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            reads.append(name)
            return super().__getitem__(name)

    load_weights(Lazy(tensors))
    assert sorted(reads) == sorted(tensors)


def test_names_that_are_stray_or_missing_are_one_sentence(tensors: dict[str, Tensor]) -> None:
    strays = {f"stray.{i:02}": torch.zeros(1) for i in range(30)}
    rest = {name: value for name, value in tensors.items() if "into" not in name}
    with pytest.raises(InputError) as refused:
        load_weights({**rest, **strays})
    sentence = str(refused.value)
    assert "lacks public.into.bias, public.into.weight and has besides stray.00, " in sentence
    assert sentence.endswith("stray.04 and 25 more; nothing is imported")
    with pytest.raises(InputError, match="stray.09 and 20 more"):
        load_weights({**tensors, **strays})


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (torch.zeros(8, 5), r"shapes public.quantizer.codebook \[5, 8\] for \[16, 8\]"),
        (torch.zeros(16, 8), r"shapes public.quantizer.codebook \[8, 16\] for \[16, 8\]"),
        (torch.zeros(8, 2, 8), r"shapes public.quantizer.codebook \[8, 2, 8\];"),
        (torch.zeros(8, 16, dtype=torch.int8), "public.quantizer.codebook of int8"),
        (torch.full((8, 16), torch.inf), "has NaN or infinity in public.quantizer.codebook"),
    ],
)
def test_weights_that_can_not_be_taken_are_named(
    tensors: dict[str, Tensor], value: Tensor, sentence: str
) -> None:
    with pytest.raises(InputError, match=sentence):
        load_weights({**tensors, "public.quantizer.codebook": value})


def test_a_file_of_no_format_gets_its_names_and_the_formats_that_there_are() -> None:
    file = PublicFile("x.bin", {f"layer.{i}": torch.zeros(1) for i in range(12)})
    with pytest.raises(InputError) as refused:
        choose_format(file)
    sentence = str(refused.value)
    assert sentence.startswith("x.bin is no tokenizer of a known format: its 12 weights are called")
    assert "layer.9 and 2 more; known are " in sentence
    assert all(public.title in sentence for public in list_formats())


def test_a_file_of_two_formats_gets_the_setting_that_decides(
    tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "list_formats", lambda: [Prefixed(), Twin()])
    with pytest.raises(InputError, match="reads as a format of this test and as its twin; .*confi"):
        load_weights(tensors)


def test_a_new_format_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "from vqgan.formats.base import Format\n\n"
        "class Mine(Format):\n"
        "    title = 'mine'\n"
        "    def recognises(self, file): return 'mine' in file.tensors\n"
        "    def plan(self, file, choices): raise NotImplementedError\n"
    )
    monkeypatch.setattr(vqgan.formats, "__path__", [*vqgan.formats.__path__, str(tmp_path)])
    try:
        assert "mine" in [public.title for public in list_formats()]
        assert choose_format(PublicFile("x", {"mine": torch.zeros(1)})).title == "mine"
    finally:
        sys.modules.pop("vqgan.formats.mine", None)


@pytest.mark.parametrize("pixels", [[0, 255], [1], "01", 1, [-1.0, 0.5], {"a": 1}])
def test_pixels_that_are_no_range_are_refused(pixels: Any) -> None:
    with pytest.raises(InputError, match="must be .-1,1. or .0,1."):
        make_choices(256, 3, pixels, None, None)


def test_choices_are_plain() -> None:
    assert make_choices(256, 3, [0, 1], True, None) == Choices((256, 256), 3, (0, 1), True)
    assert make_choices(256, 3, None, None, None) == Choices((256, 256), 3)
    with pytest.raises(InputError, match="quantizer.cosine=yes must be true or false"):
        make_choices(256, 3, None, "yes", None)
    with pytest.raises(InputError, match="quantizer.score=largest must be one of "):
        make_choices(256, 3, None, None, "largest")
