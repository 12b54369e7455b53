"""Every prior, small, for the tests that all must pass."""

from collections.abc import Callable
from typing import Any

import torch

from prior.models.base import Model
from prior.models.bigram import Bigram
from prior.models.counted import Counted
from prior.models.diffusion import Diffusion
from prior.models.gpt import GPT
from prior.models.lstm import LSTM
from prior.models.maskgit import MaskGIT
from prior.models.pixelcnn import PixelCNN
from prior.models.rar import RAR
from prior.models.rq import RQ
from prior.models.uniform import Uniform
from prior.models.unigram import Unigram

DIM = 4
PRIORS: dict[str, tuple[Callable[..., Model], dict[str, Any]]] = {  # what builds it, small, and its settings
    "gpt": (GPT, {"width": 16, "depth": 2, "heads": 2}),
    "gpt-embedding": (GPT, {"width": 16, "depth": 2, "heads": 2, "inputs": "embedding"}),
    "pixelcnn": (PixelCNN, {"width": 8, "depth": 2, "kernel": 3}),
    "pixelcnn-embedding": (PixelCNN, {"width": 8, "depth": 2, "kernel": 5, "inputs": "embedding"}),
    "lstm": (LSTM, {"width": 16, "depth": 2}),
    "lstm-embedding": (LSTM, {"width": 16, "depth": 1, "inputs": "embedding"}),
    "rar": (RAR, {"width": 16, "depth": 2, "heads": 2}),
    "rq": (RQ, {"width": 16, "depth": 2, "heads": 2, "book_depth": 1}),
    "maskgit": (MaskGIT, {"width": 16, "depth": 2, "heads": 2}),
    "maskgit-embedding": (MaskGIT, {"width": 16, "depth": 2, "heads": 2, "inputs": "embedding"}),
    "uniform": (Uniform, {}),
    "unigram": (Unigram, {}),
    "bigram": (Bigram, {}),
    "diffusion": (Diffusion, {"width": 16, "depth": 2, "heads": 2}),
}
BOOKS = {"rq": 2, "uniform": 2, "unigram": 2, "bigram": 2}  # codebooks of the tokenizer, where not one
UNLABELLED = ("uniform", "unigram", "bigram")  # priors that know no classes
FORGETFUL = ("uniform", "unigram")  # to whom the codes before are all the same


def made(name: str, K: int = 5, grid: tuple[int, int] = (2, 3), classes: int = 0, **settings: Any) -> Model:
    """A prior in eval mode that is not uniform: what starts at zero, where every test would pass, does not here."""
    build, usual = PRIORS[name]
    model = build(torch.randn(BOOKS.get(name, 1), K, DIM), grid, classes=classes, **{**usual, **settings})
    return stirred(model).eval()


def stirred(model: Model) -> Model:
    """The model with random numbers for those parameters that start at zero; one that counts has counted random codes."""
    if isinstance(model, Counted):  # in order, so that a code tells of the next
        model.count(*torch.randint(model.K, (2, 200, model.L)).sort(2).values.numpy())
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.5)
    return model


def every_grid(model: Model) -> torch.Tensor:
    """All sequences of codes (K^L, L) that there are."""
    return torch.cartesian_prod(*[torch.arange(model.K)] * model.L)


@torch.no_grad()
def likelihoods(model: Model, codes: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
    """p(codes | label) (n,) float64, of a prior that tells it exactly."""
    prediction = model.judge(codes, labels)
    logp = prediction.logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    return logp.sum(1).exp()
