"""A transformer one position at a time: what sampling is made of, so laid out for speed."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.decoding.products import pack_linear
from prior.models.transformer import Block, rotary_directions, rotate_pairs

ROOM = 64  # positions that the memory grows by


class KVSteps(nn.Module):
    """Causal blocks that remember the keys and values of the positions so far; the next position in, its output out.

    A step is a dozen small operations a block, so their number counts. The norms' scales, the square root of the width and
    the attention's scale are folded into the weights that follow; these are laid out once, in autocast's type where that is
    on. Attention looks at the whole memory, what is still empty hidden: a part of it would be copied before each product.
    """

    turns: Tensor
    least: Tensor
    past: Tensor
    hidden: Tensor

    def __init__(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> None:
        """angles (T, 1 or 2, 1, size / 2) as for the blocks' forward; n samples."""
        super().__init__()
        device = angles.device
        self.dtype = product_dtype(device)
        size = 2 * angles.shape[-1]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            weights = [fold_weights(block) for block in blocks if isinstance(block, Block)]
            self.products = [[pack_linear(w.to(self.dtype)) for w in parts] for parts in weights]
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        width = len(weights[0][1])
        self.n, self.heads, self.size, self.t = n, width // size, size, 0
        self.register_buffer("least", minimal_length(width, device))
        self.register_buffer(
            "past",
            torch.empty(
                len(self.products), 2, n, self.heads, 0, size, dtype=self.dtype, device=device
            ),
        )
        self.register_buffer("hidden", torch.empty(1, 1, 0, dtype=self.dtype, device=device))

    def restart(self) -> None:
        """The next position is the first again."""
        self.t = 0
        self.hidden.fill_(-torch.inf)

    def make_room(self) -> None:
        """Keep `ROOM` positions more, or as many as there will be."""
        more = min(ROOM, len(self.turns) - self.past.shape[-2])
        self.past = F.pad(self.past, (0, 0, 0, more))
        self.hidden = F.pad(self.hidden, (0, more), value=-torch.inf)

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n, width) of the next position -> (n, width) float32, the last block's output there, without gradients."""
        if self.t == self.past.shape[-2]:
            self.make_room()
        self.hidden[..., self.t] = 0
        with torch.autocast(x.device.type, enabled=False):
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
    """What `Steps` does as one compiled graph for every position: the position is a tensor, keys and values have room for all,
    and what is not there yet is hidden. Uncompiled it is a tenth slower than `Steps`.

    On a GPU the graph is played as a CUDA graph, for which all that it keeps lies in buffers, at addresses that stay.
    """

    towards: Tensor
    least: Tensor
    place: Tensor

    def __init__(self, blocks: nn.ModuleList, angles: Tensor, n: int) -> None:
        """As of `Steps`; of n samples at most, fewer are filled up with nothing."""
        super().__init__()
        device = angles.device
        self.n, self.t, self.dtype = n, 0, product_dtype(device)
        stack = [block for block in blocks if isinstance(block, Block)]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.layers = nn.ModuleList(
                CompiledLayer(block, self.dtype, n, len(angles)) for block in stack
            )
            self.register_buffer("towards", rotary_directions(angles))
        self.register_buffer("least", minimal_length(stack[0].qkv.in_features, device))
        self.register_buffer("place", torch.zeros(1, dtype=torch.int64, device=device))
        how: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
        self.quick = torch.compile(self._step, fullgraph=True, dynamic=False, **how)

    def restart(self) -> None:
        """The next position is the first again."""
        self.t = 0
        self.place.zero_()

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n or fewer, width) of the next position -> as many, float32, the last block's output there, without gradients."""
        whole = F.pad(x.float(), (0, 0, 0, self.n - len(x)))
        with torch.autocast(x.device.type, enabled=False):
            found: Tensor = self.quick(whole)[
                : len(x)
            ].clone()  # what a CUDA graph gives is written over by its next run
        self.t += 1
        self.place += 1
        return found

    def _step(self, x: Tensor) -> Tensor:
        hidden = torch.arange(len(self.towards), device=x.device) > self.place
        mask = torch.zeros(hidden.shape, dtype=self.dtype, device=x.device).masked_fill(
            hidden, -torch.inf
        )
        towards = self.towards.index_select(0, self.place)[0]
        for layer in self.layers:
            x = layer(x, self.place, mask, towards, self.least)
        return x


