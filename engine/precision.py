"""The precision that models run in unless a setting says otherwise."""

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
