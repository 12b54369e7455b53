"""The labels of the images of a split: what a prior is conditioned on, from a table, from a file, or by encoding other images."""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric import Fabric
from numpy.typing import NDArray
from omegaconf import OmegaConf

from codegrid.data.datamodule import ImageDataModule
from codegrid.data.pairing import pair_images, pair_rows, readable_names
from codegrid.data.tables import split_kind
from codegrid.engine.checkpoint import find_checkpoint, find_damage, read_run_id
from codegrid.engine.errors import InputError
from codegrid.engine.words import format_word
from prior.conditioning.base import Condition, is_file
from prior.conditioning.codes import CodeCondition
from prior.conditioning.vectors import (
    VECTOR_FILES,
    VectorCondition,
    VectorPart,
    check_finite,
    describe_column,
    load_vectors,
)
from prior.extract import extract
from vqgan.load import load_images, load_tokenizer, require_codes
from vqgan.tokenizer import Tokenizer

CLASSES = "classes"  # condition=classes: the same as conditional=true
CONDITION_COPY = "condition.ckpt"  # the tokenizer of the other images, in the prior's run folder


class ImageLabels(ABC):
    """The labels of images, for a condition.

    `origin` is the config of the run that the condition's tokenizer comes from, if it has one.
    """

    condition: Condition
    origin: dict[str, Any] | None = None

    @abstractmethod
    def read(
        self, split: str, flip: bool = False, crops: int = 1, *, fabric: Fabric
    ) -> NDArray[Any]:
        """The labels of a split's n readable images: (n, ...), or (views * n, ...) in the order of `extract` if views differ."""

    @abstractmethod
    def draw_blank(self, n: int) -> NDArray[Any]:
        """n random labels (n, ...), for a run that only tries a step."""

    def fit(self, train: NDArray[Any]) -> None:
        """Let the condition learn what it must of the training images' labels."""
        return

    def check(self, flip: bool, crops: int) -> None:
        """Raise InputError if images can't have labels in these views, or lack some. No image is read."""
        return


class VectorLabels(ImageLabels):
    """Vectors of numbers, the same for all views of an image."""

    condition: VectorCondition

    @abstractmethod
    def read_split(self, split: str) -> NDArray[np.float32]:
        """The vectors (n, size) of a split's readable images."""

    def read(
        self, split: str, flip: bool = False, crops: int = 1, *, fabric: Fabric
    ) -> NDArray[Any]:
        return self.read_split(split)

    def draw_blank(self, n: int) -> NDArray[Any]:
        random = np.random.default_rng(0)
        vectors = random.standard_normal((n, self.condition.size), np.float32)
        vectors[random.random(vectors.shape) < 0.1] = np.nan
        return vectors

    def fit(self, train: NDArray[Any]) -> None:
        self.condition.fit(train)


class ColumnLabels(VectorLabels):
    """Columns of the images' table, or of their dataset, as vectors."""

    def __init__(
        self,
        images: ImageDataModule,
        names: Sequence[str],
        condition: VectorCondition | None = None,
    ) -> None:
        self.images = images
        columns = images.source("train").columns
        if lacking := [name for name in names if name not in columns]:
            raise InputError(
                f"the images of {images.title} have no column {lacking[0]}, which the condition needs; add "
                f"data.columns=[{lacking[0]}]"
            )
        parts = [
            describe_column(name, columns[name], images.column_names.get(name)) for name in names
        ]
        self.condition = condition or VectorCondition(parts, of_columns=True)
        for learned, part in zip(self.condition.parts, parts, strict=True):
            is_text = learned.names is not None, part.names is not None
            if is_text[0] != is_text[1] or (not is_text[0] and learned.size != part.size):
                raise InputError(
                    f"the column {part.name} of {images.title} has other values than those that the prior learned; give the table "
                    "that it was trained with"
                )

    def read_split(self, split: str) -> NDArray[np.float32]:
        columns = self.images.columns(split)
        parts = [part.encode(columns[part.name]) for part in self.condition.parts]
        vectors = np.concatenate(parts, 1)
        names = map(str, readable_names(self.images, split))
        check_finite(vectors, "the table", names)
        return vectors


