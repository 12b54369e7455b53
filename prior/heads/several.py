"""A head for each of several codebooks."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from prior.heads.base import Head, Judged


class HeadPerCodebook(nn.ModuleList, Head):
    """Heads that take turns over the codes of a position: x is (..., L, width), the codes of each position together."""

    def __init__(self, heads: Iterable[Head]) -> None:
        super().__init__(heads)  # type: ignore[arg-type]

    @property
    def heads(self) -> list[Head]:
        return [head for head in self if isinstance(head, Head)]

    def by_codebook(self, x: Tensor, targets: Tensor) -> list[tuple[Head, Tensor, Tensor]]:
        """Each head with its part of x (..., L, width), as (n, width), and of the targets (..., L), as (n,)."""
        features = x.reshape(-1, len(self), x.shape[-1]).unbind(1)
        codes = targets.reshape(-1, len(self)).unbind(1)
        return list(zip(self.heads, features, codes, strict=True))

    def logits(self, x: Tensor) -> Tensor:
        features = x.reshape(-1, len(self), x.shape[-1]).unbind(1)
        parts = [head.logits(part) for head, part in zip(self.heads, features, strict=True)]
        logits = torch.stack(parts, 1)
        return logits.view(*x.shape[:-1], logits.shape[-1])

    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        parts = [head.nats(z, t, smoothing) for head, z, t in self.by_codebook(x, targets)]
        return join(parts, targets)

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        parts = [head.losses(z, t, smoothing) for head, z, t in self.by_codebook(x, targets)]
        loss, nats = (join(values, targets) for values in zip(*parts, strict=True))
        return loss, nats

    def judge(self, x: Tensor, targets: Tensor) -> Judged:
        parts = [head.judge(z, t) for head, z, t in self.by_codebook(x, targets)]
        columns = zip(*((part.nats, part.above, part.tied) for part in parts), strict=True)
        return Judged(*(join(values, targets) for values in columns))


def join(values: Sequence[Tensor], targets: Tensor) -> Tensor:
    """The values (n,) of each codebook in the order and the shape of the targets (..., L)."""
    return torch.stack(list(values), 1).view_as(targets)
