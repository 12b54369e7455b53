"""What every prior is: a distribution over grids of codes that can be trained, evaluated and sampled."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_range
from codegrid.engine.precision import default_float64
from prior.decoding.kv_decoder import StepCache
from prior.decoding.sampling import Numbers, Sampler, guided
from prior.heads.base import LOGITS, Head
from prior.models.front import Front, scaled_rotary
from prior.models.inputs import CodeEmbedding, LabelEmbedding, blank_like
from prior.models.transformer import Block
from prior.orders import windows
from vqgan.tokenizer import Tokenizer

MAX_DRAWN = 2**24  # logits that are drawn from at a time

# Takes the previous codes (n,), None at the first call, and returns the logits (n, K) of the next ones.
StepDecoder = Callable[[Tensor | None], Tensor]

# Yields the logits (n, m, K) of the next m codes, is sent these codes (n, m), and yields the next ones.
Predictions = Generator[Tensor, Tensor, None]

# Takes the logits (n, K) at position t, and t, and returns codes (n,).
Draw = Callable[[Tensor, int], Tensor]


@dataclass
class Prediction:
    """What the `head` reads, `features` (B, L, width), for the codes `targets` (B, L), and their `weights` (B, L), 0 for codes
    that the prior could read.

    A prior without a head has the logits (B, L, K) themselves as features. The mean over L of weights * -log p(target) is
    the nats per token that count.
    """

    features: Tensor
    targets: Tensor
    weights: Tensor
    head: Head = LOGITS

    @property
    def logits(self) -> Tensor:
        """Logits of all codes (B, L, K), which are much more than their likelihood needs where K is large."""
        return self.head.logits(self.features)


class PriorModel(nn.Module, ABC):
    """A distribution p(codes | label) over the grids (h, w) of a tokenizer with `num_codebooks` codebooks of K codes.

    Codes are flat, (B, L) int64 in [0, K), L = h * w * num_codebooks: positions in raster order, and at each position one
    code per codebook.

    A label is what the prior is conditioned on for one image. labels are

    (B,) int64           in [0, classes), -1 for no class
    (B, size) float32    after `read_vectors`: vectors of numbers, NaN for what is missing, all NaN for no vector
    (B, front.L) int64   after `read_front`: the codes of another image, all -1 for none
    None                 none at all, as for a prior that is conditioned on nothing
    """

    takes_front = False  # whether codes of another image can stand in front of its own
    stepwise = False  # whether samples are drawn by steps that sampler.compile can compile
    exact = True  # whether `judge` returns the likelihood itself; otherwise it returns a bound
    any_order = False  # whether sampler.order, corrector and remask apply

    def __init__(self, codebook: Tensor, grid: tuple[int, int], classes: int = 0) -> None:
        """codebook (num_codebooks, K, dim): the vectors that the tokenizer decodes its codes from."""
        super().__init__()
        self.num_codebooks, self.K = codebook.shape[:2]
        self.grid = (grid[0], grid[1])  # a tuple, even if a checkpoint's config gives a ListConfig
        self.classes = classes
        self.T = grid[0] * grid[1]
        self.L = self.T * self.num_codebooks
        self.vector_size = 0  # numbers of a label that is a vector
        self.front: Front | None = None

    @property
    def is_conditional(self) -> bool:
        """Whether it takes labels."""
        return bool(self.classes or self.vector_size) or self.front is not None

    def read_vectors(self, mean: Tensor, deviation: Tensor) -> None:
        """Learn p(codes | vector) from now on; mean and deviation (size,) are those of the training vectors.

        Raises InputError for a prior that reads no labels.
        """
        for embedding in self._label_embeddings():
            embedding.read_vectors(mean, deviation)
        self.vector_size = len(mean)

    def read_front(self, codebook: Tensor, grid: tuple[int, int]) -> None:
        """Learn p(codes | codes of another image) from now on; codebook (num_codebooks, K, dim) and grid of its tokenizer.

        Raises InputError for a prior that has no place for them.
        """
        if not self.takes_front:
            raise InputError(
                f"{type(self).__name__} can't read the codes of another image; use prior=gpt, rar, rq, maskgit, diffusion, lstm or "
                "pixelcnn"
            )
        for embedding in self._label_embeddings():
            embedding.ignore_labels()
        own = next(part for part in self.modules() if isinstance(part, CodeEmbedding))
        angles = self._make_front_angles(grid)
        self.front = Front(codebook, (grid[0], grid[1]), own.width, own.inputs, angles)

    def _make_front_angles(self, grid: tuple[int, int]) -> Tensor:
        own = next(part for part in self.modules() if isinstance(part, CodeEmbedding))
        block = next((part for part in self.modules() if isinstance(part, Block)), None)
        return scaled_rotary(grid, self.grid, own.width // block.heads if block else 0)

    def double(self) -> Self:
        """The same function in float64, in place: what the settings alone determine is computed again."""
        super().double()
        with default_float64():
            self.derive_buffers()
        return self

    def derive_buffers(self) -> None:
        """Compute the buffers that follow from the settings, and are in no checkpoint, in torch's default type."""
        if self.front is not None:
            device = self.front.angles.device
            self.front.angles = self._make_front_angles(self.front.grid).to(device)

    def _label_embeddings(self) -> list[LabelEmbedding]:
        embeddings = [part for part in self.modules() if isinstance(part, LabelEmbedding)]
        if not embeddings:
            raise InputError(
                f"{type(self).__name__} can't be conditioned on anything; leave condition out, or use prior=gpt"
            )
        return embeddings

    def blank_labels(self, n: int) -> Tensor | None:
        """n labels that say nothing, on the CPU; None for a prior that takes none."""
        if self.vector_size:
            return torch.full((n, self.vector_size), torch.nan)
        if self.front is not None:
            return torch.full((n, self.front.L), -1)
        return torch.full((n,), -1) if self.classes else None

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """Rows, columns and codebooks of the codes that `flatten` makes L of."""
        return self.shape_on(self.grid)

    def shape_on(self, grid: tuple[int, int]) -> tuple[int, int, int]:
        """The same for images of another grid."""
        return (*grid, self.num_codebooks)

    def map_nats(self, nats: Tensor) -> Tensor:
        """A value for each code (..., L) -> its mean over the codes of each place, (..., h, w)."""
        return nats.unflatten(-1, self.code_shape).mean(-1)

    @property
    def ends(self) -> list[nn.Module]:
        """The layers that read codes, and the `head` that predicts them if the prior has one."""
        ends: list[nn.Module] = [p for p in self.modules() if isinstance(p, CodeEmbedding)]
        head = getattr(self, "head", None)
        return ends if head is None else [*ends, head]

    @property
    def parallel(self) -> bool:
        """Whether sampler.parallel can draw many positions in one pass."""
        return False

    @property
    def has_features(self) -> bool:
        """Whether the class has `features` of its own, for its `readout`; otherwise it has logits alone."""
        features = getattr(type(self), "features", None)
        return features not in (None, Autoregressive.features)

    @property
    def readout(self) -> Head:
        """What turns the prior's features into the distribution of codes; `LOGITS` if they are logits."""
        return LOGITS

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

    def predict_in_turn(self, n: int, labels: Tensor | None) -> Predictions:
        """The logits of n grids of codes whose codes are sent as they become known, so that nothing else can be read.

        Parts of codes come in the order of the flat codes, and their -log p add up to the nats of `judge`. Raises InputError for a
        prior without a likelihood that can be computed so.
        """
        raise InputError(
            f"{type(self).__name__} has no likelihood that is exact and computed part by part, so it can't code files; use a "
            "prior that has: gpt, rar, rq, var, lstm, pixelcnn, bigram, unigram or uniform"
        )

    def redraw(
        self, codes: Tensor, labels: Tensor | None, uniform: Tensor, sampler: Sampler
    ) -> Tensor:
        """Each of the codes (n, L) drawn anew in one pass, by its number of `uniform` (n, L), given those of `codes` that the
        prior reads when it predicts it."""
        return draw_all_codes(self.judge(codes, labels), uniform, sampler, self.K)

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

        `cache` has what the batches and windows of one `generate` share: packed weights and memory, the compiled steps of a
        `stepwise` prior, the count of passes, and who watches what is drawn. Others ignore it.
        """

    def fill_grid(
        self,
        codes: Tensor,
        known: Tensor,
        numbers: Numbers,
        sampler: Sampler,
        labels: Tensor | None,
        cache: StepCache | None = None,
    ) -> Tensor:
        """Return the codes (n, *shape_on(grid)) with those of all places that are not `known` (*grid) redrawn, as `fill` does.

        A grid larger than the prior's own is drawn window by window, each conditioned on the codes already in it (VQGAN, Esser et
        al. 2021, section 3.3, in strides of half a window instead of one code).
        """
        codes, known = codes.clone(), known.clone()
        grid = (known.shape[0], known.shape[1])
        for rows, columns in windows(grid, self.grid):
            window = codes[:, rows, columns]
            fixed = known[rows, columns].flatten().repeat_interleave(self.num_codebooks)
            filled = self.fill(window.flatten(1), fixed, numbers, sampler, labels, cache)
            codes[:, rows, columns] = filled.view_as(window)
            known[rows, columns] = True
        return codes


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
        """codes (B, L), labels (B, ...) -> logits (B, L, K) float32; those at t depend on the label and the codes before t only."""

    def features(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        """As `forward`, (B, L, width) for the prior's `readout`: the logits, if it has no head."""
        logits: Tensor = self(codes, labels)
        return logits

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        """A function that draws n samples code by code: it takes the previous codes and returns the logits of the next.

        This one runs the whole prior at every call; most priors override it with one that caches.
        """
        return UncachedDecoder(self, n, labels)

    def feature_decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        """As `decoder`, with the features (n, width) for a `readout` that draws without logits."""
        return self.decoder(n, labels, cache)

    def predict_in_turn(self, n: int, labels: Tensor | None) -> Predictions:
        decode = self.decoder(n, labels)
        before: Tensor | None = None
        for _ in range(self.L):
            before = (yield decode(before)[:, None])[:, 0]

    def learn(self, codes: Tensor, labels: Tensor | None, progress: float) -> Prediction:
        return predict_all(self.features(self.replace_codes(codes), labels), codes, self.readout)

    def replace_codes(self, codes: Tensor) -> Tensor:
        """The codes as the model reads them in training, a share `token_dropout` of them random."""
        return replace_randomly(codes, self.K, self.token_dropout)

    def judge(self, codes: Tensor, labels: Tensor | None) -> Prediction:
        return predict_all(self.features(codes, labels), codes, self.readout)

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
        is_known = known.tolist()
        last = max((t for t in range(self.L) if not is_known[t]), default=-1)
        doubled, guide = double_for_guidance(labels, sampler)
        draws_directly = not guide and self.readout.draws_directly(sampler)
        draw = self.start_draws(numbers, sampler, draws_directly)
        make_decoder = self.feature_decoder if draws_directly else self.decoder
        decode = make_decoder(len(codes) * (1 + guide), doubled, cache)
        for t in range(last + 1):
            before = codes[:, t - 1] if t else None
            logits = decode(before.repeat(2) if guide and before is not None else before)
            if is_known[t]:
                continue
            if guide:
                conditional, unconditional = logits.chunk(2)
                logits = guided(conditional, unconditional, sampler.scale(t / self.L))
            codes[:, t] = draw(logits, t)
            if cache is not None and cache.watch is not None:
                cache.watch(torch.tensor([t]), codes[:, t : t + 1])
        if cache is not None:
            cache.passes += len(codes) * (last + 1)
        return codes

    def start_draws(self, numbers: Numbers, sampler: Sampler, directly: bool) -> Draw:
        """How the codes of one `fill` are drawn from their logits, or `directly` from the features of `feature_decoder`."""
        uniform, readout = numbers.uniform(self.L), self.readout
        if directly:
            return lambda features, t: readout.draw(features, uniform[:, t])
        return lambda logits, t: readout.draw_from_logits(logits, uniform[:, t], sampler)


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


