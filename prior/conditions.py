"""What samples start from: an image to complete, and labels."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegrid.data.form import Form
from codegrid.data.images import to_uint8
from codegrid.data.labels import ClassTable, display_classes
from codegrid.engine.errors import InputError, suggest
from codegrid.engine.precision import autocast
from vqgan.pictures import Picture, read_picture
from vqgan.tokenizer import Tokenizer


@torch.no_grad()
def encode_init_image(picture: Picture, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The codes of a picture, (h, w) or (h, w, num_codebooks), and what the tokenizer sees of it, (1, C, H, W) uint8.

    The middle of the picture is scaled to the tokenizer's image size and read by `tokenizer.rules`. Raises InputError for what
    is no picture.
    """
    encoder = tokenizer.encoder
    if isinstance(picture, str | Path) and not Path(picture).expanduser().is_file():
        raise InputError(f"sampler.init_image={picture} is not there; give an image file")
    image = read_picture(
        picture, Form(encoder.image_size, encoder.channels), tokenizer.rules, "sampler.init_image"
    )
    x = image[None].contiguous(memory_format=torch.channels_last)
    device = next(tokenizer.parameters()).device
    with autocast(device):
        codes = tokenizer.indices(x.to(device))
    return codes[0], to_uint8(x)


@torch.no_grad()
def show_init_image(
    image: Tensor, codes: Tensor, tokenizer: Tokenizer, known: Tensor
) -> list[Tensor]:
    """Three pictures (1, C, H, W) uint8 of what `encode_init_image` returns.

    The image as the tokenizer sees it, its reconstruction, and the reconstruction with all that is not `known` (h, w) in grey.
    """
    with autocast(codes.device):
        decoded = to_uint8(tokenizer.decode_indices(codes[None])).cpu()
    pixelwise = known.repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
    return [image, decoded, decoded.where(pixelwise, 128)]


def choose_labels(classes: ClassTable, label: Any, n: int) -> torch.Tensor | None:
    """The labels (n,) of n samples: the classes in `label` in turn, all classes by default; None for a prior without classes.

    `label` is the number or the name of a class, -1 for no class, or several of them. Raises InputError for others.
    """
    if not len(classes):
        if label is not None:
            raise InputError(
                f"label={label} needs a prior of classes; train one with conditional=true"
            )
        return None
    if label is None:
        label = list(range(len(classes)))
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    wanted = list(label) if isinstance(label, Sequence) and not isinstance(label, str) else [label]
    wanted = [each.item() if isinstance(each, np.generic) else each for each in wanted]
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
