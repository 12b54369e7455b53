"""Several codebooks a position."""

from collections.abc import Callable
from functools import reduce
from operator import add

import torch
from torch import Tensor, nn

from engine.errors import InputError, check_int
from vqgan.quantizers.base import Quantized, Quantizer


class Several(Quantizer):
    """`num_codebooks` bottlenecks of one kind: indices (B, h, w, num_codebooks); the loss is the mean of theirs, K that of each."""

    K: int

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        num_codebooks: int,
        dim: int | None,
        inner_dim: int | None,
    ) -> None:
        """`inner` makes one, with K codes and of width `inner_dim`, or where that is None of the width that is its own."""
        check_int("quantizer.num_codebooks", num_codebooks, 1)
        made = [inner(K=K, dim=inner_dim) for _ in range(num_codebooks)]
        if made[0].K is None or made[0].num_codebooks != 1:
            raise InputError(
                f"quantizer.inner={type(made[0]).__name__} has not one codebook; use one that has, such as ema or fsq"
            )
        super().__init__(made[0].K, dim or sum(each.dim for each in made), num_codebooks)
        self.inner = nn.ModuleList(made)

    @property
    def each(self) -> list[Quantizer]:
        """The inner bottlenecks, the first first."""
        return [inner for inner in self.inner if isinstance(inner, Quantizer)]

    def vectors(self) -> Tensor:
        return torch.cat([inner.vectors() for inner in self.each])

    def together(self, z_e: Tensor, z_q: Tensor, parts: list[Quantized]) -> Quantized:
        """One Quantized of those of the inner bottlenecks."""
        indices = torch.stack([indices_of(part) for part in parts], -1)
        loss = reduce(add, (part.loss for part in parts)) / len(parts)
        terms = {
            f"{name}_{i}": value
            for i, part in enumerate(parts)
            for name, value in part.terms.items()
        }
        return Quantized(z_e, z_q, indices, loss, terms, parts)

    def parameter_rates(self) -> dict[nn.Parameter, float]:
        return {p: rate for inner in self.each for p, rate in inner.parameter_rates().items()}

    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        for inner, part in zip(
            self.each[: len(q.parts)], q.parts, strict=True
        ):  # what dropout left out stays
            inner.update(part, rate)


def indices_of(q: Quantized) -> Tensor:
    """The indices of a bottleneck that has codes."""
    assert q.indices is not None
    return q.indices
