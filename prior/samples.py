"""What samples are saved as, and their picture."""

from collections.abc import Sequence
from pathlib import Path

import torch

from codegrid.data.pictures import save_picture, tile_images
from codegrid.data.pixels import PixelRules
from codegrid.data.shown import choose_shown
from codegrid.engine.errors import InputError

KINDS = ("grid", "png", "npz", "npy", "shards", "neighbours")  # values of `save`


def check_kinds(save: str | Sequence[str]) -> list[str]:
    """The kinds of files that `save` names, one or several. Raises InputError for others."""
    kinds = [save] if isinstance(save, str) else list(save)
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(
                f"save={kind} must be one of {', '.join(KINDS)}, or several, as save=[grid,npz]"
            )
    return kinds


def explain_shown(save: Sequence[str], rules: PixelRules, channels: int) -> str | None:
    """The sentence about files that hold less than the samples: some of their channels, or 8 of 16 bits. None if all is there."""
    shown = choose_shown(channels, rules.show)
    kinds = [kind for kind in ("grid", "png", "npz", "shards", "neighbours") if kind in save]
    if not kinds or (len(set(shown)) == channels and rules.depth == 8):
        return None
    numbers = ", ".join(map(str, shown))
    some = f"channel{'s' if len(shown) > 1 else ''} {numbers} of {channels}"
    what = some if len(shown) < channels or rules.show else "the samples"
    return f"pictures ({', '.join(kinds)}) show {what} in 8 bits; save=[npy] has all values, in the units of the data"


def save_grid(
    images: torch.Tensor,
    folder: Path,
    columns: int,
    rows: int,
    head: Sequence[torch.Tensor] = (),
    caption: str = "",
    name: str = "samples.png",
) -> Path:
    """Save a picture of the first `rows` rows of images (n, C, H, W) uint8, starting with the images of `head`."""
    sheet = torch.cat([*head, images])
    columns = min(columns, len(sheet))
    shown = list(sheet[: rows * columns].split(columns))
    white = images.new_full((columns - len(shown[-1]), *images.shape[1:]), 255)
    shown[-1] = torch.cat([shown[-1], white])
    return save_picture(tile_images(shown, scale=2), folder / name, caption)
