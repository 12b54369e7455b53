"""Transformer layers: attention with 2-D rotary positions, the block around it, and stacks of blocks."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.precision import at_least_float32, without_autocast


def head_size(width: int, heads: int) -> int:
    """The width of an attention head, which must be even for rotary positions."""
    if width % heads or (width // heads) % 2:
        raise InputError(
            f"prior.width={width} must be an even multiple of prior.heads={heads}; use prior.width={64 * heads}"
        )
    return width // heads


def rotary(grid: tuple[int, int], size: int, base: float = 10_000.0) -> Tensor:
    """Angles (h*w, 1, 1, size / 2) of 2-D rotary embeddings in raster order, the same for queries, keys and all heads."""
    return rotary_at(torch.arange(grid[0]), torch.arange(grid[1]), size, base)


def rotary_at(rows: Tensor, columns: Tensor, size: int, base: float = 10_000.0) -> Tensor:
    """As `rotary`, of all pairs of these places, rows (h,) and columns (w,), which may lie between those of a grid.

    Half of the channel pairs turn with the row, the other half with the column (RoPE, Su et al. 2021, eq. 15; in two
    dimensions as in LlamaGen).
    """
    pairs = size // 2
    per_axis = [pairs - pairs // 2, pairs // 2]
    angles = []
    for place, n in zip(torch.meshgrid(rows, columns, indexing="ij"), per_axis, strict=True):
        speed = base ** (-torch.arange(n) / max(n, 1))
        angles.append(place.flatten()[:, None] * speed)
    return torch.cat(angles, 1)[:, None, None]


def rotary_directions(angles: Tensor) -> Tensor:
    """Cosine and sine (..., 2) of the angles (...), computed once for all blocks."""
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate_pairs(x: Tensor, directions: Tensor) -> Tensor:
    """Turn the pairs of neighbouring channels of x (..., size) by the angles of the directions (..., size / 2, 2)."""
    pairs = at_least_float32(x).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # torch.compile does not compile complex numbers, and warns
        (a, b), (cos, sin) = pairs.unbind(-1), directions.unbind(-1)
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1)
    else:  # one complex product, forward and backward
        turned = torch.view_as_real(
            torch.view_as_complex(pairs) * torch.view_as_complex(directions)
        )
    return turned.flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention and SwiGLU (Shazeer 2020), without biases.

    With `causal`, each position attends to itself and those before it, otherwise to all.
    """

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        hidden = 32 * round(width * 8 / 3 / 32)  # as many weights as an MLP of 4 x width
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(
        self,
        x: Tensor,
        directions: Tensor,
        mask: Tensor | None = None,
        past: "Past | None" = None,
    ) -> Tensor:
        """x (B, T, width) -> (B, T, width).

        Queries and keys turn by the directions (T, 1, 1, size / 2, 2), each by its own (T, 2, 1, size / 2, 2), or by those
        of each sample (B, T, 2, 1, size / 2, 2). A `mask` (T, T), added to the scores, says instead of `causal` what each position
        attends to. With a `past` these are the positions after it: they attend to it too, and are part of it from then on.
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        turned = rotate_pairs(qkv[:, :, :2], directions).transpose(1, 3)
        q, k = turned.unbind(2)  # (B, heads, T, size) each
        dropout = self.dropout if self.training else 0.0
        v = qkv[:, :, 2].transpose(1, 2)
        if past is not None:
            k, v = past.extend(k, v)
        attended = attention(q, k, v, self.causal, dropout, mask=mask)
        x = x + self._drop(self.proj(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Past:
    """The keys and values (B, heads, t, size) of one block at the positions so far."""

    def __init__(self) -> None:
        self._pairs: tuple[Tensor, Tensor] | None = None

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of all positions, with those of the next ones at the end."""
        if self._pairs is not None:
            k, v = (torch.cat(pair, 2) for pair in zip(self._pairs, (k, v), strict=True))
        self._pairs = k, v
        return k, v


