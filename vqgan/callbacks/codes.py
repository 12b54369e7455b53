"""What the codes of a tokenizer are, and how often each is used."""

import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from data.images import to_uint8
from data.pictures import draw_bars, show_picture, tile_images
from engine.folder import PICTURES
from engine.loggers import log_histogram
from vqgan.module import VQGAN
from vqgan.tokenizer import Tokenizer

MAX_CODES = 1_024  # codes in an atlas
GRID = 7  # codes a side of what is decoded for each
SHEET = 560  # pixels a side of an atlas, about
HEIGHT = 200  # pixels of a histogram's bars; those of several codebooks share twice as many
MIN_BAR_HEIGHT = 48  # and have at least so many


class CodebookPictures(Callback):
    """After each validation: how often each code was used in it, as a picture and as a histogram of the loggers, and an atlas of
    what the codes decode to; these two of several codebooks the first. Of a bottleneck without codes, nothing."""

    def __init__(self) -> None:
        self.files: list[Path] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VQGAN)
        if module.use is None or trainer.sanity_checking:
            return
        counts = module.use.total()  # of all ranks: each must ask
        if not trainer.is_global_zero:
            return
        self.files = [
            show_picture(
                trainer,
                draw_histogram(counts),
                Path(trainer.default_root_dir) / PICTURES,
                "histogram",
                module.step,
            ),
            show_picture(
                trainer,
                draw_atlas(module.tokenizer, counts),
                Path(trainer.default_root_dir) / PICTURES,
                "atlas",
                module.step,
            ),
        ]
        log_histogram(trainer, counts[0].sort(descending=True).values.cpu(), "val/codes")


def draw_histogram(counts: Tensor) -> Tensor:
    """How often each code was used, `counts` (num_codebooks, K), the most used first, as bars in a (3, H, W) uint8
    picture, one codebook below the other, all on one scale."""
    num_codebooks, K = counts.shape
    made, height = (
        [],
        HEIGHT if num_codebooks == 1 else max(MIN_BAR_HEIGHT, 2 * HEIGHT // num_codebooks),
    )
    for book, falling in enumerate(counts.sort(1, descending=True).values.cpu()):
        used, p = int((falling > 0).sum()), falling / falling.sum()
        perplexity = float(torch.exp(-torch.xlogy(p, p).sum()))
        name = "" if num_codebooks == 1 else f"codebook {book}: "
        caption = f"{name}{used:,} of {K:,} codes in use, the most used first; perplexity {perplexity:,.1f}"
        made.append(
            draw_bars(
                falling,
                caption,
                height=height,
                top=float(counts.max()) if num_codebooks > 1 else None,
            )
        )
    return torch.cat(made, 1)


@torch.no_grad()
def draw_atlas(tokenizer: Tokenizer, counts: Tensor) -> Tensor:
    """What each code decodes to, in a nearly square (3, H, W) uint8 picture; `counts` (num_codebooks, K) is how often each
    was used.

    A code's patch is the middle of the decoded grid that is full of it. Codes in use lie in rows from dark to bright, in each
    from blue to red; after them, faded, those that are not. Of more than `MOST` codes, the most used. Of several codebooks
    the first is shown, each of the others with its most used code.
    """
    shown = counts[0].sort(descending=True, stable=True).indices[:MAX_CODES]
    side = min(GRID, *tokenizer.grid)
    f, middle = tokenizer.f, side // 2 * tokenizer.f
    made = []
    for part in shown.split(64):
        indices = counts.argmax(1).repeat(len(part), side, side, 1)
        indices[..., 0] = part[:, None, None]
        x_hat = tokenizer.decode_indices(indices if len(counts) > 1 else indices[..., 0])
        made.append(x_hat[..., middle : middle + f, middle : middle + f].cpu())
    patches, used = torch.cat(made), int((counts[0] > 0).sum().clamp(max=MAX_CODES))
    columns = math.ceil(math.sqrt(len(patches)))
    patches = torch.cat(
        [by_colour(patches[:used], columns), 0.75 + 0.25 * by_colour(patches[used:], columns)]
    )
    rows = list(to_uint8(patches).split(columns))
    rows[-1] = torch.cat(
        [rows[-1], rows[-1].new_full((columns - len(rows[-1]), *patches.shape[1:]), 255)]
    )
    return tile_images(rows, gap=1, scale=max(1, round(SHEET / (columns * (f + 1)))))


def by_colour(patches: Tensor, columns: int) -> Tensor:
    """Patches (n, C, f, f) in rows of `columns` from dark to bright, those of a row from blue to red."""
    colours = patches.mean((2, 3))
    rising = colours.mean(1).argsort(stable=True)
    warmth = colours[:, 0] - colours[:, -1]
    rows = [row[warmth[row].argsort(stable=True)] for row in rising.split(columns)]
    return patches[torch.cat(rows)] if rows else patches
