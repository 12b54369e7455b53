"""The digits of a code one after the other, instead of a logit of each code."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from codegrid.engine.errors import InputError, check_int, check_range
from codegrid.engine.precision import at_least_float32, without_autocast
from prior.decoding.sampling import Sampler
from prior.heads.base import Head, Judged
from prior.heads.likeness import rank_codes

MAX_HIDDEN = 2**24  # hidden units in memory at once, 64 MiB
BEAM = 16  # prefixes that the search for the likeliest codes keeps


class Bits(nn.Module, Head):
    """p(code | x) = product over j of p(digit j | the digits before it, x): exact, and normalised over all K codes.

    The digits are those of `rank_codes`: the channels of lfq, bsq and fsq, and for other codes the bits of a tree of similar
    codes. One hidden layer reads x and the digits before, as in NADE (Larochelle & Murray 2011, eq. 3); its weights grow
    with log K. Every setting of the sampler is exact: without any a code is drawn digit by digit, with any the
    probabilities of all K codes are computed from those of the digits.

    A share `group_share` of the loss leaves out the last digits, in which the `group_size` codes of a group differ, so
    probability at a near code is partly right. Label smoothing spreads over the values of each digit.
    """

    ranks: Tensor
    codes: Tensor
    reads_last = False  # whether the last digit can be known when another is predicted

    def __init__(
        self, width: int, vectors: Tensor, *, hidden: int, group_share: float, group_size: int
    ) -> None:
        """vectors (K, dim): what the tokenizer decodes the codes from."""
        super().__init__()
        check_int("prior.head.hidden", hidden, 1)
        check_range("prior.head.group_share", group_share, 0, 1)
        check_int("prior.head.group_size", group_size, 2, "codes")
        self.K, self.hidden = len(vectors), hidden
        self.levels, ranks = rank_codes(vectors)
        self.register_buffer("ranks", ranks)
        self.register_buffer("codes", ranks.argsort())  # by their ranks
        n, most = len(self.levels), max(self.levels)
        # How many ranks share the digits up to each one.
        self.strides = tuple(math.prod(self.levels[j + 1 :]) for j in range(n))
        self.is_even = math.prod(self.levels) == self.K and min(self.levels) == most
        within = [j for j in range(1, n) if self.strides[j - 1] <= group_size]
        if group_share and not within:
            raise InputError(
                f"prior.head.group_size={group_size} is less than the {self.levels[-1]} values of the last digit, in which the "
                f"codes of a group differ; use prior.head.group_size={self.levels[-1]}"
                if n > 1
                else f"prior.head.group_share={group_share} needs codes of several digits, and these have one; use 0"
            )
        self.group_share, self.shared = group_share, n - len(within)
        self.input = nn.Linear(width, hidden, bias=False)
        read = n if self.reads_last else n - 1
        self.digits = nn.Parameter(n**-0.5 * torch.randn(read, most, hidden))
        self.place = nn.Parameter(torch.zeros(n, hidden))
        self.weight = nn.Parameter(torch.zeros(n, most, hidden))  # an untrained prior is uniform
        nn.init.normal_(self.input.weight, std=width**-0.5)

    def logits(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, -2)
        if torch.compiler.is_compiling():
            logp = self.expand(flat)
        else:
            rows = max(1, MAX_HIDDEN * self.levels[-1] // (self.K * self.hidden))
            logp = torch.cat([self.expand(part) for part in flat.split(rows)])
        return logp.view(*x.shape[:-1], self.K)

    def expand(self, x: Tensor) -> Tensor:
        """x (n, width) -> log p (n, K) of all codes, by the tree of all digits."""
        entered = self.input(x)[:, None]
        read = x.new_zeros(1, self.hidden, dtype=torch.float32)
        logp = x.new_zeros(x.shape[0], 1, dtype=torch.float32)
        for j, level in enumerate(self.levels):
            prefixes = torch.arange(read.shape[0], device=x.device)
            step = self.predict_digit(entered + read, prefixes, j)[..., :level]
            # Ranks are numbers from 0 on, so the prefixes that no code has are the last ones.
            width = -(-self.K // self.strides[j])
            logp = (logp[..., None] + step).flatten(1)[:, :width]
            if j + 1 < len(self.levels):
                read = (read[:, None] + self.digits[j, :level]).flatten(0, 1)[:width]
        return logp.index_select(1, self.ranks)

    def predict_digit(self, hidden: Tensor, prefixes: Tensor, j: int) -> Tensor:
        """log p (n, ..., levels) of digit j, by what is known (n, ..., hidden) and the number (...) of the digits before."""
        logits = at_least_float32(F.linear(F.silu(hidden + self.place[j]), self.weight[j]))
        return self.weigh(logits, prefixes, j).log_softmax(-1)

    def weigh(self, logits: Tensor, prefixes: Tensor, j: int) -> Tensor:
        """Logits of the values of digit j plus the log of how many codes have each, so that equal logits are equal codes."""
        if self.is_even:
            return logits
        values = torch.arange(logits.shape[-1], device=logits.device)
        first = (prefixes[..., None] * self.levels[j] + values) * self.strides[j]
        n = (self.K - first).clamp(0, self.strides[j]).masked_fill(values >= self.levels[j], 0)
        return logits + n.to(logits.dtype).log()

    def nats(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        return self.by_parts(x, targets, None, smoothing, 0.0)

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        if not smoothing and not self.group_share:
            return super().losses(x, targets)
        with torch.no_grad():
            nats = self.nats(x, targets)
        return self.by_parts(x, targets, None, smoothing, self.group_share), nats

    def by_parts(
        self,
        x: Tensor,
        targets: Tensor,
        visible: Tensor | None,
        smoothing: float,
        group_share: float,
    ) -> Tensor:
        """`forward` in parts of MAX_HIDDEN hidden units, which the backward pass computes again if there are several."""
        flat = x.flatten(0, -2)
        rows = max(1, MAX_HIDDEN // (len(self.levels) * self.hidden))
        split = flat.split(rows), targets.flatten().split(rows)
        known = [None] * len(split[0]) if visible is None else visible.split(rows)
        parts = list(zip(*split, known, strict=True))
        losses = [
            self(*part, smoothing, group_share)
            if len(parts) == 1 or not torch.is_grad_enabled()
            else checkpoint(
                self, *part, smoothing, group_share,
                use_reentrant=False, preserve_rng_state=False,
            )
            for part in parts
        ]  # fmt: skip
        return torch.cat(losses).view_as(targets)

    def forward(
        self,
        x: Tensor,
        targets: Tensor,
        visible: Tensor | None,
        smoothing: float,
        group_share: float,
    ) -> Tensor:
        """The sum (n,) over the digits of the targets (n,) of -log p given x (n, width) and the digits before.

        With a set `visible` (n, digits), the digits in it are known instead, and the others' mean stands for all.
        """
        ranks = self.ranks[targets]
        prefixes = [
            ranks // (s * level) for s, level in zip(self.strides, self.levels, strict=True)
        ]
        digits = torch.stack(
            [ranks // s % level for s, level in zip(self.strides, self.levels, strict=True)], 1
        )
        read = self.read_before(digits) if visible is None else self.read_visible(digits, visible)
        hidden = F.silu(self.input(x)[:, None] + read + self.place)  # (n, digits, hidden)
        logits = at_least_float32(hidden.transpose(0, 1) @ self.weight.mT).unbind(0)
        weighed = [self.weigh(z, prefixes[j], j) for j, z in enumerate(logits)]
        logp = torch.stack(weighed, 1).log_softmax(-1)
        losses = -logp.gather(-1, digits[..., None])[..., 0]
        if smoothing:
            is_code = logp > -torch.inf
            evenly = -logp.masked_fill(~is_code, 0).sum(-1) / is_code.sum(-1)
            losses = (1 - smoothing) * losses + smoothing * evenly
        if visible is not None:
            losses = losses * ~visible / (~visible).float().mean(1, keepdim=True)
        coarse, fine = losses.tensor_split([self.shared], 1)
        return coarse.sum(1) + (1 - group_share) * fine.sum(1)

    def encode(self, digits: Tensor) -> Tensor:
        """Digits (n, digits) as indicators of their values (n, digits, levels) float32."""
        return (digits[..., None] == torch.arange(max(self.levels), device=digits.device)).float()

    def read_before(self, digits: Tensor) -> Tensor:
        """The sums (n, digits, hidden) of the vectors of the digits before each one."""
        with without_autocast(digits.device):
            shown = self.encode(digits[:, :-1]).transpose(0, 1)
            vectors = (shown @ self.digits[: len(self.levels) - 1]).transpose(0, 1)
        return F.pad(vectors.cumsum(1), (0, 0, 1, 0))

    def read_visible(self, digits: Tensor, visible: Tensor) -> Tensor:
        """The sum (n, 1, hidden) of the vectors of the visible digits."""
        with without_autocast(digits.device):
            shown = self.encode(digits) * visible[..., None]
            return (shown.flatten(1) @ self.digits.flatten(0, 1))[:, None]

    @torch.no_grad()
    def judge(self, x: Tensor, targets: Tensor) -> Judged:
        """Likelier codes are counted among those that a search finds which keeps the BEAM likeliest prefixes: it can miss one."""
        nats = self.nats(x, targets).flatten()
        ranks = self.ranks[targets.flatten()]
        rows = max(1, MAX_HIDDEN // (BEAM * max(self.levels) * self.hidden))
        searched = [self.search(part) for part in x.flatten(0, -2).split(rows)]
        logp, others = (torch.cat(column) for column in zip(*searched, strict=True))
        # The same code's log p is summed in another order here.
        ahead = logp + nats[:, None]
        is_other = others != ranks[:, None]
        above = ((ahead > 1e-5) & is_other).sum(1)
        tied = ((ahead.abs() <= 1e-5) & is_other).sum(1) + 1
        return Judged(*(values.view_as(targets) for values in (nats, above, tied)))

    def search(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log p and ranks (n, BEAM or fewer) of the likeliest codes, by a beam search over the digits."""
        n, device = len(x), x.device
        entered = self.input(x)[:, None]
        read = torch.zeros(n, 1, self.hidden, device=device)
        logp = torch.zeros(n, 1, device=device)
        prefixes = torch.zeros(n, 1, dtype=torch.int64, device=device)
        for j, level in enumerate(self.levels):
            step = self.predict_digit(entered + read, prefixes, j)[..., :level]
            # A prefix without codes, of which there are some where K is no power of two, has no probabilities.
            longer = (logp[..., None] + step).flatten(1).nan_to_num(-torch.inf, neginf=-torch.inf)
            logp, chosen = longer.topk(min(BEAM, longer.shape[1]))
            parent, digit = chosen // level, chosen % level
            prefixes = prefixes.gather(1, parent) * level + digit
            if j + 1 < len(self.levels):
                read = read.gather(1, parent[..., None].expand(-1, -1, self.hidden))
                read = read + self.digits[j][digit]
        return logp, prefixes

    def draws_directly(self, sampler: Sampler) -> bool:
        chosen = (sampler.temperature, sampler.top_k, sampler.top_p, sampler.min_p)
        return chosen == (1, 0, 1, 0)

    @torch.no_grad()
    def draw(self, x: Tensor, uniform: Tensor) -> Tensor:
        """By the inverse of the cumulative distribution over ranks: each digit takes its part of the number and leaves the rest."""
        hidden = self.input(x).float()
        prefixes = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        uniform = uniform.double()
        for j, level in enumerate(self.levels):
            p = self.predict_digit(hidden, prefixes, j).double().exp()
            cumulated = p.cumsum(1)
            total = cumulated[:, -1:]
            # Rounding must not lead past the last value that has a code.
            target = (uniform[:, None] * total).minimum(total.nextafter(torch.zeros_like(total)))
            digit = torch.searchsorted(cumulated, target, right=True)
            own = p.gather(1, digit)
            uniform = ((target - cumulated.gather(1, digit) + own) / own).clamp(0, 1)[:, 0]
            digit = digit[:, 0]
            prefixes = prefixes * level + digit
            if j + 1 < len(self.levels):
                hidden = hidden + self.digits[j, digit]
        return self.codes[prefixes]

    def draw_from_logits(self, logits: Tensor, uniform: Tensor, sampler: Sampler) -> Tensor:
        """In the order of the ranks, so that a number stands for the same code as in `draw`."""
        return self.codes[sampler.draw(logits[:, self.codes], uniform)]


class MaskedBits(Bits):
    """`Bits` that learns the digits in any order (after BAR, masked bit modelling; Uria et al. 2014 for NADE).

    In training a random set of a code's digits is known and the others are predicted, sets of every size equally often. It is
    judged and drawn in one order, as `Bits` is, so its nats are exact and are those of its samples.
    """

    reads_last = True

    def losses(self, x: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            nats = self.nats(x, targets)
        n, device = len(self.levels), x.device
        order = torch.rand(targets.numel(), n, device=device).argsort(1)
        visible = order < torch.randint(n, (targets.numel(), 1), device=device)
        return self.by_parts(x, targets, visible, smoothing, self.group_share), nats
