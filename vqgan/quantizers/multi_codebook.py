"""The base of bottlenecks with several codes per grid position."""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError, check_int
from vqgan.quantizers.base import Quantized, Quantizer, require_indices


class MultiCodebook(Quantizer):
    """`num_codebooks` bottlenecks of one kind, with indices (B, h, w, num_codebooks), or (B, h, w) of a single one.

    The loss is the mean of their losses, and K is the number of codes in each.
    """

    K: int

    def __init__(
        self,
        inner: Callable[..., Quantizer],
        K: int,
        num_codebooks: int,
        dim: int | None,
        inner_dim: int | None,
        **when: Any,
    ) -> None:
        """`inner(K=..., dim=...)` builds one bottleneck; with inner_dim=None it sets its own width.

        Raises InputError if the inner bottleneck has no codebook or several, or a `from` of its own.
        """
        check_int("quantizer.num_codebooks", num_codebooks, 1)
        quantizers = [inner(K=K, dim=inner_dim) for _ in range(num_codebooks)]
        first = quantizers[0]
        if first.K is None or first.num_codebooks != 1:
            raise InputError(
                f"quantizer.inner={type(first).__name__} must have exactly one codebook; use one such as ema or fsq"
            )
        if first.begin:
            raise InputError(
                f"quantizer.inner.from={first.begin} must be 0: all codebooks come into use together; "
                f"use quantizer.from={first.begin}"
            )
        super().__init__(first.K, dim or sum(q.dim for q in quantizers), num_codebooks, **when)
        self.inner = nn.ModuleList(quantizers)
        self.grows = first.grows

    @property
    def inner_quantizers(self) -> list[Quantizer]:
        """The inner bottlenecks in the order of their indices."""
        return [inner for inner in self.inner if isinstance(inner, Quantizer)]

    def join_codebooks(self, indices: Sequence[Tensor]) -> Tensor:
        """The indices (B, h, w) of each codebook, in one tensor."""
        return torch.stack(list(indices), -1) if self.num_codebooks > 1 else indices[0]

    def split_codebooks(self, indices: Tensor) -> tuple[Tensor, ...]:
        """The indices (B, h, w) of each codebook that one tensor has."""
        return indices.unbind(-1) if self.num_codebooks > 1 else (indices,)

    def code_vectors(self) -> Tensor:
        return torch.cat([inner.code_vectors() for inner in self.inner_quantizers])

    def list_codebooks(self) -> list[Quantizer]:
        return self.inner_quantizers

    def list_parts(self, q: Quantized) -> list[tuple[Quantizer, Quantized]]:
        """Those that dropout has not skipped."""
        return list(zip(self.inner_quantizers[: len(q.parts)], q.parts, strict=True))

    def combine(
        self, z_e: Tensor, z_q: Tensor, parts: list[Quantized], indices: Tensor | None = None
    ) -> Quantized:
        """The outputs of the inner bottlenecks as one; `indices` if theirs are not those of all images."""
        if indices is None:
            indices = self.join_codebooks([require_indices(part) for part in parts])
        loss = reduce(add, (part.loss for part in parts)) / len(parts)
        terms = {
            f"{name}_{i}": value
            for i, part in enumerate(parts)
            for name, value in part.terms.items()
        }
        return Quantized(z_e, z_q, indices, loss, terms, parts)

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        return {
            parameter: rate
            for inner in self.inner_quantizers
            for parameter, rate in inner.lr_multipliers().items()
        }

    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        # Bottlenecks skipped by nested dropout have no part and are not updated.
        for inner, part in zip(self.inner_quantizers[: len(q.parts)], q.parts, strict=True):
            inner.update(part, rate)