class FileLabels(VectorLabels):
    """Vectors of a file: of an .npz with `names`, those of the images' names; of others, a row for each image in the order of the
    names of all images, or of the training images and then the validation images where images have no names."""

    def __init__(
        self, images: ImageDataModule, value: str, condition: VectorCondition | None = None
    ) -> None:
        self.images, self.setting = images, f"condition={value}"
        self.file = load_vectors(Path(value).expanduser(), self.setting)
        size = self.file.vectors.shape[1]
        self.condition = condition or VectorCondition(
            [VectorPart("vector", size)], of_columns=False
        )
        if self.condition.size != size:
            raise InputError(
                f"{self.setting} has vectors of {size} number{'s' if size > 1 else ''}, and the prior learned "
                f"{self.condition.summarize()}; give the file that it was trained with"
            )

    def check(self, flip: bool, crops: int) -> None:
        self.place("train")

    def read_split(self, split: str) -> NDArray[np.float32]:
        samples = self.images.samples(split)
        rows = self.place(split)
        chosen = rows if samples.rows is None else rows[samples.rows]
        vectors = np.asarray(self.file.vectors[chosen], np.float32)
        check_finite(vectors, self.setting, map(str, readable_names(self.images, split)))
        return vectors

    def place(self, split: str) -> NDArray[np.int64]:
        """The row of each image of a split, the unreadable ones too. Raises InputError if an image of any split has none."""
        num_train = len(self.images.source("train"))
        return self.rows[:num_train] if split == "train" else self.rows[num_train:]

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """The row of each image, those to train on first."""
        return self.find_by_order() if self.file.names is None else self.find_by_name()

    def find_by_name(self) -> NDArray[np.int64]:
        assert self.file.names is not None
        names, rows = pair_rows(self.images, self.file.names)
        if (lacking := np.flatnonzero(rows < 0)).size:
            raise InputError(
                f"{self.setting} names {len(self.file.names):,} images, and of {len(rows):,} images {len(lacking):,} have no row "
                f"of their own there, such as {names[lacking[0]]}; name each one once as it is named here, or give a .npy with a "
                "row for each"
            )
        return rows

    def find_by_order(self) -> NDArray[np.int64]:
        train, val = (self.images.source(each) for each in ("train", "val"))
        n, total = len(train) + len(val), len(self.file.vectors)
        if n != total:
            raise InputError(
                f"{self.setting} has {total:,} rows for {n:,} images, {len(train):,} to train on and {len(val):,} to validate; "
                "give a row for each, in the order of their names, or an .npz with the arrays names and vectors"
            )
        if not train.shares_names(val):
            return np.arange(n)
        names = [*train.names(), *val.names()]
        rows = np.empty(n, np.int64)
        rows[sorted(range(n), key=lambda row: order_key(names[row]))] = np.arange(n)
        return rows


def order_key(name: str | int) -> Any:
    """What the images of a dataset are sorted by: their numbers, or the parts of their paths."""
    return name if isinstance(name, int) else tuple(name.split("/"))


