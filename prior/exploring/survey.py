"""What the validation images of a tokenizer show of its codes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.shown import choose_shown
from codegrid.engine.console import progress_bar
from codegrid.engine.precision import deterministic_float32
from prior.exploring.atlas import MAX_MAPPED, PatchMeans, pool
from vqgan.tokenizer import Tokenizer

THUMBNAIL_SIDE = 64  # pixels, at most


@dataclass(frozen=True)
class CodeSurvey:
    """Validation images and their codes.

    x               the run's pictures (p, C, H, W) float32 in [-1, 1], evenly from the set, as in the pictures of its training
    picture_codes   theirs
    names           of their classes; None without classes
    codes           of the counted images, (n, *shape)
    labels          of the counted images, as the data have them
    shown           the numbers of those of them that are shown as thumbnails
    thumbnails      (m, 3 or 1, h, w) uint8
    use             how often each code of each table occurs, (tables, K)
    patches         the mean of what images show at each code; None where codes have no places, or their map is not wanted
    total           images in the set
    """

    x: Tensor
    picture_codes: Tensor
    names: list[str] | None
    codes: Tensor
    labels: Tensor
    shown: Tensor
    thumbnails: Tensor
    use: Tensor
    patches: PatchMeans | None
    total: int


@torch.no_grad()
def survey_codes(
    tokenizer: Tokenizer,
    images: ImageDataModule,
    pictures: int,
    counted: int,
    shown: int,
    batch_size: int,
    device: torch.device,
) -> CodeSurvey:
    """Encode `counted` validation images, or all if there are fewer, evenly from the set, `batch_size` at a time; `pictures` are
    kept whole, and `shown` of the counted ones as thumbnails."""
    samples = images.samples("val")
    numbers = images.spread_evenly("val", counted, images.seed)
    chosen = torch.linspace(0, len(numbers) - 1, min(shown, len(numbers))).long()
    use = tokenizer.quantizer.make_code_use()
    patches = make_patches(tokenizer)
    tokenizer.to(device)
    codes, labels, thumbnails = [], [], []
    with deterministic_float32(), progress_bar(len(numbers), "encoding") as bar:
        for first in range(0, len(numbers), batch_size):
            values, own_labels = samples.__getitems__(numbers[first : first + batch_size])
            x = images.preprocess(values)
            own = tokenizer.indices(x.to(device)).cpu()
            small = tokenizer.rules.to_picture(x)
            if patches is not None:
                patches.add(small, own)
            use.update(own)
            here = chosen[(first <= chosen) & (chosen < first + len(x))] - first
            thumbnails.append(pool(small[here], THUMBNAIL_SIDE))
            codes.append(own)
            labels.append(own_labels)
            bar.update(len(x))
    tokenizer.cpu()
    values, picture_labels = images.take_evenly("val", pictures)
    x = images.preprocess(values)
    names = None
    known = range(len(images.classes))
    if all(label in known for label in picture_labels.tolist()):
        names = [images.classes[label] for label in picture_labels.tolist()]
    return CodeSurvey(
        x=x,
        picture_codes=tokenizer.indices(x),
        names=names,
        codes=torch.cat(codes),
        labels=torch.cat(labels),
        shown=chosen,
        thumbnails=torch.cat(thumbnails),
        use=use.total(),
        patches=patches,
        total=len(samples),
    )


def make_patches(tokenizer: Tokenizer) -> PatchMeans | None:
    """What averages the patches of codes that have places and a map."""
    if not tokenizer.is_gridded or tokenizer.K is None or tokenizer.K > MAX_MAPPED:
        return None
    channels = len(choose_shown(tokenizer.encoder.channels, tokenizer.rules.show))
    return PatchMeans(tokenizer.num_codebooks, tokenizer.K, channels, tokenizer.f)
