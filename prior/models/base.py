"""What every prior is: a distribution over grids of codes that can be learned, judged and drawn from."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import InputError, check_range
from prior.decoding.sampling import Numbers, Sampler, guided

StepDecoder = Callable[
    [Tensor | None], Tensor
]  # the code before (n,), None at the beginning -> the logits (n, K) of the next


@dataclass
class Prediction:
    """logits (B, L, K) for the codes `targets` (B, L), and `weights` (B, L), 0 for a code that was given.

    The mean over L of weights * -log p(target) is the nats per token that count.
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor


class PriorModel(nn.Module, ABC):
    """A distribution p(codes | label) over the grids (h, w) of a tokenizer with `num_codebooks` codebooks of K codes.

    Codes come flat, (B, L) int64 in [0, K): the positions in raster order, at each position its codes, L = h * w * num_codebooks.
    labels (B,) are in [0, classes), or -1 for none in particular; of a prior without classes they are None.
    """

    stepwise = False  # whether what draws is made of `steps`, which can be compiled
    kept: dict[nn.Module, Any] | None = None  # the compiled steps, while samples are drawn by such
    exact = True  # whether what `judge` finds is the likelihood itself; else it is a bound on it

    def __init__(self, codebook: Tensor, grid: tuple[int, int], classes: int = 0) -> None:
        """codebook (num_codebooks, K, dim): the vectors that the tokenizer decodes its codes from."""
        super().__init__()
        self.num_codebooks, self.K = codebook.shape[:2]
        self.grid, self.classes = (
            (grid[0], grid[1]),
            classes,
        )  # of a checkpoint it comes as a list of OmegaConf's
        self.T = grid[0] * grid[1]
        self.L = self.T * self.num_codebooks

    @abstractmethod
    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """What an update learns from, `progress` of the run being over."""

    @abstractmethod
    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        """What the prior is judged by: its nats are -log p(codes | label), or where it is not `exact` an unbiased estimate
        of a bound on that from above. The same codes are always judged alike."""

    @abstractmethod
    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> Tensor:
        """The codes (n, L), but for those `known` (L,) drawn anew; numbers are those of these n samples."""


class Autoregressive(PriorModel):
    """p(codes) = product over t of p(code_t | those before) (VQGAN, Esser et al. 2021, eq. 8).

    In training the share `token_dropout` of the codes that are read is replaced by any code, against over-fitting (the
    pkeep of VQGAN's released code is one minus it).
    """

    def __init__(
        self, codebook: Tensor, grid: tuple[int, int], classes: int = 0, token_dropout: float = 0.0
    ) -> None:
        super().__init__(codebook, grid, classes)
        check_range("prior.token_dropout", token_dropout, 0, 1)
        self.token_dropout = token_dropout

    @abstractmethod
    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), labels (B,) -> logits (B, L, K) float32; those at t see the label and the codes before t alone."""

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        """What draws n samples code by code: called with each code it gives the logits of the next. This one computes all
        anew each time; most priors have one that remembers."""
        return Uncached(self, n, labels)

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        return predict_all(self(self.reread(codes), labels), codes)

    def reread(self, codes: Tensor) -> Tensor:
        """The codes as they are read in training: some are replaced."""
        if not self.token_dropout:
            return codes
        lost = torch.rand(codes.shape, device=codes.device) < self.token_dropout
        return torch.where(lost, torch.randint_like(codes, self.K), codes)

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        return predict_all(self(codes, labels), codes)

    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
    ) -> Tensor:
        if sampler.steps:
            raise InputError(
                f"sampler.steps={sampler.steps} is for priors that draw many codes at once; this one draws each alone"
            )
        uniform, codes, told = numbers.uniform(self.L), codes.clone(), known.tolist()
        both, guide = double_for_guidance(labels, sampler)
        decode = self.decoder(len(codes) * (1 + guide), both)
        for t in range(
            self.L - told[::-1].index(False) if False in told else 0
        ):  # nothing is drawn beyond the last unknown
            before = codes[:, t - 1] if t else None
            logits = decode(before.repeat(2) if guide and before is not None else before)
            if not told[t]:
                if guide:
                    given, free = logits.chunk(2)
                    logits = guided(given, free, sampler.scale(t / self.L))
                codes[:, t] = sampler.draw(logits, uniform[:, t])
        return codes


class Uncached:
    """A decoder that runs the whole prior for every code."""

    def __init__(self, model: Autoregressive, n: int, labels: Tensor | None) -> None:
        self.model, self.labels, self.t = model, labels, 0
        self.codes = torch.zeros(n, model.L, dtype=torch.int64, device=next(model.buffers()).device)

    def __call__(self, before: Tensor | None) -> Tensor:
        if before is not None:
            self.codes[:, self.t] = before
            self.t += 1
        logits: Tensor = self.model(self.codes, self.labels)[:, self.t]
        return logits


def single_codebook(codebook: Tensor) -> Tensor:
    """codebook (1, K, dim), for a prior that learns one code a position."""
    if len(codebook) > 1:
        raise InputError(
            f"the tokenizer tells each position by {len(codebook)} codes, and this prior learns one a position; use prior=rq"
        )
    return codebook


def predict_all(logits: Tensor, codes: Tensor) -> Prediction:
    """The prediction of every code, all of which count."""
    return Prediction(logits, codes, torch.ones(codes.shape, device=codes.device))


def double_for_guidance(labels: Tensor | None, sampler: Sampler) -> tuple[Tensor | None, bool]:
    """The labels to draw by, and whether there is guidance: each sample is there twice then, with its label and without."""
    if labels is None or sampler.guidance == 1:
        return labels, False
    return torch.cat([labels, torch.full_like(labels, -1)]), True
