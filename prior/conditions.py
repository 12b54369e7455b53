"""What samples start from: an image to complete, and labels."""

import unicodedata
from collections.abc import Callable, Sequence
from difflib import SequenceMatcher
from heapq import nlargest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from codegrid.data.labels import ClassTable, display_classes
from codegrid.engine.errors import InputError
from codegrid.engine.precision import autocast
from codegrid.engine.sizes import Size
from prior.decoding.sampling import Sampler
from vqgan.pictures import Picture, read_picture
from vqgan.tokenizer import Tokenizer

NAMES_LISTED = 10  # classes that a sentence names
NEAR = 0.6  # how like a name has to be to what was typed, 0 to 1, to be asked for


def check_places(sampler: Sampler, tokenizer: Tokenizer, grid: Size | None = None) -> None:
    """Raise InputError for settings that need codes with places, if the tokenizer's have none, or if a prior takes them for a row:
    `grid` is the prior's."""
    if tokenizer.is_spatial and grid in (None, tokenizer.grid):
        return
    for name, remedy in (
        ("grid", "leave it out"),
        ("init_image", "leave it out, with sampler.rows and sampler.region"),
    ):
        if (value := getattr(sampler, name)) is not None:
            if tokenizer.is_spatial:
                what = "the codes of several scales are a row to this prior; use prior=var"
            else:
                what = (
                    f"the {tokenizer.grid[1]} codes of this tokenizer are a sequence, of which each describes the whole image; "
                    f"{remedy}"
                )
            raise InputError(f"sampler.{name}={value} needs codes with places, and {what}")


@torch.no_grad()
def encode_init_image(picture: Picture, tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """The codes of a picture, (h, w) or (h, w, num_codebooks), and what the tokenizer sees of it, (1, 3 or 1, H, W) uint8.

    It is scaled to the tokenizer's image size and read as the images of its training were. Raises InputError for what
    is no picture.
    """
    if isinstance(picture, str | Path) and not Path(picture).expanduser().is_file():
        raise InputError(f"sampler.init_image={picture} is not there; give an image file")
    image = read_picture(picture, tokenizer.form, tokenizer.rules, "sampler.init_image")
    x = image[None].contiguous(memory_format=torch.channels_last)
    device = next(tokenizer.parameters()).device
    with autocast(device):
        codes = tokenizer.indices(x.to(device))
    return codes[0], tokenizer.rules.to_picture(x)


@torch.no_grad()
def show_init_image(
    image: Tensor, codes: Tensor, tokenizer: Tokenizer, known: Tensor
) -> list[Tensor]:
    """Three pictures (1, 3 or 1, H, W) uint8 of what `encode_init_image` returns.

    The image as the tokenizer sees it, its reconstruction, and the reconstruction with all that is not `known` (h, w) in grey.
    """
    with autocast(codes.device):
        decoded = tokenizer.rules.to_picture(tokenizer.decode_indices(codes[None])).cpu()
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
    wanted = list_labels(range(len(classes)) if label is None else label)
    if not wanted:
        raise InputError("label=[] names no class; give one, or leave label out for all in turn")
    numbers: dict[tuple[type, Any], int] = {}  # each is looked up once; True is not 1
    for each in wanted:
        if (type(each), each) not in numbers:
            number = find_class(classes, each)
            if number is None:
                raise refuse_label(classes, each)
            numbers[type(each), each] = number
    in_turn = [numbers[type(each), each] for each in wanted[:n]]
    return torch.tensor([in_turn[i % len(in_turn)] for i in range(n)])


def list_labels(label: Any) -> list[Any]:
    """The labels of a sequence, an array, a tensor or a column of a table, as Python's own values; or the one label."""
    if hasattr(label, "tolist"):
        label = label.tolist()
    several = list(label) if isinstance(label, Sequence) and not isinstance(label, str) else [label]
    return [each.item() if isinstance(each, np.generic) else each for each in several]


def find_class(classes: ClassTable, label: Any) -> int | None:
    """The number of the class that a command or a script means by its number or name; None if it is none, or not one alone.

    A command line has true, 1.50 and a null in a list as values that are no text, and a name of accents may be typed in
    another form of Unicode than the data have.
    """
    if (number := classes.find(label)) is not None:
        return number
    if label is None or isinstance(label, bool):
        word = "null" if label is None else str(label).lower()
        matches = [i for i, name in enumerate(classes.names) if name.casefold() == word]
    elif isinstance(label, float):
        matches = [i for i, name in enumerate(classes.names) if reads_as(name, label)]
    elif isinstance(label, str):
        typed = unicodedata.normalize("NFC", label)
        matches = [
            i for i, name in enumerate(classes.names) if unicodedata.normalize("NFC", name) == typed
        ]
    else:
        return None
    return matches[0] if len(matches) == 1 else None


def reads_as(name: str, value: float) -> bool:
    """Whether a name is a number in text, this one."""
    try:
        return float(name) == value
    except ValueError:
        return False


def refuse_label(classes: ClassTable, label: Any) -> InputError:
    """The error about a label that is no class, with the names that are nearest to it."""
    names = classes.names
    hint, listed = ";", display_classes(names, NAMES_LISTED)
    if isinstance(label, str):
        nearest = find_nearest_names(label, names)
        likeness, first = nearest[0]
        if likeness >= NEAR:
            hint = f", did you mean {names[first]}?"
        if len(names) > NAMES_LISTED:
            shown = ", ".join(f"{number}={names[number]}" for _, number in nearest)
            listed = f"of {len(names):,} the nearest are {shown}"
    elif str(label) in names:
        number = names.index(str(label))
        hint = f"; the class called {label} has the number {number};"
    return InputError(
        f"label={label} is no class{hint} give numbers from 0 to {len(classes) - 1} or names, "
        f"or -1 for no class: {listed}"
    )


def find_nearest_names(label: str, names: Sequence[str]) -> list[tuple[float, int]]:
    """The likeness, 0 to 1, and the number of up to NAMES_LISTED names that are most like the label, whatever their capitals."""
    matcher = SequenceMatcher(b=label.casefold())

    def rank(number: int, measure: Callable[[], float]) -> tuple[float, int]:
        matcher.set_seq1(names[number].casefold())
        return measure(), -number  # of equals the first

    every = (rank(number, matcher.quick_ratio) for number in range(len(names)))
    candidates = nlargest(5 * NAMES_LISTED, every)  # ratio is too slow for thousands of names
    ranked = nlargest(NAMES_LISTED, (rank(-place, matcher.ratio) for _, place in candidates))
    return [(likeness, -place) for likeness, place in ranked]
