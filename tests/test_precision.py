"""What has to be float32 under any precision is computed in float32: read off the operations of real calls under bfloat16."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from codegrid.engine.muon import orthogonalise
from prior.decoding.sampling import Sampler
from prior.likelihood import negative_log_likelihood, weighted_mean
from prior.models.base import Prediction
from prior.models.counted import Counted
from prior.models.transformer import RMSNorm, rotary, rotary_directions, rotate_pairs
from tests.helpers.configs import compose_config, list_options
from tests.helpers.dtypes import computed_low
from tests.helpers.parts import make
from tests.helpers.priors import PRIORS, make_prior
from vqgan.discriminators.patch import PatchGAN
from vqgan.load import build_tokenizer
from vqgan.losses.adversarial import Hinge, LeastSquares, NonSaturating, Vanilla
from vqgan.losses.perceptual import LPIPS
from vqgan.losses.pixel import Pixel
from vqgan.losses.regularisers import R1
from vqgan.losses.weight import AdaptiveWeight
from vqgan.quantizers.base import Quantizer

NO_CODES = ("kl", "none")
DERIVED_DIM = ("bsq", "fsq", "lfq")
GAMES = [Hinge(), LeastSquares(), NonSaturating(), Vanilla()]


def half(*shape: int) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(*shape).bfloat16()


def make_quantizer(name: str) -> Quantizer:
    sizes = ["data.image_size=16", "model.grid=4", "model.width=8"]
    sizes += [] if name in NO_CODES else ["quantizer.K=16"]
    sizes += [] if name in DERIVED_DIM else ["quantizer.dim=8"]
    config = compose_config("stage=vqgan", f"quantizer={name}", *sizes)
    return build_tokenizer(config.model, config.quantizer).quantizer


@pytest.mark.parametrize("name", [n for n in list_options("quantizer") if n != "none"])
def test_codes_are_chosen_in_float32(name: str) -> None:
    quantizer = make_quantizer(name)
    assert computed_low(quantizer, half(2, quantizer.in_dim, 4, 4)) == set()


@pytest.mark.parametrize("name", ["vq", "ema", "lfq", "ibq", "gumbel"])
def test_a_quantizer_without_its_island_would_compute_in_bfloat16(name: str) -> None:
    """So the test above would notice; `float32` keeps the function that it wraps."""
    quantizer = make_quantizer(name)
    forward: Any = type(quantizer).forward
    while hasattr(forward, "__wrapped__"):
        forward = forward.__wrapped__
    assert computed_low(forward, quantizer, half(2, quantizer.dim, 4, 4)) != set()


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "pixel": lambda x, y: Pixel(1.0, 1.0, 1.0)(x, y),
    **{f"{type(game).__name__} of G": lambda x, y, game=game: game.generator(x) for game in GAMES},
    **{f"{type(game).__name__} of D": lambda x, y, game=game: game.discriminator(x, y) for game in GAMES},
    "perceptual": lambda x, y: LPIPS("squeeze", pretrained=False)(x, y),
    "R1": lambda x, y: R1(weight=1.0, every=1)(make(PatchGAN, 3, 8, 1), x),
}  # fmt: skip


@pytest.mark.parametrize("name", LOSSES)
def test_losses_are_computed_in_float32(name: str) -> None:
    assert computed_low(LOSSES[name], half(2, 3, 16, 16), half(2, 3, 16, 16)) == set()


def test_lambda_is_computed_in_float32() -> None:
    adaptive = make(AdaptiveWeight)
    adaptive.measure(torch.randn(8, 3), torch.randn(8, 3))
    assert computed_low(adaptive.update) == set()
    assert adaptive.weight.dtype == torch.float32


@pytest.mark.parametrize("name", [n for n, c in PRIORS.items() if not issubclass(c.kind, Counted)])
def test_logits_and_likelihoods_are_float32(name: str) -> None:
    model = make_prior(name)
    codes = torch.randint(model.K, (2, model.L))
    with torch.autocast("cpu", torch.bfloat16):
        prediction = model.learn(codes, None, 0.5)
    assert prediction.logits.dtype == prediction.weights.dtype == torch.float32

    # The head's product with its weights is that of a linear layer, in the precision of the run.
    of_logits = Prediction(prediction.logits, prediction.targets, prediction.weights)

    def judge() -> Tensor:
        return weighted_mean(negative_log_likelihood(of_logits, 0.1), of_logits)

    assert computed_low(judge) == set()


def test_logits_in_bfloat16_are_raised_to_float32_before_their_likelihood() -> None:
    learned = make_prior("gpt").learn(torch.zeros(2, 6, dtype=torch.int64), None, 0.5)
    prediction = Prediction(learned.logits.bfloat16(), learned.targets, learned.weights)
    assert computed_low(negative_log_likelihood, prediction) == set()
    softmax = torch.nn.functional.log_softmax
    with torch.autocast("cpu", enabled=False):
        assert softmax(prediction.logits, -1).dtype == torch.bfloat16, "which would be a mistake"


def test_codes_are_drawn_in_float32_or_more() -> None:
    settings = {"temperature": 0.9, "top_k": 3, "top_p": 0.9, "min_p": 0.01}
    sampler = Sampler(**{**vars(Sampler.unmodified()), **settings})
    uniform = torch.rand(4, dtype=torch.float64)
    assert computed_low(sampler.draw, torch.randn(4, 8), uniform) == set()


def test_norms_and_rotations_of_a_transformer_are_float32() -> None:
    norm = RMSNorm(8)
    x = half(2, 5, 8).requires_grad_()
    assert computed_low(norm, x) == set()
    assert computed_low(lambda: norm(x).sum().backward()) == set()
    directions = rotary_directions(rotary((2, 3), 8))
    assert computed_low(rotate_pairs, half(2, 6, 2, 2, 8), directions) == set()


def test_muon_orthogonalises_in_float32_on_a_cpu() -> None:
    assert computed_low(orthogonalise, half(2, 16, 32), 5) == set()
