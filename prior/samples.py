"""What samples are saved as, and their picture."""

from collections.abc import Sequence
from pathlib import Path

import torch

from codegrid.data.pictures import save_picture, tile_images
from codegrid.engine.errors import InputError

KINDS = ("grid", "png", "npz", "shards", "neighbours")  # values of `save`


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
