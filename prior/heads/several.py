"""A head for each of several codebooks."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from prior.heads.base import Head, Judged


class HeadPerCodebook(nn.ModuleList, Head):
    """Heads that take turns over the codes of a position: x is (..., L, width), the codes of each position together."""

    def __init__(self, heads: Iterable[Head]) -> None:
        super().__init__(heads)  # type: ignore[arg-type]

    def by_codebook(self, x: Tensor, *targets: Tensor) -> list[tuple[Head, tuple[Tensor, ...]]]:
        """Each head with its part of x (..., L, width), as (n, width), and of the targets (..., L), as (n,)."""
        parts = [x.reshape(-1, len(self), x.shape[-1]).unbind(1)]
        parts += [t.reshape(-1, len(self)).unbind(1) for t in targets]
        return list(zip(self, zip(*parts, strict=True), strict=True))  # type: ignore[arg-type]

    def logits(self, x: Tensor) -> Tensor:
        logits = torch.stack([head.logits(*part) for head, part in self.by_codebook(x)], 1)
        return logits.view(*x.shape[:-1], logits.shape[-1])

    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        parts = self.by_codebook(x, targets)
        return join([head.nats(*part, smoothing) for head, part in parts], targets)

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        parts = [head.losses(*part, smoothing) for head, part in self.by_codebook(x, targets)]
        loss, nats = (join(values, targets) for values in zip(*parts, strict=True))
        return loss, nats

    def judge(self, x: Tensor, targets: Tensor) -> Judged:
        parts = [head.judge(*part) for head, part in self.by_codebook(x, targets)]
        columns = zip(*((part.nats, part.above, part.tied) for part in parts), strict=True)
        return Judged(*(join(values, targets) for values in columns))


def join(values: Sequence[Tensor], targets: Tensor) -> Tensor:
    """The values (n,) of each codebook in the order and the shape of the targets (..., L)."""
    return torch.stack(list(values), 1).view_as(targets)