class PairedLabels(ImageLabels):
    """The codes of other images, each of which belongs to one of the prior's images."""

    condition: CodeCondition

    def __init__(
        self,
        images: ImageDataModule,
        others: ImageDataModule,
        tokenizer: Tokenizer,
        origin: dict[str, Any],
        setting: str,
    ) -> None:
        self.images, self.others, self.setting = images, others, setting
        self.condition, self.origin = CodeCondition(tokenizer), origin

    def check(self, flip: bool, crops: int) -> None:
        if crops > 1:
            raise InputError(
                f"crops={crops} cuts the images in random places, and the other images of {self.setting} in others; use crops=1"
            )
        for split in ("train", "val"):
            pair_images(self.images, self.others, split, self.setting)

    def read(
        self, split: str, flip: bool = False, crops: int = 1, *, fabric: Fabric
    ) -> NDArray[Any]:
        tokenizer = self.condition.tokenizer
        other = "val" if split == "train" else "train"
        for each in (split, other):
            self.others.samples(each)
        rows = pair_images(self.images, self.others, split, self.setting)
        n = self.others.size(split)
        parts = []
        for each in (split, other) if (rows >= n).any() else (split,):
            codes = extract(tokenizer, self.others, each, flip, fabric=fabric).values
            parts.append(codes.reshape(1 + flip, self.others.size(each), -1))
        if len(parts) == 1:
            labels = parts[0][:, rows]
        else:
            labels = np.concatenate(parts, 1)[:, rows]
        return labels.reshape(-1, labels.shape[-1])

    def draw_blank(self, n: int) -> NDArray[Any]:
        tokenizer = self.condition.tokenizer
        assert tokenizer.K is not None
        shape = (n, int(np.prod(tokenizer.code_shape)))
        return np.random.default_rng(0).integers(0, tokenizer.K, shape)


@dataclass(frozen=True)
class ConditionSetting:
    """What `condition` names: `columns`, the vectors of a `file`, or the `run` of a tokenizer; or none of them, for nothing and for
    classes."""

    columns: tuple[str, ...] = ()
    file: str | None = None
    run: str | None = None
    classes: bool = False

    @classmethod
    def of_run(cls, config: Mapping[str, Any]) -> "ConditionSetting":
        """The setting in the config of a run of stage=prior, as Hydra composed it or as a checkpoint has it."""
        condition: Any = config.get("condition")
        plain = OmegaConf.to_container(condition) if OmegaConf.is_config(condition) else condition
        return cls.read(plain, bool(config.get("conditional")))

    @classmethod
    def read(cls, condition: Any, conditional: bool = False) -> "ConditionSetting":
        """The settings condition and conditional. Raises InputError for what names nothing, and for two conditions."""
        if condition is None:
            return cls(classes=conditional)
        if condition == CLASSES:
            return cls(classes=True)
        if conditional:
            raise InputError(
                f"conditional=true and condition={condition} are two conditions, and a prior has one; leave one of them out"
            )
        if is_file(condition, VECTOR_FILES):
            return cls(file=str(condition))
        if isinstance(condition, str) and names_run(condition):
            return cls(run=condition)
        columns = [condition] if isinstance(condition, str | int) else condition
        if not isinstance(columns, Sequence) or not columns or isinstance(condition, bool):
            raise InputError(
                f"condition={condition} must be classes, a column of the images' table or several, as [age,site], a file of "
                "vectors (.npy, .npz), or the run folder of a tokenizer of other images"
            )
        return cls(columns=tuple(map(str, columns)))


def names_run(value: str) -> bool:
    """Whether a text names a run or a checkpoint instead of a column."""
    path = Path(value).expanduser()
    return path.is_dir() or path.suffix == ".ckpt" or "/" in value


def add_columns(
    data: Mapping[str, Any], columns: Sequence[str], condition: Condition | None = None
) -> dict[str, Any]:
    """The config of images with these columns among those that stay with them; the names of text are those of a `condition` that
    was learned."""
    present = [split_kind(entry)[0] for entry in data.get("columns") or ()]
    lacking = [entry for entry in columns if split_kind(entry)[0] not in present]
    config = dict(data)
    if lacking:
        config["columns"] = [*(data.get("columns") or ()), *lacking]
    if isinstance(condition, VectorCondition):
        names = {part.name: list(part.names) for part in condition.parts if part.names is not None}
        if names:
            config["column_names"] = {**(data.get("column_names") or {}), **names}
    return config


