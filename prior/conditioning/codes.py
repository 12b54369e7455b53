"""The codes of another image as a condition: maps to pictures, low to high resolution, one modality to another."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from codegrid.data.endings import readable_suffixes
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast
from prior.conditioning.base import Condition
from prior.models.base import PriorModel
from vqgan.tokenizer import Tokenizer

SHOWN_AT_ONCE = 64  # images


class CodeCondition(Condition):
    """The codes of another image, by a tokenizer of its own, which stand in front of those that the prior learns."""

    is_exportable = False

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def attach(self, model: PriorModel) -> None:
        space = self.tokenizer.code_space
        places = math.prod(space["grid"]) * len(space["codebook"])
        if places != math.prod(self.tokenizer.code_shape):
            raise InputError(
                "the tokenizer of the condition has a codebook for each scale, and codes in front are told apart by their places "
                "alone; train it with quantizer.shared=true"
            )
        model.read_front(**space)

    def describe(self) -> dict[str, Any]:
        return {"kind": "codes", "tokenizer": self.tokenizer.fingerprint()}

    def summarize(self) -> str:
        h, w = self.tokenizer.grid
        return f"the {h}x{w} codes of another image"

    def read(self, value: Any) -> Tensor:
        """Images in any form that Tokenizer.encode_images takes, or a folder of them; or a tensor (m, length) int64 of their codes,
        as codes.pt has them."""
        if isinstance(value, Tensor) and value.ndim == 2 and value.dtype == torch.int64:
            return self.check_labels(value.cpu())
        if isinstance(value, str | Path) and Path(value).expanduser().is_dir():
            value = list_pictures_in(Path(value).expanduser())
        device = next(self.tokenizer.parameters()).device
        with autocast(device):
            codes = self.tokenizer.encode_images(value)
        return codes.flatten(1)

    def check_labels(self, labels: Tensor) -> Tensor:
        """Labels (m, length) themselves; raises InputError unless they are codes, or -1 throughout for none."""
        length = math.prod(self.tokenizer.code_shape)
        if labels.shape[1] != length:
            raise InputError(
                f"condition has codes of shape {list(labels.shape)}, and this prior learned {self.summarize()}; give (m, {length})"
            )
        codes = labels[(labels >= 0).any(1)].view(-1, *self.tokenizer.code_shape)
        if len(codes):
            self.tokenizer.check_codes(codes)
        return labels

    @torch.no_grad()
    def show(self, labels: Tensor, size: Sequence[int]) -> Tensor | None:
        """The images as their tokenizer decodes them; grey for none."""
        tokenizer = self.tokenizer
        device = next(tokenizer.parameters()).device
        shown = []
        for part in labels.split(SHOWN_AT_ONCE):
            codes = part.clamp(min=0).view(-1, *tokenizer.code_shape).to(device)
            with autocast(device):
                pictures = tokenizer.rules.to_picture(tokenizer.decode_indices(codes)).cpu()
            is_blank = (part[:, 0] < 0).cpu()[:, None, None, None]
            shown.append(pictures.where(~is_blank, 128))
        whole = torch.cat(shown)
        if tuple(whole.shape[2:]) == tuple(size):
            return whole
        return F.interpolate(whole, tuple(size), mode="nearest-exact")

    def to(self, device: torch.device | str) -> None:
        self.tokenizer.to(device)


def list_pictures_in(folder: Path) -> list[str]:
    """The image files in a folder, in the order of their names. Raises InputError if there are none."""
    endings = tuple(readable_suffixes())
    files = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in endings)
    if not files:
        raise InputError(f"condition={folder} holds no image; give the folder that does, or files")
    return files