class CompiledLayer(nn.Module):
    """A block of `CompiledSteps`: its folded weights, and its memory, each a tensor by itself, or all of it would be copied for
    every position that is written."""

    qkv: Tensor
    proj: Tensor
    gate_up: Tensor
    down: Tensor
    past: Tensor

    def __init__(self, block: Block, dtype: torch.dtype, n: int, T: int) -> None:
        super().__init__()
        for name, weight in zip(
            ("qkv", "proj", "gate_up", "down"), fold_weights(block), strict=True
        ):
            self.register_buffer(name, weight.detach().to(dtype).clone())
        size = len(self.proj) // block.heads
        self.register_buffer(
            "past", torch.zeros(2, n, block.heads, T, size, dtype=dtype, device=self.proj.device)
        )

    def forward(
        self, x: Tensor, place: Tensor, mask: Tensor, towards: Tensor, least: Tensor
    ) -> Tensor:
        dtype, size = self.past.dtype, self.past.shape[-1]
        qkv = F.linear(normalise(x, least).to(dtype), self.qkv).view(len(x), 3, -1, size)
        turned = rotate_pairs(qkv[:, :2], towards)
        self.past[:, :, :, place] = torch.stack([turned[:, 1], qkv[:, 2]])[:, :, :, None]
        k, v = self.past.flatten(1, 2)
        scores = torch.bmm(turned[:, 0].reshape(-1, 1, size), k.mT) + mask
        x = x + F.linear(torch.bmm(scores.softmax(-1), v).view(len(x), -1), self.proj)
        gate, up = F.linear(normalise(x, least).to(dtype), self.gate_up).chunk(2, -1)
        return x + F.linear(F.silu(gate) * up, self.down)


Kept = dict[nn.Module, CompiledKVSteps]  # the compiled steps of each stack of blocks


def make_steps(
    blocks: nn.ModuleList, angles: Tensor, n: int, kept: Kept | None = None
) -> KVSteps | CompiledKVSteps:
    """The steps of n samples, from the first position on: with `kept` compiled ones, those of earlier samples where they have
    room, so that no two decoders can use them at a time, and the blocks must have stayed as they were."""
    if kept is None:
        return KVSteps(blocks, angles, n)
    if blocks not in kept or kept[blocks].n < n:
        kept[blocks] = CompiledKVSteps(blocks, angles, n)
    kept[blocks].restart()
    return kept[blocks]


def product_dtype(device: torch.device) -> torch.dtype:
    """The type that products are made in: autocast's where that is on."""
    return (
        torch.get_autocast_dtype(device.type)
        if torch.is_autocast_enabled(device.type)
        else torch.float32
    )


def minimal_length(width: int, device: torch.device) -> Tensor:
    """The length that RMSNorm's epsilon, its default, adds to that of a vector."""
    return torch.tensor((width * torch.finfo(torch.float32).eps) ** 0.5, device=device)


def normalise(x: Tensor, least: Tensor) -> Tensor:
    """x (n, width) over its length; RMSNorm without its factors, and with less than half its operations."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)


def fold_weights(block: Block) -> list[Tensor]:
    """A block's four weights, with what stands before them multiplied in."""
    width = block.qkv.in_features
    size = width // block.heads
    q, k, v = block.qkv.weight.chunk(3)
    qkv = torch.cat([q * size**-0.5, k, v]) * (block.norm1.weight * width**0.5)
    gate_up = block.gate_up.weight * (block.norm2.weight * width**0.5)
    return [qkv, block.proj.weight, gate_up, block.down.weight]
