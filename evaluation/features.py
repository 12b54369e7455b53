"""Networks in whose features sets of images are compared, behind one contract."""

import hashlib
import importlib
import re
import warnings
from abc import ABC, abstractmethod
from itertools import pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.network import limited_silence
from codegrid.engine.sizes import SizeSetting, check_size
from codegrid.evaluation.scores import find_ambiguous

INCEPTION = (
    "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name of TensorFlow's weights
)

PUT_THERE = "put the file there"


class Extractor(nn.Module, ABC):
    """Pixels (B, C, H, W) -> features (B, D) float32, and logits (B, classes) or None.

    Networks of three colours take uint8 with C = 1 or 3; a FeatureSet shows them the channels that pictures show.
    `name` and `hash` identify the network, `resize` is what it does to the images first, `package` is whose code it runs.
    An extractor without logits gives the reason in `no_logits_reason`.
    """

    name: str
    hash: str
    resize = "none"
    package = "torch"
    no_logits_reason = "this network predicts no classes"

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]: ...


class Inception(Extractor):
    """Inception v3 with TensorFlow's weights, by torch-fidelity: the features behind the scores in the literature.

    Raises InputError if the package is missing, or if the weights are in neither `folder` nor the torch hub folder and `fetch` is
    false or the download fails.
    """

    name = "inception-v3-compat"
    resize = "bilinear to 299, as TensorFlow 1"
    package = "torch-fidelity"

    def __init__(self, fetch: bool = True, folder: str | None = None) -> None:
        super().__init__()
        try:
            code = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
        except ImportError as error:
            raise InputError(
                "the package torch-fidelity is missing: pip install codegrid[fidelity]"
            ) from error
        file = fetch_weights(
            INCEPTION,
            code.URL_INCEPTION_V3,
            fetch,
            folder,
            f"{PUT_THERE}, or into a folder that features_dir names",
        )
        outputs = ["2048", "logits_unbiased"]
        try:
            torch.load(file, weights_only=True)  # torch-fidelity would run what a pickle says
            network = code.FeatureExtractorInceptionV3(self.name, outputs, str(file))
        except (OSError, RuntimeError, EOFError, UnpicklingError) as error:
            raise InputError(
                f"{file} is damaged ({' '.join(str(error).split())[:200]}); delete it"
            ) from error
        self.network = network.eval()
        self.hash = hash_bytes(file.read_bytes())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features, logits = self.network(images.expand(-1, 3, -1, -1))
        return features, logits


def hash_bytes(content: bytes) -> str:
    """Twelve hexadecimal digits that identify a network in the provenance of scores."""
    return hashlib.sha256(content).hexdigest()[:12]


def fetch_weights(
    name: str, url: str, fetch: bool, folder: str | None = None, way_out: str = PUT_THERE
) -> Path:
    """The file of the weights `name` in `folder` (features_dir) or in the torch hub folder, downloaded to the latter if it is in
    neither.

    The download gives up after ten seconds of silence. Raises InputError, which ends with the `way_out`, if it fails, or if
    `fetch` is false and the file is missing.
    """
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    folders = [hub] if folder is None else [Path(folder).expanduser(), hub]
    for place in folders:
        if (place / name).is_file():
            return place / name
    places = " or ".join(map(str, folders))
    if not fetch:
        raise InputError(f"the weights {name} are not in {places}, and fetch=false; {way_out}")
    file = hub / name
    try:
        hub.mkdir(parents=True, exist_ok=True)
        log_line(f"fetching {name}")
        with limited_silence(10):
            torch.hub.download_url_to_file(url, str(file), progress=False)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"the weights {name} are not in {places} and can't be fetched ({error}); {way_out}"
        ) from error
    return file


class FeatureNetwork(nn.Module):
    """A small convolutional network: x (B, C, H, W) -> (B, num_features), its last maps averaged over positions, as in FID.

    It has few enough features that their covariance over a thousand images has full rank.
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
        # Channels-last input would take five times as long on CPUs.
        features: Tensor = self.layers(x.contiguous())
        return features


class TorchScriptNetwork(Extractor):
    """Any network in a TorchScript file: uint8 (B, 3, H, W) -> features (B, D), or a pair of features and logits.

    A TorchScript file holds operations on tensors and no Python. Raises InputError if it can't be read or doesn't return
    features for images of `image_size` pixels. Its scores have the suffix `suffix`.
    """

    def __init__(self, file: str, image_size: SizeSetting) -> None:
        super().__init__()
        size = check_size("data.image_size", image_size, "pixel")
        path = Path(file).expanduser()
        if not path.is_file():
            raise InputError(
                f"features={file} is not there; give a file that torch.jit.save has written"
            )
        self.name = path.name
        self.suffix = "_" + re.sub(r"\W", "_", path.stem)
        if clash := find_ambiguous(self.suffix):
            raise InputError(
                f"features={file} would give its scores the names of others, such as {clash}; give the file another name"
            )
        self.hash = hash_bytes(path.read_bytes())
        try:
            with warnings.catch_warnings():
                # TorchScript is deprecated; its successor saves a graph for one batch size and device.
                warnings.simplefilter("ignore")
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
            features, _ = self(torch.zeros(2, 3, *size, dtype=torch.uint8))
        except (RuntimeError, ValueError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"features={file} can't be used on uint8 images (2, 3, {size[0]}, {size[1]}): {reason[:300]}"
            ) from error
        if features.dim() != 2 or len(features) != 2:
            raise InputError(
                f"features={file} must return features (n, D) for n images, and returns {tuple(features.shape)} for 2"
            )

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        output: Any = self.network(images.expand(-1, 3, -1, -1))
        features, logits = (output, None) if isinstance(output, Tensor) else output
        return features.float(), logits
