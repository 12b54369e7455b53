"""Transformer blocks one position at a time, with cached keys and values: the inner loop of sampling, laid out for speed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.precision import without_autocast
from prior.decoding.products import pack_linear
from prior.models.transformer import Block, rotary_directions, rotate_pairs

ROOM = 64  # positions that the cache grows by


class KVSteps(nn.Module):
    """Causal blocks with a cache of the keys and values so far; takes the next position's input and returns its output.

    A step is a dozen small operations per block, so their number counts. The norms' scales, the square root of the width and
    the attention's scale are folded into the weights that follow, and these are packed once, in autocast's type if it is on.
    Attention reads the whole cache with the empty positions masked: a slice of it would be copied before each product.
    """

    turns: Tensor
    least: Tensor
    past: Tensor
    hidden: Tensor

    def __init__(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> None:
        """angles (T, 1 or 2, 1, size / 2) as in the blocks' forward; n samples."""
        super().__init__()
        device = angles.device
        self.dtype = product_dtype(device)
        size = 2 * angles.shape[-1]
        with torch.no_grad(), without_autocast(device):
            weights = [fold_weights(block) for block in blocks if isinstance(block, Block)]
            self.products = [[pack_linear(w.to(self.dtype)) for w in parts] for parts in weights]
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        width = len(weights[0][1])
        self.n, self.heads, self.size = n, width // size, size
        self.t = 0  # the next position
        self.register_buffer("least", minimal_length(width, device))
        shape = (len(self.products), 2, n, self.heads, 0, size)  # blocks, keys and values, ...
        self.register_buffer("past", torch.empty(shape, dtype=self.dtype, device=device))
        self.register_buffer("hidden", torch.empty(1, 1, 0, dtype=self.dtype, device=device))

    def restart(self) -> None:
        """Start again at the first position."""
        self.t = 0
        self.hidden.fill_(-torch.inf)

    def make_room(self) -> None:
        """Extend the cache by `ROOM` positions, or by as many as the grid has left."""
        more = min(ROOM, len(self.turns) - self.past.shape[-2])
        self.past = F.pad(self.past, (0, 0, 0, more))
        self.hidden = F.pad(self.hidden, (0, more), value=-torch.inf)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n, width) at the next position -> the last block's output there (n, width) float32, without gradients."""
        if self.t == self.past.shape[-2]:
            self.make_room()
        self.hidden[..., self.t] = 0
        with without_autocast(x.device):
            x = self._step(x.float(), self.turns[self.t])
        self.t += 1
        return x

    def _step(self, x: Tensor, turn: Tensor) -> Tensor:
        t = self.t
        for (qkv_in, proj, gate_up, down), past in zip(self.products, self.past, strict=True):
            qkv = qkv_in(normalise(x, self.least).to(self.dtype)).view(
                self.n, 3, self.heads, self.size
            )
            pairs = qkv[:, :2].unflatten(-1, (-1, 2))
            if self.dtype == torch.float32:
                torch.view_as_complex(pairs).mul_(turn)
            else:
                pairs.copy_(torch.view_as_real(torch.view_as_complex(pairs.float()) * turn))
            past[:, :, :, t] = qkv[:, 1:].transpose(0, 1)
            k, v = past.flatten(1, 2)  # keys and values
            scores = torch.baddbmm(self.hidden, qkv[:, 0].reshape(-1, 1, self.size), k.mT)
            x = x + proj(torch.bmm(scores.softmax(-1), v).view(self.n, -1))
            gate, up = gate_up(normalise(x, self.least).to(self.dtype)).chunk(2, -1)
            x = x + down(F.silu(gate).mul_(up))
        return x


class CompiledKVSteps(nn.Module):
    """`KVSteps` as one compiled graph for all positions; uncompiled it would be a tenth slower than KVSteps.

    The position is a tensor, the cache has room for all positions, and those that are not filled yet are masked. On a GPU
    the graph is replayed as a CUDA graph, so all of its state is in buffers, whose addresses do not change.
    """

    directions: Tensor
    least: Tensor
    place: Tensor

    def __init__(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> None:
        """As in `KVSteps`, for n samples at most; smaller batches are padded with zeros."""
        super().__init__()
        device = angles.device
        self.n, self.dtype = n, product_dtype(device)
        self.t = 0  # the next position
        stack = [block for block in blocks if isinstance(block, Block)]
        with torch.no_grad(), without_autocast(device):
            self.layers = nn.ModuleList(
                CompiledLayer(block, self.dtype, n, len(angles)) for block in stack
            )
            self.register_buffer("directions", rotary_directions(angles))
        self.register_buffer("least", minimal_length(stack[0].qkv.in_features, device))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64, device=device))
        options: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        self.compiled_step = torch.compile(self._step, fullgraph=True, dynamic=False, **options)

    def restart(self) -> None:
        """Start again at the first position."""
        self.t = 0
        self.place.zero_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n or fewer, width) at the next position -> the last block's output there, float32, without gradients."""
        padded = F.pad(x.float(), (0, 0, 0, self.n - len(x)))
        with without_autocast(x.device):
            y: Tensor = self.compiled_step(padded)
            y = y[: len(x)].clone()  # the next replay of a CUDA graph overwrites its output
        self.t += 1
        self.place += 1
        return y

    def _step(self, x: Tensor) -> Tensor:
        empty = torch.arange(len(self.directions), device=x.device) > self.place
        mask = torch.zeros(empty.shape, dtype=self.dtype, device=x.device)
        mask = mask.masked_fill(empty, -torch.inf)
        directions = self.directions.index_select(0, self.place)[0]
        for layer in self.layers:
            x = layer(x, self.place, mask, directions, self.least)
        return x


