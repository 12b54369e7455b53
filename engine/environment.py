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
from engine.version import VERSION

GIB = 2**30
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")


def read_overrides() -> list[str]:
    """The settings on this command line, each as "key=value"."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def describe_origin() -> dict[str, Any]:
    """Where a result comes from: command line, git revision, versions, machine."""
    sweep = sweep_folder()
    command = ["train.py", *read_overrides()] if sweep else sys.argv  # each point has its own
    return {
        "command": shlex.join(command),
        "sweep": str(sweep) if sweep else None,
        "codegrid": VERSION,
        "git": git_revision(),
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB, 1),
    }


def git_revision() -> str | None:
    """The revision of this program's code, with -dirty if files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty"]
    here = Path(__file__).parent
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    return done.stdout.strip() or None


def processor_name() -> str:
    """The processor's name, as far as the system knows it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine()


def resident_memory() -> float:
    """GiB of memory that this process holds; on systems other than Linux, the most it has held so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / GIB  # in bytes on macOS


def find_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu) means on this machine."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise InputError(f"accelerator={accelerator} must be auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}, but there is no usable GPU; use auto or cpu")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")


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
