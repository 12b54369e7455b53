"""A start from classical vector quantization: a linear map of patches beside the networks."""

import torch
from einops import rearrange
from torch import Tensor, nn


def to_patches(x: Tensor, f: int) -> Tensor:
    """(B, C, H, W) -> (B*h*w, C*f*f): the f x f patches as rows."""
    return rearrange(x, "b c (h i) (w j) -> (b h w) (c i j)", i=f, j=f)


class Patches(nn.Module):
    """z = W (patch - mean), patch = W^T z + mean: the linear autoencoder that a tokenizer starts from and learns beyond.

    W holds the principal components of the f x f patches, so with a codebook by k-means and networks whose output is
    still zero, the tokenizer is classical vector quantization of patches before its first step.
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
        """Both maps from the principal components of the patches of x (n, C, H, W) in [-1, 1]."""
        rows = to_patches(x.float(), self.f)
        mean = rows.mean(0)
        into, out = self.into[1], self.out[0]
        assert isinstance(into, nn.Conv2d)
        assert isinstance(out, nn.Conv2d)
        components = principal_components(rows - mean, into.out_channels)
        n = min(
            into.out_channels, components.shape[1]
        )  # a code wider than a patch has no more components
        for parameter in (into.weight, into.bias, out.weight, out.bias):
            assert parameter is not None
            parameter.zero_()
        assert into.bias is not None
        assert out.bias is not None
        into.weight[:n] = components[:, :n].t()[:, :, None, None]
        into.bias[:n] = -components[:, :n].t() @ mean
        out.weight[:, :n] = components[:, :n][:, :, None, None]
        out.bias.copy_(mean)


def principal_components(rows: Tensor, n: int, most: int = 1024) -> Tensor:
    """The principal components of centred rows as columns, the largest variance first.

    Of rows wider than `most` the first n, nearly exactly (Halko et al. 2011): all would take minutes.
    """
    if rows.shape[1] <= most:
        return torch.linalg.eigh(torch.cov(rows.t()))[1].flip(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return torch.pca_lowrank(rows, q=min(n, len(rows)), center=False, niter=4)[2]
