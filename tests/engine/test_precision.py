"""The memory format of networks, by device and by what the CPU can do."""

import pytest
import torch
from torch import Tensor, nn

from codegrid.engine import precision
from codegrid.engine.precision import choose_memory_format, to_memory_format
from codegrid.engine.settings import TrainerSettings
from tests.helpers.configs import compose_config
from vqgan.load import build_tokenizer
from vqgan.stages.building import build_module

CPU = torch.device("cpu")
WORDS = ("stage=vqgan", "data.image_size=16", "model.grid=4", "quantizer.K=16", "quantizer.dim=8")


@pytest.mark.parametrize(
    ("kind", "avx2_alone", "gradients", "expected"),
    [
        ("cpu", False, True, torch.channels_last),
        ("cpu", False, False, torch.channels_last),
        ("cpu", True, True, torch.contiguous_format),
        ("cpu", True, False, torch.channels_last),
        ("cuda", False, True, torch.contiguous_format),
        ("cuda", False, False, torch.contiguous_format),
    ],
)
def test_the_memory_format_follows_the_device_and_whether_gradients_are_needed(
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    avx2_alone: bool,
    gradients: bool,
    expected: torch.memory_format,
) -> None:
    monkeypatch.setattr(precision, "HAS_AVX2_ALONE", avx2_alone)
    with torch.set_grad_enabled(gradients):
        assert choose_memory_format(torch.device(kind)) is expected


def test_maps_stay_as_they_are_where_channels_last_is_the_format(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(precision, "HAS_AVX2_ALONE", False)
    x = torch.randn(2, 3, 4, 4)
    assert to_memory_format(x) is x
    last = x.contiguous(memory_format=torch.channels_last)
    assert to_memory_format(last) is last


def list_strided(module: nn.Module, x: Tensor) -> list[str]:
    """The names of convolutions of a tokenizer whose input is not contiguous, in a step of training."""
    names = []
    for name, conv in module.named_modules():
        if isinstance(conv, nn.Conv2d):

            def note(_: nn.Module, inputs: tuple[Tensor], name: str = name) -> None:
                if not inputs[0].is_contiguous():
                    names.append(name)

            conv.register_forward_pre_hook(note)
    module.decode(module.encode(x).z_q).sum().backward()  # type: ignore[operator]
    return names


@pytest.mark.parametrize("model", [["conv", "model.width=8"], ["pyramid", "model.width=32"]])
def test_training_with_avx2_alone_has_contiguous_maps_in_every_convolution(
    monkeypatch: pytest.MonkeyPatch, model: list[str]
) -> None:
    monkeypatch.setattr(precision, "HAS_AVX2_ALONE", True)
    name, width = model
    config = compose_config(*WORDS, f"model={name}", width)
    x = torch.randn(2, 3, 16, 16)
    assert list_strided(build_tokenizer(config.model, config.quantizer), x) == []
    # Without the change of strides a lookup's reach the decoder, and attention's the rest of the encoder.
    monkeypatch.setattr("vqgan.tokenizer.to_memory_format", lambda z: z)
    monkeypatch.setattr("vqgan.networks.pyramid.to_memory_format", lambda z: z)
    strided = list_strided(build_tokenizer(config.model, config.quantizer), x)
    assert "out" in strided
    assert any(each.startswith("encoder") for each in strided) == (name == "pyramid")


@pytest.mark.parametrize("avx2_alone", [False, True])
def test_the_module_of_a_run_has_the_format_of_its_device(
    monkeypatch: pytest.MonkeyPatch, avx2_alone: bool
) -> None:
    monkeypatch.setattr(precision, "HAS_AVX2_ALONE", avx2_alone)
    config = compose_config(*WORDS, "model.width=8", "loss=vqvae", "trainer.accelerator=cpu")
    module = build_module(config, TrainerSettings.read(config.trainer))
    weight = module.tokenizer.decoder.last.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) is not avx2_alone
