"""A recurrent network over code grids in raster order."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding


class LSTM(Autoregressive):
    """Codes row by row with long short-term memory (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000).

    Of each code it is told the one before and the one above, which in raster order is a whole row ago and which a memory
    would have to carry all the way; its row and its column; and the label.
    """

    def __init__(
        self,
        codebook: Tensor,
        grid: tuple[int, int],
        classes: int = 0,
        inputs: str = "codes",
        width: int = 416,
        depth: int = 2,
        dropout: float = 0.0,
        token_dropout: float = 0.0,
    ) -> None:
        super().__init__(single_codebook(codebook), grid, classes, token_dropout)
        self.before, self.above = (
            CodeEmbedding(codebook[0], width, inputs),
            CodeEmbedding(codebook[0], width, inputs),
        )
        self.labels = LabelEmbedding(classes, width)
        self.row, self.column = (nn.Parameter(torch.zeros(n, width)) for n in self.grid)
        self.drop = nn.Dropout(dropout)
        # nn.LSTM drops between its layers, and warns where there is but one
        self.lstm = nn.LSTM(
            width, width, depth, batch_first=True, dropout=dropout if depth > 1 else 0.0
        )
        self.head = nn.Linear(width, self.K, bias=False)
        nn.init.normal_(self.row, std=0.02)
        nn.init.normal_(self.column, std=0.02)
        nn.init.zeros_(self.head.weight)
        for name, p in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)
            if "bias_ih" in name:
                nn.init.ones_(
                    p[width : 2 * width]
                )  # the forget gate: what is in memory stays at first (Jozefowicz et al. 2015)

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        before, above = (
            F.pad(read(codes), (0, 0, n, -n))
            for read, n in ((self.before, 1), (self.above, self.grid[1]))
        )
        x = before + above + self.places() + self.labels(len(codes), labels)[:, None]
        return self.logits(self.lstm(self.drop(x))[0])

    def decoder(self, n: int, labels: Tensor | None = None) -> StepDecoder:
        label, places = self.labels(n, labels), self.places()
        codes: list[Tensor] = []
        state: tuple[Tensor, Tensor] | None = None

        def decode(before: Tensor | None) -> Tensor:
            nonlocal state
            x = label
            if before is not None:
                codes.append(before)
                x = x + self.before(before)
            t, columns = len(codes), self.grid[1]
            if t >= columns:
                x = x + self.above(codes[t - columns])
            found, state = self.lstm((x + places[t])[:, None], state)
            return self.logits(found[:, 0])

        return decode

    def places(self) -> Tensor:
        """The vector of each position (T, width)."""
        return (self.row[:, None] + self.column).flatten(0, 1)

    def logits(self, found: Tensor) -> Tensor:
        """What the last layer found (..., width) -> (..., K)."""
        logits: Tensor = self.head(self.drop(found))
        return logits.float()
