"""Several codebooks after each other, each on what those before it left."""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import Tensor

from engine.distributed import broadcast
from engine.errors import InputError, check_range
from vqgan.quantizers.base import Quantized, Quantizer, straight_through
from vqgan.quantizers.several import Several, indices_of


class Residual(Several):
    """Each codebook codes what those before it left (Zeghidour et al. 2021, SoundStream, algorithm 1; Lee et al. 2022).

    With `dropout`, that share of the training batches uses only the first n codebooks, n uniform from 1 to num_codebooks - 1
    (SoundStream, section III-C), so that the first ones can stand alone; the others' indices are given, but neither
    decoded nor trained on.
    """

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int = 512,
        num_codebooks: int = 4,
        dim: int | None = 64,
        dropout: float = 0.0,
    ) -> None:
        check_range("quantizer.dropout", dropout, 0, 1)
        super().__init__(inner, K, num_codebooks, dim, dim)
        if getattr(self.each[0], "cosine", False):
            raise InputError(
                "quantizer.inner.cosine=true can't be in residual: codes of length 1 don't tell how much is left; use false"
            )
        self.dim = self.in_dim = self.each[0].dim
        self.dropout = dropout

    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        used = self.num_codebooks
        if (
            self.training and self.num_codebooks > 1 and self.dropout
        ):  # ranks draw alike: `update` wants all of them in every codebook
            drawn = torch.stack(
                [torch.rand(()), torch.randint(1, self.num_codebooks, ()).float()]
            ).to(z_e.device)
            chance, fewer = broadcast(drawn).tolist()
            used = int(fewer) if chance < self.dropout else used
        left, sum_q, carrier, parts = z_e, torch.zeros_like(z_e), torch.zeros_like(z_e), []
        for i, inner in enumerate(self.each[:used]):
            q = inner(left)
            parts.append(q)
            # Each z_q hands its gradient on to what it coded; for all but the first that is taken off again, or
            # the encoder would get the decoder's gradient `num_codebooks` times.
            carrier = carrier + q.z_q - (left if i else 0)
            sum_q, left = sum_q + q.z_q.detach(), left - q.z_q.detach()
        found = self.together(z_e, straight_through(carrier, sum_q), parts)
        with torch.no_grad():
            rest = []
            for inner in self.each[used:]:
                rest.append(indices_of(q := inner(left)))
                left = left - q.z_q
        if rest:
            assert found.indices is not None
            found.indices = torch.cat([found.indices, torch.stack(rest, -1)], -1)
        return found

    def lookup(self, indices: Tensor) -> Tensor:
        parts = [inner.lookup(i) for inner, i in zip(self.each, indices.unbind(-1), strict=True)]
        return reduce(add, parts, torch.zeros_like(parts[0]))

    def start(self, z: Tensor) -> None:
        """Each codebook meets what the ones before it leave of z (n, dim)."""
        left = z.float()
        for inner in self.each:
            inner.start(left)
            with torch.no_grad():
                left = left - inner(left[:, :, None, None]).z_q[:, :, 0, 0]
