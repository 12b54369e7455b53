"""Any folder of images, in class folders or flat."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.datamodule import ImageDataModule
from data.errors import InputError
from data.loading import Samples
from data.store import Arrays, fingerprint

ENDINGS = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Folder(ImageDataModule):
    """The images below `root`, scaled on the shorter side to `image_size` and cropped at the centre.

    The label is the number of the class folder (the first folder below `root`), 0 in a flat folder. `n_val` images are
    held out: "random" ones, drawn by `seed`, or the "last" in the order of their paths. Decoded images are kept as uint8
    under `cache_dir`; the key holds every file's path, size and time, so that a changed folder is read anew.
    """

    def __init__(
        self,
        root: str | None,
        image_size: int = 64,
        channels: int = 3,
        n_val: int = 1_000,
        held_out: str = "random",
        seed: int = 0,
        cache_dir: str = "cache",
        batch_size: int = 32,
        flip: bool = True,
        num_workers: int = 0,
    ) -> None:
        super().__init__(image_size, channels, batch_size, flip, num_workers, seed, cache_dir)
        if not root:
            raise InputError("data=folder needs the folder that holds the images; add data.root=<folder>")
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise InputError(f"data.root={root} is not a folder; give the folder that holds the images")
        self.title = self.root.resolve().name
        files = sorted(p for p in self.root.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
        if not files:
            raise InputError(f"data.root={root} holds no image ({', '.join(sorted(ENDINGS))}); give the folder that does")
        if not 0 < n_val < len(files):
            raise InputError(f"data.n_val={n_val} must leave both splits an image; {root} holds {len(files)}")
        if held_out not in ("random", "last"):
            raise InputError(f"data.held_out={held_out} must be random or last")
        order = np.random.default_rng(seed).permutation(len(files)) if held_out == "random" else np.arange(len(files))
        self.files = {"train": [files[i] for i in order[:-n_val]], "val": [files[i] for i in order[-n_val:]]}
        self.classes = sorted({self._class(file) for file in files})

    def _class(self, file: Path) -> str:
        parts = file.relative_to(self.root).parts
        return parts[0] if len(parts) > 1 else ""

    def load(self, split: str) -> Samples:
        files = self.files[split]
        listing = [(str(f.relative_to(self.root)), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
        key = {"root": str(self.root.resolve()), "files": fingerprint(listing)}

        def fill(arrays: Arrays) -> None:
            numbers = {name: i for i, name in enumerate(self.classes)}
            arrays["labels"][:] = [numbers[self._class(file)] for file in files]
            with ThreadPoolExecutor() as pool:  # Pillow decodes outside the interpreter's lock
                images: Iterable[NDArray[np.uint8]] = pool.map(self._read, files)
                for i, image in enumerate(images):
                    arrays["images"][i] = image

        return self.cached(f"folder-{split}", key, len(files), fill)

    def _read(self, file: Path) -> NDArray[np.uint8]:
        size = (self.image_size, self.image_size)
        try:
            with Image.open(file) as opened:
                upright = ImageOps.exif_transpose(opened).convert("RGB" if self.channels == 3 else "L")
                image = upright if upright.size == size else ImageOps.fit(upright, size, Image.Resampling.BICUBIC)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"{file} can't be read as an image ({error}); repair it or take it out of the folder") from error
        return np.asarray(image).reshape(*size, self.channels).transpose(2, 0, 1)
