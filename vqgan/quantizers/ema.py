"""A codebook of running means."""

import torch
from torch import Tensor

from vqgan.quantizers.base import Quantized, Quantizer, all_reduce, flatten, from_first_rank, nearest, straight_through
from vqgan.quantizers.kmeans import kmeans


class EMA(Quantizer):
    """Nearest neighbour in a codebook of running means (van den Oord et al. 2017, eq. 1-3 and appendix A.1).

    Each code is sums / counts, running over the encoder outputs assigned to it. Counts start at 1: from 0, the first
    step would divide the codes that nobody chose by almost nothing.

    A code whose count falls under `revive` times the average is dead and splits the cluster of a random encoder output
    of the batch: it moves to the point at `split` of the way from that output's code to the output. With split=1, the
    output itself, this is Jukebox's rule (Dhariwal et al. 2020, section 3.1), which wins a code almost nothing in many
    dimensions, where points of one cluster lie closer to its centre than to each other; a small step wins it up to half
    of the cluster, as in the codebook design of Linde, Buzo & Gray (1980).
    """

    codebook: Tensor
    counts: Tensor
    sums: Tensor

    def __init__(
        self,
        K: int,
        dim: int = 64,
        beta: float = 0.25,
        decay: float = 0.99,
        kmeans: bool = True,
        revive: float = 0.5,
        split: float = 0.2,
    ) -> None:
        super().__init__(K, dim)
        self.beta, self.decay, self.kmeans, self.revive, self.split = beta, decay, kmeans, revive, split
        self.register_buffer("codebook", torch.randn(K, dim))
        self.register_buffer("counts", torch.ones(K))
        self.register_buffer("sums", self.codebook.clone())

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, z_e: Tensor) -> Quantized:
        z_e = z_e.float()
        indices = nearest(flatten(z_e.detach()), self.codebook).view(z_e.shape[0], *z_e.shape[2:])
        z_q = self.lookup(indices)
        commitment = (z_e - z_q).square().mean()
        terms = {"commitment": commitment.detach()}
        return Quantized(z_e, straight_through(z_e, z_q), indices, self.beta * commitment, terms)

    def lookup(self, indices: Tensor) -> Tensor:
        return self.codebook[indices].movedim(-1, 1)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """k-means of encoder outputs z (n, dim); counts become the clusters' shares, 1 on average."""
        if self.kmeans:
            centres, counts = kmeans(z.float(), self.K)
            self._set(slice(None), from_first_rank(centres), from_first_rank(counts * self.K / len(z)).clamp(min=0.1))

    @torch.no_grad()
    def update(self, q: Quantized) -> None:
        z, indices = flatten(q.z_e.detach()), q.indices.flatten()
        counts = all_reduce(torch.bincount(indices, minlength=self.K).to(self.counts))
        sums = all_reduce(torch.zeros_like(self.sums).index_add_(0, indices, z))
        share = self.K / counts.sum()  # a count of 1 is the average, whatever the batch and the grid
        self.counts.lerp_(counts * share, 1 - self.decay)
        self.sums.lerp_(sums * share, 1 - self.decay)
        self.codebook.copy_(self.sums / self.counts[:, None])
        self._revive(z, indices)

    def _revive(self, z: Tensor, indices: Tensor) -> None:
        picked = torch.randint(len(z), (self.K,), device=z.device)
        fresh = self.codebook[indices[picked]].lerp(z[picked], self.split)
        fresh = from_first_rank(fresh)  # on every rank, dead codes or not: a collective never waits behind a condition
        dead = self.counts < self.revive
        self._set(dead, fresh[dead], torch.ones_like(self.counts[dead]))

    def _set(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        self.codebook[rows], self.counts[rows], self.sums[rows] = codes, counts, codes * counts[:, None]