def load_conditioned_images(
    data: Mapping[str, Any],
    config: Mapping[str, Any],
    resumes: Path | None = None,
) -> ImageDataModule:
    """`load_images` for the config of a run of stage=prior, with the columns that its condition names.

    Raises InputError for a column that isn't there.
    """
    setting, places, ckpt = ConditionSetting.of_run(config), config["data"], config["ckpt"]
    if not setting.columns:
        return load_images(data, places, ckpt, resumes)
    try:
        return load_images(add_columns(data, setting.columns), places, ckpt, resumes)
    except InputError as error:
        if "data.columns" not in str(error) and "data.label=" not in str(error):
            raise
        shown = ",".join(setting.columns)
        reason = str(error).partition("; but this command")[0]
        raise InputError(
            f"condition={shown} is neither a file of vectors (.npy, .npz) nor a run folder, and no column: {reason}"
        ) from error


def open_labels(
    config: Mapping[str, Any], images: ImageDataModule, folder: Path | None
) -> ImageLabels | None:
    """The labels of images by the config of a run that trains a prior; None for classes and for no condition.

    `folder` is that of a run that resumes, with its copy of the condition's tokenizer.
    """
    setting, places = ConditionSetting.of_run(config), config.get("condition_data") or {}
    if setting.columns:
        return ColumnLabels(images, [split_kind(entry)[0] for entry in setting.columns])
    if setting.file is not None:
        return FileLabels(images, setting.file)
    if setting.run is None:
        return None
    ckpt = find_condition(setting.run, folder)
    tokenizer, described = load_tokenizer(ckpt, "condition")
    require_codes(tokenizer, f"condition={setting.run} has no codes to put in front")
    others = load_images(described["data"], places, ckpt)
    return PairedLabels(images, others, tokenizer, described, f"condition={setting.run}")


def open_recorded_labels(
    condition: Condition | None,
    recorded: Mapping[str, Any],
    images: ImageDataModule,
    ckpt: str | Path,
    changes: Mapping[str, Any],
) -> ImageLabels | None:
    """The labels of images for a condition that a prior has learned; None for classes and for no condition.

    recorded   the config of the prior's run
    ckpt       that run
    changes    where a command has the file of vectors (condition) and the other images (condition_data), as far as it says so
    """
    if condition is None:
        return None
    if isinstance(condition, VectorCondition) and condition.of_columns:
        return ColumnLabels(images, condition.columns, condition)
    if isinstance(condition, VectorCondition):
        return FileLabels(images, str(changes.get("condition") or recorded["condition"]), condition)
    assert isinstance(condition, CodeCondition)
    folder = find_checkpoint(ckpt).parent.parent
    copied = folder / CONDITION_COPY
    _, described = load_tokenizer(copied, "condition")
    places: dict[str, Any] = {}
    for each in (recorded, changes):
        named = (each.get("condition_data") or {}).items()
        places |= {name: value for name, value in named if value is not None}
    known = {name: value for name, value in places.items() if name in described["data"]}
    others = load_images(described["data"], known, copied)
    return PairedLabels(images, others, condition.tokenizer, described, f"condition={folder.name}")


def find_condition(ckpt: str, folder: Path | None) -> str | Path:
    """The tokenizer of a condition: `ckpt`, or the copy of it in the run folder of a prior.

    Raises InputError if `ckpt` is another run than the one that the prior learned.
    """
    copied = folder / CONDITION_COPY if folder is not None else None
    if copied is None or not copied.is_file() or find_damage(copied) is not None:
        return ckpt
    other, expected = read_run_id(ckpt), read_run_id(copied)
    if expected and other not in (None, expected):
        raise InputError(
            f"{format_word('condition', ckpt)} is the run {other}, and {folder} learned the codes of {expected}; name that one, or "
            "leave condition out"
        )
    return copied


def hash_labels(labels: NDArray[Any]) -> int:
    """A checksum of labels, by which a run that resumes notices other ones."""
    return zlib.crc32(np.ascontiguousarray(labels).tobytes())
