"""A file that grows under a hidden name: it can be checked and continued after a kill, and gets its own name when it is whole."""

import os
import zlib
from collections.abc import Sequence
from pathlib import Path

READ_SIZE = 2**20  # bytes that are read at a time

FileMark = Sequence[int]  # how many bytes a file had after its head, and their CRC-32


class PartFile:
    """The file `final`, written as ".<name>.part" beside it until `publish`.

    `head` are bytes at its beginning that `publish` may replace by as many others; they don't belong to the checksum. Nothing
    stays open between two writes.
    """

    def __init__(self, final: Path, head: bytes = b"") -> None:
        self.final = final
        self.part = final.with_name(f".{final.name}.part")
        self.head = head
        self.size = 0
        self.crc = 0

    @property
    def mark(self) -> FileMark:
        """What is written by now."""
        return [self.size, self.crc]

    def write(self, content: bytes) -> None:
        """Append to the file, which the first write creates."""
        if self.size == 0:
            self.part.parent.mkdir(parents=True, exist_ok=True)
            self.part.write_bytes(self.head)
        with self.part.open("ab") as file:
            file.write(content)
        self.size += len(content)
        self.crc = zlib.crc32(content, self.crc)

    def count_intact(self, marks: Sequence[FileMark]) -> int:
        """How many of these marks, in the order in which they were made, are those of the file on disk."""
        path = self.part if self.part.is_file() else self.final
        size, crc = 0, 0
        try:
            with path.open("rb") as file:
                file.seek(len(self.head))
                for i, (length, checksum) in enumerate(marks):
                    while size < length:
                        content = file.read(min(READ_SIZE, length - size))
                        if not content:
                            return i
                        size += len(content)
                        crc = zlib.crc32(content, crc)
                    if crc != checksum:
                        return i
        except OSError:  # missing or unreadable: nothing of it is left
            return 0
        return len(marks)

    def resume_at(self, mark: FileMark) -> None:
        """Cut off what was written after `mark`, a mark that is intact, and go on from there."""
        self.size, self.crc = mark
        if self.size == 0:  # the first write creates the file anew
            return
        if not self.part.exists():
            os.replace(self.final, self.part)
        os.truncate(self.part, len(self.head) + self.size)

    def publish(self, tail: bytes = b"", head: bytes | None = None) -> None:
        """Add `tail`, write `head` over the first head, and give the file its name once it is on the disk."""
        with self.part.open("r+b") as file:
            file.write(self.head if head is None else head)
            file.seek(0, os.SEEK_END)
            file.write(tail)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.part, self.final)
