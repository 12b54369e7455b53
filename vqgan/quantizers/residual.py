"""Several codebooks in sequence, each for the residual of those before it."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.collectives import seeded_generator, share_seed
from codegrid.engine.errors import InputError, check_range
from vqgan.quantizers.base import Quantized, Quantizer, require_indices
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.multi_codebook import MultiCodebook


class Residual(MultiCodebook):
    """Each codebook codes the residual of those before it (Zeghidour et al. 2021, SoundStream, algorithm 1; Lee et al. 2022).

    So the first codebooks alone are a coarser code of the image, and `lookup` takes any number of them. With nested dropout
    (Rippel et al. 2014; for codebooks SoundStream, section III-C) they learn to stand alone: of a training batch the share
    `nested` uses only the first n codebooks, n uniform in 1 ... num_codebooks - 1. The indices of the others are still
    returned, but neither decoded nor trained on.
    """

    training_settings = ("nested",)

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        num_codebooks: int,
        dim: int | None,
        nested: float,
        **when: Any,
    ) -> None:
        check_range("quantizer.nested", nested, 0, 1)
        super().__init__(inner, K, num_codebooks, dim, dim, **when)
        first = self.inner_quantizers[0]
        if getattr(first, "cosine", False):
            raise InputError(
                "quantizer.inner.cosine=true can't be in residual: codes of length 1 can't represent residuals, "
                "which shrink; use false"
            )
        self.dim = self.in_dim = first.dim
        self.nested = nested
        self._seed: int | None = None  # that all ranks share, if there are several

    @property
    def prefixes(self) -> Sequence[int]:
        return range(1, self.num_codebooks + 1) if self.num_codebooks > 1 else ()

    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        residual = z_e
        sum_q = torch.zeros_like(z_e)
        carrier = torch.zeros_like(z_e)
        parts: list[Quantized] = []
        indices: list[Tensor] = []
        users = self.count_users(z_e.shape[0], z_e.device)
        for i, (inner, n) in enumerate(zip(self.inner_quantizers, users, strict=True)):
            coded: list[Quantized] = []
            if n != 0:
                q = inner(residual[:n])
                parts.append(q)
                coded.append(q)
                # Each z_q passes its gradient on to the residual it codes. For all but the first, subtracting the residual
                # cancels that, or the encoder would get the decoder's gradient `num_codebooks` times.
                carried = carrier[:n] + q.z_q - (residual[:n] if i else 0)
                carrier = replace_first(carrier, carried, n)
                sum_q = replace_first(sum_q, sum_q[:n] + q.z_q.detach(), n)
            if n is not None:  # the other images
                with torch.no_grad():
                    coded.append(inner(residual[n:]))
            indices.append(join_images([require_indices(q) for q in coded]))
            residual = residual - join_images([q.z_q.detach() for q in coded])
        z_q = straight_through(carrier, sum_q)
        return self.combine(z_e, z_q, parts, self.join_codebooks(indices))

    def count_users(self, n: int, device: torch.device) -> list[int | None]:
        """How many of a batch's n images use each codebook, the first ones; None: all.

        Images are in random order, so those that use the most codebooks come first and each codebook has a slice. Their
        depths lie evenly over the distribution, from a random start, so a batch has images of most depths. The numbers are
        the same on every rank, since `update` needs all ranks in each codebook: ranks share a seed from the first batch on,
        for a number from the main rank would have to be waited for each time.
        """
        if not (self.training and self.num_codebooks > 1 and self.nested):
            return [None] * self.num_codebooks
        if self._seed is None:
            self._seed = share_seed(device)
        random = None  # of this process
        if self._seed is not None:
            random = seeded_generator(self._seed, self.num_updates, self.draws)
            self.draws += 1
        start = float(torch.rand((), generator=random))
        depths = [self.choose_depth((i + start) / n) for i in range(n)]
        counts = [sum(depth > i for depth in depths) for i in range(self.num_codebooks)]
        return [None if count == n else count for count in counts]

    def choose_depth(self, place: float) -> int:
        """The number of codebooks at a place, 0 to 1, of its distribution, from all down to one."""
        below = (place - (1 - self.nested)) / self.nested
        if below < 0:
            return self.num_codebooks
        return max(self.num_codebooks - 1 - int(below * (self.num_codebooks - 1)), 1)

    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        self.draws = 0

    def lookup(self, indices: Tensor) -> Tensor:
        """Indices (B, h, w, n) of the first n codebooks, all or fewer, or (B, h, w) of a single one -> z_q (B, dim, h, w)."""
        books = self.split_codebooks(indices)
        pairs = zip(self.inner_quantizers[: len(books)], books, strict=True)
        parts = [inner.lookup(own_indices) for inner, own_indices in pairs]
        return reduce(add, parts, torch.zeros_like(parts[0]))

    def replace(self, q: Quantized, indices: Tensor) -> Tensor:
        """As the base class does; the codebooks that an image does not use stay out."""
        z_q = torch.zeros_like(q.z_q)
        books = self.split_codebooks(indices)[: len(q.parts)]
        for inner, part, own in zip(
            self.inner_quantizers[: len(q.parts)], q.parts, books, strict=True
        ):
            n = len(part.z_e)  # the first images use this codebook
            z_q[:n] += inner.lookup(own[:n])
        return straight_through(q.z_q, z_q)

    def grow_from(self, smaller: Quantizer, z: Tensor) -> None:
        """Let each codebook grow by the residuals of z (n, dim) after the smaller ones before it."""
        assert isinstance(smaller, Residual)
        self.updates.copy_(smaller.updates)
        residual = z.float()
        for inner, old in zip(self.inner_quantizers, smaller.inner_quantizers, strict=True):
            inner.grow_from(old, residual)
            with torch.no_grad():
                residual = residual - old(residual[:, :, None, None]).z_q[:, :, 0, 0]

    def initialise(self, z: Tensor) -> None:
        """Initialise each codebook with the residual of z (n, dim) after the ones before it."""
        residual = z.float()
        for inner in self.inner_quantizers:
            inner.initialise(residual)
            with torch.no_grad():
                residual = residual - inner(residual[:, :, None, None]).z_q[:, :, 0, 0]


def join_images(parts: list[Tensor]) -> Tensor:
    """The rows of one or several tensors in one."""
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def replace_first(whole: Tensor, first: Tensor, n: int | None) -> Tensor:
    """A tensor with other first n rows; None: all."""
    return first if n is None else torch.cat([first, whole[n:]])
