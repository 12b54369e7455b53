"""The base of all bottlenecks with K learned vectors: search, losses, and remedies, one switch each."""

import heapq
from abc import abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from codegrid.engine.collectives import all_reduce, broadcast
from codegrid.engine.errors import check_range
from codegrid.evaluation.code_counts import count_uses
from vqgan.quantizers.base import Quantized, Quantizer, require_indices
from vqgan.quantizers.entropy import Entropy
from vqgan.quantizers.gradients import choose_estimator
from vqgan.quantizers.kmeans import kmeans as run_kmeans
from vqgan.quantizers.precision import float32
from vqgan.quantizers.search import best_match, flatten, unflatten

LEAST_REVIVED = 64  # codes that one update can revive, if there are as many
GROWTH_STEP = 0.2  # as the step of `split`: a small one wins up to half of the cluster


class Codebook(Quantizer):
    """Nearest neighbour among the vectors returned by `codes`, with the following switches.

    beta          weight of the commitment loss, the mean square of z_e - sg(z_q); the codebook loss has weight 1
    cosine        scales encoder outputs and codes to length 1 before anything else
                  (Yu et al. 2022, ViT-VQGAN, section 3.2)
    gradient      from the decoder to z_e: straight_through; rotation, the rotation trick's (Fifty et al. 2024); or diveq, which
                  moves the codes too, so there is no codebook loss (Vali et al. 2026; their beta is 0)
    temperature   above 0, draws codes in training with p = softmax(-d^2 / temperature)
                  (Lee et al. 2022, RQ-VAE, eq. 10)
    entropy       regularises the assignments; holds n x K distances while its weight is above 0
    kmeans        initialises the codes by k-means of encoder outputs
    revive        moves a code if its running count falls below this fraction of the average. Once the learning rate is
                  under a fifth of its peak, the fraction falls with it, because networks no longer follow moving codes
    split         places a revived code this fraction of the way from another code to an encoder output in its cluster.
                  At 1, the output itself, this is Jukebox's rule (Dhariwal et al. 2020, section 3.1), which hardly wins
                  any outputs in many dimensions, because points of a cluster are closer to its centre than to each
                  other. A small step wins up to half of the cluster, as in codebook design by splitting (Linde, Buzo &
                  Gray 1980)
    decay         of the running counts, and of running means in subclasses, per update
    codebook_lr   learning rate of the codes as a multiple of the optimizer's, if they have gradients
    """

    training_settings = (
        "beta", "gradient", "temperature", "entropy", "kmeans", "revive", "split", "decay", "codebook_lr",
    )  # fmt: skip
    grows = True
    K: int
    counts: Tensor

    def __init__(
        self,
        K: int,
        dim: int,
        *,
        beta: float,
        cosine: bool,
        gradient: str,
        temperature: float,
        entropy: Entropy | None,
        kmeans: bool,
        revive: float,
        split: float,
        decay: float,
        codebook_lr: float,
        **when: Any,
    ) -> None:
        super().__init__(K, dim, **when)
        check_range("quantizer.beta", beta, 0)
        check_range("quantizer.temperature", temperature, 0)
        check_range("quantizer.codebook_lr", codebook_lr, 0)
        check_range("quantizer.revive", revive, 0, 1)
        check_range("quantizer.split", split, 0, 1)
        check_range("quantizer.decay", decay, 0, 1)
        self.beta = beta
        self.cosine = cosine
        self.gradient = gradient
        self.estimate = choose_estimator(gradient)
        self.temperature = temperature
        self.entropy = entropy
        self.kmeans = kmeans
        self.revive = revive
        self.split = split
        self.decay = decay
        self.codebook_lr = codebook_lr
        # Running counts, 1 on average. If they started at 0, every code would count as dead.
        self.register_buffer("counts", torch.ones(K))

    @property
    def decoder_moves_codes(self) -> bool:
        """Whether the codes have the decoder's gradient themselves, and no loss of their own."""
        return self.gradient == "diveq"

    @abstractmethod
    def codes(self) -> Tensor:
        """The code vectors (K, dim), of length 1 with `cosine`."""

    @abstractmethod
    def set_codes(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        """Replace the codes at `rows`, and set their running counts."""

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z = self.project(flatten(z_e.float()))  # one vector a row: fast in any memory format
        codes = self.codes()
        indices = self.choose(z.detach(), codes.detach())
        z_q = F.embedding(indices, codes)
        commitment = F.mse_loss(z, z_q.detach())
        loss = self.beta * commitment
        terms = {"commitment": commitment.detach()}
        if codes.requires_grad and not self.decoder_moves_codes:
            loss = loss + F.mse_loss(z_q, z.detach())
        if self.entropy is not None and self.entropy.weight_at(self.num_updates):
            per_sample, of_codebook = self.entropy.from_distances(self.distances(z, codes))
            loss = loss + self.entropy.loss(per_sample, of_codebook, self.num_updates)
            terms["entropy_sample"] = per_sample.detach()
            terms["entropy_codebook"] = of_codebook.detach()
        z_q = self.estimate(z, z_q if self.decoder_moves_codes else z_q.detach())
        grid = indices.view(z_e.shape[0], *z_e.shape[2:])
        return Quantized(unflatten(z, z_e), unflatten(z_q, z_e), grid, loss, terms)

    @float32
    def bypass(self, z_e: Tensor) -> Quantized:
        return super().bypass(unflatten(self.project(flatten(z_e.float())), z_e))

    @float32
    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codes()).movedim(-1, 1)

    def project(self, vectors: Tensor) -> Tensor:
        """Vectors (n, dim) as they are compared: scaled to length 1 with `cosine`, else unchanged."""
        return F.normalize(vectors, dim=1) if self.cosine else vectors

    def offsets(self, codes: Tensor) -> Tensor:
        """What z . e of each code is reduced by (K,) before the largest is chosen: |e|^2 / 2, so that it is the nearest."""
        return codes.square().sum(1) / 2

    def distances(self, z: Tensor, codes: Tensor) -> Tensor:
        """(n, K), of which the smallest in a row is chosen, up to a number for each row: squared distances."""
        squared = z.square().sum(1, keepdim=True) - 2 * z @ codes.t() + codes.square().sum(1)
        return squared.clamp(min=0)

    def choose(self, z: Tensor, codes: Tensor) -> Tensor:
        """An index (n,) for each z (n, dim): the best code, or in training with a temperature a random one."""
        offsets = self.offsets(codes)
        if not (self.training and self.temperature):
            return best_match(z, codes, offsets)
        indices = []
        for rows in z.split(max(1, 2**20 // len(codes))):
            logits = torch.addmm(offsets, rows, codes.t(), beta=-1) * (2 / self.temperature)
            # The argmax of logits + Gumbel noise is a sample from their softmax.
            noisy = logits - torch.empty_like(logits).exponential_().log()
            indices.append(noisy.argmax(1))
        return torch.cat(indices)

    @torch.no_grad()
    def initialise(self, z: Tensor) -> None:
        """Set the codes by k-means of encoder outputs z (n, dim), and the counts to the cluster sizes, 1 on average."""
        if self.kmeans:
            z = self.project(z.float())
            centres, counts = run_kmeans(z, self.K)
            centres = broadcast(centres)
            counts = broadcast(counts * self.K / len(z)).clamp(min=0.1)
            self.set_codes(slice(None), centres, counts)

    @float32
    @torch.no_grad()
    def grow_from(self, smaller: Quantizer, z: Tensor) -> None:
        """The first codes are those of the smaller codebook. Each of the others lies the fraction GROWTH_STEP of the way from
        the code whose cluster is the largest by then, which it halves, to an output in that cluster."""
        if not self.grows:
            super().grow_from(smaller, z)
        assert isinstance(smaller, Codebook)
        z = self.project(z.float())
        old_codes = smaller.codes()
        indices = smaller.choose(z, old_codes)
        parents, counts = split_crowded(torch.bincount(indices, minlength=smaller.K), self.K)
        new_codes = old_codes[parents].lerp(pick_members(z, indices, parents), GROWTH_STEP)
        codes = torch.cat([old_codes, new_codes])
        counts = (counts * self.K / len(z)).clamp(min=0.1)
        self.set_codes(slice(None), codes, counts.to(self.counts))
        for name, value in smaller.state_dict().items():
            if name not in ("counts", "sums"):
                own = self.state_dict()[name]
                (own[: smaller.K] if value.dim() else own).copy_(value)  # to the bit

    def update(self, q: Quantized, rate: float = 1.0) -> None:
        self.update_from([q], rate)

    @float32
    @torch.no_grad()
    def update_from(self, parts: Sequence[Quantized], rate: float = 1.0) -> None:
        """As `update`, by several outputs of one forward pass, such as those of several scales. Each counts as much as the others,
        however many vectors it has."""
        super().update(parts[0], rate)
        z = torch.cat([flatten(q.z_e.detach()) for q in parts])
        each = [require_indices(q).flatten() for q in parts]
        indices = torch.cat(each)
        lengths = [len(own) for own in each]
        counts = all_reduce(torch.stack([count_uses(own, self.K) for own in each]).to(self.counts))
        # So that counts are 1 on average for any batch and grid.
        per_output = self.K / counts.sum(1) / len(parts)
        self.counts.lerp_((counts * per_output[:, None]).sum(0), 1 - self.decay)
        if len(parts) == 1:
            self.move_codes(z, indices, per_output[0])
        else:
            shares = [share.expand(n) for share, n in zip(per_output, lengths, strict=True)]
            self.move_codes(z * torch.cat(shares)[:, None], indices, torch.ones_like(per_output[0]))
        if self.revive:
            self.revive_codes(z, indices, self.revive * min(1.0, 5 * rate), lengths)

    def revive_codes(
        self, z: Tensor, indices: Tensor, least: float, lengths: Sequence[int] | None = None
    ) -> None:
        """Move the codes whose running counts are below `least` to where a batch has outputs: z (n, dim), indices (n,), of which
        parts with these lengths have the same chance.

        So many rows are drawn, the least used, however many codes are dead: to count these would wait for the device. Beyond
        that number the rest has its turn in the next updates.
        """
        _, rows = self.counts.topk(max_revived(self.K), largest=False, sorted=False)
        rows = broadcast(rows)  # of equal counts, other hardware may choose other rows
        counts = self.counts.index_select(0, rows)
        is_dead = counts < least  # the same on every rank, as the counts are
        sources = draw_rows(len(rows), lengths or [len(z)], z.device)
        replacements = self.codes()[indices[sources]].lerp(z[sources], self.split)
        replacements = broadcast(replacements)
        tables = [t for t in self.state_dict(keep_vars=True).values() if t.shape[:1] == (self.K,)]
        before = [table.index_select(0, rows) for table in tables]
        self.set_codes(rows, replacements, torch.ones_like(counts))
        for table, values in zip(tables, before, strict=True):
            mask = is_dead.view(-1, *[1] * (table.ndim - 1))
            table.index_copy_(0, rows, torch.where(mask, table.index_select(0, rows), values))

    def move_codes(self, z: Tensor, indices: Tensor, per_output: Tensor) -> None:
        """Move codes without gradients by the assignments of a batch: z (n, dim), indices (n,).

        Each encoder output counts `per_output`, so that a code's count is 1 on average. Outputs that don't count alike are
        multiplied by what they count.
        """

    def lr_multipliers(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.parameters(), self.codebook_lr) if self.codebook_lr != 1 else {}


def draw_rows(n: int, lengths: Sequence[int], device: torch.device) -> Tensor:
    """n random rows of a table whose parts, one after the other, have these lengths; all parts have the same chance."""
    if len(lengths) == 1:
        return torch.randint(lengths[0], (n,), device=device)
    each = -(-n // len(lengths))
    rows: list[Tensor] = []
    first = 0
    for length in lengths:
        rows.append(first + torch.randint(length, (each,), device=device))
        first += length
    return torch.stack(rows, 1).flatten()[:n]


def max_revived(K: int) -> int:
    """How many of K codes one update can revive: more than die in one, since a revived code lives for some 70 updates by the
    decay of its count, even if nothing chooses it."""
    return min(K, max(LEAST_REVIVED, K // 32))


def split_crowded(counts: Tensor, K: int) -> tuple[Tensor, Tensor]:
    """Which codes have to be split, each one in two, until there are K: the most crowded first.

    counts (n,) of the present codes -> the parents (K - n,) of the new codes, and the counts (K,) of all by then.
    """
    heap = [(-count, code) for code, count in enumerate(counts.tolist())]
    heapq.heapify(heap)
    shares = dict(enumerate(map(float, counts.tolist())))
    parents: list[int] = []
    while len(heap) < K:
        crowd, code = heapq.heappop(heap)
        parent = code if code < len(counts) else parents[code - len(counts)]
        new = len(counts) + len(parents)
        parents.append(parent)
        for child in (code, new):
            shares[child] = -crowd / 2
            heapq.heappush(heap, (crowd / 2, child))
    return torch.tensor(parents, dtype=torch.int64, device=counts.device), torch.tensor(
        [shares[i] for i in range(K)]
    )


def pick_members(z: Tensor, indices: Tensor, parents: Tensor) -> Tensor:
    """For each new code an output among z (n, dim) that chose its parent by `indices` (n,); the children of one parent get
    different outputs, evenly from all over the images, as far as there are enough."""
    order = indices.argsort(stable=True)
    sizes = torch.bincount(indices, minlength=int(parents.max()) + 1)
    starts = sizes.cumsum(0) - sizes
    children = torch.bincount(parents, minlength=len(sizes))
    nth: Counter[int] = Counter()
    rows = []
    for parent in parents.tolist():
        rows.append(int(starts[parent] + nth[parent] * sizes[parent] // children[parent]))
        nth[parent] += 1
    return z[order[torch.tensor(rows, dtype=torch.int64, device=z.device)]]