class CompiledLayer(nn.Module):
    """A block of `CompiledKVSteps`: its folded weights and its cache.

    Each block's cache is a tensor by itself: a shared one would be copied as a whole for every position written.
    """

    qkv: Tensor
    proj: Tensor
    gate_up: Tensor
    down: Tensor
    past: Tensor

    def __init__(self, block: Block, dtype: torch.dtype, n: int, T: int) -> None:
        super().__init__()
        names = ("qkv", "proj", "gate_up", "down")
        for name, weight in zip(names, fold_weights(block), strict=True):
            self.register_buffer(name, weight.detach().to(dtype).clone())
        size = len(self.proj) // block.heads
        past = torch.zeros(2, n, block.heads, T, size, dtype=dtype, device=self.proj.device)
        self.register_buffer("past", past)

    def forward(
        self, x: Tensor, place: Tensor, mask: Tensor, directions: Tensor, least: Tensor
    ) -> Tensor:
        dtype, size = self.past.dtype, self.past.shape[-1]
        qkv = F.linear(normalise(x, least).to(dtype), self.qkv).view(len(x), 3, -1, size)
        turned = rotate_pairs(qkv[:, :2], directions)
        self.past[:, :, :, place] = torch.stack([turned[:, 1], qkv[:, 2]])[:, :, :, None]
        k, v = self.past.flatten(1, 2)
        scores = torch.bmm(turned[:, 0].reshape(-1, 1, size), k.mT) + mask
        x = x + F.linear(torch.bmm(scores.softmax(-1), v).view(len(x), -1), self.proj)
        gate, up = F.linear(normalise(x, least).to(dtype), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


class StepCache:
    """Compiled steps, one CompiledKVSteps per stack of blocks, which the batches and windows of one `generate` share.

    The blocks' weights must not change while the cache is in use, and only one decoder at a time may use it.
    """

    def __init__(self) -> None:
        self._steps: dict[nn.ModuleList, CompiledKVSteps] = {}

    def steps(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> CompiledKVSteps:
        """The steps of n samples at the first position: those of an earlier call if they have room for n."""
        if blocks not in self._steps or self._steps[blocks].n < n:
            self._steps[blocks] = CompiledKVSteps(blocks, angles, n)
        self._steps[blocks].restart()
        return self._steps[blocks]


def make_steps(
    blocks: nn.ModuleList, angles: Tensor, n: int, cache: StepCache | None = None
) -> KVSteps | CompiledKVSteps:
    """The steps of n samples at the first position: compiled ones out of the `cache`, or new ones without it."""
    return KVSteps(blocks, angles, n) if cache is None else cache.steps(blocks, angles, n)


def product_dtype(device: torch.device) -> torch.dtype:
    """The type of the products: autocast's if it is on, else float32."""
    return (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else torch.float32
    )


def minimal_length(width: int, device: torch.device) -> Tensor:
    """The length that stands for RMSNorm's default epsilon: it is added to that of a vector in quadrature."""
    return torch.full((), (width * torch.finfo(torch.float32).eps) ** 0.5, device=device)


def normalise(x: Tensor, least: Tensor) -> Tensor:
    """x (n, width) divided by its length: RMSNorm without its factors, in less than half as many operations."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)


def fold_weights(block: Block) -> list[Tensor]:
    """A block's weights of qkv, proj, gate_up and down, with the scales before them multiplied in."""
    width = block.qkv.in_features
    size = width // block.heads
    q, k, v = block.qkv.weight.chunk(3)
    qkv = torch.cat([q * size**-0.5, k, v]) * (block.norm1.weight * width**0.5)
    gate_up = block.gate_up.weight * (block.norm2.weight * width**0.5)
    return [qkv, block.proj.weight, gate_up, block.down.weight]
