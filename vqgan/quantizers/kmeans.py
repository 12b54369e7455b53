"""k-means, for codebooks that start where the encoder's outputs are."""

import torch
from torch import Tensor

from vqgan.quantizers.base import nearest


def kmeans(z: Tensor, K: int, iterations: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: z (n, dim) float32 -> centres (K, dim), counts (K,) of the points nearest to each.

    Wherever a centre needs a place, a point is drawn with probability in proportion to its squared distance from the
    nearest centre (k-means++, Arthur & Vassilvitskii 2007; here a sixteenth of the centres at a time, as in k-means||,
    Bahmani et al. 2012): a cluster of identical points, a black background, can't hold many centres.
    """
    random = torch.Generator(z.device).manual_seed(seed)

    def draw(farness: Tensor, n: int) -> Tensor:
        chances = farness[: 2**24] + 1e-12  # multinomial takes at most 2^24 categories
        return z[torch.multinomial(chances, n, replacement=True, generator=random)]

    farness = torch.ones(len(z), device=z.device)
    centres = z[:0]
    while len(centres) < K:
        fresh = draw(farness, min(max(1, K // 16), K - len(centres)))
        nearby = (z - fresh[nearest(z, fresh)]).square().sum(1)
        farness = torch.minimum(farness, nearby) if len(centres) else nearby
        centres = torch.cat([centres, fresh])
    noise = torch.randn(K, z.shape[1], generator=random, device=z.device)
    centres = centres + 1e-4 * z.std() * noise  # points that were drawn twice part
    for iteration in range(iterations):
        indices = nearest(z, centres)
        counts = torch.bincount(indices, minlength=K).to(z)
        sums = torch.zeros_like(centres).index_add_(0, indices, z)
        empty = counts == 0
        farness = (z - centres[indices]).square().sum(1)
        centres = torch.where(empty[:, None], centres, sums / counts.clamp(min=1)[:, None])
        if empty.any() and farness.any() and iteration + 1 < iterations:
            centres[empty] = draw(farness, int(empty.sum()))
    return centres, torch.bincount(nearest(z, centres), minlength=K).to(z)
