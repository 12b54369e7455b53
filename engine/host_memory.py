"""How much more memory this process may use."""

import os
from collections.abc import Iterator
from pathlib import Path

import torch

from codegrid.engine.environment import STATM, read_system_file

SYSTEM_MEMORY = Path("/proc/meminfo")
OWN_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
FILES_OF_GROUP = {  # of both versions of control groups: limit, use, and the key of cached files that make way
    1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: ("memory.max", "memory.current", "inactive_file"),
}


def free_host_memory() -> int | None:
    """Bytes that this process can still use: the machine's, its container's or job's, and those of ulimit -v, whichever
    are fewest; None if the system doesn't say."""
    amounts = [*free_on_machine(), *free_in_groups(), *free_address_space()]
    return max(0, min(amounts)) if amounts else None


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still have on a device; None if the system doesn't say."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps of earlier work counts as taken
        return torch.cuda.mem_get_info(device)[0]
    return free_host_memory()


def free_on_machine() -> Iterator[int]:
    """Bytes that the system has for new work, cached files aside."""
    for line in read_system_file(SYSTEM_MEMORY).splitlines():
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            yield int(amount.split()[0]) * 1024


def free_in_groups() -> Iterator[int]:
    """Bytes that each control group of this process, from its own to the root's, allows beyond what it uses."""
    for line in read_system_file(OWN_GROUPS).splitlines():
        _, controllers, place = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        version = 1 if controllers else 2
        root = CONTROL_GROUPS / controllers
        own = root / place.lstrip("/")
        # A container sees its own group as the root, whatever it is called outside.
        for group in (own, *(parent for parent in own.parents if parent.is_relative_to(root))):
            yield from free_in_group(group, version)


def free_in_group(group: Path, version: int) -> Iterator[int]:
    """Bytes that a control group allows beyond what it uses; nothing if it has no limit."""
    limit_file, use_file, cached = FILES_OF_GROUP[version]
    limit, use = (read_system_file(group / name).strip() for name in (limit_file, use_file))
    if not (limit.isdecimal() and use.isdecimal()):  # no such group, or "max"
        return
    entries = (line.split() for line in read_system_file(group / "memory.stat").splitlines())
    yield int(limit) - int(use) + sum(int(n) for name, n in entries if name == cached)


def free_address_space() -> Iterator[int]:
    """Bytes that ulimit -v allows beyond what this process has."""
    words = read_system_file(STATM).split()
    if not words:
        return
    import resource  # which Windows lacks

    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - int(words[0]) * os.sysconf("SC_PAGE_SIZE")
