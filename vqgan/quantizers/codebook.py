"""What all bottlenecks with K learned vectors share: the search, the losses, and the remedies, each a switch of its own."""

from abc import abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.distributed import all_reduce, broadcast
from engine.errors import check_range
from vqgan.quantizers.base import (
    Quantized,
    Quantizer,
    flatten,
    float32,
    nearest,
    rotate,
    straight_through,
    unflatten,
)
from vqgan.quantizers.entropy import Entropy
from vqgan.quantizers.kmeans import kmeans as lloyd


class Codebook(Quantizer):
    """Nearest neighbour among the vectors that a subclass's `codes` gives, with

    beta          weight of the commitment loss, the mean square of z_e - sg(z_q); the codes' own loss has weight 1
    cosine        encoder outputs and codes are scaled to length 1 before all else (Yu et al. 2022, ViT-VQGAN, section 3.2)
    rotation      the rotation trick's gradient instead of the straight-through one (Fifty et al. 2024)
    temperature   above 0, codes are drawn in training with p = softmax(-d^2 / temperature) (Lee et al. 2022, RQ-VAE, eq. 10)
    entropy       regularises the assignments; holds n x K distances while its weight is above 0
    kmeans        the codes start as the k-means of the first encoder outputs
    revive        a code whose running count is under this share of the average is dead and moves to where outputs are; from a
                  fifth of the peak learning rate on the share falls with it, for networks no longer follow moving codes then
    split         to the point this share of the way from another code to an output of its cluster; 1, the output itself,
                  is Jukebox's rule (Dhariwal et al. 2020, section 3.1). In many dimensions that rule wins a code almost
                  nothing, since points of a cluster lie closer to its centre than to each other; a small step wins up to
                  half of the cluster, as in the codebook design of Linde, Buzo & Gray (1980)
    decay         of the running counts (and of what else a subclass keeps), per update
    codebook_lr   the codes' learning rate as a multiple of the optimizer's, where they have gradients
    """

    K: int
    counts: Tensor

    def __init__(
        self,
        K: int,
        dim: int = 64,
        beta: float = 0.25,
        cosine: bool = False,
        rotation: bool = False,
        temperature: float = 0.0,
        entropy: Entropy | None = None,
        kmeans: bool = True,
        revive: float = 0.5,
        split: float = 0.2,
        decay: float = 0.99,
        codebook_lr: float = 1.0,
    ) -> None:
        super().__init__(K, dim)
        for name, value in (
            ("beta", beta),
            ("temperature", temperature),
            ("codebook_lr", codebook_lr),
        ):
            check_range(f"quantizer.{name}", value, 0)
        for name, value in (("revive", revive), ("split", split), ("decay", decay)):
            check_range(f"quantizer.{name}", value, 0, 1)
        self.beta, self.cosine, self.rotation, self.temperature = (
            beta,
            cosine,
            rotation,
            temperature,
        )
        self.entropy, self.kmeans, self.revive, self.split, self.decay = (
            entropy,
            kmeans,
            revive,
            split,
            decay,
        )
        self.codebook_lr = codebook_lr
        self.register_buffer(
            "counts", torch.ones(K)
        )  # of an average of 1; from 0 they would call every code dead

    @abstractmethod
    def codes(self) -> Tensor:
        """The vectors (K, dim) that are chosen from, of length 1 with `cosine`."""

    @abstractmethod
    def place(self, rows: Tensor | slice, codes: Tensor, counts: Tensor) -> None:
        """Put these codes there, with running counts that make sense of them."""

    @float32
    def forward(self, z_e: Tensor) -> Quantized:
        z, codes = (
            self.comparable(flatten(z_e.float())),
            self.codes(),
        )  # one vector a row: fast in any memory format
        indices = self.choose(z.detach(), codes.detach())
        z_q = F.embedding(indices, codes)
        commitment = F.mse_loss(z, z_q.detach())
        loss, terms = self.beta * commitment, {"commitment": commitment.detach()}
        if codes.requires_grad:
            loss = loss + F.mse_loss(z_q, z.detach())
        if self.entropy is not None and self.entropy.at(self.updates):
            distances = (
                z.square().sum(1, keepdim=True) - 2 * z @ codes.t() + codes.square().sum(1)
            ).clamp(min=0)
            sure, spread = self.entropy.of_distances(distances)
            loss = loss + self.entropy.loss(sure, spread, self.updates)
            terms |= {"entropy_sample": sure.detach(), "entropy_codebook": spread.detach()}
        z_q = (rotate if self.rotation else straight_through)(z, z_q.detach())
        return Quantized(
            unflatten(z, z_e),
            unflatten(z_q, z_e),
            indices.view(z_e.shape[0], *z_e.shape[2:]),
            loss,
            terms,
        )

    @float32
    def lookup(self, indices: Tensor) -> Tensor:
        return F.embedding(indices, self.codes()).movedim(-1, 1)

    def comparable(self, z: Tensor) -> Tensor:
        """z (n, dim) as it is compared with the codes."""
        return F.normalize(z, dim=1) if self.cosine else z

    def choose(self, z: Tensor, codes: Tensor) -> Tensor:
        """The index (n,) of the code nearest to each z (n, dim), or in training with a temperature one drawn by its distance."""
        if not (self.training and self.temperature):
            return nearest(z, codes)
        half_norms = codes.square().sum(1) / 2
        drawn = []
        for part in z.split(max(1, 2**20 // len(codes))):
            logits = torch.addmm(half_norms, part, codes.t(), beta=-1) * (2 / self.temperature)
            drawn.append(
                (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
            )  # Gumbel's way to draw
        return torch.cat(drawn)

    @torch.no_grad()
    def start(self, z: Tensor) -> None:
        """k-means of encoder outputs z (n, dim); counts become the clusters' shares, 1 on average."""
        if self.kmeans:
            z = self.comparable(z.float())
            centres, counts = lloyd(z, self.K)
            self.place(
                slice(None), broadcast(centres), broadcast(counts * self.K / len(z)).clamp(min=0.1)
            )

    @float32
    @torch.no_grad()
    def update(self, q: Quantized, rate: float = 1.0) -> None:
        super().update(q, rate)
        assert q.indices is not None
        z, indices = flatten(q.z_e.detach()), q.indices.flatten()
        counts = all_reduce(torch.bincount(indices, minlength=self.K).to(self.counts))
        share = (
            self.K / counts.sum()
        )  # a count of 1 is the average, whatever the batch and the grid
        self.counts.lerp_(counts * share, 1 - self.decay)
        self.follow(z, indices, share)
        dead = (self.counts < self.revive * min(1.0, 5 * rate)).nonzero()[
            :, 0
        ]  # the same on every rank, as the counts are
        picked = torch.randint(len(z), (len(dead),), device=z.device)
        fresh = self.codes()[indices[picked]].lerp(z[picked], self.split)
        fresh = broadcast(fresh)  # always, also of none: no rank waits for another
        if len(dead):
            self.place(dead, fresh, torch.ones_like(self.counts[dead]))

    def follow(self, z: Tensor, indices: Tensor, share: Tensor) -> None:
        """Move the codes by this batch's assignments, where they move without gradients."""

    def parameter_rates(self) -> dict[nn.Parameter, float]:
        return dict.fromkeys(self.parameters(), self.codebook_lr) if self.codebook_lr != 1 else {}


def softly(p: Tensor, indices: Tensor, codes: Tensor) -> Tensor:
    """Exactly codes[indices], (n, dim), backward also as if p @ codes had been chosen: onehot + p - sg(p), times codes.

    The chosen codes get the gradient as they are, the probabilities p (n, K) and what lies behind them as a softmax.
    """
    chosen = F.embedding(indices, codes)
    return straight_through(chosen + p @ codes.detach(), chosen.detach())
