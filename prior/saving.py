"""The forms in which samples are saved, batch by batch, and the journal by which a killed run goes on where it was."""

import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.archives import TAR_END, npy_header, npy_size, npz_head, npz_tail, tar_member
from codegrid.data.part_file import FileMark, PartFile
from codegrid.data.pictures import encode_png
from codegrid.data.pixels import PixelRules
from codegrid.data.ranges import to_range_setting
from codegrid.engine.checkpoint import save_atomically
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.figures import format_figures
from codegrid.engine.folder import METRICS, SAMPLES, write_atomically
from codegrid.engine.resume import resume_command

ARRAY = "arr_0"  # the name under which public evaluators of FID look for samples
JOURNAL_FORMAT = 1
EMPTY_MARK: FileMark = (0, 0)


@dataclass
class SampleBatch:
    """Consecutive samples on the CPU.

    first      the number of the first one
    images     (b, C, H, W), pixels as batches of the data have them: uint8, or int32 of 16 bits
    codes      (b, h, w, ...), if they have any
    labels     (b, ...), classes or what else they are conditioned on, if they have any
    pictures   (b, 3 or 1, H, W) uint8, what is shown of the images; None: the images themselves
    values     (b, C, H, W) in the units of the data, if they are saved
    """

    first: int
    images: Tensor
    codes: Tensor | None = None
    labels: Tensor | None = None
    pictures: Tensor | None = None
    values: NDArray[Any] | None = None

    @property
    def indices(self) -> range:
        """The numbers of the samples."""
        return range(self.first, self.first + len(self.images))

    @cached_property
    def rgb(self) -> Tensor:
        """The pictures (b, 3, H, W); grey ones have three equal channels."""
        shown = self.images if self.pictures is None else self.pictures
        return shown.expand(-1, 3, -1, -1)

    @cached_property
    def pngs(self) -> list[bytes]:
        """The pictures as PNG files."""
        return [encode_png(image) for image in self.rgb]


# The first line, and those of the batches.
Journal = tuple[dict[str, Any] | None, list[dict[str, Any]]]


def read_journal(folder: Path) -> Journal:
    """The journal of a folder of samples, as far as its lines are whole and follow one another; None and none without one."""
    file = folder / SAMPLES
    lines = file.read_text(errors="replace").splitlines() if file.is_file() else []
    about: dict[str, Any] | None = None
    entries: list[dict[str, Any]] = []
    done = 0
    for line in lines:
        try:
            content = json.loads(line)
        except ValueError:  # the run was killed while it wrote this line
            break
        if not isinstance(content, dict) or (about is not None and content.get("first") != done):
            break
        if about is None:
            about = content
        else:
            entries.append(content)
            done += content["n"]
    return about, entries


def check_journal(folder: Path, about: Mapping[str, Any]) -> None:
    """Raise InputError unless the samples that a folder holds are of the same model, settings and number."""
    earlier, entries = read_journal(folder)
    for name, value in {"format": JOURNAL_FORMAT, **about}.items():
        if entries and earlier is not None and earlier.get(name) != value:
            raise InputError(
                f"the {len(entries)} batches in {folder} were drawn with another {name} ({earlier.get(name)}, now {value}); "
                "draw into a new folder with run_dir=... and without resume="
            )


def check_finished(folder: Path, result: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a finished run in `folder`. Raises InputError if one of its files is gone."""
    files = [result[kind] for kind in ("png", "npz", "npy", "shards") if kind in result]
    for file in (*files, *result.get("pictures", ())):
        if not Path(file).exists():
            raise InputError(
                f"{file} is gone, though the run is finished; remove {folder / METRICS}, and resume={folder} draws "
                "the samples again"
            )
    return dict(result)


@contextmanager
def explain_write_errors(folder: Path) -> Iterator[None]:
    """Turn errors of the disk into InputError, which says how to go on."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"can't write to {folder} ({error.strerror or error}); make room there, and {resume_command(folder)}"
        ) from error


