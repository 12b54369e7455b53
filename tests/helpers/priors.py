"""Every prior, small, for the tests that all must pass."""

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import nn

from prior.models.base import PriorModel
from prior.models.bigram import Bigram
from prior.models.counted import Counted
from prior.models.diffusion import Diffusion
from prior.models.gpt import GPT
from prior.models.lstm import LSTM
from prior.models.masked import Masked
from prior.models.maskgit import MaskGIT
from prior.models.pixelcnn import PixelCNN
from prior.models.rar import RAR
from prior.models.rq import RQ
from prior.models.transformer import Block, rotary, rotary_directions
from prior.models.uniform import Uniform
from prior.models.unigram import Unigram

DIM = 4

PRIORS: dict[
    str, tuple[Callable[..., PriorModel], dict[str, Any]]
] = {  # what builds it, small, and its settings
    "gpt": (GPT, {"width": 16, "depth": 2, "heads": 2}),
    "gpt-embedding": (GPT, {"width": 16, "depth": 2, "heads": 2, "inputs": "embedding"}),
    "pixelcnn": (PixelCNN, {"width": 8, "depth": 2, "kernel": 3}),
    "pixelcnn-embedding": (PixelCNN, {"width": 8, "depth": 2, "kernel": 5, "inputs": "embedding"}),
    "lstm": (LSTM, {"width": 16, "depth": 2}),
    "lstm-embedding": (LSTM, {"width": 16, "depth": 1, "inputs": "embedding"}),
    "rar": (RAR, {"width": 16, "depth": 2, "heads": 2}),
    "rq": (RQ, {"width": 16, "depth": 2, "heads": 2, "codebook_depth": 1}),
    "maskgit": (MaskGIT, {"width": 16, "depth": 2, "heads": 2}),
    "maskgit-embedding": (MaskGIT, {"width": 16, "depth": 2, "heads": 2, "inputs": "embedding"}),
    "uniform": (Uniform, {}),
    "unigram": (Unigram, {}),
    "bigram": (Bigram, {}),
    "diffusion": (Diffusion, {"width": 16, "depth": 2, "heads": 2}),
}

BOOKS = {
    "rq": 2,
    "uniform": 2,
    "unigram": 2,
    "bigram": 2,
}  # codebooks of the tokenizer, where not one

UNLABELLED = ("uniform", "unigram", "bigram")  # priors that know no classes

FORGETFUL = ("uniform", "unigram")  # to whom the codes before are all the same


def make_prior(
    name: str, K: int = 5, grid: tuple[int, int] = (2, 3), classes: int = 0, **settings: Any
) -> PriorModel:
    """A prior in eval mode that is not uniform: what starts at zero, where every test would pass, does not here."""
    build, usual = PRIORS[name]
    model = build(
        torch.randn(BOOKS.get(name, 1), K, DIM), grid, classes=classes, **{**usual, **settings}
    )
    return stirred(model).eval()


def stirred(model: PriorModel) -> PriorModel:
    """The model with random numbers for those parameters that start at zero; one that counts has counted random codes."""
    if isinstance(model, Counted):  # in order, so that a code tells of the next
        model.count(*torch.randint(model.K, (2, 200, model.L)).sort(2).values.numpy())
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.5)
    return model


def every_grid(model: PriorModel) -> torch.Tensor:
    """All sequences of codes (K^L, L) that there are."""
    return torch.cartesian_prod(*[torch.arange(model.K)] * model.L)


@torch.no_grad()
def likelihoods(
    model: PriorModel, codes: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """p(codes | label) (n,) float64, of a prior that tells it exactly."""
    prediction = model.judge(codes, labels)
    logp = prediction.logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    return logp.sum(1).exp()


def looks(model: Masked) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The codes and the mask of each run of the network from now on, as they are then."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    model.register_forward_pre_hook(
        lambda _, arguments: seen.append((arguments[0].clone(), arguments[1].clone()))
    )
    return seen


def exact_bound(model: Masked, codes: torch.Tensor) -> torch.Tensor:
    """Nats a token (B,): over m = 1 ... L and all sets of m codes the mean of the mean -log p of the set."""
    found = torch.zeros(len(codes), dtype=torch.float64)
    for m in range(1, model.L + 1):
        sets = [
            {i for i, inside in enumerate(choice) if inside}
            for choice in product([0, 1], repeat=model.L)
            if sum(choice) == m
        ]
        for hidden in sets:
            found -= logp(model, codes, hidden)[:, sorted(hidden)].mean(1) / len(sets) / model.L
    return found


WIDTH, HEADS, STEP_GRID = 32, 2, (3, 4)


def make_blocks() -> nn.ModuleList:
    blocks = nn.ModuleList(Block(WIDTH, HEADS, dropout=0.5) for _ in range(3)).eval()
    for name, p in blocks.named_parameters():
        nn.init.normal_(p, 1.0 if "norm" in name else 0.0, 0.3)  # the norms' own scales must count
    return blocks


def run_at_once(stack: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in stack:
        x = block(x, rotary_directions(rotary(STEP_GRID, WIDTH // HEADS)))
    return x


@torch.no_grad()
def logp(model: Masked, codes: torch.Tensor, hidden: set[int]) -> torch.Tensor:
    """log p (B, L) of each code given those that are not hidden."""
    where = torch.tensor([[i in hidden for i in range(model.L)]]).expand(codes.shape)
    return model(codes, where).double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
