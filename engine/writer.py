"""Checkpoints that are written while training continues: a copy of the state, and a thread that writes it."""

import copy
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO
from torch import Tensor

from codegrid.engine.checkpoint import save_atomically
from codegrid.engine.console import log_line
from codegrid.engine.environment import MIB
from codegrid.engine.errors import summarize_error
from codegrid.engine.folder import PREVIOUS
from codegrid.engine.host_memory import free_host_memory


class AtomicCheckpointIO(CheckpointIO):
    """Lightning's checkpoint plugin: writes with save_atomically, keeping the file before; reads without running code.

    If it `is_async`, training waits for a copy of the state alone, which a thread writes. There is one write at a time: the
    next waits for it, so files appear in the order in which they were saved, and memory holds one copy. Where memory has no
    room for a copy, training waits for the write. A program that ends waits for it too.

    An OSError is kept for `take_error` instead of raised: Lightning waits for all ranks after a save, and only the main
    one writes.
    """

    def __init__(self, is_async: bool) -> None:
        self.is_async = is_async
        self._write: Future[None] | None = None  # under way, or ended and not yet looked at
        self._errors: dict[Path, OSError] = {}  # of the last write to each file
        self._has_reported = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        file = Path(path)

        def save(content: Any) -> None:
            self._errors.pop(file, None)
            try:
                save_atomically(content, file, file.with_name(PREVIOUS.name))
            except OSError as error:
                self._errors[file] = error

        self.write(checkpoint, save)

    def write(self, content: Any, save: Callable[[Any], None]) -> None:
        """Call `save` with the content after the earlier write has ended: at once, or in a thread with a copy taken at once."""
        self.finish()
        copied = self._copy(content) if self.is_async else None
        if copied is None:
            save(content)
            return
        thread = ThreadPoolExecutor(1)
        self._write = thread.submit(save, copied)
        thread.shutdown(wait=False)  # it ends after this write, which a program's end waits for

    def _copy(self, content: Any) -> Any:
        """A copy of a state; None, which is reported once, if memory has no room for it and for training beside it, or
        none after all."""
        needed = count_state_bytes(content)
        free = free_host_memory()
        if free is None or 2 * needed <= free:
            try:
                return copy_state(content)
            except (MemoryError, RuntimeError) as error:  # of torch's allocator
                why = f" and can't be made ({summarize_error(error)})"
        else:
            why = f", and {free / MIB:,.0f} MiB of memory are free, too little for both"
        if not self._has_reported:
            self._has_reported = True
            log_line(
                f"checkpoints are written while training waits: a copy of the state takes {needed / MIB:,.0f} MiB{why}; "
                "trainer.save_async=false does the same"
            )
        return None

    @property
    def is_writing(self) -> bool:
        """Whether a write is under way."""
        return self._write is not None and not self._write.done()

    def finish(self) -> None:
        """Wait until no write is under way. Raises what it raised, unless that was the disk's."""
        if self._write is None:
            return
        self._write.exception()  # a signal may end this wait, and then the write is still known
        write, self._write = self._write, None
        write.result()

    def teardown(self) -> None:
        """Wait for the write under way; Lightning calls it when training is over, however it ends."""
        self.finish()

    def take_error(self, file: Path) -> OSError | None:
        """The error of the last write to a file, once, after waiting for it; None if it succeeded."""
        self.finish()
        return self._errors.pop(file, None)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def copy_state(content: Any) -> Any:
    """The same containers in memory of their own, with their tensors on the CPU.

    Tensors that share memory share it in the copy too, so torch.save writes the same bytes for both.
    """
    storages: dict[int, torch.UntypedStorage] = {}
    copies = {
        id(tensor): copy_tensor(tensor, storages)
        for tensor in find_tensors(content)
        if is_plain(tensor)
    }
    return copy.deepcopy(content, copies)  # which takes these copies for those tensors


def find_tensors(content: Any) -> Iterator[Tensor]:
    """All tensors in containers within containers."""
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, Mapping):
        for value in content.values():
            yield from find_tensors(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            yield from find_tensors(value)


def is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is its storage, offset, shape and strides and nothing else."""
    is_strided = type(tensor) is Tensor and tensor.layout == torch.strided
    return is_strided and not (tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def copy_tensor(tensor: Tensor, storages: dict[int, torch.UntypedStorage]) -> Tensor:
    """A copy on the CPU; `storages` are the copies of storages so far, to which it adds its own."""
    storage = tensor.untyped_storage()
    if storage._cdata not in storages:
        storages[storage._cdata] = torch.UntypedStorage(storage.nbytes()).copy_(storage, False)
    copied = torch.empty(0, dtype=tensor.dtype).set_(
        storages[storage._cdata], tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    return copied.requires_grad_(tensor.requires_grad)


def count_state_bytes(content: Any) -> int:
    """The memory of all tensors in containers, each storage once."""
    storages = [tensor.untyped_storage() for tensor in find_tensors(content) if is_plain(tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())
