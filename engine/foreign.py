"""Weights of other programs, recognised so that a stage can say that they have to be imported first."""

import shlex
import zipfile
from pathlib import Path

from codegrid.engine.errors import InputError
from codegrid.engine.folder import BEST, LAST, PREVIOUS
from codegrid.engine.program import PROGRAM

FOREIGN_ENDINGS = (".safetensors", ".bin", ".ckpt", ".pt", ".pth")
FOREIGN_FOLDERS = ("", "vqvae", "movq", "vqgan", "vae", "checkpoints")  # where a tokenizer may lie
OLD_TORCH = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # files of torch before 1.6 begin so


def refuse_foreign(ckpt: str | Path) -> None:
    """Raise InputError, with the command that imports it, if `ckpt` is a file or folder of another program's weights."""
    path = Path(ckpt).expanduser()
    files = [path]
    if path.is_dir():
        files = [path / name for name in (BEST, LAST, PREVIOUS) if (path / name).is_file()]
        files = files or [
            file
            for folder in FOREIGN_FOLDERS
            for file in sorted((path / folder).glob("*"))
            if file.name.endswith(FOREIGN_ENDINGS)
        ]
    if files and files[0].is_file() and is_foreign(files[0]):
        word = shlex.quote(f"from={ckpt}")
        raise InputError(
            f"{ckpt} is no checkpoint of Codegrid: it holds weights of another program; if they are a tokenizer's, import "
            f"them first: {PROGRAM} stage=import {word} data=folder data.root=photos"
        )


def is_foreign(file: Path) -> bool:
    """Whether a file has tensors and no header of this program; damaged files are nobody's."""
    with file.open("rb") as opened:
        start = opened.read(len(OLD_TORCH))
    length = int.from_bytes(start[:8], "little")
    if start == OLD_TORCH or (start[8:9] == b"{" and 8 + length <= file.stat().st_size):
        return True
    try:
        with zipfile.ZipFile(file) as parts:
            names = [name for name in parts.namelist() if name.endswith("/data.pkl")]
            pickled = parts.read(names[0]) if names else b""
    except Exception:  # a damaged file can raise anything
        return False
    return b"_rebuild_tensor" in pickled and b"codegrid" not in pickled
