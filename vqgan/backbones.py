"""Networks trained by others, whose features losses and discriminators look at."""

import difflib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from engine.errors import InputError

MIN_SIDE = 64  # pixels a side; below, the deep layers of most networks have no room
IMAGENET_MEAN_STD = (
    (0.485, 0.456, 0.406),
    (0.229, 0.224, 0.225),
)  # mean and standard deviation of the colours in [0, 1]
UNSUITABLE = (
    "vit_",
    "maxvit_",
    "swin_",
    "inception_",
    "googlenet",
)  # torchvision's that want other sizes, or have no maps (C, h, w)
TRUNKS = (
    "features",
    "trunk_output",
    "layers",
    "",
)  # where torchvision's networks keep their convolutions; "", all of them


class FrozenNetwork:
    """A network that never trains: in eval mode, its weights without gradients, float32 under autocast.

    No nn.Module, so its weights are in no checkpoint, optimizer or average of what holds it. `channels` says how many
    each layer's map has. Raises InputError where the network takes no images of 64 pixels or a layer gives no map.
    """

    def __init__(
        self, title: str, network: nn.Module, normal: tuple[Any, Any] = IMAGENET_MEAN_STD
    ) -> None:
        self.network = _Normalised(network, *normal).eval().requires_grad_(False)
        try:
            with torch.no_grad():
                maps = self.features(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{title} takes no images of {MIN_SIDE} pixels ({_one_line(error)}); use another backbone.name, "
                "or of timm's transformers +dynamic_img_size=true in the backbone"
            ) from error
        if any(m.dim() != 4 for m in maps):
            raise InputError(
                f"a layer of {title} gives no map (B, C, h, w); choose other backbone.layers, or null for the usual"
            )
        self.channels = [m.shape[1] for m in maps]

    def features(self, x: Tensor) -> list[Tensor]:
        """x (B, 1 or 3, H, W) in [-1, 1] -> a map (B, channels[i], h_i, w_i) from each layer, with a gradient to x alone."""
        with torch.autocast(x.device.type, enabled=False):
            network = self.network.to(
                x.device
            ).eval()  # a copy of a traced network is in training mode again
            maps: list[Tensor] = network(to_network_input(x))
        return maps


class Torchvision(FrozenNetwork):
    """A convolutional classification network of torchvision, by default its last layer at each resolution.

    `name` as in torchvision.models, `layers` the names of its modules; of a VGG16 the default layers are those of LPIPS.
    With pretrained=False, for tests, the weights are random and the same in every run. Raises InputError for a name or a
    layer that does not exist, and where the weights are neither in the torch hub folder nor to be fetched.
    """

    def __init__(
        self, name: str = "resnet18", layers: list[str] | None = None, pretrained: bool = True
    ) -> None:
        names = [
            n
            for n in torchvision.models.list_models(torchvision.models)
            if not n.startswith(UNSUITABLE)
        ]
        if name not in names:
            raise InputError(
                f"backbone.name={name} is no convolutional network of torchvision; {_suggest_closest(name, names)}"
            )
        network = _load_torchvision(name, pretrained).eval()
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]  # it would write over the map before it
        self.layers = list(layers) if layers else _find_last_layers(network)
        existing = [n for n, _ in network.named_modules() if n]
        for layer in self.layers:
            if layer not in existing:
                raise InputError(
                    f"backbone.layers has {layer}, which is no layer of {name}; {_suggest_closest(layer, existing)}"
                )
        extractor = create_feature_extractor(network, self.layers, suppress_diff_warning=True)
        super().__init__(name, _MapsInOrder(extractor, self.layers))


