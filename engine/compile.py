"""torch.compile for the parts that take the time: in place, so that names, checkpoints and averages stay as they are."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from codegrid.engine.errors import InputError


def check_compile(name: str, value: object, kind: str) -> None:
    """Raise InputError if the setting `name` is not a bool, or is true where torch.compile fails for this kind of device."""
    if not isinstance(value, bool):
        raise InputError(f"{name}={value} must be true or false")
    if value and (reason := compile_failure(kind)):
        if kind == "cuda":
            need = "a GPU that Triton is made for, and a C compiler"
        else:
            need = "a C++ compiler, g++ or what CXX names"
        raise InputError(
            f"{name}=true needs {need}, and torch.compile fails here ({reason}); "
            f"install it, or use {name}=false"
        )


def compile_failure(kind: str) -> str | None:
    """Why torch.compile can't compile the smallest program for this kind of device; None if it can.

    Forgets what was compiled before: torch keeps few variants of a module, and the points of a sweep have one each.
    """
    torch.compiler.reset()
    try:
        torch.compile(_program, options={"force_disable_caches": True})(torch.ones(8, device=kind))
    except Exception as error:  # whatever a missing compiler, driver or header raises
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _program(x: Tensor) -> Tensor:
    return 2 * x + 1


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Compile these modules, each when it is first run; equal ones share the code. Copies and files are not compiled."""
    for part in parts:
        part.compile()


class EagerValidation(Callback):
    """Runs validation without compiled code: compiling it too, without gradients and for a smaller last batch, would take
    longer than it saves."""

    def __init__(self) -> None:
        self._eager = ExitStack()

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._eager.enter_context(torch.compiler.set_stance("force_eager"))

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._eager.close()  # whatever stance was set before

    def on_exception(self, *_: Any) -> None:
        self._eager.close()
