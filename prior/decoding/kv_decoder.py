"""Transformer blocks with cached keys and values, a position or a window of positions at a time: the inner loop of sampling,
laid out for speed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.precision import at_least_float32, without_autocast
from prior.decoding.products import pack_linear
from prior.models.transformer import EPSILON, Block, rotary_directions, rotate_pairs

ROOM = 16  # positions that a cache grows by, at least, and a multiple of which it holds

Multiply = Callable[[Tensor], Tensor]
Watch = Callable[[Tensor, Tensor], None]
Packed = TypeVar("Packed")


@dataclass
class PackedBlock:
    """The products of a block, with the scales before them in the weights."""

    qkv: Multiply
    proj: Multiply
    gate_up: Multiply
    down: Multiply


class PackedBlocks:
    """A stack of causal blocks as products with packed weights, in autocast's type if it is on; `high` is that of all else.

    The norms' scales, the square root of the width and the attention's scale are folded into the weights that follow. `turns`
    (T, 3, 1, size / 2) turn the queries and the keys of each position, and leave the values.
    """

    def __init__(self, blocks: nn.ModuleList, angles: Tensor) -> None:
        """angles (T, 1 or 2, 1, size / 2) as in the blocks' forward."""
        self.device = angles.device
        stack = [block for block in blocks if isinstance(block, Block)]
        weight = stack[0].qkv.weight
        self.dtype, self.high = product_dtype(self.device, weight), high_dtype(weight)
        self.width, self.heads = stack[0].qkv.in_features, stack[0].heads
        self.size = self.width // self.heads
        with torch.no_grad(), without_autocast(self.device):
            self.blocks = [self._pack(block) for block in stack]
            turns = torch.polar(torch.ones_like(angles), angles).expand(-1, 2, -1, -1)
            self.turns = torch.cat([turns, torch.ones_like(turns[:, :1])], 1)
        self.least = minimal_length(self.width, self.device, self.high)

    def _pack(self, block: Block) -> PackedBlock:
        return PackedBlock(*(pack_linear(w.to(self.dtype)) for w in fold_weights(block)))


