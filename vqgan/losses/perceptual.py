"""Distances between images in the features of a network, with a gradient to the second alone."""

import warnings
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data.errors import InputError

WEIGHTS = {"vgg": "vgg16-397923af.pth", "alex": "alexnet-owt-7be5be79.pth", "squeeze": "squeezenet1_1-b8a52dc0.pth"}


class Features(nn.Module):
    """Learned perceptual loss: distance in the features of the discriminator being trained (Larsen et al. 2016, eq. 7).

    Needs no weights from elsewhere. Each layer's mean absolute difference is divided by that layer's mean magnitude on
    the real images, so that layers of any scale count alike.
    """

    def forward(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """The features of x and of x_hat, layer by layer -> a scalar."""
        pairs = [(r.detach().float(), f.float()) for r, f in zip(real, fake, strict=True)]
        return torch.stack([F.l1_loss(f, r) / r.abs().mean().clamp(min=1e-6) for r, f in pairs]).mean()


class LPIPS(nn.Module):
    """Learned perceptual image patch similarity (Zhang et al. 2018), frozen, by the authors' package.

    `net` is vgg, alex or squeeze. Images below 64 pixels are enlarged to 64, grey ones repeated over three channels. The
    network is no submodule: its weights enter no checkpoint, optimizer or average. Raises InputError where the
    torchvision weights are neither in the torch hub folder nor to be fetched.
    """

    def __init__(self, net: str = "vgg", pretrained: bool = True) -> None:
        super().__init__()
        if net not in WEIGHTS:
            raise InputError(f"loss.perceptual.net={net} must be one of {', '.join(WEIGHTS)}")
        self._network = [_lpips(net, pretrained)]  # in a list, out of nn.Module's sight

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Both (B, C, H, W) in [-1, 1] -> a scalar."""
        network = self._network[0].to(x.device)
        with torch.autocast(x.device.type, enabled=False):
            distance: Tensor = network(_three_channels(x), _three_channels(x_hat))
        return distance.mean()


def _three_channels(x: Tensor) -> Tensor:
    x = x.float().expand(-1, 3, -1, -1)
    return x if min(x.shape[2:]) >= 64 else F.interpolate(x, size=(64, 64), mode="bilinear", antialias=True)


def _lpips(net: str, pretrained: bool) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the package still says `pretrained=` to torchvision
        import lpips

        try:
            network: nn.Module = lpips.LPIPS(net=net, pnet_rand=not pretrained, pretrained=pretrained, verbose=False)
        except (URLError, OSError) as error:
            file = Path(torch.hub.get_dir()) / "checkpoints" / WEIGHTS[net]
            raise InputError(
                f"LPIPS needs the torchvision weights {WEIGHTS[net]}, which can't be fetched ({error}); "
                f"put the file at {file}, or use loss/perceptual=features"
            ) from error
    return network.eval().requires_grad_(False)
