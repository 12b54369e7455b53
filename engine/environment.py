"""The machine, the versions and the code that a run is made with."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig

from codegrid.engine.errors import InputError
from codegrid.engine.packages import package_version
from codegrid.engine.sweep import sweep_folder
from codegrid.engine.trust import flatten_config
from codegrid.engine.version import VERSION

MIB = 2**20
GIB = 2**30
CPUINFO = Path("/proc/cpuinfo")
STATM = Path("/proc/self/statm")
PROCESS_STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")  # writing 5 resets the peak in PROCESS_STATUS
GIT_SECONDS = 10  # after which the revision stays unknown
PACKAGES = ("torch", "torchvision", "lightning", "hydra-core", "wandb", "torchmetrics")


def read_overrides() -> list[str]:
    """The settings on this command line, each as "key=value"."""
    return list(HydraConfig.get().overrides.task) if HydraConfig.initialized() else []


def keys_of_experiment(config: Any, groups: Sequence[str]) -> list[str]:
    """The keys of settings below these groups that an `experiment` of this command gives another value than the stage's own."""
    if not HydraConfig.initialized() or not HydraConfig.get().runtime.choices.get("experiment"):
        return []
    plain = compose("config", [f"stage={config.stage}"])
    mine, stages = (
        dict(flatten_config({name: c.get(name) for name in groups})) for c in (config, plain)
    )
    return [key for key in mine if mine[key] != stages.get(key)]


def describe_origin() -> dict[str, Any]:
    """Where a result comes from: command line, git revision, versions, machine.

    Nothing here is needed to train, so what a machine doesn't say is None.
    """
    sweep = sweep_folder()
    command = ["train.py", *read_overrides()] if sweep else sys.argv  # each point has its own
    return {
        "command": shlex.join(command),
        "sweep": str(sweep) if sweep else None,
        "codegrid": VERSION,
        "git": git_revision(),
        "python": platform.python_version(),
        **{package: package_version(package) for package in PACKAGES},
        "device": gpu_name() or processor_name(),
        "processor": processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": installed_memory(),
    }


def git_revision() -> str | None:
    """The revision of this program's code, with -dirty if files differ from it; None outside a repository and without git."""
    here = Path(__file__).resolve()
    # An installed copy may lie within somebody else's repository.
    is_tracked = ["git", "ls-files", "--error-unmatch", here.name]
    describe = ["git", "describe", "--always", "--dirty"]
    try:
        for command in (is_tracked, describe):
            done = subprocess.run(
                command,
                cwd=here.parent,
                capture_output=True,
                text=True,
                check=False,
                timeout=GIT_SECONDS,
            )
            if done.returncode:
                return None
    except (OSError, subprocess.TimeoutExpired):  # no git, or a network disk that doesn't answer
        return None
    return done.stdout.strip() or None


def gpu_name() -> str | None:
    """The name of this process's GPU; None if there is none, or if its driver doesn't answer."""
    if not torch.cuda.is_available():
        return None
    try:
        return torch.cuda.get_device_name()
    except (RuntimeError, AssertionError):
        return None


def installed_memory() -> float | None:
    """GiB of memory of this machine; None if the system doesn't say."""
    try:
        pages = os.sysconf("SC_PHYS_PAGES")
        return round(os.sysconf("SC_PAGE_SIZE") * pages / GIB, 1) if pages > 0 else None
    except (OSError, ValueError, AttributeError):  # an unknown name is a ValueError
        return None


def read_system_file(file: Path) -> str:
    """The text of a file such as /proc/cpuinfo; empty where the system has none, or doesn't show it."""
    try:
        return file.read_text(errors="replace")
    except OSError:
        return ""


def processor_name() -> str:
    """The processor's name, as far as the system knows it."""
    lines = read_system_file(CPUINFO).splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), "") or platform.processor() or platform.machine() or "unknown"


def resident_memory() -> float:
    """GiB of memory that this process holds; without Linux's /proc, the most it has held so far."""
    words = read_system_file(STATM).split()
    if len(words) > 1:
        return int(words[1]) * os.sysconf("SC_PAGE_SIZE") / GIB
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / GIB if sys.platform == "darwin" else peak * 1024 / GIB  # bytes, or KiB


def reset_peak_memory(device: torch.device) -> int | None:
    """Forget the most memory so far, for `read_peak_memory`. Returns the bytes held now, beyond which a peak counts: 0 on a GPU,
    where the peak is of tensors alone; None if the system can't forget."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return None
    return read_peak_memory(device)


def read_peak_memory(device: torch.device) -> int | None:
    """The most bytes since `reset_peak_memory`: allocated on a GPU, or held by this process; None if the system doesn't say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    lines = read_system_file(PROCESS_STATUS).splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def find_device(accelerator: str) -> torch.device:
    """The device that `accelerator` (auto, cpu, gpu) means on this machine."""
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise InputError(f"accelerator={accelerator} must be auto, cpu or gpu")
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise InputError(f"accelerator={accelerator}, but there is no usable GPU; use auto or cpu")
    return torch.device("cuda" if torch.cuda.is_available() and accelerator != "cpu" else "cpu")
