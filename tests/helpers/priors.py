"""A small instance of every prior, for the tests that all priors must pass."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from codegrid.engine.sizes import SizeSetting
from prior.decoding.sampling import Numbers
from prior.heads.base import Head
from prior.heads.bits import Bits
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
from prior.models.var import VAR
from tests.helpers.configs import ROOT
from tests.helpers.parts import make
from vqgan.quantizers.scales import Scales

DIM = 4


def make_head(kind: type[Head], width: int, vectors: torch.Tensor) -> Head:
    """A small head, with conf/'s values for what is not small."""
    return make(kind, width, vectors, **({"hidden": 64} if issubclass(kind, Bits) else {}))


TRANSFORMER = {"width": 16, "depth": 2, "heads": 2}


@dataclass
class Case:
    """A prior under test: its class, the settings that differ from conf/'s, and what it can do."""

    kind: type[PriorModel]
    settings: dict[str, Any] = field(default_factory=dict)
    num_codebooks: int = 1
    has_labels: bool = True
    reads_codes: bool = True  # whether a code's distribution depends on the codes before it


PRIORS = {  # one line per prior, or more for variants; every file of conf/prior must have one
    "gpt": Case(GPT, TRANSFORMER),
    "gpt-embedding": Case(GPT, {**TRANSFORMER, "inputs": "embedding"}),
    "gpt-bits": Case(GPT, {**TRANSFORMER, "head": partial(make_head, Bits)}),
    "pixelcnn": Case(PixelCNN, {"width": 8, "depth": 2, "kernel": 3}),
    "pixelcnn-embedding": Case(
        PixelCNN, {"width": 8, "depth": 2, "kernel": 5, "inputs": "embedding"}
    ),
    "lstm": Case(LSTM, {"width": 16, "depth": 2}),
    "lstm-embedding": Case(LSTM, {"width": 16, "depth": 1, "inputs": "embedding"}),
    "rar": Case(RAR, TRANSFORMER),
    "rq": Case(RQ, {**TRANSFORMER, "codebook_depth": 1}, num_codebooks=2),
    "maskgit": Case(MaskGIT, TRANSFORMER),
    "maskgit-embedding": Case(MaskGIT, {**TRANSFORMER, "inputs": "embedding"}),
    "uniform": Case(Uniform, num_codebooks=2, has_labels=False, reads_codes=False),
    "unigram": Case(Unigram, num_codebooks=2, has_labels=False, reads_codes=False),
    "bigram": Case(Bigram, num_codebooks=2, has_labels=False),
    "diffusion": Case(Diffusion, TRANSFORMER),
    "var": Case(VAR, TRANSFORMER),
}

BOOKS = {name: case.num_codebooks for name, case in PRIORS.items() if case.num_codebooks > 1}

UNLABELLED = [name for name, case in PRIORS.items() if not case.has_labels]


def documented_prior() -> Case:
    """The example in docs/extending/prior.md."""
    page = (ROOT / "docs/extending/prior.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(source, "docs/extending/prior.md", "exec"), namespace)
    return Case(namespace["NeuralBigram"], {"width": 16, "token_dropout": 0.0})


def build_prior(
    case: Case, K: int = 5, grid: tuple[int, int] = (2, 3), classes: int = 0, **settings: Any
) -> PriorModel:
    """The untrained prior, with conf/'s values for settings that neither the case nor the test passes."""
    codebook = torch.randn(case.num_codebooks, K, DIM)
    if case.kind is VAR:
        settings.setdefault("scales", make_scales(grid))
    return make_model(case.kind, codebook, grid, classes=classes, **{**case.settings, **settings})


def make_scales(grid: tuple[int, int], sizes: Sequence[SizeSetting] | None = None) -> Scales:
    """The scales of a tokenizer with this grid, with random convolutions."""
    scales = Scales(DIM, sizes, convolutions=2, strength=0.5)
    scales.bind(grid)
    with torch.no_grad():
        for p in scales.parameters():
            p += 0.1 * torch.randn_like(p)
    return scales.frozen()


def make_model(
    kind: type[PriorModel], codebook: torch.Tensor, grid: tuple[int, int], **settings: Any
) -> Any:
    """`make` for a prior. Classes without a file in conf/, such as the documentation's, get these settings only."""
    if kind.__module__.startswith("prior."):
        return make(kind, codebook, grid, **settings)
    return kind(codebook, grid, **settings)


def make_prior(name: str, **settings: Any) -> PriorModel:
    """A prior in eval mode with randomised weights, since weights that start at zero would let every test pass."""
    return randomised(build_prior(PRIORS[name], **settings)).eval()


VECTOR_SIZE, FRONT_GRID, FRONT_K = 3, (1, 2), 4
CONDITIONS = ("vectors", "codes", "two codebooks")  # of another image


def make_conditioned(name: str, kind: str, **settings: Any) -> PriorModel:
    """As make_prior, conditioned on vectors of numbers or on the codes of another image, with weights that pass them on."""
    model = build_prior(PRIORS[name], **settings)
    condition_on(model, kind)
    for part_name, part in model.named_modules():
        if isinstance(part, Block) or part_name in ("front", "map_front"):
            for p in part.parameters():
                p.data *= 10 if p.ndim > 1 else 1
    return randomised(model).eval()


def condition_on(model: PriorModel, kind: str) -> None:
    if kind == "vectors":
        model.read_vectors(torch.tensor([0.0, 1.0, -1.0]), torch.tensor([1.0, 2.0, 1.0]))
    else:
        num_codebooks = 1 if kind == "codes" else 2
        model.read_front(torch.randn(num_codebooks, FRONT_K, DIM), FRONT_GRID)


def make_conditions(model: PriorModel, n: int, seed: int = 0) -> torch.Tensor:
    """n labels, all different from each other with a probability near 1; those of codes need not be."""
    generator = torch.Generator().manual_seed(seed)
    if model.front is None:
        return torch.randn(n, model.vector_size, generator=generator)
    return torch.randint(FRONT_K, (n, model.front.L), generator=generator)


class OneStream(Numbers):
    """One stream of random numbers for all samples, for tests whose many samples would take seconds with a stream each."""

    def __init__(
        self, seed: int, indices: Iterable[int], device: torch.device | str = "cpu"
    ) -> None:
        self.stream, self.n, self.device = np.random.default_rng(seed), len(list(indices)), device

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.stream.random((self.n, *shape))).to(self.device)

    def fork(self) -> list[np.random.Generator]:
        return [self.stream] * self.n


