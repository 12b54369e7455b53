"""Distances between images in the features of a network, with a gradient to the second image only."""

import warnings

import torch
from torch import Tensor, nn

from codegrid.engine.errors import InputError
from codegrid.engine.precision import without_autocast
from vqgan.backbones import (
    ColourReader,
    FrozenNetwork,
    fetching_weights,
    follow_device,
    to_network_input,
)

WEIGHTS = {
    "vgg": "vgg16-397923af.pth",
    "alex": "alexnet-owt-7be5be79.pth",
    "squeeze": "squeezenet1_1-b8a52dc0.pth",
}


class DiscriminatorFeatures(nn.Module):
    """Learned perceptual loss: distance in the features of the discriminator being trained (Larsen et al. 2016, eq. 7).

    Needs no downloaded weights. The mean absolute difference of each layer is divided by the layer's mean magnitude on the
    real image, so that layers of any scale count equally. Its inputs are features, so the adversary calls it, which has
    them; all other perceptual losses take images.
    """

    def forward(self, real: list[Tensor], fake: list[Tensor]) -> Tensor:
        """The features of x and of x_hat, layer by layer -> a scalar."""
        pairs = [
            (r.detach().float().flatten(1), f.float().flatten(1))
            for r, f in zip(real, fake, strict=True)
        ]
        return torch.stack(
            [((f - r).abs().mean(1) / r.abs().mean(1).clamp(min=1e-6)).mean() for r, f in pairs]
        ).mean()


class LPIPS(nn.Module, ColourReader):
    """Learned perceptual image patch similarity (Zhang et al. 2018), frozen, by the authors' package.

    `net` is vgg, alex or squeeze. Images below 64 pixels are enlarged to 64; grey images are repeated over three channels, and
    of other images it sees the `shown` channels.
    The network is not a submodule, so its weights enter no checkpoint, optimizer or average. Raises InputError if the
    torchvision weights are neither in the torch hub folder nor available for download.
    """

    def __init__(self, net: str, pretrained: bool) -> None:
        super().__init__()
        if net not in WEIGHTS:
            raise InputError(f"loss.perceptual.net={net} must be one of {', '.join(WEIGHTS)}")
        self._network = [_lpips(net, pretrained)]  # in a list, where nn.Module does not register it

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Both (B, C, H, W) in [-1, 1] -> a scalar."""
        network = follow_device(self._network[0], x)
        with without_autocast(x.device):
            inputs = [to_network_input(images, self.shown) for images in (x, x_hat)]
            distance: Tensor = network(*inputs)
        return distance.mean()


class Backbone(nn.Module):
    """Distance in the features of any frozen network (Zhang et al. 2018, eq. 1 with every w = 1).

    The features of each layer are scaled to length 1 at each position. Squared differences are summed over channels and
    layers and averaged over positions. The network is not a submodule, so its weights enter no checkpoint, optimizer or
    average.
    """

    def __init__(self, backbone: FrozenNetwork) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor, x_hat: Tensor) -> Tensor:
        """Both (B, C, H, W) in [-1, 1] -> a scalar."""
        with torch.no_grad():
            real = self.backbone.features(x)
        fake = self.backbone.features(x_hat)
        distances = [
            (_unit(r) - _unit(f)).square().sum(1).mean() for r, f in zip(real, fake, strict=True)
        ]
        return torch.stack(distances).sum()


def _unit(features: Tensor) -> Tensor:
    """Vectors of length 1 along dimension 1; the small number bounds the gradient where all features are 0."""
    return features * (features.square().sum(1, keepdim=True) + 1e-10).rsqrt()


def _lpips(net: str, pretrained: bool) -> nn.Module:
    with warnings.catch_warnings(), fetching_weights(WEIGHTS[net], "loss/perceptual=features"):
        warnings.simplefilter(
            "ignore"
        )  # the package passes torchvision the deprecated `pretrained=`
        import lpips

        network: nn.Module = lpips.LPIPS(
            net=net, pnet_rand=not pretrained, pretrained=pretrained, verbose=False
        )
    return network.eval().requires_grad_(False)


def check_lpips(net: str | None) -> None:
    """Raise InputError unless LPIPS has weights for `net`, or it is None."""
    if net is not None and net not in WEIGHTS:
        raise InputError(f"lpips={net} must be one of {', '.join(WEIGHTS)}, or null for none")
