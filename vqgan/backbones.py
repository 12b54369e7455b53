"""Pretrained networks whose features serve losses and discriminators."""

import difflib
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from codegrid.data.shown import pick_shown
from codegrid.engine.errors import InputError
from codegrid.engine.precision import without_autocast

MIN_SIDE = 64  # pixels; below, most networks have no room for their deep layers
# Mean and standard deviation of the colours in [0, 1].
IMAGENET_MEAN_STD = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# Networks of torchvision that need other image sizes or have no maps (C, h, w).
UNSUITABLE = ("vit_", "maxvit_", "swin_", "inception_", "googlenet")
# Attributes in which networks of torchvision hold their convolutions; "" is the network itself.
TRUNKS = ("features", "trunk_output", "layers", "")


class ColourReader:
    """What reads images of three colours, or grey ones, and is to serve images of any channels.

    shown    the channels that it sees, counted from 1; None: the first three, or the first of fewer than three
    """

    shown: Sequence[int] | None = None


class FrozenNetwork(ColourReader):
    """A network that never trains: in eval mode, without gradients for its weights, float32 under autocast.

    It is no nn.Module, so its weights are in no checkpoint, optimizer or weight average of the module that holds it.
    `channels` are the channels of each layer's map. Raises InputError if the network rejects images of 64 pixels or if
    a layer has no map.
    """

    def __init__(
        self, title: str, network: nn.Module, mean_std: tuple[Any, Any] = IMAGENET_MEAN_STD
    ) -> None:
        self.network = _Normalised(network, *mean_std).eval().requires_grad_(False)
        try:
            with torch.no_grad():
                maps = self.features(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{title} takes no images of {MIN_SIDE} pixels ({_one_line(error)}); use another backbone.name, "
                "or for timm's transformers +dynamic_img_size=true in the backbone"
            ) from error
        if any(m.dim() != 4 for m in maps):
            raise InputError(
                f"a layer of {title} gives no map (B, C, h, w); choose other backbone.layers, or null for the default"
            )
        self.channels = [m.shape[1] for m in maps]

    def features(self, x: Tensor) -> list[Tensor]:
        """x (B, C, H, W) in [-1, 1] -> one map (B, channels[i], h_i, w_i) per layer, with a gradient to the shown channels of x
        only."""
        with without_autocast(x.device):
            # eval() again, because a copy of a traced network is in training mode.
            network = follow_device(self.network, x).eval()
            maps: list[Tensor] = network(to_network_input(x, self.shown))
        return maps


def follow_device(network: nn.Module, x: Tensor) -> nn.Module:
    """A network that is part of no module, moved to where x is."""
    parameter = next(network.parameters(), None)
    is_there = parameter is not None and parameter.device == x.device
    return network if is_there else network.to(x.device)


class Torchvision(FrozenNetwork):
    """A convolutional classification network of torchvision, by default its last layer at each resolution.

    `name` is a name in torchvision.models, `layers` are names of its modules. The default layers of a VGG16 are those of
    LPIPS. With pretrained=False, for tests, the weights are random and the same in every run. Raises InputError for an
    unknown name or layer, and if the weights are neither in the torch hub folder nor can be downloaded.
    """

    def __init__(self, name: str, layers: list[str] | None, pretrained: bool) -> None:
        all_names = torchvision.models.list_models(torchvision.models)
        names = [n for n in all_names if not n.startswith(UNSUITABLE)]
        if name not in names:
            raise InputError(
                f"backbone.name={name} is no convolutional network of torchvision; {_suggest_closest(name, names)}"
            )
        network = load_torchvision(name, pretrained).eval()
        for module in network.modules():
            if hasattr(module, "inplace"):
                module.inplace = False  # type: ignore[assignment]  # it would overwrite the map before it
        self.layers = list(layers) if layers else find_last_layers(network)
        existing = [n for n, _ in network.named_modules() if n]
        for layer in self.layers:
            if layer not in existing:
                raise InputError(
                    f"backbone.layers has {layer}, which is no layer of {name}; {_suggest_closest(layer, existing)}"
                )
        extractor = create_feature_extractor(network, self.layers, suppress_diff_warning=True)
        super().__init__(name, _MapsInOrder(extractor, self.layers))


