"""Transformer layers: attention with 2-D rotary positions, the block around it, and stacks of blocks."""

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.precision import without_autocast


def head_size(width: int, heads: int) -> int:
    """The width of an attention head, which must be even for rotary positions."""
    if width % heads or (width // heads) % 2:
        raise InputError(
            f"prior.width={width} must be an even multiple of prior.heads={heads}; use prior.width={64 * heads}"
        )
    return width // heads


def rotary(grid: tuple[int, int], size: int, base: float = 10_000.0) -> Tensor:
    """Angles (h*w, 1, 1, size / 2) of 2-D rotary embeddings in raster order, the same for queries, keys and all heads.

    Half of the channel pairs turn with the row, the other half with the column (RoPE, Su et al. 2021, eq. 15; in two
    dimensions as in LlamaGen).
    """
    pairs = size // 2
    per_axis = [pairs - pairs // 2, pairs // 2]
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = []
    for place, n in zip((rows, columns), per_axis, strict=True):
        speed = base ** (-torch.arange(n) / max(n, 1))
        angles.append(place.flatten()[:, None] * speed)
    return torch.cat(angles, 1)[:, None, None]


def rotary_directions(angles: Tensor) -> Tensor:
    """Cosine and sine (..., 2) of the angles (...), computed once for all blocks."""
    return torch.stack([angles.cos(), angles.sin()], -1)


def rotate_pairs(x: Tensor, directions: Tensor) -> Tensor:
    """Turn the pairs of neighbouring channels of x (..., size) by the angles of the directions (..., size / 2, 2)."""
    pairs = x.float().unflatten(-1, (-1, 2))
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

    def forward(self, x: Tensor, directions: Tensor) -> Tensor:
        """x (B, T, width) -> (B, T, width).

        Queries and keys turn by the directions (T, 1, 1, size / 2, 2), each by its own (T, 2, 1, size / 2, 2), or by those
        of each sample (B, T, 2, 1, size / 2, 2).
        """
        qkv = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1))
        turned = rotate_pairs(qkv[:, :, :2], directions).transpose(1, 3)
        q, k = turned.unbind(2)  # (B, heads, T, size) each
        dropout = self.dropout if self.training else 0.0
        attended = attention(q, k, qkv[:, :, 2].transpose(1, 2), self.causal, dropout)
        x = x + self._drop(self.proj(attended.transpose(1, 2).flatten(2)))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Stack(nn.ModuleList):
    """Blocks one after the other, all of which turn queries and keys by the same angles."""

    def __init__(
        self, depth: int, width: int, heads: int, dropout: float, causal: bool = True
    ) -> None:
        super().__init__(Block(width, heads, dropout, causal) for _ in range(depth))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """x (B, T, width) -> (B, T, width); angles as from `rotary`, or with more dimensions as in Block.forward."""
        directions = rotary_directions(angles)
        for block in self:
            x = block(x, directions)
        return x


def attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, dropout: float = 0.0, max_scores: int = 2**22
) -> Tensor:
    """softmax(q k^T / sqrt(size)) v (Vaswani et al. 2017, eq. 1), all (B, heads, T, size); causal: up to each position.

    On a CPU in bf16 the backward pass of torch's own kernel takes eight times as long as plain products, so these are used,
    `max_scores` scores at a time: for more than these 8 MiB the operating system has to hand out fresh pages at every step.
    Under torch.compile all scores are computed at once, since each part would be compiled separately.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, dropout_p=dropout)
    T = q.shape[-2]
    mask = torch.full((T, T), -torch.inf if causal else 0.0, dtype=q.dtype).triu(1)
    attended = []
    with torch.autocast("cpu", enabled=False):
        part = q.shape[:2].numel() if torch.compiler.is_compiling() else max(1, max_scores // T**2)
        rows = ((q * q.shape[-1] ** -0.5).flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        for queries, keys, values in zip(*(x.split(part) for x in rows), strict=True):
            scores = (queries @ keys.mT).add_(mask)
            attended.append(F.dropout(scores.softmax(-1), dropout) @ values)
        return torch.cat(attended).view_as(v)


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm (Zhang & Sennrich 2019, eq. 4) with fewer passes over the memory when it trains on a CPU."""

    def forward(self, x: Tensor) -> Tensor:
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
