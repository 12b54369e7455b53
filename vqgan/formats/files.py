"""Public weights on disk or on a hub: one file, folder or id becomes the tensors and settings of one tokenizer."""

from collections.abc import Mapping
from dataclasses import dataclass

from vqgan.formats.base import PublicFile


@dataclass(frozen=True)
class Contents:
    """What a public source holds.

    file       its tokenizer; tensors[name] reads from the disk at each access, so a weight is asked for when it is copied, and
               none is collected. Half precision comes as float32
    ignored    what else is in it, and how many tensors each has: {"discriminator": 16, "optimizer": 930}
    sha256     of the file; of several parts one after the other, in the order of their names, as cat and sha256sum have it
    origin     the file's absolute path, or hub:owner/name/file@commit
    licence    as the file or the model card beside it says, or "unknown"
    remarks    what was chosen where there was a choice, one sentence each
    """

    file: PublicFile
    ignored: Mapping[str, int]
    sha256: str
    origin: str
    licence: str
    remarks: tuple[str, ...] = ()


def open_public(source: str, config: str | None, ema: bool | None) -> Contents:
    """The tokenizer in a file, a folder or a hub id (owner/name, owner/name/file); reading it runs no code.

    `config` is its own config file, None for the one beside it, if there is one. `ema` takes averaged weights (True), the last
    ones (False), or averaged ones if there are some (None). Raises InputError, with one sentence, for whatever can't be read.
    """
    raise NotImplementedError
