"""The cross-entropy of many codes in little memory: logits are computed tile by tile, and again for the gradient."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from codegrid.engine.precision import without_autocast
from prior.decoding.kv_decoder import product_dtype

TILE_ROWS = 2**12
MAX_TILE = 2**24  # logits of a tile, 64 MiB


class TiledCrossEntropy(torch.autograd.Function):
    """-log softmax(x W^T) at the targets, without ever holding all logits (as in Wijmans et al. 2024, Cut Cross-Entropy).

    The forward pass keeps one normaliser per row; the backward pass computes each tile of logits again. Beside its inputs and
    gradients a call needs a few tiles. Products are in autocast's type if it is on, everything else in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        groups: Tensor | None,
        smoothing: float,
        group_share: float,
    ) -> tuple[Tensor, Tensor]:
        """x (n, width), weight (K, width), targets (n,), groups (K,) -> loss and nats (n,) float32; only the loss has a gradient.

        A share `smoothing` of the target is spread over all codes, and a share `group_share` of the loss is that of the
        target's group.
        """
        has_autocast = torch.amp.is_autocast_available(x.device.type)
        ctx.dtype = product_dtype(x.device) if has_autocast else weight.dtype
        ctx.shares = smoothing, group_share
        K = len(weight)
        target = torch.zeros(len(x), device=x.device)
        total = torch.zeros_like(target)
        normaliser = torch.full_like(target, -torch.inf)
        within = torch.full_like(target, -torch.inf)
        for rows, codes in list_tiles(len(x), K):
            z = tile_logits(x[rows], weight[codes], ctx.dtype)
            normaliser[rows] = torch.logaddexp(normaliser[rows], z.logsumexp(1))
            place, is_here = locate(targets[rows], codes)
            target[rows] += z.gather(1, place)[:, 0].where(is_here, 0)
            if smoothing:
                total[rows] += z.sum(1)
            if groups is not None:
                others = groups[codes] != groups[targets[rows]][:, None]
                near = z.masked_fill_(others, -torch.inf).logsumexp(1)
                within[rows] = torch.logaddexp(within[rows], near)
        nats = normaliser - target
        own = (1 - smoothing) * nats + smoothing * (normaliser - total / K) if smoothing else nats
        loss = own.clone()
        if groups is not None:
            loss = (1 - group_share) * own + group_share * (normaliser - within)
        ctx.save_for_backward(x, weight, targets, groups, normaliser, within)
        ctx.mark_non_differentiable(nats)
        return loss, nats

    @staticmethod
    def backward(ctx: Any, slope: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """d loss / d z = p - share of the target - share of the smoothing / K - share of the group * p within the group."""
        x, weight, targets, groups, normaliser, within = ctx.saved_tensors
        smoothing, group_share = ctx.shares
        of_x = torch.zeros(x.shape, device=x.device)
        of_weight = torch.zeros(weight.shape, device=x.device)
        for rows, codes in list_tiles(len(x), len(weight)):
            part, vectors = x[rows], weight[codes]
            z = tile_logits(part, vectors, ctx.dtype)
            near = None
            if groups is not None:
                others = groups[codes] != groups[targets[rows]][:, None]
                near = (z - within[rows, None]).exp_().masked_fill_(others, 0)
            g = z.sub_(normaliser[rows, None]).exp_()
            if near is not None:
                g.sub_(near, alpha=group_share)
            if smoothing:
                g -= (1 - group_share) * smoothing / len(weight)
            place, is_here = locate(targets[rows], codes)
            g.scatter_add_(1, place, is_here[:, None] * -((1 - group_share) * (1 - smoothing)))
            g = g.mul_(slope[rows, None]).to(ctx.dtype)
            with without_autocast(x.device):
                of_x[rows] += g @ vectors.to(ctx.dtype)
                of_weight[codes] += g.mT @ part.to(ctx.dtype)
        return of_x.to(x.dtype), of_weight.to(weight.dtype), None, None, None, None


def list_tiles(n: int, K: int) -> Iterator[tuple[slice, slice]]:
    """The rows and codes of each tile of logits (n, K)."""
    height = min(n, TILE_ROWS)
    width = max(1, MAX_TILE // height)
    for code in range(0, K, width):
        for row in range(0, n, height):
            yield slice(row, min(row + height, n)), slice(code, min(code + width, K))


def tile_logits(x: Tensor, weight: Tensor, dtype: torch.dtype) -> Tensor:
    """x (r, width) and weight (c, width) -> logits (r, c) float32, multiplied in `dtype`."""
    with without_autocast(x.device):
        return (x.to(dtype) @ weight.to(dtype).mT).float()


def locate(targets: Tensor, codes: slice) -> tuple[Tensor, Tensor]:
    """Where each target (r,) is among these codes, (r, 1), and whether it is one of them, (r,)."""
    place = targets - codes.start
    last = codes.stop - codes.start - 1
    return place.clamp(0, last)[:, None], (place >= 0) & (place <= last)
