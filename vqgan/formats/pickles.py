"""Reads what torch.save wrote without running it: tensors and plain containers, and a placeholder for every other class.

torch.load(weights_only=True) refuses the containers of old trainers, and it reads files of torch before 1.6 whole, optimizer
and all. Here the pickle is read first, and tensors stay on the disk.
"""

import pickle
import pickletools
import zipfile
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import torch

from codegrid.engine.errors import InputError, summarize_error
from vqgan.formats.weights import Storages, Stored

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a file of torch before 1.6

STORAGE_TYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
ELEMENT_TYPES = {
    f"torch.{str(kind).removeprefix('torch.')}": kind for kind in STORAGE_TYPES.values()
}
PLAIN_CLASSES = {
    "builtins.dict": dict,
    "builtins.list": list,
    "builtins.tuple": tuple,
    "builtins.set": set,
    "builtins.frozenset": frozenset,
    "torch.Size": tuple,
}

# What checkpoints of trainers hold beside weights: callbacks, settings, counters. None of it is needed.
ADMITTED_PACKAGES = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_lite.", "lightning_utilities.", "torchmetrics.",
    "torch.optim.", "torch.amp.", "torch.cuda.amp.", "numpy.",
    "omegaconf.", "easydict.", "addict.", "munch.", "yacs.", "ml_collections.",
)  # fmt: skip
ADMITTED = {
    "argparse.Namespace", "collections.deque", "types.SimpleNamespace", "typing.Any", "uuid.UUID",
    "_codecs.encode", "copyreg._reconstructor",
    *(f"builtins.{name}" for name in ("int", "float", "str", "bool", "bytes", "bytearray", "complex", "object", "slice", "range")),
    *(f"builtins.{name}" for name in ("long", "unicode", "xrange")),  # torch.save writes names of Python 2
    *(f"datetime.{name}" for name in ("datetime", "date", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")),
    *(f"torch.{name}" for name in ("device", "Tensor", "_tensor.Tensor", "nn.parameter.Parameter", "nn.parameter.Buffer")),
}  # fmt: skip
DICTIONARIES = {"collections.OrderedDict", "collections.defaultdict", "collections.Counter"}
RENAMED = {"__builtin__": "builtins", "copy_reg": "copyreg"}  # by Python 3


class Entries(dict[Any, Any]):
    """A dictionary of a class that is plain enough to keep its entries."""

    def __init__(self, entries: Any = (), *_: Any) -> None:
        super().__init__(entries if isinstance(entries, list | tuple | dict) else ())

    def __setstate__(self, state: Any) -> None:
        """Attributes are left out."""


class Inert(dict[Any, Any]):
    """Stands for an object whose class isn't imported: holds what the file gives it and does nothing."""

    def __init__(self, *_: Any) -> None:
        super().__init__()
        self.members: list[Any] = []
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def append(self, member: Any) -> None:
        self.members.append(member)

    def extend(self, members: Any) -> None:
        self.members.extend(members)

    def add(self, member: Any) -> None:
        self.members.append(member)

    def __hash__(self) -> int:  # type: ignore[override]  # placeholders are keys too
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


class PickleReader(pickle.Unpickler):
    """Builds plain containers, `Stored` for tensors, and an `Inert` class a name for every admitted other.

    Names are looked up in this file alone, so nothing is imported, and what a pickle can call is what stands here.
    """

    def __init__(self, stream: IO[bytes], storages: Storages) -> None:
        super().__init__(stream, encoding="utf-8", errors="surrogateescape")
        self._storages = storages
        self._classes: dict[str, type[Inert]] = {}
        self._rebuilders: dict[str, Callable[..., Any]] = {
            "torch._utils._rebuild_tensor": self.rebuild_tensor,
            "torch._utils._rebuild_tensor_v2": self.rebuild_tensor,
            "torch._utils._rebuild_tensor_v3": self.rebuild_bits,
            "torch._utils._rebuild_parameter": self.take_data,
            "torch._utils._rebuild_parameter_with_state": self.take_data,
            "torch._tensor._rebuild_from_type_v2": self.rebuild_subclass,
        }
        self.tensors: list[Stored] = []

    def find_class(self, module: str, name: str) -> Any:
        module = RENAMED.get(module, module)
        full = f"{module}.{name}"
        if full in PLAIN_CLASSES:
            return PLAIN_CLASSES[full]
        if full in DICTIONARIES:
            return Entries
        if full in self._rebuilders:
            return self._rebuilders[full]
        if full in ELEMENT_TYPES:
            return ELEMENT_TYPES[full]
        if module in ("torch", "torch.cuda", "torch.storage") and name in STORAGE_TYPES:
            return STORAGE_TYPES[name]
        if full in ADMITTED or full.startswith(ADMITTED_PACKAGES):
            return self._classes.setdefault(full, type(name, (Inert,), {}))
        raise InputError(
            f"{self._storages.file} holds a {full}, and only tensors, plain containers and what known trainers save beside "
            "them are read, so nothing of it was run; save the state_dict() of its tokenizer alone in its own program"
        )

    def persistent_load(self, pid: Any) -> Any:
        """A storage: its key and type."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] not in ("storage", b"storage"):
            kind = pid[1] if isinstance(pid, tuple) and len(pid) > 1 else pid
            name = getattr(kind, "__name__", type(kind).__name__)
            raise InputError(
                f"{self._storages.file} holds a whole module ({name}) instead of weights; save its state_dict() alone in "
                "its own program"
            )
        _, kind, key, _, count, *view = pid
        if not isinstance(kind, torch.dtype) or not isinstance(count, int) or any(view):
            raise pickle.UnpicklingError(f"storage {key} is of an unknown kind")
        return kind, str(key), count

    def rebuild_tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Stored:
        kind, key, count = storage
        return self._rebuild(key, kind, count * kind.itemsize, offset, size, stride)

    def rebuild_bits(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        _: Any,
        __: Any,
        dtype: Any,
        *___: Any,
    ) -> Stored:
        """A tensor of a type that has no storage of its own."""
        kind, key, count = storage
        if not isinstance(dtype, torch.dtype):
            raise pickle.UnpicklingError(f"storage {key} is of an unknown type")
        return self._rebuild(key, dtype, count * kind.itemsize, offset, size, stride)

    def _rebuild(
        self, key: str, dtype: torch.dtype, size: int, offset: Any, shape: Any, stride: Any
    ) -> Stored:
        numbers = [offset, *shape, *stride]
        if len(shape) != len(stride) or not all(isinstance(n, int) and n >= 0 for n in numbers):
            raise pickle.UnpicklingError(f"a tensor of storage {key} has an impossible shape")
        tensor = Stored(self._storages, key, dtype, offset, tuple(shape), tuple(stride))
        if tensor.size > size:
            raise pickle.UnpicklingError(f"a tensor reaches beyond its storage {key}")
        self.tensors.append(tensor)
        return tensor

    def take_data(self, data: Any, *_: Any) -> Any:
        return data

    def rebuild_subclass(self, rebuild: Any, _: Any, args: Any, __: Any) -> Any:
        if rebuild not in self._rebuilders.values():
            raise pickle.UnpicklingError("a tensor of an unknown kind")
        return rebuild(*args)


def read_pickle(file: Path) -> Any:
    """The content of a file of torch.save, with `Stored` for each tensor and placeholders for objects.

    Raises InputError for a file that is damaged or that wants more than this.
    """
    try:
        return read_zip(file) if zipfile.is_zipfile(file) else read_legacy(file)
    except InputError:
        raise
    except Exception as error:  # bytes that are no pickle can raise anything
        raise InputError(
            f"{file} is damaged, or no file that torch.save wrote ({summarize_error(error)}); fetch it again"
        ) from error


def read_zip(file: Path) -> Any:
    """The content of a file of torch 1.6 and later."""
    storages = Storages(file)
    with zipfile.ZipFile(file) as archive, file.open("rb") as stream:
        parts = {part.filename: part for part in archive.infolist()}
        pickles = [name for name in parts if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise InputError(f"{file} is a zip file, but none that torch.save wrote")
        root = pickles[0].removesuffix("data.pkl")
        parts = {name.removeprefix(root): part for name, part in parts.items()}
        if "constants.pkl" in parts:
            raise InputError(
                f"{file} is a TorchScript program; save its state_dict() with torch.save instead"
            )
        if any(part.compress_type != zipfile.ZIP_STORED for part in parts.values()):
            raise InputError(f"{file} is a compressed zip file; save it again with torch.save")
        spans = {name: find_span(stream, part) for name, part in parts.items()}
        if "byteorder" in parts and read_span(stream, *spans["byteorder"]) != b"little":
            raise InputError(f"{file} was saved on a big-endian machine; save it again on another")
        for name, span in spans.items():
            storages.spans[name.removeprefix("data/")] = span
        content, tensors = load_pickle(BytesIO(read_span(stream, *spans["data.pkl"])), storages)
    check_spans(tensors)
    return content


def find_span(stream: IO[bytes], part: zipfile.ZipInfo) -> tuple[int, int]:
    """The first byte of an uncompressed part of a zip file, which follows its name and padding, and its size."""
    header = read_span(stream, part.header_offset, 30)
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    return part.header_offset + 30 + lengths, part.file_size


def read_span(stream: IO[bytes], start: int, size: int) -> bytes:
    """Bytes of an open file."""
    stream.seek(start)
    return stream.read(size)


def read_legacy(file: Path) -> Any:
    """The content of a file of torch before 1.6: pickles, and then the storages one after another."""
    storages = Storages(file)
    with file.open("rb") as stream:
        magic, _ = load_pickle(stream, storages)
        if magic != LEGACY_MAGIC:
            raise pickle.UnpicklingError("it begins as another kind of file")
        load_pickle(stream, storages)  # the version of the layout, of which there is one
        load_pickle(stream, storages)  # the sizes of numbers on that machine
        content, tensors = load_pickle(stream, storages)
        keys, _ = load_pickle(stream, storages)
        sizes = {tensor.key: tensor.dtype.itemsize for tensor in tensors}
        for key in keys:
            count = int.from_bytes(stream.read(8), "little")
            start, size = stream.tell(), count * sizes.get(str(key), 1)
            storages.spans[str(key)] = start, size
            stream.seek(start + size)
    check_spans(tensors)
    return content


def load_pickle(stream: IO[bytes], storages: Storages) -> tuple[Any, list[Stored]]:
    """The next pickle of a stream, and the tensors in it."""
    start = stream.tell()
    for i, (opcode, number, _) in enumerate(pickletools.genops(stream)):
        if opcode.name.startswith("EXT"):  # takes classes from a table of the whole process
            raise pickle.UnpicklingError("it names classes by numbers")
        if opcode.name in ("PUT", "LONG_BINPUT") and isinstance(number, int) and number > i:
            raise pickle.UnpicklingError(
                "it numbers more objects than it has"
            )  # and allocates them
    stream.seek(start)
    reader = PickleReader(stream, storages)
    return reader.load(), reader.tensors


def check_spans(tensors: Iterable[Stored]) -> None:
    """Raise UnpicklingError unless the bytes of every tensor are there."""
    for tensor in tensors:
        start, size = tensor.storages.spans.get(tensor.key, (0, 0))
        if tensor.size > size or start + size > tensor.storages.file.stat().st_size:
            raise pickle.UnpicklingError(f"storage {tensor.key} is cut off")


def find_broken_part(file: Path) -> str | None:
    """The part of a zip file whose checksum is wrong; None if all are right, or for a file of another kind.

    torch.serialization.set_crc32_options(False) leaves all checksums zero.
    """
    if not zipfile.is_zipfile(file):
        return None
    with zipfile.ZipFile(file) as parts:
        return None if not any(part.CRC for part in parts.infolist()) else parts.testzip()
