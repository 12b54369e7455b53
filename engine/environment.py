"""The machine, the versions and the code that a run is made with."""

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from hydra.core.hydra_config import HydraConfig

from engine.errors import InputError
from engine.sweep import sweep_folder

GIB = 2**30


def read_overrides() -> list[str]:
    """What this command line said, as "key=value"."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def resident_memory() -> float:
    """GiB of memory that this process holds; where the system does not tell (it is not Linux), the most that it has held."""
    pages = Path("/proc/self/statm")
    if pages.exists():
        return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # bytes, as macOS has it


PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")


def describe_origin() -> dict[str, Any]:
    """Where a result comes from: command line, git revision, versions, machine."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=here,
        capture_output=True,
        text=True,
        check=False,
    )
    swept = sweep_folder()
    return {
        "command": shlex.join(
            ["train.py", *read_overrides()] if swept else sys.argv
        ),  # of a sweep's points each has its own
        "sweep": str(swept) if swept else None,
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    }


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def best_precision() -> str:
    """bf16 autocast where the hardware computes in bf16, else float32: emulated bf16 is three times slower than float32."""
    if torch.cuda.is_available():
        return (
            "bf16-mixed" if torch.cuda.is_bf16_supported(including_emulation=False) else "32-true"
        )
    found = torch.cpu.get_capabilities()
    return "bf16-mixed" if found.get("avx512_bf16") or found.get("amx_bf16") else "32-true"


def find_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu) means on this machine."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise InputError(f"accelerator={accelerator} must be auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}, but there is no usable GPU; use auto or cpu")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


def autocast(where: torch.device) -> torch.autocast:
    """The precision that training chooses by itself, for what runs outside Lightning's trainer."""
    return torch.autocast(where.type, torch.bfloat16, enabled=best_precision() == "bf16-mixed")