class Timm(FrozenNetwork):
    """A network of the package timm, by default all maps that it offers.

    `name` is timm's, `layers` are indices of the maps, and `options` are further arguments of timm.create_model, such
    as dynamic_img_size=True for a vision transformer. Raises InputError as Torchvision does, and if timm is missing.
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
                "vqgan.backbones.Timm needs the package timm: pip install timm, or use vqgan.backbones.Torchvision"
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
        known = (
            network.pretrained_cfg
        )  # some networks were not trained with ImageNet's normalisation
        super().__init__(name, _ChannelsFirst(network), (known["mean"], known["std"]))


def to_network_input(x: Tensor, shown: Sequence[int] | None = None) -> Tensor:
    """x (B, C, H, W) -> float32 (B, 3, H', W'): the shown channels, a single one repeated, and the shorter side enlarged to at
    least 64 pixels."""
    x = pick_shown(x, shown).float().expand(-1, 3, -1, -1)
    shorter = min(x.shape[2:])
    if shorter >= MIN_SIDE:
        return x
    size = [round(n * MIN_SIDE / shorter) for n in x.shape[2:]]
    return F.interpolate(x, size=size, mode="bilinear")


@contextmanager
def fetching_weights(file: str, alternative: str) -> Iterator[None]:
    """Context in which torchvision reads weights from the torch hub folder or downloads them; InputError if both fail."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # no network, no such file, or a truncated one
        path = Path(torch.hub.get_dir()) / "checkpoints" / file
        raise InputError(
            f"the torchvision weights {file} can't be fetched ({_one_line(error)}); put the file at {path}, "
            f"or use {alternative}"
        ) from error


class _Normalised(nn.Module):
    """Maps images in [-1, 1] to the network's own normalisation."""

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
        self.network = network
        self.layers = layers

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = self.network(x)
        return [maps[layer] for layer in self.layers]


class _ChannelsFirst(nn.Module):
    """timm's maps as (B, C, h, w), also for networks that return (B, h, w, C)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.channels: list[int] = network.feature_info.channels()  # type: ignore[operator, union-attr]

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            m if m.shape[1] == c else m.movedim(-1, 1)
            for m, c in zip(self.network(x), self.channels, strict=True)
        ]


def load_torchvision(name: str, pretrained: bool) -> nn.Module:
    """A network of torchvision with its default weights, or with random ones from a fixed seed."""
    weights = torchvision.models.get_model_weights(name).DEFAULT if pretrained else None
    file = weights.url.rsplit("/", 1)[1] if weights else ""
    with (
        torch.random.fork_rng(devices=[]),
        fetching_weights(file, "loss/perceptual=features and loss/discriminator=fine"),
    ):
        # No checkpoint holds these weights, so they must be the same on every rank and after resuming.
        torch.default_generator.manual_seed(0)
        network: nn.Module = torchvision.models.get_model(name, weights=weights)
    return network


def find_last_layers(network: nn.Module) -> list[str]:
    """Names of the last part of the trunk at each resolution, without pooling layers and maps of one pixel."""
    trunk = next(t for t in TRUNKS if not t or hasattr(network, t))
    children = [
        (name, part)
        for name, part in network.get_submodule(trunk).named_children()
        if not isinstance(part, nn.MaxPool2d)
    ]
    last_at: dict[int, str] = {}  # side of the map -> the last part with a map of that side

    def remember(name: str, output: Any) -> None:
        if output.dim() == 4:
            last_at[output.shape[-1]] = name

    hooks = [
        part.register_forward_hook(lambda _, __, output, name=name: remember(name, output))
        for name, part in children
    ]
    with torch.no_grad():
        network(torch.zeros(1, 3, MIN_SIDE, MIN_SIDE))
    for hook in hooks:
        hook.remove()
    return [f"{trunk}.{name}".lstrip(".") for side, name in last_at.items() if side > 1]


def _suggest_closest(word: str, words: list[str]) -> str:
    closest = difflib.get_close_matches(word, words, n=4, cutoff=0)
    return f"the closest are {', '.join(closest)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
