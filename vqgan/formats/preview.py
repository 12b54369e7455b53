"""What an import shows at once: reconstructions of a few validation images, and how close they are."""

from pathlib import Path

import torch
from torch import Tensor

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.pictures import save_picture, tile_images
from codegrid.engine.errors import check_int
from codegrid.engine.folder import PICTURES
from codegrid.evaluation.reconstruction import Reconstruction
from codegrid.evaluation.units import describe_shown
from vqgan.formats.load import format_range
from vqgan.tokenizer import PIXEL_RANGES, Tokenizer

COLUMNS = 12  # images in a row of the picture
TRIED = (
    2  # images that are tried in the other range, since networks of this size take seconds for each
)
CLEARLY_BETTER = (
    2.0  # dB by which another range of pixels has to be closer before it is worth a sentence
)


class Preview:
    """Reconstructions of `n` validation images by a tokenizer, on a device; none with n=0.

    scores     PSNR, SSIM and sharpness of these images alone
    remarks    a sentence if images in another range of pixels come back closer
    """

    def __init__(
        self, tokenizer: Tokenizer, data: ImageDataModule, n: int, device: torch.device
    ) -> None:
        check_int("show", n, 0)
        self.scores: dict[str, float] = {}
        self.remarks: list[str] = []
        self.rows: list[Tensor] = []
        if n == 0:
            return
        tokenizer = tokenizer.to(device)
        self.depth, self.caption = data.rules.depth, describe_shown(data.rules, data.channels)
        x = data.preprocess(data.take_evenly("val", n)[0])
        x_hat = reconstruct(tokenizer, x, device)
        self.scores = measure_closeness(x, x_hat, self.depth)
        pictures = [data.rules.to_picture(images).split(COLUMNS) for images in (x, x_hat)]
        pairs = zip(*pictures, strict=True)
        self.rows = [row for pair in pairs if len(pair[0]) == len(x[:COLUMNS]) for row in pair]
        self._try_other_pixels(tokenizer, x[:TRIED], x_hat[:TRIED], device)

    def _try_other_pixels(
        self, tokenizer: Tokenizer, x: Tensor, x_hat: Tensor, device: torch.device
    ) -> None:
        own = tokenizer.pixels
        [other] = [pixels for pixels in PIXEL_RANGES if pixels != own]
        tokenizer.pixels = other
        psnr = measure_closeness(x, reconstruct(tokenizer, x, device), self.depth)["psnr"]
        tokenizer.pixels = own
        own_psnr = measure_closeness(x, x_hat, self.depth)["psnr"]
        if psnr > own_psnr + CLEARLY_BETTER:
            self.remarks.append(
                f"PSNR is {psnr:.1f} dB with pixels={format_range(other)} and {own_psnr:.1f} dB with "
                f"pixels={format_range(own)}, which this run has: look at its picture"
            )

    def save(self, folder: Path) -> list[str]:
        """Write the picture below a run folder, rows of images above their reconstructions; the names of the files."""
        if not self.rows:
            return []
        sheet = tile_images(self.rows, scale=max(1, 128 // self.rows[0].shape[-1]))
        file = folder / PICTURES / "reconstructions.png"
        return [str(save_picture(sheet, file, self.caption))]


@torch.no_grad()
def reconstruct(tokenizer: Tokenizer, x: Tensor, device: torch.device) -> Tensor:
    """Images (n, C, H, W) -> their reconstructions on the CPU, one by one: at full resolution the networks need memory."""
    return torch.cat(
        [tokenizer.decode(tokenizer.encode(image.to(device)).z_q).cpu() for image in x.split(1)]
    )


def measure_closeness(x: Tensor, x_hat: Tensor, depth: int) -> dict[str, float]:
    """PSNR, SSIM and sharpness of reconstructions at this depth of their pixels, to four digits after the point."""
    scores = Reconstruction()
    scores.update(x, x_hat, depth)
    return {name: round(float(value), 4) for name, value in scores.compute().items()}
