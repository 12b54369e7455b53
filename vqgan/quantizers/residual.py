"""Several codebooks in sequence, each for the residual of those before it."""

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.collectives import seeded_generator, share_seed
from codegrid.engine.errors import InputError, check_range
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.quantizers.gradients import straight_through
from vqgan.quantizers.multi_codebook import MultiCodebook, require_indices


class Residual(MultiCodebook):
    """Each codebook codes the residual of those before it (Zeghidour et al. 2021, SoundStream, algorithm 1; Lee et al. 2022).

    With probability `dropout`, a training batch uses only the first n codebooks, n uniform in 1 ... num_codebooks - 1
    (SoundStream, section III-C), so that the first codebooks can stand alone. The indices of the other codebooks are
    still returned, but neither decoded nor trained on.
    """

    training_settings = ("dropout",)

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        num_codebooks: int,
        dim: int | None,
        dropout: float,
        **when: Any,
    ) -> None:
        check_range("quantizer.dropout", dropout, 0, 1)
        super().__init__(inner, K, num_codebooks, dim, dim, **when)
        first = self.inner_quantizers[0]
        if getattr(first, "cosine", False):
            raise InputError(
                "quantizer.inner.cosine=true can't be in residual: codes of length 1 can't represent residuals, "
                "which shrink; use false"
            )
        self.dim = self.in_dim = first.dim
        self.dropout = dropout
        self._seed: int | None = None  # that all ranks share, if there are several

    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        used = self.sample_depth(z_e.device)
        residual = z_e
        sum_q = torch.zeros_like(z_e)
        carrier = torch.zeros_like(z_e)
        parts = []
        for i, inner in enumerate(self.inner_quantizers[:used]):
            q = inner(residual)
            parts.append(q)
            # Each z_q passes its gradient on to the residual it codes. For all but the first, subtracting the residual
            # cancels that, or the encoder would get the decoder's gradient `num_codebooks` times.
            carrier = carrier + q.z_q - (residual if i else 0)
            sum_q = sum_q + q.z_q.detach()
            residual = residual - q.z_q.detach()
        output = self.combine(z_e, straight_through(carrier, sum_q), parts)
        if used < self.num_codebooks:
            indices = [require_indices(output), self.code_residual(residual, used)]
            output.indices = torch.cat(indices, -1)
        return output

    def sample_depth(self, device: torch.device) -> int:
        """How many codebooks this batch uses. The same on every rank, since `update` needs all ranks in each codebook: ranks
        share a seed from the first batch on, for a number from the main rank would have to be waited for each time."""
        if not (self.training and self.num_codebooks > 1 and self.dropout):
            return self.num_codebooks
        if self._seed is None:
            self._seed = share_seed(device)
        random = None  # of this process
        if self._seed is not None:
            random = seeded_generator(self._seed, self.num_updates, self.draws)
            self.draws += 1
        chance = torch.rand((), generator=random)
        depth = torch.randint(1, self.num_codebooks, (), generator=random)
        return int(depth) if float(chance) < self.dropout else self.num_codebooks

    @torch.no_grad()
    def code_residual(self, residual: Tensor, first: int) -> Tensor:
        """Indices (B, h, w, num_codebooks - first) of the codebooks from `first` on."""
        indices = []
        for inner in self.inner_quantizers[first:]:
            q = inner(residual)
            indices.append(require_indices(q))
            residual = residual - q.z_q
        return torch.stack(indices, -1)

    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        self.draws = 0

    def lookup(self, indices: Tensor) -> Tensor:
        pairs = zip(self.inner_quantizers, indices.unbind(-1), strict=True)
        parts = [inner.lookup(own_indices) for inner, own_indices in pairs]
        return reduce(add, parts, torch.zeros_like(parts[0]))

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