class Stack(nn.ModuleList):
    """Blocks one after the other, all of which turn queries and keys by the same angles."""

    def __init__(
        self, depth: int, width: int, heads: int, dropout: float, causal: bool = True
    ) -> None:
        super().__init__(Block(width, heads, dropout, causal) for _ in range(depth))

    def forward(
        self,
        x: Tensor,
        angles: Tensor,
        mask: Tensor | None = None,
        pasts: Sequence[Past] | None = None,
    ) -> Tensor:
        """x (B, T, width) -> (B, T, width); angles as from `rotary`, or with more dimensions as in Block.forward; `mask` as there,
        and a past for each block."""
        directions = rotary_directions(angles)
        for i, block in enumerate(self):
            if pasts is not None:
                # Past its hooks: one rank draws alone, and FSDP would count this use of the weights on that rank only.
                x = Block.forward(block, x, directions, mask, pasts[i])  # type: ignore[arg-type]
            elif mask is None:
                x = block(x, directions)
            else:
                x = block(x, directions, mask)
        return x


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    dropout: float = 0.0,
    max_scores: int = 2**22,
    mask: Tensor | None = None,
) -> Tensor:
    """softmax(q k^T / sqrt(size) + mask) v (Vaswani et al. 2017, eq. 1), all (B, heads, T, size), of q fewer positions if there is
    no mask; causal: up to each position. A mask (T, T) takes the place of `causal`.

    On a CPU in bf16 the backward pass of torch's own kernel takes eight times as long as plain products, so these are used,
    `max_scores` scores at a time: for more than these 8 MiB the operating system has to hand out fresh pages at every step.
    Under torch.compile all scores are computed at once, since each part would be compiled separately.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        bias = None if mask is None else mask.to(q.dtype)
        is_causal = causal and mask is None
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=is_causal, dropout_p=dropout)
    shape = (q.shape[-2], k.shape[-2])
    if mask is None:
        mask = torch.full(shape, -torch.inf if causal else 0.0).triu(1)
    mask = mask.to(q.dtype)
    attended = []
    with torch.autocast("cpu", enabled=False):
        all_at_once = torch.compiler.is_compiling()
        part = q.shape[:2].numel() if all_at_once else max(1, max_scores // math.prod(shape))
        rows = ((q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        for queries, keys, values in zip(*(x.split(part) for x in rows), strict=True):
            scores = (queries @ keys.mT).add_(mask)
            attended.append(F.dropout(scores.softmax(-1), dropout) @ values)
        return torch.cat(attended).view_as(q)


EPSILON = torch.finfo(torch.float32).eps  # nn.RMSNorm's default in float32


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang & Sennrich 2019, eq. 4) with fewer passes over the memory when it trains on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:  # whose own epsilon would make another function of it
            return F.rms_norm(x, self.normalized_shape, self.weight, EPSILON)
        if x.is_cuda or not torch.is_grad_enabled():
            return super().forward(x)
        y: Tensor = _Normalise.apply(x, self.weight)
        return y


class _Normalise(torch.autograd.Function):
    """y = x / rms(x), times the weight, in float32: autocast would round the products of vecdot to bfloat16."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x = x.float()
        with without_autocast(x.device):
            square = torch.linalg.vecdot(x, x)[..., None] / x.shape[-1]
        scale = square.add_(torch.finfo(x.dtype).eps).rsqrt_()
        y = x * scale
        ctx.save_for_backward(y, scale, weight)
        return y * weight

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor]:
        y, scale, weight = ctx.saved_tensors
        inward = slope * weight
        # The norm undoes any change of length, so the part of the gradient along y vanishes.
        with without_autocast(y.device):
            along = torch.linalg.vecdot(inward, y)[..., None] / y.shape[-1]
        of_x = torch.addcmul(inward, y, along, value=-1).mul_(scale)
        of_weight = (slope * y).flatten(0, -2).sum(0)
        return of_x, of_weight


def initialise_blocks(blocks: Iterable[nn.Module]) -> None:
    """Initialise the weights of one residual stream as GPT-2 does: those that write to it get smaller with their number."""
    stream = nn.ModuleList(blocks)
    for name, p in stream.named_parameters():
        if p.ndim > 1:
            into_stream = name.endswith(("proj.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / (2 * len(stream)) ** 0.5 if into_stream else 0.02)
