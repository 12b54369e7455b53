"""Pictures of a codebook: how often each code is used, and what it decodes to."""

import math
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from codegrid.data.images import to_uint8
from codegrid.data.pictures import draw_bars, show_picture, tile_images
from codegrid.data.shown import pick_shown
from codegrid.engine.folder import PICTURES
from codegrid.engine.loggers import log_histogram
from codegrid.evaluation.codebook import CodebookUse
from codegrid.evaluation.units import describe_shown
from vqgan.module import VQGAN
from vqgan.tokenizer import Tokenizer

MAX_CODES = 1_024  # in an atlas
CPU_WORK = 1e11  # parameters times grid positions that a CPU decodes for an atlas, about a minute's
GRID = 7  # codes a side of the grid that is decoded for each code
SHEET = 560  # pixels a side of an atlas, about
HEIGHT = 200  # pixels of a histogram's bars; several codebooks share twice as many
MIN_BAR_HEIGHT = 48  # pixels of one codebook's bars among several


class CodebookPictures(Callback):
    """After each validation: how often each code was used in it, as a picture and as a histogram in the loggers, and an atlas
    of what the codes decode to, unless they are no grid: such a code by itself is no picture.

    With several codebooks the logged histogram and the atlas show the first. A bottleneck without codes has no pictures.
    `files` are the last pictures, in the folder `pictures` of the run.
    """

    def __init__(self) -> None:
        self.files: list[Path] = []

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, VQGAN)
        if module.codebook_use is None or trainer.sanity_checking:
            return
        counts = module.codebook_use.total()  # a sum over ranks, so each rank has to call it
        if not trainer.is_global_zero:
            return
        folder = Path(trainer.default_root_dir) / PICTURES
        tokenizer = module.tokenizer
        caption = describe_shown(tokenizer.rules, tokenizer.encoder.channels)
        self.files = [
            show_picture(
                trainer,
                draw_histogram(counts, part_name(module.codebook_use)),
                folder,
                "histogram",
                module.step,
            )
        ]
        if tokenizer.is_gridded:
            atlas = draw_atlas(tokenizer, counts)
            self.files.append(show_picture(trainer, atlas, folder, "atlas", module.step, caption))
        log_histogram(trainer, counts[0].sort(descending=True).values.cpu(), "val/codes")


def part_name(use: CodebookUse) -> str:
    """What the rows of its counts are."""
    return "scale" if use.lengths else "codebook"


def draw_histogram(counts: Tensor, part: str = "codebook") -> Tensor:
    """How often each code was used, `counts` (num_codebooks, K), as bars in a (3, H, W) uint8 picture.

    Codes are sorted by use. Each codebook, or other `part`, has a panel below the one before it, and all panels have one scale.
    """
    num_codebooks, K = counts.shape
    several = num_codebooks > 1
    height = max(MIN_BAR_HEIGHT, 2 * HEIGHT // num_codebooks) if several else HEIGHT
    panels = []
    for i, sorted_counts in enumerate(counts.sort(1, descending=True).values.cpu()):
        used = int((sorted_counts > 0).sum())
        p = sorted_counts / sorted_counts.sum()
        perplexity = float(torch.exp(-torch.xlogy(p, p).sum()))
        name = f"{part} {i}: " if several else ""
        caption = f"{name}{used:,} of {K:,} codes in use, the most used first; perplexity {perplexity:,.1f}"
        top = float(counts.max()) if several else None
        panels.append(draw_bars(sorted_counts, caption, height=height, top=top))
    return torch.cat(panels, 1)


@torch.no_grad()
def draw_atlas(tokenizer: Tokenizer, counts: Tensor) -> Tensor:
    """What each code decodes to, in a nearly square (3, H, W) uint8 picture. `counts` (num_codebooks, K) says how often each
    was used.

    A code's patch is the middle of a decoded grid that holds nothing else, in the channels that pictures show. Codes in use are
    in rows from dark to bright, and within a row from blue to red; unused ones follow, faded. More codes than `count_shown`
    are cut to the most used. With several codebooks the codes of the first are shown, each with the most used code of every other
    codebook.
    """
    side = min(GRID, *tokenizer.grid)
    shown = count_shown(tokenizer, side)
    codes = counts[0].sort(descending=True, stable=True).indices[:shown]
    f = tokenizer.f
    middle = side // 2 * f
    decoded = []
    for part in codes.split(64):
        indices = counts.argmax(1).repeat(len(part), side, side, 1)
        indices[..., 0] = part[:, None, None]
        x_hat = tokenizer.decode_indices(indices if len(counts) > 1 else indices[..., 0])
        decoded.append(x_hat[..., middle : middle + f, middle : middle + f].cpu())
    patches = pick_shown(torch.cat(decoded), tokenizer.rules.show)
    used = int((counts[0] > 0).sum().clamp(max=shown))
    columns = math.ceil(math.sqrt(len(patches)))
    in_use = sort_by_colour(patches[:used], columns)
    faded = 0.75 + 0.25 * sort_by_colour(patches[used:], columns)
    rows = list(to_uint8(torch.cat([in_use, faded])).split(columns))
    blank = rows[-1].new_full((columns - len(rows[-1]), *patches.shape[1:]), 255)
    rows[-1] = torch.cat([rows[-1], blank])
    return tile_images(rows, gap=1, scale=max(1, round(SHEET / (columns * (f + 1)))))


def count_shown(tokenizer: Tokenizer, side: int) -> int:
    """How many codes an atlas shows: on a CPU as many as a large decoder can decode in about a minute, each on a grid of
    side x side."""
    parameters = list(tokenizer.decoder.parameters())
    if parameters[0].device.type != "cpu":
        return MAX_CODES
    weights = sum(p.numel() for p in parameters)
    return min(MAX_CODES, max(1, int(CPU_WORK / (weights * side**2))))


def sort_by_colour(patches: Tensor, columns: int) -> Tensor:
    """Patches (n, C, f, f) in rows of `columns`, from dark to bright, and within a row from blue to red."""
    colours = patches.mean((2, 3))
    by_brightness = colours.mean(1).argsort(stable=True)
    warmth = colours[:, 0] - colours[:, -1]
    rows = [row[warmth[row].argsort(stable=True)] for row in by_brightness.split(columns)]
    return patches[torch.cat(rows)] if rows else patches
