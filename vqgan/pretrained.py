"""A tokenizer for a script or a notebook from wherever it is: a run, an export, another program's weights, the hub."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from codegrid.engine.aliases import upgrade_names
from codegrid.engine.checkpoint import BEST, LAST, PREVIOUS
from codegrid.engine.console import log_line
from codegrid.engine.errors import InputError
from codegrid.engine.folder import CONFIG
from codegrid.engine.foreign import holds_foreign
from codegrid.engine.sizes import SizeSetting, check_size
from codegrid.engine.trust import Trust, admit, check_name
from vqgan.formats.codegrid import CLASS_NAME, FACTS, READING
from vqgan.formats.files import open_folder, read_public
from vqgan.formats.load import load_public, make_choices
from vqgan.formats.locate import FileTree
from vqgan.formats.settings import list_nodes, read_quietly
from vqgan.load import load_tokenizer, read_images_as
from vqgan.tokenizer import Tokenizer

SETTING = "ckpt"  # what sentences call the source
SIZE_SETTINGS = (
    "resolution",
    "crop_size",
)  # of images in the configs of others; the second is TiTok's


@dataclass(frozen=True)
class Reading:
    """What weights of another program may leave open, by the settings of stage=import; None: as the files say."""

    image_size: SizeSetting | None = None
    config: str | Path | None = None
    ema: bool | None = None
    pixels: tuple[int, int] | None = None
    cosine: bool | None = None
    score: str | None = None
    scales: Sequence[SizeSetting] | None = None
    head_width: int | None = None

    def check_unset(self, source: str | Path) -> None:
        """Raise InputError for a setting, since a run has all of them."""
        for name, value in vars(self).items():
            if value is not None:
                raise InputError(
                    f"{name}={value} is for weights of other programs, and {SETTING}={source} is a run, which has its settings; "
                    f"leave {name} out"
                )


def load_pretrained(
    source: str | Path, revision: str | None, trust: Sequence[str], reading: Reading
) -> Tokenizer:
    """The tokenizer in a run folder or checkpoint, an export, a file or folder of other programs, or a hub id, in eval mode.

    Prints what was assumed of weights of other programs. Raises InputError where two readings remain, with the setting that
    decides.
    """
    for name in trust:
        check_name(name)
    with admit(Trust(frozenset(trust))):
        if not is_run(source):
            return load_foreign(source, revision, reading)
        reading.check_unset(source)
        if revision is not None:
            raise InputError(
                f"revision={revision} is of a repository on the hub, and {SETTING}={source} is a run here; leave revision out"
            )
        return load_tokenizer(source, SETTING)[0]


def load_foreign(source: str | Path, revision: str | None, reading: Reading) -> Tokenizer:
    """The tokenizer in what is no run."""
    folder, inner = open_folder(str(source), revision, SETTING)
    facts = read_facts(folder, inner)
    check_readable(folder, facts, source)
    config = None if reading.config is None else str(reading.config)
    contents = read_public(folder, inner, config, reading.ema, SETTING)
    size = check_size(
        "image_size",
        reading.image_size or find_image_size(facts, contents.file.settings, source),
        "pixel",
    )
    codes = reading.cosine, reading.score, reading.scales, reading.head_width
    choices = make_choices(size, None, reading.pixels, *codes)
    imported = load_public(contents.file, choices)
    for remark in () if facts else (*contents.remarks, *imported.plan.remarks):
        log_line(f"{source}: {remark}")
    read_images_as(imported.tokenizer, upgrade_names({"data": facts.get(READING, {})})["data"])
    return imported.tokenizer


def is_run(source: str | Path) -> bool:
    """Whether a path holds a run of this program: a checkpoint, or the config of a run that has none yet."""
    path = Path(source).expanduser()
    if path.is_dir():
        has_checkpoint = any((path / name).is_file() for name in (BEST, LAST, PREVIOUS))
        is_pending = (path / CONFIG).is_file() and not (path / FACTS).is_file()
        return (has_checkpoint or is_pending) and not holds_foreign(path)
    return path.is_file() and not holds_foreign(path) and path.suffix != ".json"


def read_facts(folder: FileTree, inner: str) -> dict[str, Any]:
    """The config.json of an export of this program, beside the weights or above them; empty for another program's folder."""
    places = [PurePosixPath(inner), PurePosixPath(inner).parent]
    for name in [(place / FACTS).as_posix() for place in places]:
        facts = read_quietly(folder.fetch(name)) if name in folder.names else None
        if isinstance(facts, Mapping) and facts.get("_class_name") == CLASS_NAME:
            return dict(facts)
    return {}


def check_readable(folder: FileTree, facts: Mapping[str, Any], source: str | Path) -> None:
    """Raise InputError for an export in formats that can't be read back."""
    has_weights = any(name.endswith(".safetensors") for name in folder.names)
    if facts and not has_weights:
        raise InputError(
            f"{SETTING}={source} is an export without weights that can be read back; export it with format=safetensors too"
        )


def find_image_size(
    facts: Mapping[str, Any], settings: Mapping[str, Any], source: str | Path
) -> SizeSetting:
    """The size of the training's images, as an export or the config beside the weights says it. Raises InputError if none does.

    diffusers' sample_size is not asked: many models have the default of 32 there.
    """
    if facts:
        size: SizeSetting = facts["image_size"]
        return size
    for word in SIZE_SETTINGS:
        sizes = set()
        for node in list_nodes(settings, skipped=()):
            value = node.get(word)
            sizes |= set(value) if isinstance(value, list | tuple) else {value}
        sizes.discard(None)
        if len(sizes) == 1 and isinstance(side := sizes.pop(), int):
            return side
    raise InputError(
        f"{SETTING}={source} does not say the size of its images, to which encode_images scales; add image_size=256, for example"
    )
