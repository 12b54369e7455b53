"""What every image dataset shares: sources of images in, batches on the model's device out, and their augmentation."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from codegrid.data.decode import DECODE_VERSION
from codegrid.data.endings import IMAGE_SUFFIXES, check_suffixes, readable_suffixes
from codegrid.data.form import FIT_CHOICES, Form
from codegrid.data.identity import check_same_images, identify_images, save_image_ids
from codegrid.data.images import crop_at, to_model_input
from codegrid.data.labelling import Labelling
from codegrid.data.labels import MAX_RECORDED, SORTED, Classes, check_classes
from codegrid.data.loading import BatchDataModule, count_cores
from codegrid.data.pixels import (
    ALPHA_CHOICES,
    PixelRules,
    ValuesBeyondRange,
    check_depth,
    check_num_channels,
    check_number_type,
    check_show,
)
from codegrid.data.ranges import (
    AUTO,
    FULL_16_BITS,
    RangeSetting,
    check_value_range,
    to_range_setting,
    write_ranges,
)
from codegrid.data.samples import ArraySamples, LiveSamples, from_numpy, raise_unreadable
from codegrid.data.source import Source, hold_out
from codegrid.data.split import Names, Rows, split_by_name
from codegrid.data.store import Arrays, CacheEntry, fingerprint, load_or_fill
from codegrid.data.summary import summarize
from codegrid.data.survey import (
    Survey,
    check_channels_serve,
    check_range_serves,
    choose_rules,
    survey_sources,
)
from codegrid.data.threads import map_in_threads
from codegrid.data.tiles import check_num_pictures, check_tiles, cut_tiles
from codegrid.engine.console import log_line, progress_bar
from codegrid.engine.errors import InputError, check_int
from codegrid.engine.sizes import Size, SizeSetting, check_size, to_setting, write_size

LABELS = "labels"  # the part of a key that is of labels in a table
READ_CHUNK = 256  # images that a thread reads at a time


class ImageDataModule(BatchDataModule):
    """Batches (images, label), label (B,) int64, -1 for images without a label.

    Validation images are (B, channels, *image_size) float32 in [-1, 1], in the memory format of `choose_memory_format`.
    Training images are uint8 (B, channels, *stored_size), or int32 if their pixels have 16 bits (see data/images.py); the
    training step passes them to `augment`, which returns the same form.

    A dataset is a subclass with `open_source`. It passes the settings below on as keywords; conf/images/default.yaml
    holds their defaults.

    image_size    pixels of what the model sees: of a side, or [rows, columns]
    channels      of a pixel, 1 to 16: 3 for RGB, 1 for grey, and images of the other of these two kinds are converted
    crop          "centre": the middle of the image; "random": in training a new position for each image each time
    resize        pixels of the shorter side, or [rows, columns], to which the middle of an image is scaled before the crop;
                  None stands for image_size with centre crops and 9/8 of it with random crops
    fit           how an image of other proportions gets its size: "crop", "pad" or "stretch" (see Form)
    flip          mirror images horizontally with probability 1/2 in training
    cache         where decoded images are cached: "disk", a memory map below `cache_dir`; "ram"; or "none", which
                  decodes them on each access
    on_error      what to do at an unreadable image: "stop", or "skip", which leaves it out and logs its name
    batch_size    images per step and device
    num_workers   processes that read; None stands for 0 if images are cached, else one per core, at most 8
    reader_timeout   seconds without a new batch, or chunk of the cache, after which the run ends; 0 for no limit
    seed          decides the order of training batches, and what a dataset draws by itself
    split_seed    decides which images are held out, for datasets that hold out some (see `hold_out`)
    split_at      the boundary between the splits, as an earlier run recorded it; None: n_val images validate
    cache_dir     folder of the cache
    classes       names of the classes in the order of their numbers; None: the data's own; SORTED: as version 0.1 ordered them
    range         the values that become the lowest and the highest pixel in images of more than 8 bits a channel: a pair, or
                  one for each channel; "auto": by the largest value of all; "percentiles": 0.1 and 99.9 of a sample
    depth         bits of a channel of the pixels, 8 or 16; None: 16 if a sample of the images has more than 8
    number_type   the type of values in the data's own units; None: that of a sample of the images
    show          the channels that pictures show (see PixelRules)
    tiles         pixels of a side, or [rows, columns], of the tiles that are cut out of each picture (see data/tiles.py); None:
                  each picture is one image
    alpha         "white" blends transparent pixels with white, "ignore" leaves a fourth channel out
    suffixes      endings of image files, for datasets of folders; None: those that this installation reads
    labelling     the settings of a table of labels (see Labelling), for datasets that have them

    range, depth, number_type, alpha and suffixes are decided once for all images if they are open, mostly by the images
    themselves (see data/survey.py); `decisions` has the result. They and `classes` have the values of earlier versions if a
    config lacks them.

    Raises InputError for settings that cannot work.
    """

    classes: list[str] = []  # the class names, in the order of the labels
    splits_by_number = (
        False  # whether images were held out by their numbers, as in earlier versions
    )
    # The ids (see Source.image_ids) of images that were left out of training as copies of validation images.
    copied_ids: NDArray[np.uint64] = np.zeros(0, np.uint64)
    # Settings that say where the images are or how they are read, not which they are; subclasses add theirs.
    place_settings: ClassVar[tuple[str, ...]] = (
        "cache",
        "cache_dir",
        "num_workers",
        "reader_timeout",
        "on_error",
    )
    title = ""  # names the run folder and the cache; defaults to the class name in lower case
    left_out: Mapping[str, int] = {}  # files that are no images, ending -> number
    label_remark = ""  # what the summary says about a label column that is missing
    file_column: str | None = None  # the column of a table that names the images
    label_summary = ""  # what a table of labels has, for the summary
    # What whole numbers stand for in further columns of text, by the names of the columns.
    column_names: Mapping[str, list[str]] = {}
    label_settings: ClassVar[Sequence[str]] = ()  # the settings of Labelling that a dataset has
    is_stream = False  # its images are read in one order only, and not before training

    def __init__(
        self,
        *,
        image_size: SizeSetting,
        channels: int,
        crop: str,
        resize: SizeSetting | None,
        flip: bool,
        cache: str,
        on_error: str,
        batch_size: int,
        num_workers: int | None,
        reader_timeout: float,
        seed: int,
        cache_dir: str,
        fit: str = FIT_CHOICES[0],
        classes: Classes = SORTED,
        range: RangeSetting = FULL_16_BITS,
        depth: int | None = 8,
        number_type: str | None = None,
        show: int | Sequence[int] | None = None,
        alpha: str | None = "white",
        suffixes: Sequence[str] | None = IMAGE_SUFFIXES,
        tiles: SizeSetting | None = None,
        split_seed: int | None = None,
        split_at: float | str | None = None,
        **labelling: Any,
    ) -> None:
        if num_workers is None:
            num_workers = 0 if cache != "none" else min(8, count_cores())
        super().__init__(batch_size, num_workers, seed, reader_timeout)
        check_num_channels(channels)
        for name, value, choices in (
            ("crop", crop, ("centre", "random")),
            ("fit", fit, FIT_CHOICES),
            ("cache", cache, ("none", "ram", "disk")),
            ("on_error", on_error, ("stop", "skip")),
        ):
            if value not in choices:
                raise InputError(f"data.{name}={value} must be one of {', '.join(choices)}")
        self.image_size = check_size("data.image_size", image_size, "pixel")
        self.stored_size = self._choose_stored_size(resize, crop)
        self.tiles = check_tiles(tiles, self.stored_size)
        self.title = self.title or type(self).__name__.lower()
        self.channels = channels
        self.crop = crop
        self.fit = fit
        self.flip = flip
        self.cache = cache
        self.on_error = on_error
        self.cache_dir = cache_dir
        self._set_decisions(classes, suffixes)
        self._set_pixels(range, depth, number_type, show, alpha)
        self._set_split(split_seed, split_at)
        self._set_labelling(labelling)
        self._sources: dict[str, Source] = {}

    def _choose_stored_size(self, resize: SizeSetting | None, crop: str) -> Size:
        """The size to which images are scaled before the crop. Raises InputError if the crop is larger."""
        if resize is None:
            scale = 1 if crop == "centre" else 9 / 8
            return round(self.image_size[0] * scale), round(self.image_size[1] * scale)
        stored = check_size("data.resize", resize, "pixel")
        if isinstance(resize, int):  # the shorter side
            shorter = min(self.image_size)
            height, width = (round(side * resize / shorter) for side in self.image_size)
            stored = height, width
        if stored[0] < self.image_size[0] or stored[1] < self.image_size[1]:
            raise InputError(
                f"data.resize={write_size(stored)} must be at least data.image_size={write_size(self.image_size)}, "
                "which is cut out of it"
            )
        return stored

    @property
    def form(self) -> Form:
        """What each image becomes before it is cropped."""
        return Form(self.stored_size, self.channels, self.fit)

    def _set_split(self, split_seed: int | None, split_at: float | str | None) -> None:
        """Set how images are held out."""
        if split_seed is not None:
            check_int("data.split_seed", split_seed, 0)
        elif split_at is not None:
            raise InputError(
                f"data.split_at={split_at} needs a data.split_seed, which says how names are placed"
            )
        self.split_seed = split_seed
        self.split_at = split_at

    def _set_labelling(self, settings: Mapping[str, Any]) -> None:
        """Set where labels and further columns are. Raises InputError for a setting that this dataset doesn't have."""
        if unknown := settings.keys() - set(Labelling.settings()):
            raise TypeError(f"{type(self).__name__} has no setting {min(unknown)}")
        self.labelling = Labelling(**settings)
        self.labelling.check_supported(self.label_settings, f"data={self.title}")

    def _set_decisions(
        self,
        classes: Classes,
        suffixes: Sequence[str] | None,
    ) -> None:
        """Set what the images decide where it is None."""
        self.class_setting = check_classes(classes)
        if isinstance(self.class_setting, list):
            self.classes = self.class_setting
        self.decides_suffixes = suffixes is None
        self.suffixes = readable_suffixes() if suffixes is None else check_suffixes(suffixes)

    def _set_pixels(
        self,
        value_range: RangeSetting,
        depth: int | None,
        number_type: str | None,
        show: int | Sequence[int] | None,
        alpha: str | None,
    ) -> None:
        """Set how values become pixels, where the images do not decide it."""
        self.range = check_value_range(value_range, self.channels)
        self.depth = check_depth(depth)
        self.number_type = check_number_type(number_type)
        self.show = check_show(show, self.channels)
        if alpha not in (None, *ALPHA_CHOICES):
            raise InputError(f"data.alpha={alpha} must be one of {', '.join(ALPHA_CHOICES)}")
        self.alpha = alpha

    @abstractmethod
    def open_source(self, split: str) -> Source:
        """The images of "train" or "val"."""

    def hold_out(self, names: Names, n_val: int, how: str) -> tuple[Rows, Rows]:
        """The rising rows of the images with these names that train, and of those that validate: n_val of them, "random" ones
        by `split_seed` or the "last".

        The boundary between them becomes a decision, so that images that come or go later move no other (see split_by_name).
        Without a `split_seed`, as in runs of earlier versions, the images are numbered and drawn by `seed`, as they were then.
        Raises InputError if a split would be empty.
        """
        if self.tiles is not None and self.split_at is None:
            check_num_pictures(n_val, len(names))
        self.splits_by_number = self.split_seed is None
        if self.split_seed is None:
            return hold_out(len(names), n_val, how, self.seed)
        split = split_by_name(names, n_val, how, self.split_seed, self.split_at)
        self.split_at = split.at
        return split.train, split.val

    def decisions(self) -> dict[str, Any]:
        """The settings that were null and that the images have decided. A run records them in its config, so that everything
        that builds on it decides alike."""
        for split in ("train", "val"):
            self.source(split)
        decided: dict[str, Any] = {} if self.split_at is None else {"split_at": self.split_at}
        rules = self.rules
        if isinstance(self.range, str):
            decided["range"] = to_range_setting(rules.scaled_ranges)
        if self.depth is None:
            decided["depth"] = rules.depth
        if self.number_type is None:
            rules.number_type = rules.number_type or self.survey.number_type
            decided |= {"number_type": rules.number_type} if rules.number_type else {}
        if self.alpha is None:
            decided["alpha"] = rules.alpha
        if self.class_setting is None and len(self.classes) <= MAX_RECORDED:
            decided["classes"] = list(self.classes)
        if self.decides_suffixes:
            decided["suffixes"] = self.suffixes
        return decided | self.label_decisions()

    def label_decisions(self) -> dict[str, Any]:
        """Those of the settings of Labelling."""
        decided: dict[str, Any] = {}
        if self.file_column is not None and self.labelling.file_column is None:
            decided["file_column"] = self.file_column
        few = {name: v if len(v) <= MAX_RECORDED else [] for name, v in self.column_names.items()}
        if self.labelling.columns and self.labelling.column_names is None:
            decided["column_names"] = few
        return decided

    def source(self, split: str) -> Source:
        """The images of "train" or "val", opened on first use."""
        if split not in self._sources:
            source = self.open_source(split)
            self._sources[split] = source if self.tiles is None else self._cut(source, split)
        return self._sources[split]

    def _cut(self, source: Source, split: str) -> Source:
        """The tiles of the pictures of a split."""
        assert self.tiles is not None
        cache_dir = None if self.cache == "ram" else self.cache_dir
        name = f"{self.title}-{split}"
        skips = self.on_error == "skip"
        return cut_tiles(source, self.tiles, self.channels, name, cache_dir, skips, self.patience)

    @cached_property
    def survey(self) -> Survey:
        """What a sample of the image files shows about all of them."""
        sources = [self.source(split) for split in ("train", "val")]
        return survey_sources(sources, self.channels, self.patience)

    @property
    def rules(self) -> PixelRules:
        """How pixels that are not plain 8-bit colours are read, decided on first use and set for the sources."""
        if self._rules is None:
            self._set_rules(self._decide_rules())
        assert self._rules is not None
        return self._rules

    _rules: PixelRules | None = None

    def _set_rules(self, rules: PixelRules) -> None:
        self._rules = rules
        for split in ("train", "val"):
            self.source(split).rules = rules

    def _decide_rules(self) -> PixelRules:
        chosen = PixelRules(
            None if isinstance(self.range, str) else self.range,
            self.alpha or "white",
            depth=self.depth or 8,
            show=self.show,
            number_type=self.number_type,
        )
        if not isinstance(self.range, str) and self.alpha is not None and self.depth is not None:
            return chosen
        sources = [self.source(split) for split in ("train", "val")]
        # If all images are read before training, a value beyond the range of the sample widens it.
        all_are_read = self.cache != "none" or all(source.checked_up_front for source in sources)
        rules = choose_rules(
            self.survey,
            chosen,
            self.channels,
            self.range,
            decides_alpha=self.alpha is None,
            decides_depth=self.depth is None,
        )
        rules.is_open = all_are_read and self.range == AUTO
        if rules.is_open and (entry := self._range_entry()) and entry.read() is not None:
            ranges = check_value_range(entry.read_meta()["notes"])
            assert not isinstance(ranges, str)
            rules = replace(rules, value_range=ranges)
        return rules

    def _range_entry(self) -> CacheEntry | None:
        """Where the range is cached that all images turned out to have; nowhere if images are cached in memory."""
        if self.cache == "ram":
            return None
        keys = [self.source(split).key for split in ("train", "val")]
        return CacheEntry(self.cache_dir, f"range-{self.title}", [*keys, self.channels], {})

    def prepare_data(self) -> None:
        super().prepare_data()
        rules = self.rules
        if not rules.is_open:
            return
        rules.is_open = False
        if rules.value_range is None:
            rules.value_range = FULL_16_BITS
        elif entry := self._range_entry():
            with entry.acquire():
                if entry.read() is None:
                    entry.publish(entry.create(), to_range_setting(rules.scaled_ranges))

    def samples(self, split: str) -> Any:
        """The samples of "train" or "val", loaded on first use.

        If an image has values beyond the range that a sample of the images suggested, the range is widened, and what was
        read is read again.
        """
        while split not in self._samples:
            try:
                self._samples[split] = self.load_samples(split)
            except ValuesBeyondRange:
                loaded = [*self._samples]
                self._samples.clear()
                widened = replace(self.rules, value_range=self.rules.widen(), beyond=[])
                if self.depth is None and not self.survey.facts:  # no sample has decided it
                    widened.depth = 16
                self._set_rules(widened)
                log_line(
                    "an image has values beyond those of the sample: "
                    f"data.range={write_ranges(widened.scaled_ranges)}"
                )
                for other in loaded:
                    self.samples(other)
            else:
                self._report_beyond()
        return self._samples[split]

    def _report_beyond(self) -> None:
        """Log how many of the images that were read just now have values that are cut off."""
        rules = self.rules
        if rules.is_open or not (extent := rules.report_beyond()):
            return
        low, high = extent
        log_line(
            f"{len(rules.beyond):,} images have values beyond data.range={write_ranges(rules.scaled_ranges)}, from "
            f"{low:,.6g} to {high:,.6g}, which are cut off"
        )
        rules.beyond.clear()

    def columns(self, split: str) -> dict[str, NDArray[Any]]:
        """The further columns of the images of a split, in the order of its samples, without unreadable images.

        float32 (n,) or (n, size), not a number where an image has none; or int64 (n,) for text, -1 for none, which
        `column_names` names.
        """
        rows = self.samples(split).rows
        columns = self.source(split).columns
        return {name: values if rows is None else values[rows] for name, values in columns.items()}

    def cache_key(self, split: str) -> dict[str, Any]:
        """Everything that the pixels and labels of a split depend on, in types that JSON can write."""
        label_key = self.source(split).label_key
        return {
            **({} if label_key is None else {LABELS: label_key}),
            "source": self.source(split).key,
            "side": to_setting(self.stored_size),
            "channels": self.channels,
            "decode": DECODE_VERSION,
            **({} if self.fit == FIT_CHOICES[0] else {"fit": self.fit}),
            **self.rules.key(),
        }

    def describe(self) -> dict[str, Any]:
        """What the record of a run says about its images: their title, the size of each split, hashes of the images, which are
        the same wherever they lie, their summary, and the settings that they have decided."""
        sizes = {split: self.size(split) for split in ("train", "val")}
        images = identify_images(self)
        facts = {"title": self.title, **sizes, "hash": fingerprint(images), "images": images}
        decided = self.decisions()
        return {**facts, **({"decided": decided} if decided else {}), **summarize(self)}

    def check_recorded(self, folder: Path | None) -> None:
        """Raise InputError if these are not the images that the run in a folder was trained on; print smaller differences.

        None is a new run, which has no others.
        """
        check_same_images(self, folder, resumes=True)

    def record_images(self, folder: Path) -> None:
        """List the images in a run folder, for later commands to compare theirs with."""
        save_image_ids(self, folder)

    def load_samples(self, split: str) -> ArraySamples | LiveSamples:
        source = self.source(split)
        _ = self.rules  # decided before the first image is read
        if self.cache == "none" and not source.checked_up_front:
            self._check_images()
            return LiveSamples(source, None, self.form, self.on_error == "stop")
        arrays, faults = self._read_or_load(source, split)
        rows = self._select_readable(arrays["good"], faults, split)
        if self.cache == "none":
            return LiveSamples(source, rows, self.form)
        labels: Any = arrays["labels"]
        if source.label_key is not None and source.labels is not None:  # those of a table
            labels = np.asarray(source.labels)
        samples = ArraySamples(arrays["images"], labels, rows)
        # Cached images need no order by shards, but caching must not change the order of training.
        samples.shard_sizes = source.shard_sizes if rows is None else None
        return samples

    def _read_or_load(self, source: Source, split: str) -> tuple[Arrays, dict[str, str]]:
        """Labels, a mask of the readable images and, if they are cached, the images; and the faults, name -> reason."""
        n = len(source)
        spec: dict[str, tuple[tuple[int, ...], str]] = {
            "labels": ((n,), "int64"),
            "good": ((n,), "bool"),
        }
        if self.cache != "none":
            spec["images"] = ((n, *self.form.shape), self.rules.dtype.name)

        def fill(arrays: Arrays) -> dict[str, str]:
            self._check_images()
            return self._read_all(source, arrays, f"{self.title} {split}")

        if self.cache == "ram":
            arrays: Arrays = {name: np.empty(shape, dtype) for name, (shape, dtype) in spec.items()}
            return arrays, fill(arrays)
        name = f"{self.title}-{split}"
        # A corrected table of labels is no reason to decode the images again.
        key = {part: value for part, value in self.cache_key(split).items() if part != LABELS}
        return load_or_fill(self.cache_dir, name, key, spec, fill)

    def read_first(self, n: int) -> tuple[Tensor, Tensor]:
        """Read from the source; a cache is neither read nor filled."""
        source = self.source("train")
        _ = self.rules  # decided before the first image is read
        self._check_images()
        rows = range(min(n, len(source)))
        images, labels, faults = source.read_batch(rows, self.form)
        if faults and (self.on_error == "stop" or len(faults) == len(rows)):
            raise_unreadable({source.image_name(row): reason for row, reason in faults.items()})
        places = torch.arange(n) % len(rows)
        return from_numpy(images)[places], torch.from_numpy(labels)[places]

    def _check_images(self) -> None:
        """Raise InputError if no image fits data.channels, or if data.range is one that the values of all lie outside of."""
        check_channels_serve(self.survey, self.channels)
        if not isinstance(self.range, str) and self.rules.value_range != FULL_16_BITS:
            check_range_serves(self.survey, self.range)

    def _read_all(self, source: Source, arrays: Arrays, what: str) -> dict[str, str]:
        """Read all images once and write them into `arrays`; returns the faults of unreadable images, name -> reason."""
        all_faults: dict[str, str] = {}

        def read_chunk(chunk: range) -> dict[str, str]:
            images, labels, faults = source.read_batch(chunk, self.form)
            rows = slice(chunk.start, chunk.stop)
            arrays["labels"][rows] = labels
            arrays["good"][rows] = [place not in faults for place in range(len(chunk))]
            if "images" in arrays:
                arrays["images"][rows] = self.rules.deepen(images)
            return {source.image_name(chunk[place]): reason for place, reason in faults.items()}

        n = len(source)
        chunks = [range(start, min(start + READ_CHUNK, n)) for start in range(0, n, READ_CHUNK)]
        num_threads = count_cores() if source.use_threads else 1
        results = map_in_threads(read_chunk, chunks, num_threads, self.patience)
        with closing(results), progress_bar(n, f"reading {what}") as bar:
            for chunk, faults in zip(chunks, results, strict=True):
                all_faults |= faults
                bar.update(len(chunk))
                if self.rules.is_open and self.rules.beyond:
                    raise ValuesBeyondRange
                if all_faults and self.on_error == "stop":
                    raise_unreadable(all_faults)
        return all_faults

    def _select_readable(
        self, good: NDArray[np.bool_], faults: dict[str, str], split: str
    ) -> NDArray[np.int64] | None:
        """The rows of the readable images, None if all are readable. Logs which are left out, or raises InputError."""
        if not faults:
            return None
        if self.on_error == "stop":
            raise_unreadable(faults)
        if not good.any():
            raise InputError(f"none of the {len(good)} {split} images of {self.title} can be read")
        named = [f"{name} ({reason})" for name, reason in faults.items()]
        more = f" and {len(named) - 5} more" if len(named) > 5 else ""
        log_line(
            f"{len(named)} of {len(good):,} {split} images can't be read and are left out: {', '.join(named[:5])}{more}"
        )
        return np.flatnonzero(good)

    def on_after_batch_transfer(
        self, batch: tuple[Tensor, Tensor], dataloader_idx: int
    ) -> tuple[Tensor, Tensor]:
        """Validation images as a model sees them; training images stay pixels, for the training step to augment."""
        images, labels = batch
        training = self.trainer is not None and self.trainer.training
        return images if training else self.preprocess(images), labels

    def augment(self, images: Tensor) -> Tensor:
        """Pixels (B, C, *stored_size) -> model input with random crops and flips, on the device of the images."""
        if self.crop == "random" and self.stored_size != self.image_size:
            images = crop_at(images, self._draw_corners(images), self.image_size)
        x = self.preprocess(images)
        if not self.flip:
            return x
        mirrored = torch.rand(len(x), 1, 1, 1, device=x.device) < 0.5
        return torch.where(mirrored, x.flip(3), x)

    def _draw_corners(self, images: Tensor) -> Tensor:
        """Random upper left corners (B, 2) of the crops of images (B, C, *stored_size)."""
        rooms = [
            stored - size for stored, size in zip(self.stored_size, self.image_size, strict=True)
        ]
        if rooms[0] == rooms[1]:
            return torch.randint(rooms[0] + 1, (len(images), 2), device=images.device)
        drawn = [torch.randint(room + 1, (len(images),), device=images.device) for room in rooms]
        return torch.stack(drawn, 1)

    def preprocess(self, images: Tensor) -> Tensor:
        """Pixels (B, C, h, w), at least of image_size -> model input: their middle, float in [-1, 1] (see to_model_input)."""
        return to_model_input(self.crop_middle(images))

    def crop_middle(self, images: Tensor) -> Tensor:
        """The middle of images (B, C, h, w), of image_size: the pixels of what a model sees."""
        rows, columns = (
            slice((have - size) // 2, (have - size) // 2 + size)
            for have, size in zip(images.shape[-2:], self.image_size, strict=True)
        )
        return images[..., rows, columns]