def replace_randomly(codes: Tensor, K: int, share: float) -> Tensor:
    """Codes of which a share is replaced by random ones."""
    if not share:
        return codes
    lost = torch.rand(codes.shape, device=codes.device) < share
    return torch.where(lost, torch.randint_like(codes, K), codes)


def describe_codes(settings: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """What a prior with the `prior` group `settings` takes from its tokenizer: codebook, grid, and scales if it has that setting.

    Raises InputError if the codes are none that it can learn.
    """
    space, quantizer = tokenizer.code_space, tokenizer.quantizer
    scales = getattr(quantizer, "scales", None)
    if "scales" in settings:
        if scales is None:
            raise InputError(
                "prior=var predicts codes scale by scale, and this tokenizer's have one grid; train one with quantizer=multiscale, "
                "or use prior=gpt"
            )
        return {**space, "grid": tokenizer.grid, "scales": scales}
    if scales is not None and len(space["codebook"]) > 1:
        raise InputError(
            "quantizer.shared=false gives each scale codes of its own, which only prior=var tells apart; use prior=var"
        )
    return space


def single_codebook(codebook: Tensor) -> Tensor:
    """The codebook (1, K, dim) itself, for a prior that learns one code per position; raises InputError for several."""
    if len(codebook) > 1:
        raise InputError(
            f"the tokenizer describes each position by {len(codebook)} codes, and this prior learns one per position; "
            "use prior=rq"
        )
    return codebook


def draw_all_codes(prediction: Prediction, uniform: Tensor, sampler: Sampler, K: int) -> Tensor:
    """Codes (n, L) for a prediction of all of them and numbers (n, L) in [0, 1), at most about MAX_DRAWN logits at a time."""
    head = prediction.head
    samples = max(1, MAX_DRAWN // (uniform.shape[1] * K))
    drawn = []
    for features, own in zip(
        prediction.features.split(samples), uniform.split(samples), strict=True
    ):
        if head.draws_directly(sampler):
            drawn.append(head.draw(features.flatten(0, 1), own.flatten()).view_as(own))
        else:
            logits = head.logits(features).flatten(0, 1)
            drawn.append(head.draw_from_logits(logits, own.flatten(), sampler).view_as(own))
    return torch.cat(drawn)


def predict_all(features: Tensor, codes: Tensor, head: Head = LOGITS) -> Prediction:
    """The prediction of all codes, each with weight 1, from what the head reads."""
    return Prediction(features, codes, torch.ones(codes.shape, device=codes.device), head)


def double_for_guidance(labels: Tensor | None, sampler: Sampler) -> tuple[Tensor | None, bool]:
    """The labels to draw by, and whether guidance is on.

    With guidance every sample is there twice: the labels (2n, ...) are those passed, then n that say nothing.
    """
    if labels is None or sampler.guidance == 1:
        return labels, False
    return torch.cat([labels, blank_like(labels)]), True
