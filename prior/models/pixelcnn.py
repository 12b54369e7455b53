"""Masked convolutions over code grids."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.errors import InputError
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding


class PixelCNN(Autoregressive):
    """Gated PixelCNN (van den Oord et al. 2016b, section 2 and figure 2): a vertical stack of convolutions reads the rows
    above, a horizontal one the vertical one and the row so far, and together they have no blind spot.

    With r = depth * (kernel // 2), codes are seen up to r + 1 rows above, r columns to either side, and r + 1 to the left.
    Unlike in the paper each position has a vector of its own, by which a code is told from the nothing around the grid.
    """

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        inputs: str = "codes",
        width: int = 96,
        depth: int = 8,
        kernel: int = 5,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__(single_codebook(codebook), grid, classes, token_dropout)
        if kernel < 3 or kernel % 2 == 0:
            raise InputError(
                f"prior.kernel={kernel} must be odd and at least 3, a centre and as much on each side; use prior.kernel=5"
            )
        self.reach = kernel // 2
        self.read = CodeEmbedding(codebook[0], width, inputs)
        self.place = nn.Parameter(torch.zeros(width, *self.grid))
        self.drop = nn.Dropout(dropout)
        down = (self.reach + 1, 2 * self.reach + 1)
        self.vertical = nn.ModuleList(
            nn.Conv2d(width, 2 * width, down, bias=False) for _ in range(depth)
        )
        self.horizontal = nn.ModuleList(
            Horizontal(width, self.reach, dropout) for _ in range(depth)
        )
        self.labels = LabelEmbedding(classes, 2 * depth * 2 * width)
        self.last, self.head = nn.Conv2d(width, width, 1), nn.Conv2d(width, self.K, 1)
        nn.init.normal_(self.place, std=0.02)
        for p in self.vertical.parameters():
            nn.init.normal_(
                p, std=2 / p[0].numel() ** 0.5
            )  # the gate halves what is small, and nothing leads past it here
        for p in self.head.parameters():
            nn.init.zeros_(p)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        x = rearrange(self.read(codes), "b (h w) c -> b c h w", w=self.grid[1])
        # The first layer's mask A as a shift of what it reads: then no position holds its own code, and all masks are B.
        v = self.drop(F.pad(x, (0, 0, 1, -1)) + self.place)
        h = self.drop(F.pad(x, (1, -1)) + self.place)
        for vertical, horizontal, (above, beside) in zip(
            self.vertical, self.horizontal, self.told(len(x), labels), strict=True
        ):
            a = vertical(F.pad(v, (self.reach, self.reach, self.reach, 0))) + above
            v, h = gate(a), horizontal(F.pad(h, (self.reach, 0)), a, beside)
        return rearrange(self.logits(h), "b K h w -> b (h w) K")

    def told(self, n: int, labels: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Each layer's biases, V^T h of eq. 4, in the vertical and in the horizontal stack, (n, 2 * width, 1, 1) each."""
        biases = self.labels(n, labels)[:, :, None, None].chunk(2 * len(self.vertical), 1)
        return list(zip(biases[::2], biases[1::2], strict=True))

    def logits(self, h: Tensor) -> Tensor:
        """(n, width, r, c) of the last layer -> (n, K, r, c)."""
        logits: Tensor = self.head(F.relu(self.last(F.relu(h))))
        return logits.float()

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        return Remembering(self, n, labels)


class Horizontal(nn.Module):
    """A layer of the horizontal stack, with its gate and residual connection."""

    def __init__(self, width: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.reach = reach
        self.conv = nn.Conv2d(width, 2 * width, (1, reach + 1), bias=False)
        self.across = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.drop, self.out = nn.Dropout(dropout), nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor, a: Tensor, bias: Tensor) -> Tensor:
        """h (n, width, r, reach + c) and a (n, 2 * width, r, c) of the vertical layer -> h (n, width, r, c) of the next."""
        found = gate(self.conv(h) + self.across(a) + bias)
        return h[..., self.reach :] + self.out(self.drop(found))


def gate(x: Tensor) -> Tensor:
    """x (n, 2 * width, r, c) -> tanh of one half times sigmoid of the other (n, width, r, c) (eq. 2)."""
    f, g = x.chunk(2, 1)
    return f.tanh() * g.sigmoid()


class Remembering:
    """A decoder that computes each position of each layer once: the vertical stack, which depends on the rows above alone,
    row by row, the horizontal one code by code."""

    def __init__(self, model: PixelCNN, n: int, labels: Tensor | None) -> None:
        self.model, self.told, self.t = model, model.told(n, labels), 0
        (width, _, columns), reach, blank = model.place.shape, model.reach, model.place.new_zeros
        self.outside = blank(n, width, 1, 1)
        self.row = [self.outside] * columns  # of the last codes, one a column
        self.rows = [
            blank(n, width, reach + 1, reach + columns + reach) for _ in model.vertical
        ]  # what each layer reads

    def __call__(self, before: Tensor | None) -> Tensor:
        row, column = divmod(self.t, self.model.grid[1])
        if before is not None:
            self.row[column - 1] = self.model.read(before)[:, :, None, None]
        if column == 0:
            self._begin(row)
        h = (self.row[column - 1] if column else self.outside) + self.model.place[
            :, row, column, None, None
        ]
        for i, horizontal in enumerate(self.model.horizontal):
            self.left[i] = torch.cat([self.left[i][..., 1:], h], 3)
            h = horizontal(self.left[i], self.above[i][..., column, None], self.told[i][1])
        self.t += 1
        return self.model.logits(h)[..., 0, 0]

    def _begin(self, row: int) -> None:
        reach = self.model.reach
        self.left = [self.outside.expand(-1, -1, -1, reach + 1)] * len(
            self.rows
        )  # what each layer reads in this row
        self.above: list[Tensor] = []  # what each vertical layer found in it
        v = torch.cat(self.row, 3) + self.model.place[:, None, row]
        for i, vertical in enumerate(self.model.vertical):
            self.rows[i] = torch.cat([self.rows[i][:, :, 1:], F.pad(v, (reach, reach))], 2)
            self.above.append(vertical(self.rows[i]) + self.told[i][0])
            v = gate(self.above[i])
