"""Attention with 2-D rotary positions and a cache, and the block around it."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from data.errors import InputError


@dataclass
class Cache:
    """Keys and values of the positions so far, (B, heads, t, width / heads), one pair a layer."""

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k and v of new positions; all keys and values of the layer."""
        if layer in self.layers:
            old_k, old_v = self.layers[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.layers[layer] = k, v
        return k, v

    @property
    def t(self) -> int:
        """How many positions there are."""
        return self.layers[0][0].shape[2] if self.layers else 0


def head_size(width: int, heads: int) -> int:
    """The width of a head, which rotary positions want even."""
    if width % heads or (width // heads) % 2:
        raise InputError(f"prior.width={width} must be an even multiple of prior.heads={heads}; use prior.width={64 * heads}")
    return width // heads


def rotary(grid: tuple[int, int], size: int, base: float = 10_000.0) -> Tensor:
    """Angles (h*w, size / 2) of 2-D rotary embeddings in raster order: half of the pairs turn with the row, half with
    the column (RoPE, Su et al. 2021, eq. 15; in two dimensions as in LlamaGen)."""
    pairs = size // 2
    per_axis = [pairs - pairs // 2, pairs // 2]
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    angles = []
    for place, n in zip((rows, columns), per_axis, strict=True):
        speed = base ** (-torch.arange(n) / max(n, 1))
        angles.append(place.flatten()[:, None] * speed)
    return torch.cat(angles, 1)


def turn(x: Tensor, angles: Tensor) -> Tensor:
    """Turn the pairs of x (B, heads, t, size) by angles (t, size / 2)."""
    a, b = x.float().chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([a * cos - b * sin, a * sin + b * cos], -1).to(x.dtype)


class Block(nn.Module):
    """Pre-norm attention, of each position to those up to it or (not `causal`) to all, and SwiGLU (Shazeer 2020), without
    biases."""

    def __init__(self, width: int, heads: int, dropout: float, causal: bool = True) -> None:
        super().__init__()
        hidden = 32 * round(width * 8 / 3 / 32)  # as many weights as an MLP of 4 x width
        self.heads, self.dropout, self.causal = heads, dropout, causal
        self.norm1, self.norm2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.gate_up, self.down = nn.Linear(width, 2 * hidden, bias=False), nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor, layer: int, cache: Cache | None) -> Tensor:
        """x (B, t, width) -> (B, t, width); with a cache x is the next position alone."""
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (three h c) -> three b h t c", three=3, h=self.heads)
        q, k = turn(q, angles), turn(k, angles)
        if cache is not None:
            k, v = cache.extend(layer, k, v)
        dropout = self.dropout if self.training else 0.0
        # One query sees every cached key; is_causal would line it up with the first key alone.
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and cache is None, dropout_p=dropout)
        x = x + self._drop(self.proj(rearrange(attended, "b h t c -> b t (h c)")))
        gate, up = self.gate_up(self.norm2(x)).chunk(2, -1)
        return x + self._drop(self.down(F.silu(gate) * up))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def initialise(blocks: nn.ModuleList) -> None:
    """Weights as in GPT-2: those that write to the residual stream the smaller, the more of them there are."""
    for name, p in blocks.named_parameters():
        if p.ndim > 1:
            into_stream = name.endswith(("proj.weight", "down.weight"))
            nn.init.normal_(p, std=0.02 / (2 * len(blocks)) ** 0.5 if into_stream else 0.02)