class SampleFiles(ABC):
    """One form of saved samples. Each batch that is written gets a mark, which JSON can write, to check it by later."""

    @abstractmethod
    def write(self, batch: SampleBatch) -> Any:
        """Save a batch, the one after the last; returns its mark."""

    @abstractmethod
    def count_intact(self, spans: Sequence[range], marks: Sequence[Any]) -> int:
        """How many batches, from the first on, are on disk as they were written: those of samples `spans`, with these marks."""

    @abstractmethod
    def resume(self, done: int, marks: Sequence[Any]) -> None:
        """Go on after `done` samples, in batches with these marks, and remove what comes after them."""

    @abstractmethod
    def finish(self) -> dict[str, Any]:
        """Give the files their names; returns what the result says about them. Called after the last batch, perhaps again."""

    def remove_parts(self) -> None:
        """Remove what is no longer needed once the run is finished."""
        return


class PngFiles(SampleFiles):
    """A PNG file for each sample, named by its number."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, index: int) -> Path:
        return self.folder / f"{index:06d}.png"

    def write(self, batch: SampleBatch) -> int:
        crc = 0
        self.folder.mkdir(exist_ok=True)
        for index, content in zip(batch.indices, batch.pngs, strict=True):
            part = self.file(index).with_suffix(".part")
            part.write_bytes(content)
            os.replace(part, self.file(index))
            crc = zlib.crc32(content, crc)
        return crc

    def count_intact(self, spans: Sequence[range], marks: Sequence[int]) -> int:
        for i, (span, mark) in enumerate(zip(spans, marks, strict=True)):
            crc = 0
            for index in span:
                try:
                    crc = zlib.crc32(self.file(index).read_bytes(), crc)
                except OSError:  # missing or unreadable
                    return i
            if crc != mark:
                return i
        return len(marks)

    def resume(self, done: int, marks: Sequence[int]) -> None:
        """Later files are written over."""

    def finish(self) -> dict[str, Any]:
        return {"png": str(self.folder)}


class StreamedFile(SampleFiles):
    """A file of all samples, one after the other; a mark is its size and checksum after a batch."""

    def __init__(self, file: PartFile) -> None:
        self.file = file

    @abstractmethod
    def content(self, batch: SampleBatch) -> bytes:
        """The bytes of a batch."""

    def write(self, batch: SampleBatch) -> FileMark:
        self.file.write(self.content(batch))
        return list(self.file.mark)

    def count_intact(self, spans: Sequence[range], marks: Sequence[FileMark]) -> int:
        return self.file.count_intact(marks)

    def resume(self, done: int, marks: Sequence[FileMark]) -> None:
        self.file.resume_at(marks[-1] if marks else EMPTY_MARK)


class NpzFile(StreamedFile):
    """arr_0 (n, H, W, 3) uint8 in an .npz, as public evaluators of FID read it."""

    def __init__(self, file: Path, shape: tuple[int, ...]) -> None:
        self.shape = shape
        super().__init__(PartFile(file, npz_head(ARRAY, npy_size(self.shape), 0)))

    def content(self, batch: SampleBatch) -> bytes:
        pixels = batch.rgb.permute(0, 2, 3, 1).numpy().tobytes()
        return pixels if batch.first else npy_header(self.shape) + pixels

    def finish(self) -> dict[str, Any]:
        about = ARRAY, npy_size(self.shape), self.file.crc
        self.file.publish(tail=npz_tail(*about), head=npz_head(*about))
        return {"npz": str(self.file.final)}


class NpyFile(StreamedFile):
    """A .npy of the samples (n, H, W, C) in the units of the data, and a .json beside it with the range of the values."""

    def __init__(self, file: Path, shape: tuple[int, ...], rules: PixelRules) -> None:
        self.shape = shape
        self.dtype = rules.unit_type.newbyteorder("<")
        self.range = to_range_setting(rules.ranges)
        header = npy_header(shape, np.lib.format.dtype_to_descr(self.dtype))  # type: ignore[arg-type]
        super().__init__(PartFile(file, header))

    def content(self, batch: SampleBatch) -> bytes:
        assert batch.values is not None
        return batch.values.transpose(0, 2, 3, 1).astype(self.dtype).tobytes()

    def finish(self) -> dict[str, Any]:
        about = {
            "array": self.file.final.name,
            "shape": list(self.shape),
            "axes": ["sample", "row", "column", "channel"],
            "type": self.dtype.name,
            "range": self.range,  # [low, high] of all channels, or one of each
        }
        write_atomically(self.file.final.with_suffix(".json"), format_figures(about) + "\n")
        self.file.publish()
        return {"npy": str(self.file.final), "range": self.range}


class CodeFile(StreamedFile):
    """codes.pt: the codes (n, ...) int64 of all samples, and if there are any the labels (n, ...), and the names of all classes."""

    def __init__(
        self,
        file: Path,
        shape: tuple[int, ...],
        labels: Tensor | None,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(PartFile(file.with_suffix(".int64")))
        self.final = file
        self.shape = shape
        self.labels = labels
        self.classes = classes

    def content(self, batch: SampleBatch) -> bytes:
        assert batch.codes is not None
        return batch.codes.numpy().tobytes()

    def finish(self) -> dict[str, Any]:
        """Write codes.pt from a memory map of the stream, which stays until `remove_parts`."""
        codes = torch.from_numpy(np.memmap(self.file.part, np.int64, "c", shape=self.shape))
        content: dict[str, Any] = {"codes": codes}
        if self.labels is not None:
            content |= {"labels": self.labels, "classes": list(self.classes)}
        save_atomically(content, self.final)
        return {}

    def remove_parts(self) -> None:
        self.file.part.unlink(missing_ok=True)


class FirstSamples(StreamedFile):
    """The first samples (m, C, H, W), uint8 or uint16, for the pictures, which are drawn from them at the end."""

    def __init__(self, file: Path, shape: tuple[int, ...], depth: int = 8) -> None:
        super().__init__(PartFile(file))
        self.shape = shape
        self.dtype = np.dtype(f"uint{depth}")

    def content(self, batch: SampleBatch) -> bytes:
        first = batch.images[: max(0, self.shape[0] - batch.first)]
        return first.numpy().astype(self.dtype).tobytes()

    def read(self) -> Tensor:
        """The samples, once all are written, as batches have them."""
        pixels = np.fromfile(self.file.part, self.dtype).reshape(self.shape)
        return torch.from_numpy(pixels if self.dtype == np.uint8 else pixels.astype(np.int32))

    def finish(self) -> dict[str, Any]:
        return {}

    def remove_parts(self) -> None:
        self.file.part.unlink(missing_ok=True)


class ShardFiles(SampleFiles):
    """.tar files of `shard_size` samples each, NUMBER.png and for classes NUMBER.cls, as webdataset and data=hf read them.

    The mark of a batch lists the shards that it lies in: number of the shard, size and checksum after the batch's samples.
    """

    def __init__(self, folder: Path, n: int, shard_size: int) -> None:
        self.folder = folder
        self.n = n
        self.shard_size = shard_size
        self.shard: PartFile | None = None  # the one that is begun

    def open_shard(self, number: int) -> PartFile:
        return PartFile(self.folder / f"{number:06d}.tar")

    def write(self, batch: SampleBatch) -> list[list[int]]:
        marks = []
        for number in range(
            batch.indices[0] // self.shard_size, batch.indices[-1] // self.shard_size + 1
        ):
            stop = min((number + 1) * self.shard_size, self.n)
            inside = range(
                max(batch.first, number * self.shard_size), min(batch.indices.stop, stop)
            )
            shard = self.shard or self.open_shard(number)
            is_full = inside.stop == stop
            content = [self._entry(batch, index) for index in inside]
            shard.write(b"".join([*content, TAR_END if is_full else b""]))
            marks.append([number, *shard.mark])
            self.shard = None if is_full else shard
            if is_full:
                shard.publish()
        return marks

    @staticmethod
    def _entry(batch: SampleBatch, index: int) -> bytes:
        at = index - batch.first
        entry = tar_member(f"{index:06d}.png", batch.pngs[at])
        if batch.labels is None or batch.labels.ndim > 1:
            return entry
        return entry + tar_member(f"{index:06d}.cls", str(int(batch.labels[at])).encode())

    def count_intact(self, spans: Sequence[range], marks: Sequence[Sequence[Sequence[int]]]) -> int:
        by_shard: dict[int, list[tuple[int, FileMark]]] = {}
        for i, batch_marks in enumerate(marks):
            for number, *mark in batch_marks:
                by_shard.setdefault(number, []).append((i, mark))
        for number, entries in sorted(by_shard.items()):
            intact = self.open_shard(number).count_intact([mark for _, mark in entries])
            if intact < len(entries):
                return entries[intact][0]
        return len(marks)

    def resume(self, done: int, marks: Sequence[Sequence[Sequence[int]]]) -> None:
        number = done // self.shard_size
        self.shard = None
        if done % self.shard_size and done < self.n:
            _, *mark = marks[-1][-1]
            self.shard = self.open_shard(number)
            self.shard.resume_at(mark)
            number += 1
        elif done == self.n:
            number = -(-done // self.shard_size)
        for later in self.folder.glob("*.tar*"):  # hidden ones too
            name = re.fullmatch(r"\.?(\d+)\.tar(\.part)?", later.name)
            if name and int(name[1]) >= number:
                later.unlink()

    def finish(self) -> dict[str, Any]:
        return {"shards": str(self.folder)}


class SampleSaver:
    """Saves samples in several forms at once, and knows after a kill how many are on disk in all of them.

    The journal samples.jsonl begins with what the samples are of (`about`), and has a line for each batch: its first sample,
    their number, and the mark of each form. A batch without a line counts as not drawn.
    """

    def __init__(
        self, folder: Path, n: int, about: Mapping[str, Any], forms: Mapping[str, SampleFiles]
    ) -> None:
        self.folder = folder
        self.n = n
        self.about = {"format": JOURNAL_FORMAT, **about}
        self.forms = forms
        self.done = 0

    def resume(self) -> int:
        """Check what is on disk, cut off the rest, and return the number of samples that are there in every form."""
        if (self.folder / METRICS).is_file():  # its streams are removed by now
            raise InputError(
                f"the run in {self.folder} was finished by another process while this one waited; "
                f"resume={self.folder} prints its result"
            )
        entries = read_journal(self.folder)[1]
        spans = [range(entry["first"], entry["first"] + entry["n"]) for entry in entries]
        if entries:
            log_line(f"checking the {spans[-1].stop:,} samples in {self.folder}")
        by_form = {name: [entry["marks"][name] for entry in entries] for name in self.forms}
        intact = min(
            [len(entries)]
            + [form.count_intact(spans, by_form[name]) for name, form in self.forms.items()]
        )
        self.done = spans[intact - 1].stop if intact else 0
        if intact < len(entries):
            log_line(
                f"samples {self.done:,} to {spans[-1].stop - 1:,} in {self.folder} are not as they were written; "
                "they are drawn again"
            )
        elif self.done:
            log_line(
                f"{self.done:,} of {self.n:,} samples are in {self.folder}; the others are drawn"
            )
        lines = [format_figures(line) + "\n" for line in (self.about, *entries[:intact])]
        with explain_write_errors(self.folder):
            write_atomically(self.folder / SAMPLES, "".join(lines))
            for name, form in self.forms.items():
                form.resume(self.done, by_form[name][:intact])
        return self.done

    def save(self, batch: SampleBatch) -> None:
        """Write a batch in all forms, and then its line in the journal."""
        assert batch.first == self.done
        with explain_write_errors(self.folder):
            marks = {name: form.write(batch) for name, form in self.forms.items()}
            entry = {"first": batch.first, "n": len(batch.images), "marks": marks}
            with (self.folder / SAMPLES).open("a") as journal:
                journal.write(format_figures(entry) + "\n")
        self.done = batch.indices.stop

    def first_samples(self) -> Tensor:
        """The samples that pictures are drawn from, once all are saved; none if there are no pictures to draw."""
        first = self.forms.get("first")
        return first.read() if isinstance(first, FirstSamples) else torch.empty(0)

    def finish(self) -> dict[str, Any]:
        """Give all files their names; returns what the result says about them."""
        files: dict[str, Any] = {}
        with explain_write_errors(self.folder):
            for form in self.forms.values():
                files |= form.finish()
        return files

    def remove_parts(self) -> None:
        """Remove the streams that only served the making of other files; called when the result is on disk."""
        for form in self.forms.values():
            form.remove_parts()
