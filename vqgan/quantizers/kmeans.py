"""k-means, for codebooks that start where the encoder's outputs are."""

import torch
from torch import Tensor

from vqgan.quantizers.base import nearest


def kmeans(z: Tensor, K: int, iterations: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm: z (n, dim) float32 -> centres (K, dim), counts (K,) of the points nearest to each.

    A centre without points moves to a point drawn with probability in proportion to its squared distance from its own
    centre, so that a cluster of identical points (a black background) can't hold many centres.
    """
    random = torch.Generator(z.device).manual_seed(seed)
    picked = torch.randperm(len(z), generator=random, device=z.device)[:K]
    if len(picked) < K:  # fewer points than codes: repeat them, each a little moved
        extra = torch.randint(len(z), (K - len(picked),), generator=random, device=z.device)
        picked = torch.cat([picked, extra])
    noise = torch.randn(K, z.shape[1], generator=random, device=z.device)
    centres = z[picked] + 1e-4 * z.std() * noise
    for iteration in range(iterations):
        indices = nearest(z, centres)
        counts = torch.bincount(indices, minlength=K).to(z)
        sums = torch.zeros_like(centres).index_add_(0, indices, z)
        empty = counts == 0
        farness = (z - centres[indices]).square().sum(1)
        centres = torch.where(empty[:, None], centres, sums / counts.clamp(min=1)[:, None])
        if empty.any() and farness.any() and iteration + 1 < iterations:
            # multinomial takes at most 2^24 categories
            choice = torch.multinomial(farness[: 2**24], int(empty.sum()), replacement=True, generator=random)
            centres[empty] = z[choice]
    return centres, torch.bincount(nearest(z, centres), minlength=K).to(z)
