"""Other codes than the encoder's, for a decoder that learns to decode what a prior draws."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from codegrid.engine.errors import InputError, check_int, check_range
from vqgan.learning import Learners
from vqgan.quantizers.base import Quantized, Quantizer
from vqgan.tokenizer import Tokenizer


class CodeChange(ABC):
    """Replaces some of the codes that the decoder sees in training. The image that it has to reconstruct stays, and so do the
    codes that the bottleneck learns from.

    source         what the command names it by
    fingerprint    Tokenizer.fingerprint_codes of the only codes that it can change; None: any
    """

    source = "loss.perturb"
    fingerprint: str | None = None

    def check(self, tokenizer: Tokenizer, learners: Learners) -> None:
        """Raise InputError for a tokenizer, whose weights may not be set yet, that has other codes than this changes, or while
        these parts of it learn."""
        assert tokenizer.K is not None

    def check_codes(self, tokenizer: Tokenizer) -> None:
        """Raise InputError for a tokenizer whose weights make other codes than this changes."""
        if self.fingerprint not in (None, tokenizer.fingerprint_codes()):
            raise InputError(
                f"{self.source} learned the codes of another tokenizer than the one that init=... names; name the run that the "
                "prior was trained on, or one that started from it with learn=decoder"
            )

    @abstractmethod
    def __call__(
        self, quantizer: Quantizer, q: Quantized, indices: Tensor, labels: Tensor | None
    ) -> Tensor:
        """Other indices in place of `indices`, which have the shape of q.indices; labels (B,) of the images, as in the data."""


class Perturb(CodeChange):
    """Replaces a share of the codes of each batch, at random positions, by one of the `nearest` codes to each (RobusTok, Qiu et
    al. 2025, section 3.2). Where a position has several codes, so many of each codebook."""

    def __init__(self, share: float, nearest: int) -> None:
        check_range("loss.perturb", share, 0, 1)
        check_int("loss.perturb_nearest", nearest, 1, "code")
        self.share, self.nearest = share, nearest

    @torch.no_grad()
    def __call__(
        self, quantizer: Quantizer, q: Quantized, indices: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        books = split_codebooks(indices)
        for i, (part, _) in enumerate(quantizer.list_parts(q)):
            books[i] = self.perturb(part, books[i])
        return books[0] if indices.ndim == 3 else torch.stack(books, -1)

    def perturb(self, quantizer: Quantizer, indices: Tensor) -> Tensor:
        """Indices of one codebook, of any shape."""
        flat = indices.flatten()
        count = round(self.share * len(flat))
        rows = torch.rand(len(flat), device=flat.device).topk(count, sorted=False).indices
        near = quantizer.draw_near(flat[rows], self.nearest)
        return flat.index_copy(0, rows, near).view_as(indices)


def split_codebooks(indices: Tensor) -> list[Tensor]:
    """Indices (B, h, w) or (B, h, w, num_codebooks) -> those of each codebook (B, h, w)."""
    return [indices] if indices.ndim == 3 else list(indices.unbind(-1))


def replace_codes(
    changes: Sequence[CodeChange], quantizer: Quantizer, q: Quantized, labels: Tensor | None
) -> Tensor:
    """What the decoder sees of an output of the bottleneck after all changes, (B, dim, h, w), with the gradient of q.z_q."""
    if not changes or q.indices is None:
        return q.z_q
    indices = q.indices
    for change in changes:
        indices = change(quantizer, q, indices, labels)
    return quantizer.replace(q, indices)
