"""Networks whose features images are compared in, behind one contract, and what the comparison finds."""

import hashlib
import importlib
import re
import socket
import warnings
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from engine.console import log_line
from engine.errors import InputError

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the name that torch-fidelity gives the TensorFlow weights


class Extractor(nn.Module, ABC):
    """uint8 images (B, C, H, W), C = 1 or 3 -> features (B, D) float32, and logits (B, classes) or None.

    `name` and `hash` say which network it is, `resize` what it does to the images first, `package` whose code it runs.
    """

    name: str
    hash: str
    resize = "none"
    package = "torch"
    speechless = "this network tells no classes"  # why there are no logits, where there are none

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception(Extractor):
    """Inception v3 with the weights of TensorFlow, by torch-fidelity: the features of the literature's scores.

    Raises InputError where the package is missing, or the weights are neither in the torch hub folder nor, with `fetch`,
    to be fetched.
    """

    name = "inception-v3-compat"
    resize = "bilinear to 299, as TensorFlow 1"
    package = "torch-fidelity"

    def __init__(self, fetch: bool = True) -> None:
        super().__init__()
        try:
            code = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InputError(
                "the package torch-fidelity is missing: pip install codegrid[fidelity]"
            ) from error
        file = fetched(INCEPTION, code.URL_INCEPTION_V3, fetch)
        try:
            network = code.FeatureExtractorInceptionV3(self.name, ["2048", "logits_unbiased"])
        except (OSError, RuntimeError, EOFError) as error:
            raise InputError(
                f"{file} is damaged ({' '.join(str(error).split())[:200]}); delete it"
            ) from error
        self.network = network.eval()
        self.hash = hashlib.sha256(file.read_bytes()).hexdigest()[:12]

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def fetched(name: str, url: str, fetch: bool) -> Path:
    """The file of the weights `name` in the torch hub folder; fetched where it is missing, with patience for ten seconds of
    silence. InputError where that fails, or without `fetch`."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / name
    if file.is_file():
        return file
    if not fetch:
        raise InputError(f"the weights {name} are not in {file.parent}, and fetch=false")
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)  # or a network that swallows packets would hold the run for ever
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        log_line(f"fetching {name}")
        torch.hub.download_url_to_file(url, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the weights {name} are not in {file.parent} and can't be fetched ({error})"
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return file


class FeatureNetwork(nn.Module):
    """A small convolutional network: x (B, C, H, W) -> (B, num_features), its last maps averaged over positions, as in FID.

    So few features that the covariance over a thousand images has full rank.
    """

    num_features = 128

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = (channels, 32, 64, 128, self.num_features)
        blocks: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            blocks += [nn.Conv2d(inner, outer, 3, 2, 1), nn.GroupNorm(8, outer), nn.SiLU()]
        self.layers = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.layers(
            x.contiguous()
        )  # channels last would take five times as long on CPUs
        return features


class Script(Extractor):
    """Any network in a TorchScript file: uint8 (B, 3, H, W) -> features (B, D), or a pair of features and logits.

    A TorchScript file holds operations on tensors, no Python. Raises InputError where it can't be read or gives something
    else for images of `image_size` pixels.
    """

    def __init__(self, file: str, image_size: int) -> None:
        super().__init__()
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(
                f"features={file} is not there; give a file that torch.jit.save has written"
            )
        self.name, self.suffix = path.name, "_" + re.sub(r"\W", "_", path.stem)
        if self.suffix == "_proxy":
            raise InputError(
                f"features={file} would give its scores the names of our own proxy's; give the file another name"
            )
        self.hash = hashlib.sha256(path.read_bytes()).hexdigest()[:12]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore"
                )  # it is deprecated; its successor saves a graph of one batch size and device
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
            features, _ = self(torch.zeros(2, 3, image_size, image_size, dtype=torch.uint8))
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"features={file} can't be used on uint8 images (2, 3, {image_size}, {image_size}): {reason[:300]}"
            ) from error
        if features.dim() != 2 or len(features) != 2:
            raise InputError(
                f"features={file} must give features (n, D) of n images, and gives {tuple(features.shape)} of 2"
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        found: Any = self.network(images.expand(-1, 3, -1, -1))
        features, logits = (found, None) if isinstance(found, Tensor) else found
        return features.float(), logits
