"""Every model's forward pass on a GPU that need not be there: no tensor of the CPU meets the GPU's, and nothing waits for it."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from torch import Tensor, nn

from prior.decoding.kv_decoder import StepCache
from prior.decoding.parallel import Pace, Windows
from prior.decoding.sampling import ORDERS, GumbelNoise, Numbers, Sampler
from prior.models.base import Autoregressive, PriorModel
from prior.models.bigram import Bigram
from prior.models.counted import Counted
from prior.models.gpt import GPTWindows
from prior.models.lstm import LSTM
from tests.helpers.configs import compose_config, list_options
from tests.helpers.fake_cuda import fake_cuda, move_to_fake_cuda
from tests.helpers.looks import Look
from tests.helpers.priors import PRIORS, make_conditioned, make_prior
from vqgan.discriminators.frozen import FrozenFeatures
from vqgan.load import build_tokenizer
from vqgan.tokenizer import Tokenizer

# Without a GPU torch can't ask its driver for cudnn's LSTM, which tests/prior/test_meta.py covers; and how many pairs of codes a
# bigram reads depends on the codes.
FAKED = [name for name, case in PRIORS.items() if case.kind not in (LSTM, Bigram)]
AUTOREGRESSIVE = [name for name in FAKED if issubclass(PRIORS[name].kind, Autoregressive)]
NARROW = ["model.width=32", "model.z_channels=8"]
SMALLER = {  # models as small as their f and their parts allow, for images of 32 pixels
    "conv_f16": ["model.grid=2", "model.width=8"],
    "llamagen_f16": ["model.grid=2", "model.depth=1", *NARROW],
    "movqgan_f8": ["model.grid=4", "model.depth=1", *NARROW],
    "pyramid": ["model.grid=4", *NARROW],
    "taming_f16": ["model.grid=2", "model.depth=1", *NARROW],
    "var_f16": ["model.grid=2", "model.depth=1", *NARROW],
    "vit": ["model.grid=4", "model.width=32", "model.depth=1"],
}
NO_CODES = ("kl", "none")
DERIVED_DIM = ("bsq", "fsq", "lfq")  # quantizers whose K says how many channels they take


def read_tokenizer(*overrides: str) -> Tokenizer:
    config = compose_config("stage=vqgan", *overrides)
    return build_tokenizer(config.model, config.quantizer)


def check_tokenizer(tokenizer: Tokenizer, size: int) -> None:
    """Encode and decode as in training and as in use, on the GPU alone."""
    with fake_cuda():
        move_to_fake_cuda(tokenizer)
        x = torch.randn(2, 3, size, size, device="cuda")
        for is_training in (True, False):
            q = tokenizer.train(is_training).encode(x)
            x_hat = tokenizer.decode(q.z_q)
            assert (x_hat.shape, x_hat.device.type) == (x.shape, "cuda")
            assert {t.device.type for t in [q.loss, *q.terms.values()]} <= {"cuda"}
        if q.indices is not None:
            assert tokenizer.decode_indices(q.indices).device.type == "cuda"


@pytest.mark.parametrize("model", list_options("model"))
def test_every_tokenizers_networks_run_on_a_gpu(model: str) -> None:
    codes = ["quantizer.K=16", "quantizer.dim=8"]
    check_tokenizer(
        read_tokenizer(f"model={model}", "data.image_size=32", *SMALLER.get(model, []), *codes), 32
    )


@pytest.mark.parametrize("quantizer", list_options("quantizer"))
def test_every_quantizer_runs_on_a_gpu(quantizer: str) -> None:
    small = ["data.image_size=16", "model.grid=4", "model.width=8"]
    small += [] if quantizer in NO_CODES else ["quantizer.K=16"]
    small += [] if quantizer in DERIVED_DIM else ["quantizer.dim=8"]
    check_tokenizer(read_tokenizer(f"quantizer={quantizer}", *small), 16)


@pytest.mark.parametrize("name", list_options("loss/discriminator"))
def test_every_discriminator_runs_on_a_gpu(name: str) -> None:
    backbone = "loss.discriminator.backbone"
    squeezed = [f"{backbone}.name=squeezenet1_1", f"{backbone}.pretrained=false"]
    overrides = ["stage=vqgan", "loss=vqgan", f"loss/discriminator={name}", "data.image_size=32"]
    config = compose_config(
        *overrides, "loss.discriminator.width=8", *(squeezed if name == "frozen" else [])
    )
    discriminator = instantiate(config.loss.discriminator)
    with fake_cuda():
        if isinstance(discriminator, FrozenFeatures):  # it moves to the images by itself
            move_to_fake_cuda(discriminator.backbone.network)
        judgement = move_to_fake_cuda(discriminator)(torch.randn(2, 3, 32, 32, device="cuda"))
        assert {x.device.type for x in [judgement.logits, *judgement.features]} == {"cuda"}


@pytest.mark.parametrize("name", ["lpips", "backbone"])
def test_every_perceptual_network_runs_on_a_gpu(name: str) -> None:
    small = {
        "lpips": ["net=squeeze", "pretrained=false"],
        "backbone": ["backbone.name=squeezenet1_1", "backbone.pretrained=false"],
    }
    overrides = [f"loss.perceptual.{setting}" for setting in small[name]]
    config = compose_config("stage=vqgan", f"loss/perceptual={name}", *overrides)
    perceptual = instantiate(config.loss.perceptual)
    hidden = perceptual._network[0] if name == "lpips" else perceptual.backbone.network
    with fake_cuda():
        move_to_fake_cuda(hidden)  # it moves to the images by itself
        x, x_hat = torch.randn(2, 2, 3, 32, 32, device="cuda")
        assert move_to_fake_cuda(perceptual)(x, x_hat).device.type == "cuda"


@pytest.mark.parametrize("name", FAKED)
def test_every_prior_runs_on_a_gpu(name: str) -> None:
    model = make_prior(name, **labels_of(name))
    with fake_cuda():
        move_to_fake_cuda(model)
        codes = torch.randint(model.K, (4, model.L), device="cuda")
        labels = torch.randint(2, (4,), device="cuda") if model.classes else None
        predicted = [model.learn(codes, labels, 0.5)] if not isinstance(model, Counted) else []
        if model.exact:  # a bound draws masks by the codes' values
            predicted.append(model.judge(codes, labels))
        for prediction in predicted:
            parts = prediction.logits, prediction.targets, prediction.weights
            assert {x.device.type for x in parts} == {"cuda"}


@pytest.mark.parametrize("condition", ["vectors", "two codebooks"])
@pytest.mark.parametrize("name", ["gpt", "rq"])
def test_conditions_are_read_on_a_gpu(name: str, condition: str) -> None:
    model = make_conditioned(name, condition)
    known = torch.zeros(model.L, dtype=torch.bool)
    sampler = Sampler(**{**vars(Sampler.unmodified()), "guidance": 2.0})
    with fake_cuda(), torch.no_grad():
        move_to_fake_cuda(model)
        codes = torch.zeros(4, model.L, dtype=torch.int64, device="cuda")
        size, is_vector = model.vector_size, model.front is None
        labels = (
            torch.zeros(4, size, device="cuda")
            if is_vector
            else torch.zeros(4, model.front.L, dtype=torch.int64, device="cuda")  # type: ignore[union-attr]
        )
        assert model.learn(codes, labels, 0.5).logits.device.type == "cuda"
        assert model.fill(codes, known, FakeNumbers(), sampler, labels).device.type == "cuda"


class FakeNumbers(Numbers):
    """Random numbers that the GPU draws: those of a seed are drawn on the host."""

    def __init__(self) -> None: ...

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(4, *shape, dtype=torch.float64, device="cuda")


@pytest.mark.parametrize("name", AUTOREGRESSIVE)
def test_codes_are_drawn_on_a_gpu_without_looking_at_them(name: str) -> None:
    """With the cache of keys and values where a prior has one, and with all ways to cut the logits off."""
    model = make_prior(name, **labels_of(name))
    known = torch.zeros(model.L, dtype=torch.bool)
    settings = {"temperature": 0.9, "top_k": 3, "top_p": 0.9, "min_p": 0.01, "guidance": 2.0}
    sampler = Sampler(**{**vars(Sampler.unmodified()), **settings})
    with fake_cuda():
        fill_on_gpu(model, known, sampler)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", ["maskgit", "diffusion"])
def test_masked_codes_are_filled_in_on_a_gpu_with_a_single_copy_to_it(
    name: str, order: str
) -> None:
    """The places that are filled in; all steps, those that draw codes again too, leave the host free."""
    model = make_prior(name, **labels_of(name))
    settings = {"order": order, "steps": 4, "corrector": 1, "remask": 0.5, "guidance": 2.0}
    sampler = Sampler(**{**vars(Sampler.unmodified()), **settings})
    known = torch.arange(model.L) == 1
    with fake_cuda(raises=False) as looks:
        fill_on_gpu(model, known, sampler)
    [look] = looks.looks
    assert "places = torch.tensor(" in look


@torch.no_grad()
def fill_on_gpu(model: PriorModel, known: Tensor, sampler: Sampler) -> None:
    move_to_fake_cuda(model)
    codes = torch.zeros(4, model.L, dtype=torch.int64, device="cuda")
    labels = torch.zeros(4, dtype=torch.int64, device="cuda") if model.classes else None
    drawn = model.fill(codes, known, FakeNumbers(), sampler, labels)
    assert (drawn.shape, drawn.device.type) == (codes.shape, "cuda")


class FakeNoise(GumbelNoise):
    """Noise that the GPU draws."""

    def at(self, first: Sequence[int], window: int) -> Tensor:
        return torch.randn(len(first), window, self.blocks.shape[-1], device="cuda")


@pytest.mark.parametrize("name", ["gpt", "rar"])
def test_a_window_is_drawn_on_a_gpu_without_looking_at_it(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which codes are final is asked afterwards, once for each pass."""
    model = make_prior(name, classes=2)
    settings = {"top_k": 3, "top_p": 0.9, "guidance": 2.0, "guidance_power": 1.0, "parallel": 4}
    sampler = Sampler(**{**vars(Sampler.unmodified()), **settings})
    agreed = iter([[1, 0], [2, 3], [0, 0], [3, 3], [3, 3], [3, 3]])
    monkeypatch.setattr(Windows, "count_agreed", lambda *_: next(agreed))
    noise = FakeNoise([], model.L, model.K, 8, "cuda")
    known = torch.zeros(model.L, dtype=torch.bool)
    # The positions of the next windows are copied to the GPU, which is no look.
    with fake_cuda(raises=False), torch.no_grad():
        move_to_fake_cuda(model)
        codes = torch.zeros(2, model.L, dtype=torch.int64, device="cuda")
        doubled = torch.tensor([0, 1, -1, -1]).to("cuda")
        decode = GPTWindows(model, 4, doubled, StepCache(), 4)  # type: ignore[arg-type]
        windows = Windows(decode, codes, known, noise, sampler, True, Pace(4, 0.0, 0.0))
        assert windows.fill().device.type == "cuda"
        assert windows.passes > 2


def labels_of(name: str) -> dict[str, Any]:
    return {"classes": 2} if PRIORS[name].has_labels else {}


class Forgetful(nn.Module):
    """Keeps a tensor that does not move with the module."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = torch.ones(3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


def test_a_tensor_that_stays_on_the_cpu_is_caught() -> None:
    with fake_cuda(), pytest.raises(Look, match="add of tensors on cpu and cuda"):
        move_to_fake_cuda(Forgetful())(torch.randn(2, 3, device="cuda"))
