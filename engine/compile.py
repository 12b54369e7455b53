"""torch.compile, for what takes the time: in place, so that names, checkpoints and averages stay what they are."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from engine.errors import InputError


def check_compile(name: str, wanted: object, kind: str) -> None:
    """Raise InputError where the setting `name` is no bool, or asks for what torch.compile can't do for this kind of device."""
    if not isinstance(wanted, bool):
        raise InputError(f"{name}={wanted} must be true or false")
    if wanted and (reason := compile_failure(kind)):
        need = (
            "a GPU that Triton is made for, and a C compiler"
            if kind == "cuda"
            else "a C++ compiler, g++ or what CXX names"
        )
        raise InputError(
            f"{name}=true needs {need}, and torch.compile fails here ({reason}); install it, or use {name}=false"
        )


def compile_failure(kind: str) -> str | None:
    """Why torch.compile can't compile the smallest program there is for this kind of device; None where it can.

    What was compiled before is forgotten: torch keeps few variants of a module, and a sweep's points have one each.
    """
    torch.compiler.reset()
    try:
        torch.compile(_program, options={"force_disable_caches": True})(torch.ones(8, device=kind))
    except Exception as error:  # whatever comes of a compiler, a driver or a header that is missing
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _program(x: Tensor) -> Tensor:
    return 2 * x + 1


def compile_parts(parts: Iterable[nn.Module]) -> None:
    """Compile these modules for training, each when it is first run there; those that are alike share the code.

    In eval mode they run as ever: a validation, without gradients and with a smaller batch in the end, would have them compiled
    twice more, and is too short to make up for it. Copies and files of the modules know nothing of all this.
    """
    for part in parts:
        part._compiled_call_impl = in_training(part)


def in_training(part: nn.Module) -> Callable[..., Any]:
    """What calls the part: as nn.Module.compile would have it where it is in training mode, else by torch's own way."""
    quick, usual = torch.compile(part._call_impl), part._call_impl
    return lambda *inputs: quick(*inputs) if part.training else usual(*inputs)
