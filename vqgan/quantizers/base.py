"""The contract of every bottleneck: encoder output in, `Quantized` out."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from codegrid.engine.clock import Mark
from codegrid.engine.collectives import broadcast
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import flatten

if TYPE_CHECKING:
    from codegrid.evaluation.codebook import CodebookUse

MAX_SCORES = 2**22  # distances that are held at a time


@dataclass
class Quantized:
    """The output of a bottleneck.

    z_e      (B, dim, h, w), the encoder output as it was compared with the codes
    z_q      (B, dim, h, w), the input of the decoder; its gradient reaches the encoder
    indices  int64 in [0, K), (B, h, w), or (B, h, w, num_codebooks) for several codebooks; None without codes
    loss     a scalar, the bottleneck's part of the training loss
    terms    the parts of the loss and other figures to log
    parts    the outputs of the inner bottlenecks, if the bottleneck consists of several
    """

    z_e: Tensor
    z_q: Tensor
    indices: Tensor | None
    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    parts: list["Quantized"] = field(default_factory=list)


def join_micro_batches(outputs: list[Quantized]) -> Quantized:
    """The outputs for the micro-batches of one update, joined as far as `Quantizer.update` reads them.

    If nested dropout skipped inner bottlenecks in some micro-batches, their parts hold the other micro-batches only.
    """
    if len(outputs) == 1:
        return outputs[0]
    z_e = torch.cat([q.z_e for q in outputs])
    z_q = torch.cat([q.z_q for q in outputs])
    indices = [q.indices for q in outputs if q.indices is not None]
    depth = max(len(q.parts) for q in outputs)
    parts = [
        join_micro_batches([q.parts[i] for q in outputs if len(q.parts) > i]) for i in range(depth)
    ]
    joined = torch.cat(indices) if indices else None
    return Quantized(z_e, z_q, joined, outputs[0].loss, parts=parts)


def check_begin(settings: Mapping[str, Any]) -> Mark:
    """The moment `from`, of which the settings consist, or 0 if there are none; a step or a fraction of the run.

    Raises TypeError for other settings, and InputError if it is no moment before the end of a run.
    """
    if unknown := settings.keys() - {"from"}:
        raise TypeError(f"a quantizer has no setting {', '.join(sorted(unknown))}")
    begin: Mark = settings.get("from", 0)
    is_number = isinstance(begin, int | float) and not isinstance(begin, bool)
    if not is_number or begin < 0 or (isinstance(begin, float) and not begin < 1):
        raise InputError(
            f"quantizer.from={begin} must be a step (whole) or a fraction of the run (with a point) from 0 to below 1"
        )
    return begin


def require_indices(q: Quantized) -> Tensor:
    """The indices of a bottleneck that has codes."""
    assert q.indices is not None
    return q.indices


NO_CODES_MESSAGE = (
    "this tokenizer is continuous (quantizer=none or kl) and has no codes; "
    "train one with quantizer=ema"
)


class Quantizer(nn.Module, ABC):
    """A bottleneck of width `dim`.

    K is the number of codes per codebook, None for a continuous bottleneck. `num_codebooks` is the number of codes per
    grid position, each from its own codebook. `in_dim` is the number of channels expected from the encoder.

    `forward` is pure. State changes only in `initialise` or `grow_from`, once before training (and `initialise` again where
    the codes come into use, if that is later), and in `update`, after each step.

    training_settings    those of its settings that say how its codes learn and not what they are; a run that starts with a
                         trained tokenizer may choose them anew
    nested               the share of training images that are decoded from a prefix of their codes
    prefixes             the numbers of leading codes, along the last axis of the indices, that `lookup` takes without those
                         behind them; each is a rate at which one tokenizer serves. Empty if it takes all codes only
    grows                whether it can take over a smaller codebook of its kind
    begin                when the codes come into use, the setting `from`: a step (int) or a fraction of the run (float); until
                         then the decoder sees what `bypass` returns
    is_gridded           whether indices are (B, h, w) or (B, h, w, num_codebooks), codes of places; otherwise see `code_shape`
    lengths              the numbers of codes in the parts of a row (B, 1, L), whose use is counted apart; empty for one part
    draws                random choices since the last update that several ranks make alike; checkpoints hold it, as frozen
                         codes have no updates
    """

    training_settings: tuple[str, ...] = ()
    nested: float = 0.0
    grows = False
    is_gridded = True
    draws = 0
    updates: Tensor
    _counted: tuple[Tensor, int, int] | None = None  # `updates`, its version, and what it held then

    def __init__(
        self,
        K: int | None,
        dim: int,
        num_codebooks: int = 1,
        in_dim: int | None = None,
        **when: Any,
    ) -> None:
        """`when` may have the setting `from`, a word that is no name of a parameter in Python."""
        super().__init__()
        if K is not None:
            check_int("quantizer.K", K, 2, "codes")
        self.begin = check_begin(when)
        check_int("quantizer.dim", dim, 1)
        self.K = K
        self.dim = dim
        self.num_codebooks = num_codebooks
        self.in_dim = in_dim or dim
        # Schedules of the bottleneck follow this count.
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._remember_updates(0)

    def bind(self, grid: Size | None) -> None:
        """Take the model's grid, once before anything else; None where codes have no places. Raises InputError for one that
        doesn't fit."""

    def code_shape(self, grid: Size) -> tuple[int, ...]:
        """The shape of the codes of a map z_e (dim, *grid)."""
        return (*grid, self.num_codebooks) if self.num_codebooks > 1 else grid

    @property
    def prefixes(self) -> Sequence[int]:
        """See the class."""
        return ()

    @property
    def lengths(self) -> list[int]:
        return []

    def make_code_use(self) -> "CodebookUse":
        """What counts how often the codes are used."""
        from codegrid.evaluation.codebook import CodebookUse  # which a model in use does without

        assert self.K is not None
        return CodebookUse(self.K, self.num_codebooks, self.lengths)

    @property
    def bits(self) -> float:
        """Bits per grid position: num_codebooks * log2(K); nan for a continuous bottleneck."""
        return self.num_codebooks * math.log2(self.K) if self.K else math.nan

    @property
    def num_updates(self) -> int:
        """`updates` as a number, for schedules. It waits for the device only where something else than `update` has set it, as
        a checkpoint does."""
        if (number := self._remembered_updates()) is None:
            number = int(self.updates)
            self._remember_updates(number)
        return number

    def _remember_updates(self, number: int) -> None:
        """Note on the host what `updates` holds on its device, and which version of it that is."""
        if not self.updates.is_inference():  # such a tensor counts no versions
            self._counted = self.updates, self.updates._version, number

    def _remembered_updates(self) -> int | None:
        """What `updates` holds; None if it has been set since that was noted."""
        if self._counted is None or self.updates.is_inference():
            return None
        buffer, version, number = self._counted
        return number if buffer is self.updates and version == buffer._version else None

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        """Move to another device with what is noted of `updates`."""
        number = self._remembered_updates()
        super()._apply(fn, recurse)
        if number is not None:
            self._remember_updates(number)
        return self

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose buffers count versions of their own: the number alone."""
        return {**self.__dict__, "_counted": self._remembered_updates()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        number = state.get("_counted")
        super().__setstate__({**state, "_counted": None})
        if number is not None:
            self._remember_updates(number)

    @abstractmethod
    def forward(self, z_e: Tensor) -> Quantized:
        """z_e (B, in_dim, h, w) -> z_q (B, dim, h, w), indices (B, h, w) or (B, h, w, num_codebooks)."""

    def bypass(self, z_e: Tensor) -> Quantized:
        """z_e (B, in_dim, h, w) as it is compared with the codes, in place of the codes, without indices or loss."""
        z = z_e.float()
        return Quantized(z, z, None, z.new_zeros(()))

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices from `forward` -> z_q (B, dim, h, w), in eval mode the same bits as `forward` returned.

        Raises InputError if the bottleneck is continuous.
        """
        raise InputError(NO_CODES_MESSAGE)

    def lookup_on(self, indices: Tensor, grid: Size) -> Tensor:
        """As `lookup`, for the codes of a map of any grid (h, w), which the shape of a row doesn't tell."""
        return self.lookup(indices)

    def restrict(self, indices: Tensor, known: Tensor) -> Tensor:
        """Codes of images of which only the places (h, w) bool are `known`, from the codes of the whole images."""
        return indices

    @torch.no_grad()
    def code_vectors(self) -> Tensor:
        """All code vectors, (num_codebooks, K, width of a codebook), on the device of the bottleneck.

        Raises InputError if the bottleneck is continuous.
        """
        if self.K is None:
            raise InputError(NO_CODES_MESSAGE)
        all_indices = torch.arange(self.K, device=self.updates.device)
        return self.lookup(all_indices[:, None, None])[None, :, :, 0, 0]

    def codebooks(self) -> Tensor:
        """The same on the CPU, as later stages take them."""
        return self.code_vectors().cpu()

    def compared(self, q: Quantized) -> Tensor:
        """What of an output of `forward` is compared with the code vectors, (B, dim, h, w): the nearest one is the code, or
        almost always. Its gradient reaches the encoder."""
        return q.z_e

    def list_codebooks(self) -> list["Quantizer"]:
        """The bottleneck of each codebook, in the order of the last axis of the indices; or of each of the `lengths` of a row."""
        return [self]

    def list_parts(self, q: Quantized) -> list[tuple["Quantizer", Quantized]]:
        """The bottlenecks of one codebook in an output of `forward`, each with its own output, in the order of the indices."""
        return [(self, q)]

    def replace(self, q: Quantized, indices: Tensor) -> Tensor:
        """The input of the decoder for other `indices`, of the shape of q.indices: what `lookup` returns, with the gradient of
        q.z_q (B, dim, h, w)."""
        return straight_through(q.z_q, self.lookup(indices).detach())

    @torch.no_grad()
    def draw_near(self, indices: Tensor, nearest: int) -> Tensor:
        """For each index (n,) of a single codebook another one, drawn from the `nearest` codes that lie closest to its own."""
        assert self.K is not None
        drawn = []
        for rows in indices.split(max(1, MAX_SCORES // self.K)):
            candidates = self.list_near(rows, nearest)
            chosen = torch.randint(candidates.shape[1], (len(rows), 1), device=rows.device)
            drawn.append(candidates.gather(1, chosen)[:, 0])
        return torch.cat(drawn)

    @float32
    @torch.no_grad()
    def list_near(self, indices: Tensor, nearest: int) -> Tensor:
        """For each index (n,) of a single codebook the others that `draw_near` draws from, each as likely as it is often among
        them: the `nearest` codes that lie closest, in any order, (n, nearest); fewer if there are fewer codes."""
        [codes] = self.code_vectors().float()
        offsets = codes.square().sum(1)
        nearest = min(nearest, len(codes) - 1)
        near = []
        for rows in indices.split(max(1, MAX_SCORES // len(codes))):
            # Squared distances, up to a number for each row.
            scores = torch.addmm(offsets, codes[rows], codes.t(), alpha=-2)
            scores.scatter_(1, rows[:, None], math.inf)
            near.append(scores.topk(nearest, largest=False, sorted=False).indices)
        return torch.cat(near)

    def sample_latents(
        self, n: int, grid: tuple[int, int], seed: int, batch_size: int, start: int = 0
    ) -> Iterator[Tensor]:
        """Samples `start` to n - 1 of a seed, in batches of z_q (b, dim, *grid), from the distribution that the training loss
        pulls z_q towards. Sample i depends on the seed and i only.

        Raises InputError if the bottleneck has no such distribution.
        """
        raise InputError(
            "only a tokenizer with quantizer=kl can be sampled directly; for any other, train a prior on its codes "
            "with stage=prior ckpt=<its run folder>, and pass that prior to stage=sample"
        )

    def initialise(self, z: Tensor) -> None:
        """Fit codes and scales to encoder outputs z (n, in_dim), once before the first step."""

    def initialise_maps(self, z: Tensor, most: int) -> None:
        """As `initialise`, by so many outputs, or less than twice as many, evenly from all over the maps z (n, in_dim, h, w)."""
        rows = flatten(z)
        self.initialise(rows[:: max(1, len(rows) // most)])

    def grow_from(self, smaller: "Quantizer", z: Tensor) -> None:
        """Take over the codes of a smaller codebook of the same kind, and split those that most of the encoder outputs
        z (n, in_dim) have chosen, for the codes that are new; once before the first step."""
        raise InputError(f"a codebook of {type(self).__name__} can't grow; leave grow out")

    def update(self, q: Quantized, rate: float = 1.0) -> None:
        """Count the update and change what has no gradients, after the optimizers' step.

        `rate` is the current learning rate divided by its peak.
        """
        number = self._remembered_updates()
        self.updates += 1
        if number is not None:
            self._remember_updates(number + 1)

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        """Parameters with their own learning rate -> that rate divided by the optimizer's."""
        return {}


class Standardised(Quantizer):
    """A bottleneck whose codes or noise have a fixed scale, for encoder outputs of any scale.

    `initialise` sets the mean (`centre`) and standard deviation (`spread`) of each channel once. Encoder outputs are
    standardised with them, and z_q is scaled back.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, K: int | None, dim: int, in_dim: int | None = None, **when: Any) -> None:
        super().__init__(K, dim, in_dim=in_dim, **when)
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        z = z[:, : self.dim].float()
        self.centre.copy_(broadcast(z.mean(0)))
        self.spread.copy_(broadcast(z.std(0).clamp(min=1e-4)))

    def standardise(self, z: Tensor) -> Tensor:
        """Encoder outputs (B, dim, h, w) -> about zero mean and unit variance per channel."""
        return (z - self.centre[:, None, None]) / self.spread[:, None, None]

    def unstandardise(self, z: Tensor) -> Tensor:
        """The inverse of `standardise`."""
        return z * self.spread[:, None, None] + self.centre[:, None, None]