class Timm(FrozenNetwork):
    """A network of the package timm, by default all the maps that it offers.

    `name` as in timm, `layers` indices of the maps, `options` what else timm.create_model takes, such as
    dynamic_img_size=True for a vision transformer. Raises InputError as Torchvision does, and without the package.
    """

    def __init__(
        self,
        name: str = "resnet18",
        layers: list[int] | None = None,
        pretrained: bool = True,
        **options: Any,
    ) -> None:
        try:
            timm = importlib.import_module("timm")
        except ImportError as error:
            raise InputError(
                "vqgan.backbones.Timm needs the package timm: pip install timm, or use Torchvision there"
            ) from error
        if not timm.is_model(name):
            raise InputError(
                f"backbone.name={name} is no network of timm; {_suggest_closest(name, timm.list_models())}"
            )
        options |= {"out_indices": list(layers)} if layers else {}
        try:
            network = timm.create_model(name, features_only=True, pretrained=pretrained, **options)
        except (AssertionError, IndexError) as error:
            raise InputError(
                f"backbone.layers={layers} are not all indices of maps that {name} has ({_one_line(error)})"
            ) from error
        except (OSError, RuntimeError) as error:
            raise InputError(
                f"timm's weights {name} can't be fetched ({_one_line(error)}); put them into a file "
                "and add +pretrained_cfg_overlay.file=FILE to the backbone, or use vqgan.backbones.Torchvision"
            ) from error
        known = network.pretrained_cfg  # some were not trained on ImageNet's normalisation
        super().__init__(name, _ChannelsFirst(network), (known["mean"], known["std"]))


def to_network_input(x: Tensor) -> Tensor:
    """x (B, 1 or 3, H, W) -> float32 (B, 3, ...), grey repeated, the shorter side enlarged to 64 pixels where it has fewer."""
    x, short = x.float().expand(-1, 3, -1, -1), min(x.shape[2:])
    if short >= MIN_SIDE:
        return x
    return F.interpolate(
        x, size=[round(n * MIN_SIDE / short) for n in x.shape[2:]], mode="bilinear"
    )


@contextmanager
def fetching_weights(file: str, instead: str) -> Iterator[None]:
    """Inside, torchvision weights are read from the torch hub folder or fetched into it; InputError where neither works."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # no network, no such file, a file that is cut off
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        raise InputError(
            f"the torchvision weights {file} can't be fetched ({_one_line(error)}); put the file at {path}, or use {instead}"
        ) from error


class _Normalised(nn.Module):
    """Images in [-1, 1] as a network saw them in its training."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", 2 * torch.tensor(mean).view(3, 1, 1) - 1)
        self.register_buffer("std", 2 * torch.tensor(std).view(3, 1, 1))

    def forward(self, x: Tensor) -> list[Tensor]:
        maps: list[Tensor] = self.network((x - self.mean) / self.std)
        return maps


class _MapsInOrder(nn.Module):
    """Torchvision's dictionary of maps as a list."""

    def __init__(self, network: nn.Module, layers: list[str]) -> None:
        super().__init__()
        self.network, self.layers = network, layers

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network(x)
        return [maps[layer] for layer in self.layers]


class _ChannelsFirst(nn.Module):
    """timm's maps (B, C, h, w), also of those networks that compute (B, h, w, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.channels: list[int] = network.feature_info.channels()  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            m if m.shape[1] == c else m.movedim(-1, 1)
            for m, c in zip(self.network(x), self.channels, strict=True)
        ]


def _load_torchvision(name: str, pretrained: bool) -> nn.Module:
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    file = weights.url.rsplit("/", 1)[1] if weights else ""
    with (
        torch.random.fork_rng(devices=[]),
        fetching_weights(file, "loss/perceptual=features and loss/discriminator=fine"),
    ):
        torch.default_generator.manual_seed(
            0
        )  # what is in no checkpoint must be the same on every rank and after resuming
        network: nn.Module = torchvision.models.get_model(name, weights=weights)
    return network


def _find_last_layers(network: nn.Module) -> list[str]:
    """The names of the trunk's parts after which the map gets smaller, and of the last; pooling and single pixels left out."""
    trunk = next(t for t in TRUNKS if not t or hasattr(network, t))
    children = [
        (name, part)
        for name, part in network.get_submodule(trunk).named_children()
        if not isinstance(part, nn.MaxPool2d)
    ]
    at: dict[int, str] = {}  # a resolution, and the last part so far that has it
    hooks = [
        part.register_forward_hook(
            lambda _, __, out, name=name: (
                at.update({out.shape[-1]: name}) if out.dim() == 4 else None
            )
        )
        for name, part in children
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE))
    for hook in hooks:
        hook.remove()
    return [f"{trunk}.{name}".lstrip(".") for size, name in at.items() if size > 1]


def _suggest_closest(word: str, words: list[str]) -> str:
    return f"the closest are {', '.join(difflib.get_close_matches(word, words, n=4, cutoff=0))}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
