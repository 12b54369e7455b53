"""What every prior is: a distribution over grids of codes that can be trained, evaluated and sampled."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_range
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler, guided
from prior.models.inputs import CodeEmbedding
from prior.models.transformer import Block

MAX_DRAWN = 2**24  # logits that are drawn from at a time

# Takes the previous codes (n,), None at the first call, and returns the logits (n, K) of the next ones.
StepDecoder = Callable[[Tensor | None], Tensor]


@dataclass
class Prediction:
    """logits (B, L, K) for the codes `targets` (B, L), and their `weights` (B, L), 0 for codes that the prior could read.

    The mean over L of weights * -log p(target) is the nats per token that count.
    """

    logits: Tensor
    targets: Tensor
    weights: Tensor


class PriorModel(nn.Module, ABC):
    """A distribution p(codes | label) over the grids (h, w) of a tokenizer with `num_codebooks` codebooks of K codes.

    Codes are flat, (B, L) int64 in [0, K), L = h * w * num_codebooks: positions in raster order, and at each position one
    code per codebook. labels (B,) are in [0, classes), or -1 for no class; a prior without classes takes None.
    """

    stepwise = False  # whether samples are drawn by steps that sampler.compile can compile
    exact = True  # whether `judge` returns the likelihood itself; otherwise it returns a bound

    def __init__(self, codebook: Tensor, grid: tuple[int, int], classes: int = 0) -> None:
        """codebook (num_codebooks, K, dim): the vectors that the tokenizer decodes its codes from."""
        super().__init__()
        self.num_codebooks, self.K = codebook.shape[:2]
        self.grid = (grid[0], grid[1])  # a tuple, even if a checkpoint's config gives a ListConfig
        self.classes = classes
        self.T = grid[0] * grid[1]
        self.L = self.T * self.num_codebooks

    @property
    def ends(self) -> list[nn.Module]:
        """The layers that read codes, and the `head` that predicts them if the prior has one."""
        ends: list[nn.Module] = [p for p in self.modules() if isinstance(p, CodeEmbedding)]
        head = getattr(self, "head", None)
        return ends if head is None else [*ends, head]

    @property
    def recomputed(self) -> list[nn.Module]:
        """The parts whose activations the backward pass may compute again: the transformer blocks, if it has any."""
        return [part for part in self.modules() if isinstance(part, Block)]

    @abstractmethod
    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        """The prediction that an update minimises the loss of, at `progress` in [0, 1] of the run."""

    @abstractmethod
    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        """The prediction that a validation scores.

        Its nats are -log p(codes | label), or, if the prior is not `exact`, an unbiased estimate of an upper bound on it.
        Deterministic: the same codes always get the same prediction.
        """

    def redraw(
        self, codes: Tensor, labels: Tensor | None, uniform: Tensor, sampler: Sampler
    ) -> Tensor:
        """Each of the codes (n, L) drawn anew in one pass, by its number of `uniform` (n, L), given those of `codes` that the
        prior reads when it predicts it."""
        return draw_all_codes(self.judge(codes, labels).logits, uniform, sampler)

    @abstractmethod
    def fill(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Return the codes (n, L) with all that are not `known` (L,) redrawn by the random `numbers` of these n samples.

        `cache` holds the compiled steps of a `stepwise` prior and is passed where sampler.compile is on; others ignore it.
        """


class Autoregressive(PriorModel):
    """p(codes) = product over t of p(code_t | codes before t) (VQGAN, Esser et al. 2021, eq. 8).

    In training, a share `token_dropout` of the codes that the model reads is replaced by random codes, against
    over-fitting (1 - pkeep in VQGAN's released code).
    """

    def __init__(
        self, codebook: Tensor, grid: tuple[int, int], classes: int = 0, token_dropout: float = 0.0
    ) -> None:
        super().__init__(codebook, grid, classes)
        check_range("prior.token_dropout", token_dropout, 0, 1)
        self.token_dropout = token_dropout

    @abstractmethod
    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """codes (B, L), labels (B,) -> logits (B, L, K) float32; those at t depend on the label and the codes before t only."""

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        """A function that draws n samples code by code: it takes the previous codes and returns the logits of the next.

        This one runs the whole prior at every call; most priors override it with one that caches.
        """
        return UncachedDecoder(self, n, labels)

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        return predict_all(self(self.replace_codes(codes), labels), codes)

    def replace_codes(self, codes: Tensor) -> Tensor:
        """The codes as the model reads them in training, a share `token_dropout` of them random."""
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
        cache: StepCache | None = None,
    ) -> Tensor:
        if sampler.steps:
            raise InputError(
                f"sampler.steps={sampler.steps} is for priors that draw many codes in one step; this prior draws one code "
                "at a time, use sampler.steps=0"
            )
        codes = codes.clone()
        uniform = numbers.uniform(self.L)
        is_known = known.tolist()
        last = max((t for t in range(self.L) if not is_known[t]), default=-1)
        doubled, guide = double_for_guidance(labels, sampler)
        decode = self.decoder(len(codes) * (1 + guide), doubled, cache)
        for t in range(last + 1):
            before = codes[:, t - 1] if t else None
            logits = decode(before.repeat(2) if guide and before is not None else before)
            if is_known[t]:
                continue
            if guide:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, sampler.scale(t / self.L))
            codes[:, t] = sampler.draw(logits, uniform[:, t])
        return codes


class UncachedDecoder:
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
    """The codebook (1, K, dim) itself, for a prior that learns one code per position; raises InputError for several."""
    if len(codebook) > 1:
        raise InputError(
            f"the tokenizer describes each position by {len(codebook)} codes, and this prior learns one per position; "
            "use prior=rq"
        )
    return codebook


def draw_all_codes(logits: Tensor, uniform: Tensor, sampler: Sampler) -> Tensor:
    """Codes (n, L) from logits (n, L, K) and numbers (n, L) in [0, 1), at most MAX_DRAWN logits at a time."""
    rows = max(1, MAX_DRAWN // logits.shape[-1])
    parts = zip(logits.flatten(0, 1).split(rows), uniform.flatten().split(rows), strict=True)
    return torch.cat([sampler.draw(*part) for part in parts]).view_as(uniform)


def predict_all(logits: Tensor, codes: Tensor) -> Prediction:
    """The prediction of all codes, each with weight 1."""
    return Prediction(logits, codes, torch.ones(codes.shape, device=codes.device))


def double_for_guidance(labels: Tensor | None, sampler: Sampler) -> tuple[Tensor | None, bool]:
    """The labels to draw by, and whether guidance is on.

    With guidance every sample is there twice: the labels (2n,) are those passed, then n times -1.
    """
    if labels is None or sampler.guidance == 1:
        return labels, False
    return torch.cat([labels, torch.full_like(labels, -1)]), True