class KVCache:
    """Keys and values of all blocks: `past`, (2, n, heads, length, size) for each, of which `length` grows up to T.

    Attention is at the speed of the memory, and reads what is contiguous twice as fast as the first positions of each head in a
    cache for all of them. So a cache is laid out anew when it grows. The storage for all positions is taken once, with that of
    one block more to lay out the next one in; fresh memory costs the system a page fault every 4 KiB. Positions that are not
    filled hold numbers of earlier samples, or 0: they have to be masked.
    """

    def __init__(
        self, depth: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        """shape (n, heads, T, size), n and T at most."""
        self.capacity, self.heads, self.T, self.size = shape
        area = 2 * self.capacity * self.heads * self.T * self.size
        storages = [torch.zeros(area, dtype=dtype, device=device) for _ in range(depth + 1)]
        self.spare = storages.pop()
        self.storages = storages
        self.restart(self.capacity)

    def restart(self, n: int) -> None:
        """Empty the cache for n samples, up to its capacity."""
        self.n, self.length = n, min(ROOM, self.T)
        self.past = [self._lay_out(storage) for storage in self.storages]

    def make_room(self, filled: int, needed: int) -> None:
        """Grow to `needed` positions or more, of which the first `filled` stay."""
        room = max(needed, filled + filled // 4)
        self.length = min(-(-room // ROOM) * ROOM, self.T)
        self._move(lambda past: past[:, :, :, :filled], filled)

    def select(self, samples: Tensor) -> None:
        """Keep these samples only, in this order; samples (m,) int64."""
        self.n = len(samples)
        self._move(lambda past: past.index_select(1, samples), self.length)

    def copy(self, other: "KVCache", filled: int) -> None:
        """Hold what another cache of as many samples has at the first `filled` positions."""
        if filled > self.length:
            self.make_room(0, filled)
        for own, past in zip(self.past, other.past, strict=True):
            own[:, :, :, :filled] = past[:, :, :, :filled]

    def _lay_out(self, storage: Tensor) -> Tensor:
        shape = (2, self.n, self.heads, self.length, self.size)
        return storage[: 2 * self.n * self.heads * self.length * self.size].view(shape)

    def _move(self, take: Callable[[Tensor], Tensor], filled: int) -> None:
        """Lay out each block's cache in the spare storage, with what `take` takes of it as the first `filled` positions."""
        for i, past in enumerate(self.past):
            self.past[i] = self._lay_out(self.spare)
            self.past[i][:, :, :, :filled] = take(past)
            self.storages[i], self.spare = self.spare, self.storages[i]


class CachedBlocks:
    """Packed blocks on `window` positions of each of n samples at once, with a cache of the positions before.

    A step of sampling is some twenty small operations per block, so their number counts, and that of the views between them:
    what a block computes goes through the same memory in each block and step, of which all views are taken once.
    """

    def __init__(self, packed: PackedBlocks, n: int, T: int) -> None:
        """For n samples, or fewer, of T positions."""
        self.packed, self.capacity = packed, n
        shape = (n, packed.heads, T, packed.size)
        self.cache = KVCache(len(packed.blocks), shape, packed.dtype, packed.device)
        self.allot(n, 1)

    def allot(self, n: int, window: int) -> None:
        """Take the memory of a block for n samples and this window, and its views."""
        packed = self.packed
        heads, size, width = packed.heads, packed.size, packed.width
        low: dict[str, Any] = {"dtype": packed.dtype, "device": packed.device}
        high: dict[str, Any] = {"dtype": packed.high, "device": packed.device}
        self.n, self.window = n, window
        self.x = torch.zeros(n * window, width, **high)
        self.normalised = torch.zeros(n * window, width, **low)
        self.qkv = torch.zeros(n * window, 3 * width, **high)
        self.pairs = torch.view_as_complex(self.qkv.view(n, window, 3, heads, size // 2, 2))
        self.by_head = self.qkv.view(n, window, 3, heads, size).permute(2, 0, 3, 1, 4)
        self.turned = torch.zeros(3, n, heads, window, size, **low)
        self.queries, self.entries = self.turned[0], self.turned[1:]  # entries of the cache

    def run(
        self, x: Tensor, turns: Tensor, mask: Tensor, store: Callable[[Tensor, Tensor], object]
    ) -> Tensor:
        """x (n * window, width) -> the last block's output, float32 or float64 as the weights, a new tensor without gradients.

        turns (..., 3, 1, size / 2) of the positions; mask (n or 1, 1, window, length), added to the scores; `store` puts keys and
        values (2, n, heads, window, size) in their places in a block's cache.
        """
        with torch.inference_mode(), without_autocast(self.packed.device):
            self.x.copy_(x)
            for block, past in zip(self.packed.blocks, self.cache.past, strict=True):
                self.qkv.copy_(block.qkv(self.normalise()))
                self.pairs.mul_(turns)
                self.turned.copy_(self.by_head)
                store(past, self.entries)
                keys, values = past.unbind(0)
                attended = F.scaled_dot_product_attention(
                    self.queries, keys, values, mask, scale=1.0
                )
                # On a CPU it lies in memory as the reshape has it.
                self.x.add_(block.proj(attended.transpose(1, 2).reshape(self.x.shape)))
                gate, up = block.gate_up(self.normalise()).chunk(2, -1)
                self.x.add_(block.down(F.silu(gate).mul_(up)))
        return self.x.clone()  # outside of inference mode, where it may be used as any other

    def normalise(self) -> Tensor:
        """x divided by its length (`normalise`), in the type of the products."""
        length = torch.linalg.vector_norm(self.x, dim=-1, keepdim=True).hypot_(self.packed.least)
        return torch.div(self.x, length, out=self.normalised)


class KVSteps(CachedBlocks):
    """Causal blocks one position at a time: takes the next position's input and returns its output."""

    def __init__(
        self,
        blocks: nn.ModuleList,
        angles: Tensor,
        n: int,
        packed: PackedBlocks | None = None,
    ) -> None:
        """angles (T, 1 or 2, 1, size / 2) as in the blocks' forward; n samples; `packed` are these blocks if they are there."""
        super().__init__(packed or PackedBlocks(blocks, angles), n, len(angles))
        self.restart()

    def restart(self, n: int | None = None) -> None:
        """Start again at the first position, with n samples, up to its capacity, or with as many as before."""
        self.t = 0  # the next position
        self.cache.restart(self.n if n is None else n)
        if n is not None and n != self.n:
            self.allot(n, 1)
        self._hide()

    def go_on(self, past: KVCache, t: int) -> None:
        """Go on at position t, after what `past` has of the same samples at the positions before."""
        self.cache.copy(past, t)
        self.t = t
        self._hide()

    def _hide(self) -> None:
        """Mask the positions of the cache that are empty."""
        self.hidden = self.cache.past[0].new_full((1, 1, 1, self.cache.length), -torch.inf)
        self.hidden[..., : self.t] = 0

    def __call__(self, x: Tensor) -> Tensor:
        """x (n, width) at the next position -> the last block's output there (n, width), without gradients."""
        t = self.t
        if t == self.cache.length:
            self.cache.make_room(t, t + 1)
            self._hide()
        self.hidden[..., t] = 0
        self.t += 1
        turns = self.packed.turns[t]
        return self.run(
            x, turns, self.hidden, lambda past, entries: past[:, :, :, t : t + 1].copy_(entries)
        )


class KVWindows(CachedBlocks):
    """Causal blocks on a window of positions at a time, which starts at a position of its own for each sample.

    A window may begin before the end of the last one: what it holds replaces what was cached for its positions.
    """

    def __init__(
        self,
        blocks: nn.ModuleList,
        angles: Tensor,
        n: int,
        window: int,
        packed: PackedBlocks | None = None,
    ) -> None:
        """As in `KVSteps`. Windows may reach by up to `window` positions beyond the last one."""
        packed = packed or PackedBlocks(blocks, angles)
        self.beyond = window
        self.turns = torch.cat([packed.turns, packed.turns[-1:].expand(window, -1, -1, -1)])
        super().__init__(packed, n, len(self.turns))

    def restart(self, n: int) -> None:
        """Forget all positions; n samples, up to its capacity."""
        self.cache.restart(n)

    def select(self, samples: Tensor) -> None:
        """Keep these samples only, (m,) int64."""
        self.cache.select(samples)

    def go_on(self, past: KVCache, t: int) -> None:
        """Go on at position t or later, after what `past` has of the same samples at the positions before."""
        self.cache.copy(past, t)

    def __call__(self, x: Tensor, first: Tensor, end: int) -> Tensor:
        """x (n, W, width) at the positions first (n,) to first + W - 1 -> the last block's output there, float32.

        All positions before `first` must have been in a window. `end` is the largest first + W, known to the host.
        """
        n, W, _ = x.shape
        if (n, W) != (self.n, self.window):
            self.allot(n, W)
        if end > self.cache.length:
            self.cache.make_room(self.cache.length, end)
        heads, size, length = self.packed.heads, self.packed.size, self.cache.length
        places = first[:, None] + torch.arange(W, device=x.device)
        empty = torch.arange(length, device=x.device) > places[..., None]  # (n, W, length)
        mask = torch.zeros(empty.shape, dtype=self.packed.dtype, device=x.device)
        mask = mask.masked_fill_(empty, -torch.inf)[:, None]
        rows = torch.arange(n * heads, device=x.device).view(n, heads, 1) * length
        slots = (rows + places[:, None]).flatten()  # (n * heads * W,)

        def store(past: Tensor, entries: Tensor) -> None:
            past.view(2, -1, size).index_copy_(1, slots, entries.view(2, -1, size))

        return self.run(x.flatten(0, 1), self.turns[places], mask, store).view(n, W, -1)


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
        self.capacity, self.dtype = n, product_dtype(device)
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

    def restart(self, n: int | None = None) -> None:
        """Start again at the first position; whatever n is, there is room for `capacity` samples."""
        self.t = 0
        self.place.zero_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n or fewer, width) at the next position -> the last block's output there, float32, without gradients."""
        padded = F.pad(x.float(), (0, 0, 0, self.capacity - len(x)))
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
    """What the batches and windows of one `generate` share: packed weights, caches for as many samples as came together so far,
    and with `compiled` the graphs of CompiledKVSteps. `passes` counts the forward passes, each once for every sample in it.

    `watch` is called with places (n, r), or (r,) for all samples, and codes (n, r) as soon as these are drawn, by all priors but
    those that draw in windows (sampler.parallel) or ignore the cache. What it raises ends the drawing.

    The blocks' weights must not change while the cache is in use, and only one decoder at a time may use it.
    """

    def __init__(self, compiled: bool = True, watch: Watch | None = None) -> None:
        self.compiled, self.watch = compiled, watch
        self.passes = 0
        self._packed: dict[Any, Any] = {}
        self._steps: dict[nn.ModuleList, KVSteps | CompiledKVSteps] = {}
        self._windows: dict[nn.ModuleList, KVWindows] = {}

    def pack(self, key: Any, make: Callable[[], Packed]) -> Packed:
        """What `make` makes of the module `key`: once."""
        if key not in self._packed:
            self._packed[key] = make()
        packed: Packed = self._packed[key]
        return packed

    def steps(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> KVSteps | CompiledKVSteps:
        """The steps of n samples at the first position: those of an earlier call if they have room for n."""
        steps = self._steps.get(blocks)
        if steps is None or steps.capacity < n:
            steps = self._steps[blocks] = self._make_steps(blocks, angles, n)
        steps.restart(n)
        return steps

    def _make_steps(
        self, blocks: nn.ModuleList, angles: Tensor, n: int
    ) -> KVSteps | CompiledKVSteps:
        if self.compiled:
            return CompiledKVSteps(blocks, angles, n)
        return KVSteps(blocks, angles, n, self._pack_blocks(blocks, angles))

    def windows(self, blocks: nn.ModuleList, angles: Tensor, n: int, window: int) -> KVWindows:
        """Windows of n samples, of which none has a position yet."""
        windows = self._windows.get(blocks)
        if windows is None or windows.capacity < n or windows.beyond < window:
            packed = self._pack_blocks(blocks, angles)
            self._windows[blocks] = windows = KVWindows(blocks, angles, n, window, packed)
        windows.restart(n)
        return windows

    def _pack_blocks(self, blocks: nn.ModuleList, angles: Tensor) -> PackedBlocks:
        return self.pack(blocks, lambda: PackedBlocks(blocks, angles))


def make_steps(
    blocks: nn.ModuleList, angles: Tensor, n: int, cache: StepCache | None = None
) -> KVSteps | CompiledKVSteps:
    """The steps of n samples at the first position: out of the `cache`, or new ones without it."""
    return KVSteps(blocks, angles, n) if cache is None else cache.steps(blocks, angles, n)


def pack_head(norm: nn.RMSNorm, head: nn.Linear) -> Multiply:
    """A function from the last block's output x (n, width) to its logits head(norm(x)) (n, K), float32 or float64 as the weights,
    without gradients."""
    weight = head.weight
    dtype = product_dtype(weight.device, weight)
    least = minimal_length(weight.shape[1], weight.device, high_dtype(weight))
    with torch.no_grad(), without_autocast(weight.device):
        folded = weight * (norm.weight * weight.shape[1] ** 0.5)
        multiply = pack_linear(folded.to(dtype))

    def predict(x: Tensor) -> Tensor:
        with torch.no_grad(), without_autocast(x.device):
            return at_least_float32(multiply(normalise(x, least).to(dtype)))

    return predict


def product_dtype(device: torch.device, weight: Tensor | None = None) -> torch.dtype:
    """The type of the products: autocast's if it is on, else float32, or float64 for a weight that is."""
    if torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return torch.float32 if weight is None else high_dtype(weight)


def high_dtype(weight: Tensor) -> torch.dtype:
    """The type of what is not a product: float32, or float64 for a weight that is."""
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def minimal_length(width: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The length that stands for RMSNorm's epsilon: it is added to that of a vector in quadrature."""
    return torch.full((), (width * EPSILON) ** 0.5, device=device, dtype=dtype)


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
