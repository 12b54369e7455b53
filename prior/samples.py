"""What samples begin with, and what they are saved as."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from data.decode import UnreadableImage, decode
from data.images import to_model_input, to_uint8
from data.pictures import save_picture, tile_images
from engine.environment import autocast
from engine.errors import InputError
from prior.models.base import PriorModel
from vqgan.tokenizer import Tokenizer

KINDS = ("grid", "png", "npz", "neighbours")  # what samples are saved as


def encode_init_image(
    file: str, tokenizer: Tokenizer, known: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The codes (h, w) or (h, w, num_codebooks) of an image file, whose middle is scaled to what the tokenizer sees, and pictures
    (1, C, H, W) uint8: the image, its reconstruction, and of that what is `known` (h, w), the rest grey."""
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
        seen = to_uint8(tokenizer.decode_indices(codes)).cpu()
    pixelwise = known.repeat_interleave(tokenizer.f, 0).repeat_interleave(tokenizer.f, 1)
    return codes[0], [image, seen, seen.where(pixelwise, 128)]


def choose_labels(model: PriorModel, label: Any, n: int) -> torch.Tensor | None:
    """The labels (n,) of n samples: the classes that `label` names in turn, by default all; None of a prior without classes."""
    if not model.classes:
        if label is not None:
            raise InputError(
                f"label={label} needs a prior of classes; train one with conditional=true"
            )
        return None
    chosen = (
        list(range(model.classes))
        if label is None
        else list(label)
        if OmegaConf.is_list(label)
        else [label]
    )
    if not chosen or any(
        not isinstance(number, int) or not -1 <= number < model.classes for number in chosen
    ):
        raise InputError(
            f"label={label} must be classes, 0 to {model.classes - 1}, or -1 for none in particular"
        )
    return torch.tensor([chosen[i % len(chosen)] for i in range(n)])


def save_samples(
    images: torch.Tensor,
    folder: Path,
    kinds: list[str],
    columns: int,
    rows: int,
    head: Sequence[torch.Tensor] = (),
) -> dict[str, Any]:
    """Images (n, C, H, W) uint8 as a picture of the first `rows` rows, in which those of `head` come first, as files of
    their own, and as the .npz that evaluators of FID read: arr_0 (n, H, W, 3). Where they are."""
    files: dict[str, Any] = {}
    if "grid" in kinds:
        sheet = torch.cat([*head, images])
        columns = min(columns, len(sheet))
        shown = list(sheet[: rows * columns].split(columns))
        shown[-1] = torch.cat(
            [shown[-1], images.new_full((columns - len(shown[-1]), *images.shape[1:]), 255)]
        )
        files["pictures"] = [str(save_picture(tile_images(shown, scale=2), folder / "samples.png"))]
    if "png" in kinds:
        for i, image in enumerate(images):
            save_picture(tile_images([image[None]]), folder / "samples" / f"{i:06d}.png")
        files["png"] = str(folder / "samples")
    if "npz" in kinds:
        np.savez(
            folder / "samples.npz", arr_0=images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
        )
        files["npz"] = str(folder / "samples.npz")
    return files
