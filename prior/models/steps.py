"""A transformer one position at a time: what sampling is made of, so laid out for speed."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.models.transformer import Block


class Steps(nn.Module):
    """Causal blocks that remember the keys and values of the positions so far; the next position in, its output out.

    A step is a dozen small operations a block, so their number counts. The norms' scales, the square root of the width and
    the attention's scale are folded into the weights that follow; these are kept transposed, as one product wants them, and
    in autocast's type where that is on.

    `static` steps are all of one shape, as CUDA graphs want them: they look at all T positions, those to come masked.
    """

    turns: Tensor
    least: Tensor
    past: Tensor
    ahead: Tensor

    def __init__(self, blocks: nn.ModuleList, angles: Tensor, n: int, static: bool = False) -> None:
        """angles (T, 1 or 2, 1, size / 2) as for the blocks' forward; n samples."""
        super().__init__()
        device = angles.device
        cast = torch.is_autocast_enabled(device.type)
        self.dtype = torch.get_autocast_dtype(device.type) if cast else torch.float32
        T, size = len(angles), 2 * angles.shape[-1]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            self.weights = [[w.to(self.dtype) for w in folded(block)] for block in blocks if isinstance(block, Block)]
            self.register_buffer("turns", torch.polar(torch.ones_like(angles), angles))
        self.n, self.heads, self.size, self.static, self.t = n, len(self.weights[0][1]) // size, size, static, 0
        width, eps = len(self.weights[0][0]), torch.finfo(torch.float32).eps
        self.register_buffer("least", torch.tensor((width * eps) ** 0.5, device=device))  # as RMSNorm has it by default
        shape = len(self.weights), 2, n, self.heads, T, size
        self.register_buffer("past", torch.zeros(shape, dtype=self.dtype, device=device))  # keys and values
        self.register_buffer("ahead", torch.full((T, T), -torch.inf, dtype=self.dtype, device=device).triu(1))

    def restart(self) -> None:
        """The next position is the first again."""
        self.t = 0

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """x (n, width) of the next position -> (n, width) float32, the last block's output there, without gradients."""
        t, self.t = self.t, self.t + 1
        with torch.autocast(x.device.type, enabled=False):
            return self._step(x.float(), torch.tensor(t, device=x.device) if self.static else t)

    def _step(self, x: Tensor, t: int | Tensor) -> Tensor:
        turn = self.turns[t]
        for (qkv_in, proj, gate_up, down), past in zip(self.weights, self.past, strict=True):
            qkv = torch.mm(normal(x, self.least).to(self.dtype), qkv_in).view(self.n, 3, self.heads, self.size)
            turned = torch.view_as_real(torch.view_as_complex(qkv[:, :2].float().unflatten(-1, (-1, 2))) * turn).flatten(-2)
            past[0, :, :, t], past[1, :, :, t] = turned[:, 1], qkv[:, 2]
            seen = past if isinstance(t, Tensor) else past[:, :, :, : t + 1]
            k, v = seen.flatten(1, 2)
            scores = torch.bmm(turned[:, 0].reshape(-1, 1, self.size).to(self.dtype), k.mT)
            if isinstance(t, Tensor):
                scores = scores + self.ahead[t]
            attended = torch.bmm(scores.softmax(-1), v).view(self.n, -1)
            x = added(x, attended, proj)
            gate, up = torch.mm(normal(x, self.least).to(self.dtype), gate_up).chunk(2, -1)
            x = added(x, F.silu(gate).mul_(up), down)
        return x


def normal(x: Tensor, least: Tensor) -> Tensor:
    """x (n, width) over its length; RMSNorm without its factors, and with less than half its operations."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)


def added(x: Tensor, y: Tensor, weight: Tensor) -> Tensor:
    """x + y @ weight, x (n, width) float32."""
    return torch.addmm(x, y, weight) if weight.dtype == x.dtype else x + torch.mm(y, weight)


def folded(block: Block) -> list[Tensor]:
    """A block's four weights, transposed, with what stands before them multiplied in."""
    width = block.qkv.in_features
    size = width // block.heads
    q, k, v = block.qkv.weight.chunk(3)
    qkv = torch.cat([q * size**-0.5, k, v]) * (block.norm1.weight * width**0.5)
    gate_up = block.gate_up.weight * (block.norm2.weight * width**0.5)
    return [weight.t().contiguous() for weight in (qkv, block.proj.weight, gate_up, block.down.weight)]
