"""k-means, which places codebooks among encoder outputs before training."""

import torch
from torch import Tensor

from vqgan.quantizers.search import nearest


def kmeans(z: Tensor, K: int, iterations: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: z (n, dim) float32 -> centres (K, dim), and counts (K,) of the points nearest to each.

    New centres are points sampled with probability proportional to their squared distance from the nearest centre
    (k-means++, Arthur & Vassilvitskii 2007), a sixteenth of the centres at a time (as in k-means||, Bahmani et al.
    2012). A cluster of identical points, such as a black background, therefore can't take many centres.
    """
    generator = torch.Generator(z.device).manual_seed(seed)

    def sample_points(distances: Tensor, n: int) -> Tensor:
        weights = distances[: 2**24] + 1e-12  # multinomial takes at most 2^24 categories
        return z[torch.multinomial(weights, n, replacement=True, generator=generator)]

    distances = torch.ones(len(z), device=z.device)  # squared, to the nearest centre
    centres = z[:0]
    while len(centres) < K:
        fresh = sample_points(distances, min(max(1, K // 16), K - len(centres)))
        to_fresh = (z - fresh[nearest(z, fresh)]).square().sum(1)
        distances = torch.minimum(distances, to_fresh) if len(centres) else to_fresh
        centres = torch.cat([centres, fresh])
    # The noise separates centres that are the same point.
    noise = torch.randn(K, z.shape[1], generator=generator, device=z.device)
    centres = centres + 1e-4 * z.std() * noise
    for iteration in range(iterations):
        indices = nearest(z, centres)
        counts = torch.bincount(indices, minlength=K).to(z)
        sums = torch.zeros_like(centres).index_add_(0, indices, z)
        empty = counts == 0
        moves = iteration + 1 < iterations and bool(empty.any())
        if moves:
            distances = (z - centres[indices]).square().sum(1)
        centres = torch.where(empty[:, None], centres, sums / counts.clamp(min=1)[:, None])
        if moves and distances.any():
            centres[empty] = sample_points(distances, int(empty.sum()))
    return centres, torch.bincount(nearest(z, centres), minlength=K).to(z)
