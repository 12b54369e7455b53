"""A .cgz file: an image's codes, and what has to match to read them (docs/codec.md has the format)."""

import hashlib
import struct
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from codegrid.engine.errors import InputError

MAGIC = b"CGZ"
FILE_FORMAT = 1  # the fourth byte of a file
CGZ = ".cgz"
FIXED_PART = struct.Struct("<3sB6s6s6sI")  # magic, version, tokenizer, prior, checksum, phase
LABEL_PART = struct.Struct("<cH")  # kind and number of the numbers of a label
NO_LABEL = b"\0"
DAMAGED_CODES = "its codes don't have the checksum in its header, so it is damaged; get it again"
NUMBERS = {b"1": "<u1", b"2": "<u2", b"4": "<u4", b"f": "<f4"}  # kinds of labels


@dataclass(frozen=True)
class CodedFile:
    """The parts of a file.

    tokenizer   twelve hexadecimal digits of the weights that make the codes, Tokenizer.fingerprint_codes
    prior       the same of the prior's weights
    checksum    six bytes of the SHA-256 of everything before the payload and of the codes
    phase       of the grid that logits are rounded to
    label       what the codes are conditioned on, in bytes as `pack_label` makes them
    payload     the codes, by range coding
    """

    tokenizer: str
    prior: str
    checksum: bytes
    phase: int
    label: bytes
    payload: bytes

    @classmethod
    def make(
        cls,
        tokenizer: str,
        prior: str,
        phase: int,
        label: Tensor | None,
        payload: bytes,
        codes: Tensor,
    ) -> "CodedFile":
        """The file of codes (L,), with its checksum."""
        parts = tokenizer, prior, bytes(6), phase, pack_label(label), payload
        return cls(tokenizer, prior, cls(*parts).sum_up(codes), *parts[3:])

    @property
    def header(self) -> bytes:
        """Everything before the payload."""
        hashes = bytes.fromhex(self.tokenizer), bytes.fromhex(self.prior), self.checksum
        return FIXED_PART.pack(MAGIC, FILE_FORMAT, *hashes, self.phase) + self.label

    def write(self) -> bytes:
        return self.header + self.payload

    def sum_up(self, codes: Tensor) -> bytes:
        """The checksum of a file with codes (L,)."""
        blank = CodedFile(self.tokenizer, self.prior, bytes(6), self.phase, self.label, b"")
        content = blank.header + codes.cpu().numpy().astype("<i4").tobytes()
        return hashlib.sha256(content).digest()[:6]

    @classmethod
    def read(cls, content: bytes, name: str = "this file") -> "CodedFile":
        """The parts of what `write` wrote. Raises InputError, with `name` in its sentence, for what is no such file."""
        if content[:3] != MAGIC:
            raise InputError(f"{name} is no {CGZ} file; give those that stage=compress wrote")
        if content[3:4] and content[3] != FILE_FORMAT:
            raise InputError(
                f"{name} has format {content[3]} of {CGZ} files, and this program reads {FILE_FORMAT}; use the one that wrote it"
            )
        cut = InputError(f"{name} is cut off after {len(content)} bytes; get it again")
        end = FIXED_PART.size + 1
        if len(content) < end:
            raise cut
        _, _, tokenizer, prior, checksum, phase = FIXED_PART.unpack_from(content)
        kind = content[FIXED_PART.size : end]
        if kind != NO_LABEL:
            if kind not in NUMBERS:
                raise InputError(
                    f"{name} has a label of an unknown kind, so it is damaged; get it again"
                )
            if len(content) < FIXED_PART.size + LABEL_PART.size:
                raise cut
            _, n = LABEL_PART.unpack_from(content, FIXED_PART.size)
            end = FIXED_PART.size + LABEL_PART.size + n * np.dtype(NUMBERS[kind]).itemsize
            if len(content) < end:
                raise cut
        label = content[FIXED_PART.size : end]
        return cls(tokenizer.hex(), prior.hex(), checksum, phase, label, content[end:])

    def unpack_label(self) -> Tensor | None:
        """The label, a class () or (size,), int64 or float32; None for none."""
        kind = self.label[:1]
        if kind == NO_LABEL:
            return None
        numbers = torch.from_numpy(
            np.frombuffer(self.label[LABEL_PART.size :], NUMBERS[kind]).copy()
        )
        return numbers if kind == b"f" else numbers.long()


def pack_label(label: Tensor | None) -> bytes:
    """A label (), (size,) int64 or float32 as bytes; one that says nothing, -1 or NaN throughout, as None."""
    if label is None:
        return NO_LABEL
    numbers = label.flatten().numpy()
    if numbers.dtype.kind == "f":
        is_blank, kind = bool(np.isnan(numbers).all()), b"f"
    else:
        is_blank = bool((numbers < 0).all())
        kind = next(k for k in (b"1", b"2", b"4") if numbers.max() <= np.iinfo(NUMBERS[k]).max)
    if is_blank:
        return NO_LABEL
    if len(numbers) > 2**16 - 1:
        raise InputError(
            f"a condition of {len(numbers):,} numbers is more than the 65,535 that a {CGZ} file holds; use condition=none"
        )
    return LABEL_PART.pack(kind, len(numbers)) + numbers.astype(NUMBERS[kind]).tobytes()
