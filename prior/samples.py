"""What samples start from (an image, labels), what they are saved as, and their picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from codegrid.data.decode import PLAIN, UnreadableImage, decode
from codegrid.data.images import to_model_input, to_uint8
from codegrid.data.labels import ClassTable, display_classes
from codegrid.data.pictures import save_picture, tile_images
from codegrid.data.pixels import PixelRules
from codegrid.engine.cli import suggest
from codegrid.engine.environment import autocast
from codegrid.engine.errors import InputError
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz", "shards", "neighbours")  # values of `save`


def encode_init_image(
    file: str, tokenizer: Tokenizer, known: torch.Tensor, rules: PixelRules = PLAIN
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes (h, w) or (h, w, num_codebooks) of an image file, and three pictures (1, C, H, W) uint8.

    The middle of the image is scaled to the tokenizer's image size; `rules` are those of the tokenizer's images. The pictures
    are the image, its reconstruction, and the reconstruction with all that is not `known` (h, w) in grey.
    """
    path, encoder = Path(file).expanduser(), tokenizer.encoder
    if not path.is_file():
        raise InputError(f"sampler.init_image={file} is not there; give an image file")
    try:
        pixels = decode(path.read_bytes(), encoder.image_size, encoder.channels, rules)
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


def choose_labels(classes: ClassTable, label: Any, n: int) -> torch.Tensor | None:
    """The labels (n,) of n samples: the classes in `label` in turn, all classes by default; None for a prior without classes.

    `label` is the number or the name of a class, -1 for no class, or a list of them.
    """
    if not len(classes):
        if label is not None:
            raise InputError(
                f"label={label} needs a prior of classes; train one with conditional=true"
            )
        return None
    if label is None:
        label = list(range(len(classes)))
    wanted = list(label) if isinstance(label, Sequence) and not isinstance(label, str) else [label]
    numbers = [classes.find(each) for each in wanted]
    if not numbers or None in numbers:
        unknown = next((each for each in wanted if classes.find(each) is None), "[]")
        hint = suggest(str(unknown), classes.names) if isinstance(unknown, str) else ""
        if not isinstance(unknown, str) and str(unknown) in classes.names:
            number = classes.names.index(str(unknown))
            hint = f"; the class called {unknown} has the number {number}"
        complaint = f"label={unknown} is no class{hint}"
        raise InputError(
            f"{complaint}{' ' if hint.endswith('?') else '; '}give numbers from 0 to {len(classes) - 1} or names, "
            f"or -1 for no class: {display_classes(classes.names)}"
        )
    return torch.tensor([numbers[i % len(numbers)] for i in range(n)])


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
