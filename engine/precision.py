"""The precision that models run in unless a setting says otherwise."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

HAS_AVX2_ALONE = torch.backends.cpu.get_cpu_capability() == "AVX2"


def best_precision() -> str:
    """bf16 autocast where the hardware computes in bf16, else float32: emulated bf16 is three times slower than float32."""
    if torch.cuda.is_available():
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities()
        has_bf16 = bool(features.get("avx512_bf16") or features.get("amx_bf16"))
    return "bf16-mixed" if has_bf16 else "32-true"


def autocast(device: torch.device) -> torch.autocast:
    """The precision that training chooses by itself, for code that runs outside Lightning's Trainer."""
    return torch.autocast(device.type, torch.bfloat16, enabled=best_precision() == "bf16-mixed")


def without_autocast(device: torch.device) -> AbstractContextManager[None]:
    """Inside, float32 stays float32 under any precision setting; on a device that has no autocast it does so anyway."""
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def at_least_float32(x: Tensor) -> Tensor:
    """x in float32 unless it is in float64: a float32 island of a network that may run in float64 as a whole."""
    return x if x.dtype == torch.float64 else x.float()


@contextmanager
def default_float64() -> Iterator[None]:
    """Inside, new tensors of floats are float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class RoundingWatch(TorchDispatchMode):
    """Inside, `rounded_to` becomes a type of fewer bits that an operation rounds numbers of float64 to; None if none does."""

    def __init__(self) -> None:
        super().__init__()
        self.rounded_to: torch.dtype | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        is_new = func.name().startswith(("aten::new_", "aten::empty_like", "aten::full_like"))
        if not is_new and any(is_float64(each) for each in tree_leaves((args, kwargs))):
            for each in tree_leaves(result):
                if isinstance(each, Tensor) and each.is_floating_point() and not is_float64(each):
                    self.rounded_to = each.dtype
        return result


def is_float64(value: object) -> bool:
    """Whether it is a tensor of float64."""
    return isinstance(value, Tensor) and value.dtype == torch.float64


def choose_memory_format(device: torch.device) -> torch.memory_format:
    """The memory format in which networks of convolutions and GroupNorm are fastest, docs/speed.md.

    channels_last on a CPU, but contiguous for training on one with AVX2 and without AVX-512, whose backward passes are slower
    otherwise. A GPU's convolutions like channels_last too, but its GroupNorm copies into contiguous tensors and the next
    convolution back.
    """
    if device.type == "cpu" and not (HAS_AVX2_ALONE and torch.is_grad_enabled()):
        return torch.channels_last
    return torch.contiguous_format


def to_memory_format(x: Tensor) -> Tensor:
    """A map (B, C, h, w) of any strides as the convolutions behind it should have it: contiguous where that is the format to
    choose, for they would run in the strides of their input; as it is elsewhere."""
    return x.contiguous() if choose_memory_format(x.device) is torch.contiguous_format else x


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """Inside, a GPU's convolutions don't round to TensorFloat-32 and always use the same algorithm."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
