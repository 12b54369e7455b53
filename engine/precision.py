"""The precision that models run in unless a setting says otherwise."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


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
    if not torch.amp.is_autocast_available(device.type):  # type: ignore[attr-defined]
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@contextmanager
def deterministic_float32() -> Iterator[None]:
    """Inside, a GPU's convolutions don't round to TensorFloat-32 and always use the same algorithm."""
    with torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    ):
        yield
