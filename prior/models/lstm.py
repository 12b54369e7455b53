"""A recurrent network over code grids in raster order."""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.console import log_line
from codegrid.engine.precision import at_least_float32, without_autocast
from prior.decoding.kv_decoder import StepCache
from prior.models.base import Autoregressive, StepDecoder, single_codebook
from prior.models.inputs import CodeEmbedding, LabelEmbedding


class LSTM(Autoregressive):
    """Codes row by row with long short-term memory (Hochreiter & Schmidhuber 1997; with forget gates, Gers et al. 2000).

    Each step reads the code before, the code above, vectors of its row and its column, and the label. The code above is a
    whole row ago in raster order, and the memory would otherwise have to carry it all that way. The codes of another image are
    steps before the first.
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
        dropout: float,
        token_dropout: float,
    ) -> None:
        super().__init__(single_codebook(codebook), grid, classes, token_dropout)
        self.before = CodeEmbedding(codebook[0], width, inputs)
        self.above = CodeEmbedding(codebook[0], width, inputs)
        self.labels = LabelEmbedding(classes, width)
        self.row, self.column = (nn.Parameter(torch.zeros(n, width)) for n in self.grid)
        self.drop = nn.Dropout(dropout)
        between = dropout if depth > 1 else 0.0  # nn.LSTM warns if a single layer has dropout
        self.lstm = nn.LSTM(width, width, depth, batch_first=True, dropout=between)
        self.head = nn.Linear(width, self.K, bias=False)
        nn.init.normal_(self.row, std=0.02)
        nn.init.normal_(self.column, std=0.02)
        nn.init.zeros_(self.head.weight)
        for name, p in self.lstm.named_parameters():
            if "bias" in name:
                nn.init.zeros_(p)
            if "bias_ih" in name:
                # The forget gate: at first the memory lasts (Jozefowicz et al. 2015).
                nn.init.ones_(p[width : 2 * width])

    def forward(self, codes: Tensor, labels: Tensor | None = None) -> Tensor:
        before = F.pad(self.before(codes), (0, 0, 1, -1))
        above = F.pad(self.above(codes), (0, 0, self.grid[1], -self.grid[1]))
        x = before + above + self.places() + self.labels(codes.shape[0], labels)[:, None]
        if self.front is None:
            return self.logits(self.recur(self.drop(x))[0])
        joined = torch.cat([self.front(codes.shape[0], labels), x], 1)
        return self.logits(self.recur(self.drop(joined))[0][:, self.front.T :])

    def decoder(
        self, n: int, labels: Tensor | None = None, cache: StepCache | None = None
    ) -> StepDecoder:
        label, places = self.labels(n, labels), self.places()
        codes: list[Tensor] = []
        state: tuple[Tensor, Tensor] | None = None
        if self.front is not None:
            state = self.recur(self.front(n, labels))[1]

        def decode(before: Tensor | None) -> Tensor:
            nonlocal state
            x = label
            if before is not None:
                codes.append(before)
                x = x + self.before(before)
            t, columns = len(codes), self.grid[1]
            if t >= columns:
                x = x + self.above(codes[t - columns])
            hidden, state = self.recur((x + places[t])[:, None], state)
            return self.logits(hidden[:, 0])

        return decode

    def recur(
        self, x: Tensor, state: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """The recurrent layers on x (B, T, width): outputs (B, T, width) and the state after them. In float32 where this
        machine has no LSTM in the precision of the run."""
        kind = x.device.type
        is_mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if is_mixed and not has_lstm(kind, torch.get_autocast_dtype(kind)):
            with without_autocast(x.device):
                outputs, state = self.lstm(x.float(), state)
        else:
            outputs, state = self.lstm(x, state)
        return outputs, state

    def places(self) -> Tensor:
        """The vector of each position (T, width)."""
        return (self.row[:, None] + self.column).flatten(0, 1)

    def logits(self, hidden: Tensor) -> Tensor:
        """The last layer's output (..., width) -> logits (..., K) float32."""
        logits: Tensor = self.head(self.drop(hidden))
        return at_least_float32(logits)


@cache
def has_lstm(kind: str, dtype: torch.dtype) -> bool:
    """Whether torch has an LSTM of this precision here, to sample and to train: a processor's depends on its instructions, and
    some have the one without the other. If not, logs it once."""
    if kind != "cpu":
        return True
    with torch.random.fork_rng(devices=[]):  # the weights' random numbers are none of the run's
        layer = nn.LSTM(8, 8)
    try:
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(kind, dtype):
            outputs, _ = layer(torch.zeros(1, 1, 8))
        outputs.float().sum().backward()
    except RuntimeError:
        log_line(f"prior=lstm runs in float32: this processor has no LSTM in {dtype}")
        return False
    return True
