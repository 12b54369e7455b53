"""Public networks of the package timm in whose features sets of images are compared."""

import difflib
import hashlib
import importlib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError, check_int, summarize_error
from codegrid.evaluation.features import Extractor
from codegrid.evaluation.scores import find_ambiguous

NETWORK_SETTINGS = {"name", "size", "head"}
HUB_FILE = "model.safetensors"  # in each of timm's repositories on the Hugging Face Hub


class UnavailableNetwork(InputError):
    """A network's package or its weights are not at hand, so its scores are absent."""


class TimmNetwork(Extractor):
    """A network of timm by its name there, such as vit_large_patch14_dinov2.lvd142m.

    Images are resized to `size` pixels per side. The features are the network's last ones, pooled as it was trained; with `head`
    they are the outputs of its last linear layer, which is the projection of CLIP.

    The weights are the file <name>.safetensors in `folder`, or those of timm's repository on the Hugging Face Hub, from the cache
    or, with `fetch`, downloaded. Raises UnavailableNetwork if timm or the weights are missing, and InputError for a name that timm
    doesn't have and for weights that are not those of the network.
    """

    package = "timm"
    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, size: int, head: bool, fetch: bool, folder: str | None = None
    ) -> None:
        super().__init__()
        timm = import_timm()
        check_network_name(timm, name)
        known = timm.get_pretrained_cfg(name)
        file = find_network_weights(name, known.hf_hub_id, fetch, folder)
        # The size of a transformer is a part of it, and its embeddings of places are interpolated; others take any.
        options = {"img_size": size} if known.fixed_input_size else {}
        try:
            network = timm.create_model(
                name, pretrained=True, pretrained_cfg_overlay={"file": str(file)}, **options
            )
        except Exception as error:  # of timm, torch or safetensors, as the file is damaged
            raise InputError(
                f"{file} does not hold the weights of {name} ({summarize_error(error)}); put them there, or delete it"
            ) from error
        if not head:  # only now: timm lets a file lack weights if the head is another
            network.reset_classifier(0)
        self.network = network.eval().requires_grad_(False)
        self.size = size
        self.name = f"{name}, with its head" if head else name
        self.resize = f"bicubic, antialiased, to {size}"
        with file.open("rb") as content:
            self.hash = hashlib.file_digest(content, "sha256").hexdigest()[:12]
        self.register_buffer("mean", torch.tensor(known.mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(known.std).view(3, 1, 1))
        try:
            self(torch.zeros(1, 3, size, size, dtype=torch.uint8))
        except (AssertionError, RuntimeError) as error:
            raise InputError(
                f"networks: {name} takes no images of size={size} ({summarize_error(error)}); choose another size"
            ) from error

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        x = images.expand(-1, 3, -1, -1).float()
        if x.shape[2:] != (self.size, self.size):
            x = F.interpolate(x, (self.size, self.size), mode="bicubic", antialias=True)
        features = self.network((x.clamp(0, 255) / 255 - self.mean) / self.std)
        return features.float(), None


def import_timm() -> Any:
    """The package timm; UnavailableNetwork if it is missing."""
    try:
        return importlib.import_module("timm")
    except ImportError as error:
        raise UnavailableNetwork(
            "the package timm is missing: pip install codegrid[features]"
        ) from error


def check_networks(networks: Any) -> None:
    """Raise InputError if networks, {key: {name, size, head}}, are anything else; if timm is there and has no weights of one of
    these names, if a size can't be, or if scores would get the names of others."""
    if not isinstance(networks, Mapping):
        raise InputError(
            f"networks={networks} is no mapping of networks; choose files of conf/networks with networks=[dinov2], in "
            "stage=pipeline with networks@evaluate.networks=[dinov2]"
        )
    for key, about in networks.items():
        if clash := find_ambiguous(f"_{key}"):
            raise InputError(
                f"networks.{key} would give its scores the names of others, such as {clash}; give the network another key"
            )
        if set(about) != NETWORK_SETTINGS:
            raise InputError(
                f"networks.{key} has {', '.join(about) or 'nothing'}, and needs name, size and head, as conf/networks/dinov2.yaml"
            )
        check_int(f"networks.{key}.size", about["size"], 1, "pixel")
        with suppress(UnavailableNetwork):
            check_network_name(import_timm(), about["name"])


def check_network_name(timm: Any, name: str) -> None:
    """Raise InputError unless timm has weights of this name."""
    if timm.models.is_model_pretrained(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(pretrained=True), 3, 0.5)
    raise InputError(
        f"networks: timm has no weights of the name {name}"
        + (f"; the closest are {', '.join(close)}" if close else "")
    )


def find_network_weights(
    name: str, repository: str | None, fetch: bool, folder: str | None
) -> Path:
    """The file of weights of a network of timm; UnavailableNetwork, which says where to put it, if it is nowhere."""
    hub: Any = importlib.import_module("huggingface_hub")  # timm depends on it
    if folder is not None and (own := Path(folder).expanduser() / f"{name}.safetensors").is_file():
        return own
    place = folder or "a folder that features_dir names"
    if not repository:
        raise UnavailableNetwork(
            f"the weights of {name} are not on the Hugging Face Hub; put them into {place} as {name}.safetensors"
        )
    cached = hub.try_to_load_from_cache(repository, HUB_FILE)
    if isinstance(cached, str):
        return Path(cached)
    reason = "fetch=false"
    if fetch:
        log_line(f"fetching {HUB_FILE} of {repository}")
        try:
            return Path(hub.hf_hub_download(repository, HUB_FILE))
        except Exception as error:  # the library and its network layer have many kinds
            reason = f"they can't be fetched ({summarize_error(error)})"
    raise UnavailableNetwork(
        f"the weights of {name} are not at hand, and {reason}; put {HUB_FILE} of {repository} on the Hugging Face Hub into {place} "
        f"as {name}.safetensors"
    )