def draw_by_one_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prior.decoding.generate.Numbers", OneStream)


def randomised(model: PriorModel) -> PriorModel:
    """Randomise the parameters that start at zero; a counting prior counts random codes."""
    if isinstance(model, Counted):  # sorted, so that a code is informative about the next
        model.count(*torch.randint(model.K, (2, 200, model.L)).sort(2).values.numpy())
    with torch.no_grad():
        for p in model.parameters():
            if not p.any():
                torch.nn.init.normal_(p, std=0.5)
    return model


def every_grid(model: PriorModel) -> torch.Tensor:
    """All sequences of codes (K^L, L)."""
    return torch.cartesian_prod(*[torch.arange(model.K)] * model.L)


@torch.no_grad()
def likelihoods(
    model: PriorModel, codes: torch.Tensor, labels: torch.Tensor | None = None
) -> torch.Tensor:
    """p(codes | label) (n,) float64, of an exact prior."""
    prediction = model.judge(codes, labels)
    logp = prediction.logits.double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
    return logp.sum(1).exp()


def chi_square(codes: torch.Tensor, p: torch.Tensor, K: int) -> float:
    """How many standard deviations the counts of all grids are from those expected."""
    counts = (codes @ K ** torch.arange(codes.shape[1] - 1, -1, -1)).bincount(minlength=len(p))
    expected = len(codes) * p
    assert expected.min() > 5
    return float(((counts - expected).square() / expected).sum() - len(p) + 1) / (2 * len(p)) ** 0.5


def record_runs(model: Masked) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Record the codes and the mask of each pass through the network from now on in the returned list."""
    runs: list[tuple[torch.Tensor, torch.Tensor]] = []
    run = model.features

    def record(codes: torch.Tensor, masked: torch.Tensor, *labels: Any) -> torch.Tensor:
        runs.append((codes.clone(), masked.clone()))
        return run(codes, masked, *labels)

    model.features = record  # type: ignore[method-assign]
    return runs


def exact_bound(model: Masked, codes: torch.Tensor) -> torch.Tensor:
    """Nats per token (B,): the mean -log p of a set of m codes, averaged over all sets and over m = 1 ... L."""
    nats = torch.zeros(len(codes), dtype=torch.float64)
    for m in range(1, model.L + 1):
        sets = [
            {i for i, inside in enumerate(choice) if inside}
            for choice in product([0, 1], repeat=model.L)
            if sum(choice) == m
        ]
        for hidden in sets:
            nats -= logp(model, codes, hidden)[:, sorted(hidden)].mean(1) / len(sets) / model.L
    return nats


WIDTH, HEADS, STEP_GRID = 32, 2, (3, 4)


def make_blocks() -> nn.ModuleList:
    blocks = nn.ModuleList(Block(WIDTH, HEADS, dropout=0.5) for _ in range(3)).eval()
    for name, p in blocks.named_parameters():
        nn.init.normal_(
            p, 1.0 if "norm" in name else 0.0, 0.3
        )  # scales other than 1, so that the norms' scales matter
    return blocks


def run_at_once(stack: nn.ModuleList, x: torch.Tensor) -> torch.Tensor:
    for block in stack:
        x = block(x, rotary_directions(rotary(STEP_GRID, WIDTH // HEADS)))
    return x


@torch.no_grad()
def logp(model: Masked, codes: torch.Tensor, hidden: set[int]) -> torch.Tensor:
    """log p (B, L) of each code, conditioned on those that are not hidden."""
    where = torch.tensor([[i in hidden for i in range(model.L)]]).expand(codes.shape)
    return model(codes, where).double().log_softmax(-1).gather(-1, codes[..., None])[..., 0]
