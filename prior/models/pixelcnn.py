"""Masked convolutions over code grids."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.precision import at_least_float32
from prior.decoding.kv_decoder import StepCache
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding


class PixelCNN(Autoregressive):
    """Gated PixelCNN (van den Oord et al. 2016b, section 2 and figure 2).

    A vertical stack of convolutions reads the rows above, a horizontal stack reads the vertical one and the current row;
    together they have no blind spot. With r = depth * (kernel // 2), the receptive field reaches r + 1 rows up, r columns
    to either side, and r + 1 to the left. Unlike in the paper, each position has a vector of its own, by which the model
    can tell a code of zeros from the padding around the grid. The codes of another image are a map that is resized to the grid and
    added to every layer (eq. 5).
    """

    takes_front = True

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        *,
        inputs: str,
        width: int,
        depth: int,
        kernel: int,
        dropout: float,
        token_dropout: float,
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
        size = (self.reach + 1, 2 * self.reach + 1)
        vertical = (nn.Conv2d(width, 2 * width, size, bias=False) for _ in range(depth))
        self.vertical = nn.ModuleList(vertical)
        horizontal = (Horizontal(width, self.reach, dropout) for _ in range(depth))
        self.horizontal = nn.ModuleList(horizontal)
        self.labels = LabelEmbedding(classes, 2 * depth * 2 * width)
        self.last, self.head = nn.Conv2d(width, width, 1), nn.Conv2d(width, self.K, 1)
        nn.init.normal_(self.place, std=0.02)
        for p in self.vertical.parameters():
            # Twice the usual: the gate halves small values, and this stack has no residual connection around it.
            nn.init.normal_(p, std=2 / p[0].numel() ** 0.5)
        for p in self.head.parameters():
            nn.init.zeros_(p)

    def read_front(self, codebook: Tensor, grid: tuple[int, int]) -> None:
        super().read_front(codebook, grid)
        width, num_biases = len(self.place), self.labels.vectors.shape[1]
        self.map_front = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, num_biases, 1)
        )

    @property
    def recomputed(self) -> list[nn.Module]:
        return list(self.horizontal)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        x = rearrange(self.read(codes), "b (h w) c -> b c h w", w=self.grid[1])
        # The first layer's mask A is a shift of its input: no position holds its own code then, and all masks are B.
        v = self.drop(F.pad(x, (0, 0, 1, -1)) + self.place)
        h = self.drop(F.pad(x, (1, -1)) + self.place)
        for vertical, horizontal, (v_bias, h_bias) in zip(
            self.vertical, self.horizontal, self.biases(x.shape[0], labels), strict=True
        ):
            a = vertical(F.pad(v, (self.reach, self.reach, self.reach, 0))) + v_bias
            v, h = gate(a), horizontal(F.pad(h, (self.reach, 0)), a, h_bias)
        return rearrange(self.logits(h), "b K h w -> b (h w) K")

    def biases(self, n: int, labels: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Each layer's label biases, V^T h of eq. 4, of its vertical and its horizontal stack, (n, 2 * width, 1, 1) each, or
        (n, 2 * width, h, w) with the codes of another image."""
        of_label = self.labels(n, labels)[:, :, None, None]
        if self.front is not None:
            read = self.front(n, labels)
            picture = rearrange(read, "b (h w) c -> b c h w", w=self.front.grid[1])
            resized = F.interpolate(picture, self.grid, mode="bilinear", align_corners=False)
            of_label = of_label + self.map_front(resized)
        biases = of_label.chunk(2 * len(self.vertical), 1)
        return list(zip(biases[::2], biases[1::2], strict=True))

    def logits(self, h: Tensor) -> Tensor:
        """The last layer's output (n, width, r, c) -> logits (n, K, r, c) float32."""
        logits: Tensor = self.head(F.relu(self.last(F.relu(h))))
        return at_least_float32(logits)

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        return CachedDecoder(self, n, labels)


class Horizontal(nn.Module):
    """A layer of the horizontal stack, with its gate and residual connection."""

    def __init__(self, width: int, reach: int, dropout: float) -> None:
        super().__init__()
        self.reach = reach
        self.conv = nn.Conv2d(width, 2 * width, (1, reach + 1), bias=False)
        self.across = nn.Conv2d(2 * width, 2 * width, 1, bias=False)
        self.drop, self.out = nn.Dropout(dropout), nn.Conv2d(width, width, 1)

    def forward(self, h: Tensor, a: Tensor, bias: Tensor) -> Tensor:
        """h (n, width, r, reach + c) and the vertical layer's a (n, 2 * width, r, c) -> the next h (n, width, r, c)."""
        gated = gate(self.conv(h) + self.across(a) + bias)
        return h[..., self.reach :] + self.out(self.drop(gated))


def gate(x: Tensor) -> Tensor:
    """x (n, 2 * width, r, c) -> tanh of one half times sigmoid of the other (n, width, r, c) (eq. 2)."""
    f, g = x.chunk(2, 1)
    return f.tanh() * g.sigmoid()


class CachedDecoder:
    """A decoder that computes each position of each layer once: the vertical stack, which depends on the rows above only,
    row by row, and the horizontal stack code by code."""

    def __init__(self, model: PixelCNN, n: int, labels: Tensor | None) -> None:
        self.model, self.t = model, 0
        (width, rows, columns), reach = model.place.shape, model.reach
        blank = model.place.new_zeros
        self.biases = [
            [bias.expand(-1, -1, rows, columns) for bias in pair]
            for pair in model.biases(n, labels)
        ]
        self.outside = blank(n, width, 1, 1)
        self.row = [self.outside] * columns  # vectors of the last codes, one per column
        # The last rows that each vertical layer reads.
        self.rows = [blank(n, width, reach + 1, reach + columns + reach) for _ in model.vertical]

    def __call__(self, before: Tensor | None) -> Tensor:
        row, column = divmod(self.t, self.model.grid[1])
        if before is not None:
            self.row[column - 1] = self.model.read(before)[:, :, None, None]
        if column == 0:
            self._begin(row)
        left = self.row[column - 1] if column else self.outside
        h = left + self.model.place[:, row, column, None, None]
        for i, horizontal in enumerate(self.model.horizontal):
            self.left[i] = torch.cat([self.left[i][..., 1:], h], 3)
            bias = self.biases[i][1][:, :, row, None, column, None]
            h = horizontal(self.left[i], self.above[i][..., column, None], bias)
        self.t += 1
        return self.model.logits(h)[..., 0, 0]

    def _begin(self, row: int) -> None:
        """Run the vertical stack on the rows above this one."""
        reach = self.model.reach
        # What each horizontal layer reads in this row, and the output of each vertical layer for it.
        self.left = [self.outside.expand(-1, -1, -1, reach + 1)] * len(self.rows)
        self.above: list[Tensor] = []
        v = torch.cat(self.row, 3) + self.model.place[:, None, row]
        for i, vertical in enumerate(self.model.vertical):
            self.rows[i] = torch.cat([self.rows[i][:, :, 1:], F.pad(v, (reach, reach))], 2)
            self.above.append(vertical(self.rows[i]) + self.biases[i][0][:, :, row, None])
            v = gate(self.above[i])
