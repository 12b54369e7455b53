"""What samples start from (an image, labels), what they are saved as, and their picture."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from data.decode import UnreadableImage, decode
from data.images import to_model_input, to_uint8
from data.pictures import save_picture, tile_images
from engine.environment import autocast
from engine.errors import InputError
from prior.models.base import PriorModel
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz", "shards", "neighbours")  # values of `save`


def encode_init_image(
    file: str, tokenizer: Tokenizer, known: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes (h, w) or (h, w, num_codebooks) of an image file, and three pictures (1, C, H, W) uint8.

    The middle of the image is scaled to the tokenizer's image size. The pictures are the image, its reconstruction, and the
    reconstruction with all that is not `known` (h, w) in grey.
    """
    path, encoder = Path(file).expanduser(), tokenizer.encoder
    if not path.is_file():
        raise InputError(f"sampler.init_image={file} is not there; give an image file")
    try:
        pixels = decode(path.read_bytes(), encoder.image_size, encoder.channels)
    except (OSError, UnreadableImage) as error:
        raise InputError(
            f"sampler.init_image={file} can't be read as an image ({error}); give another"
        ) from error
    image = torch.from_numpy(np.array(pixels))[None]  # a copy: it may be read-only or mirrored
    where = next(tokenizer.parameters()).device
    with torch.no_grad(), autocast(where):
        codes = tokenizer.indices(to_model_input(image).to(where))
        decoded = to_uint8(tokenizer.decode_indices(codes)).cpu()
    pixelwise = known.repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
    return codes[0], [image, decoded, decoded.where(pixelwise, 128)]


def choose_labels(
    model: PriorModel, label: int | Sequence[int] | None, n: int
) -> torch.Tensor | None:
    """The labels (n,) of n samples: the classes in `label` in turn, all classes by default; None for a prior without classes."""
    if not model.classes:
        if label is not None:
            raise InputError(
                f"label={label} needs a prior of classes; train one with conditional=true"
            )
        return None
    if label is None:
        label = range(model.classes)
    classes = list(label) if isinstance(label, Sequence) else [label]
    if not classes or any(
        not isinstance(number, int) or not -1 <= number < model.classes for number in classes
    ):
        raise InputError(
            f"label={label} must be classes, 0 to {model.classes - 1}, or -1 for no class"
        )
    return torch.tensor([classes[i % len(classes)] for i in range(n)])


def check_kinds(save: str | Sequence[str]) -> list[str]:
    """The kinds of files that `save` names, one or several. Raises InputError for others."""
    kinds = [save] if isinstance(save, str) else list(save)
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(
                f"save={kind} must be one of {', '.join(KINDS)}, or several, as save=[grid,npz]"
            )
    return kinds


def save_grid(
    images: torch.Tensor,
    folder: Path,
    columns: int,
    rows: int,
    head: Sequence[torch.Tensor] = (),
) -> Path:
    """Save a picture of the first `rows` rows of images (n, C, H, W) uint8, starting with the images of `head`."""
    sheet = torch.cat([*head, images])
    columns = min(columns, len(sheet))
    shown = list(sheet[: rows * columns].split(columns))
    white = images.new_full((columns - len(shown[-1]), *images.shape[1:]), 255)
    shown[-1] = torch.cat([shown[-1], white])
    return save_picture(tile_images(shown, scale=2), folder / "samples.png")
