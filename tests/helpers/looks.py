"""Whoever looks at a value of a device's tensor makes the processor wait for the device: tests that catch it.

`HostLooks` watches each operation, on real tensors of the CPU too. `watch_training` trains under its watch, also on the device
"meta", whose tensors have no values, so that a look at one raises.
"""

import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.accelerators import Accelerator, CPUAccelerator
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LOOKING = {  # operations whose result, or its shape, the host must know before it continues
    "_local_scalar_dense", "nonzero", "masked_select", "bincount", "_unique2", "unique_dim", "unique_consecutive", "equal",
    "is_nonzero", "allclose", "linalg_cholesky", "linalg_eigh",
}  # fmt: skip
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl_")
MASKS = (torch.bool, torch.uint8)
ROOT = Path(__file__).parents[2]


class Look(AssertionError):
    """The host looked at a value of the device."""


@dataclass
class HostLooks(TorchDispatchMode):
    """Raises Look at an operation that waits for the device, or records it in `looks` if `raises` is off.

    On another device than the CPU, tensors of the CPU must not meet the device's: a copy waits as well, also one that
    torch.tensor(x, device=...) makes. `is_on` switches the watch.
    """

    device: str
    raises: bool = True
    is_on: bool = True
    looks: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        reason = find_look(self.device, operation, args, kwargs) if self.is_on else ""
        if reason and not is_excused(reason):
            sentence = f"{reason} at {calling_line()}"
            if self.raises:
                self.is_on = False  # Lightning tidies up
                raise Look(sentence)
            self.looks.append(sentence)
        is_leaving = operation is torch.ops.aten._to_copy.default and args[0].is_meta
        is_leaving = is_leaving and kwargs.get("device") == torch.device("cpu")
        if is_leaving and not self.is_on:  # at the end Lightning moves what it logged to the CPU
            return torch.zeros(args[0].shape)
        return operation(*args, **kwargs)


def find_look(device: str, operation: Any, args: Any, kwargs: Any) -> str:
    """What makes the host wait for the device in an operation; empty if nothing does."""
    name = operation.overloadpacket.__name__
    tensors = tensors_of((args, kwargs))
    kinds = {x.device.type for x in tensors}
    target = kwargs.get("device")
    target_type = device if target is None else torch.device(target).type
    if device not in kinds | {target_type}:
        return ""  # the host's own affair
    if name in LOOKING and device in kinds:
        return name
    if name in INDEXING and any(x.dtype in MASKS for x in tensors_of(args[1])):
        return f"{name} by a mask"
    if name == "repeat_interleave" and kwargs.get("output_size") is None:
        return "repeat_interleave without output_size"
    if device == "cpu":
        return ""
    if name == "lift_fresh" and device in kinds:
        return "a copy of a number to the device"
    if tensors and target is not None and kinds != {target_type}:
        return f"a copy from {', '.join(sorted(kinds))} to {target_type}"
    return f"{name} of tensors on {' and '.join(sorted(kinds))}" if len(kinds) > 1 else ""


def tensors_of(arguments: Any) -> list[Tensor]:
    return [x for x in tree_leaves(arguments) if isinstance(x, Tensor)]


def is_excused(reason: str) -> bool:
    """Whether Lightning is fetching the next batch, which is the host's affair, or copies the tensors that it has made for a term
    that is logged for the first time: later they are on the device of the term."""
    frames = traceback.extract_stack()
    is_logging = any(f.name == "log" and f.filename.endswith("result.py") for f in frames)
    is_new_term = is_logging and reason.startswith("a copy from cpu")
    return is_new_term or any("fetchers.py" in f.filename for f in frames)


def calling_line() -> str:
    """The innermost line of this project, or of Lightning, that is being run."""
    frames = [f for f in traceback.extract_stack() if Path(f.filename) != Path(__file__)]
    own = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and ".venv" not in f.filename]
    others = [f for f in frames if "lightning" in f.filename]
    frame = max((*own[-1:], *others[-1:]), key=frames.index, default=frames[-1])
    file = Path(frame.filename)
    shown = file.relative_to(ROOT) if file.is_relative_to(ROOT) else file.name
    return f"{shown}:{frame.lineno} {frame.line}"


class MetaAccelerator(Accelerator):
    """Lightning's view of the device "meta"."""

    def setup_device(self, device: torch.device) -> None: ...

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        return {}

    def teardown(self) -> None: ...

    @staticmethod
    def parse_devices(devices: Any) -> Any:
        return devices

    @staticmethod
    def get_parallel_devices(devices: Any) -> list[torch.device]:
        return [torch.device("meta")]

    @staticmethod
    def auto_device_count() -> int:
        return 1

    @staticmethod
    def is_available() -> bool:
        return True

    @staticmethod
    def name() -> str:
        return "meta"


class WatchedStrategy(SingleDeviceStrategy):
    """Training on one device, each batch watched from its arrival on the device to the arrival of the next."""

    def __init__(self, looks: HostLooks, accelerator: Accelerator, watched: range) -> None:
        super().__init__(torch.device(looks.device), accelerator=accelerator)
        self.looks, self.watched, self.batch = looks, watched, 0
        looks.is_on = False

    def batch_to_device(self, *args: Any, **kwargs: Any) -> Any:
        self.looks.is_on = False
        moved = super().batch_to_device(*args, **kwargs)
        self.looks.is_on = self.batch in self.watched
        self.batch += 1
        return moved

    def teardown(self) -> None:
        """Leave the weights where they are: those of the device "meta" have no values to move to the CPU."""


def watch_training(
    looks: HostLooks,
    module: L.LightningModule,
    data: L.LightningDataModule,
    callbacks: Iterable[Callback] = (),
    watched: range = range(1, 2),
    **settings: Any,
) -> L.Trainer:
    """Train by Lightning's trainer on the device of `looks`, without validations, and without loggers unless `settings` have them:
    both look at values by design.

    `watched` are the numbers of the batches. The first is none of them: in it Lightning registers what is logged, and optimizers
    begin. On a CPU the module should train longer, since the last step is logged. On the device "meta" optimizers need
    foreach=True, since there are no fused kernels.
    """
    accelerator = CPUAccelerator() if looks.device == "cpu" else MetaAccelerator()
    trainer = L.Trainer(
        max_epochs=-1, strategy=WatchedStrategy(looks, accelerator, watched), enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0,
        use_distributed_sampler=False, callbacks=list(callbacks), **{"logger": False, **settings},
    )  # fmt: skip
    with looks:
        trainer.fit(module, data)
    return trainer
