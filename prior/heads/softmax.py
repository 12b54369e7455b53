"""A logit of each code."""

from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.errors import check_range
from codegrid.engine.precision import at_least_float32
from prior.heads.base import LOGITS, Head, Judged, judge_logits
from prior.heads.likeness import group_codes
from prior.heads.tiles import TiledCrossEntropy

MAX_LOGITS = 2**25  # in memory at once, 128 MiB


class Softmax(nn.Linear, Head):
    """softmax(W x), as in every language model.

    With a `group_share`, that share of the loss is grouped cross-entropy: -log of the probability of the target's group,
    the `group_size` codes whose vectors are nearest each other, so probability at a near code is partly right. Nats are
    those of the code itself.

    The loss of more than MAX_LOGITS logits is computed tile by tile, and so is its gradient.
    """

    groups: Tensor

    def __init__(self, width: int, vectors: Tensor, *, group_share: float, group_size: int) -> None:
        """vectors (K, dim): what the tokenizer decodes the codes from."""
        super().__init__(width, len(vectors), bias=False)
        nn.init.zeros_(self.weight)  # an untrained prior is uniform
        check_range("prior.head.group_share", group_share, 0, 1)
        self.group_share, self.group_size = group_share, group_size
        if group_share:
            self.register_buffer("groups", group_codes(vectors, group_size))

    def forward(
        self, x: Tensor, targets: Tensor | None = None, smoothing: float = 0.0, share: float = 0.0
    ) -> Any:
        """The logits (..., K) in the precision of the run; with targets, their losses and nats (...) tile by tile, of which `share`
        is the groups'."""
        if targets is None:
            return super().forward(x)
        groups = self.groups if share else None
        losses, nats = TiledCrossEntropy.apply(
            x.flatten(0, -2), self.weight, targets.flatten(), groups, smoothing, share
        )
        return losses.view_as(targets), nats.view_as(targets)

    def logits(self, x: Tensor) -> Tensor:
        logits: Tensor = self(x)
        return at_least_float32(logits)

    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        if self.is_small(targets):
            return LOGITS.nats(self.logits(x), targets, smoothing)
        nats: Tensor = self(x, targets, smoothing)[0]
        return nats

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        if not self.is_small(targets):
            loss, nats = self(x, targets, smoothing, self.group_share)
            return loss, nats
        logits = self.logits(x)
        loss, nats = LOGITS.losses(logits, targets, smoothing)
        if self.group_share:
            of_group = logits.logsumexp(-1) - self.sum_group(logits, targets)
            loss = (1 - self.group_share) * loss + self.group_share * of_group
        return loss, nats

    def sum_group(self, logits: Tensor, targets: Tensor) -> Tensor:
        """log sum exp (...) of the logits (..., K) of the codes in each target's group."""
        places = self.groups[targets][..., None] * self.group_size
        places = places + torch.arange(self.group_size, device=places.device)
        codes = self.groups.argsort(stable=True)[places.clamp(max=self.out_features - 1)]
        near = logits.gather(-1, codes).masked_fill(places >= self.out_features, -torch.inf)
        return near.logsumexp(-1)

    @torch.no_grad()
    def judge(self, x: Tensor, targets: Tensor) -> Judged:
        rows = max(1, MAX_LOGITS // self.out_features)
        parts = [
            judge_logits(self.logits(part), of_part)
            for part, of_part in zip(
                x.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True
            )
        ]
        columns = zip(*((part.nats, part.above, part.tied) for part in parts), strict=True)
        return Judged(*(torch.cat(column).view_as(targets) for column in columns))

    def is_small(self, targets: Tensor) -> bool:
        """Whether the logits of these targets may be in memory all at once."""
        return targets.numel() * self.out_features <= MAX_LOGITS


def plain_softmax(width: int, vectors: Tensor) -> Softmax:
    """The head of conf/prior/head/softmax.yaml, for priors that are built without naming one."""
    return Softmax(width, vectors, group_share=0.0, group_size=16)
