"""A linear autoencoder of patches, with which a tokenizer starts as classical vector quantization."""

import torch
from einops import rearrange
from torch import Tensor, nn


def to_patches(x: Tensor, f: int) -> Tensor:
    """(B, C, H, W) -> (B*h*w, C*f*f): the f x f patches as rows."""
    return rearrange(x, "b c (h i) (w j) -> (b h w) (c i j)", i=f, j=f)


class Patches(nn.Module):
    """z = W (patch - mean), patch = W^T z + mean: the linear autoencoder that a tokenizer starts from.

    W holds the principal components of the f x f patches. With a k-means codebook, and networks whose output is still
    zero, the tokenizer is classical vector quantization of patches before its first step. Both maps are then trained.
    """

    def __init__(self, channels: int, f: int, dim: int) -> None:
        super().__init__()
        self.f = f
        self.into = nn.Sequential(nn.PixelUnshuffle(f), nn.Conv2d(channels * f * f, dim, 1))
        self.out = nn.Sequential(nn.Conv2d(dim, channels * f * f, 1), nn.PixelShuffle(f))

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, dim, h, w)."""
        z: Tensor = self.into(x)
        return z

    def decode(self, z: Tensor) -> Tensor:
        """(B, dim, h, w) -> (B, C, H, W)."""
        x: Tensor = self.out(z)
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Set both maps to the principal components of the patches of x (n, C, H, W) in [-1, 1]."""
        rows = to_patches(x.float(), self.f)
        mean = rows.mean(0)
        into = self.into[1]
        out = self.out[0]
        assert isinstance(into, nn.Conv2d)
        assert isinstance(out, nn.Conv2d)
        components = principal_components(rows - mean, into.out_channels)
        # A code wider than a patch leaves the remaining channels at zero.
        n = min(into.out_channels, components.shape[1])
        for parameter in (into.weight, into.bias, out.weight, out.bias):
            assert parameter is not None
            parameter.zero_()
        assert into.bias is not None
        assert out.bias is not None
        into.weight[:n] = components[:, :n].t()[:, :, None, None]
        into.bias[:n] = -components[:, :n].t() @ mean
        out.weight[:, :n] = components[:, :n][:, :, None, None]
        out.bias.copy_(mean)


def principal_components(rows: Tensor, n: int, max_exact: int = 1024) -> Tensor:
    """The principal components of centred rows (N, width) as columns, largest variance first.

    All of them if the width is at most `max_exact`. Otherwise the first n, by a randomised and nearly exact method
    (Halko et al. 2011): the exact one would take minutes.
    """
    if rows.shape[1] <= max_exact:
        return torch.linalg.eigh(torch.cov(rows.t()))[1].flip(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.pca_lowrank(rows, q=min(n, len(rows)), center=False, niter=4)[2]
