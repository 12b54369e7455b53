"""How much more memory a process may use, by the machine, its container or job, and ulimit."""

import resource
from pathlib import Path

import pytest
import torch

from codegrid.engine import host_memory as module
from codegrid.engine.host_memory import free_host_memory, free_memory


@pytest.fixture(autouse=True)
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 8,000 KiB of available memory and no control groups."""
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable: 8000 kB\n")
    monkeypatch.setattr(module, "SYSTEM_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(module, "OWN_GROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(module, "CONTROL_GROUPS", tmp_path / "groups")
    return tmp_path


def write_group(group: Path, **files: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / name.replace("_dot_", ".")).write_text(f"{text}\n")


def test_the_machine_has_what_its_system_calls_available() -> None:
    assert free_host_memory() == free_memory(torch.device("cpu")) == 8000 * 1024


def test_a_group_allows_its_limit_without_what_it_uses_cached_files_aside(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/job/step\n")
    stat = "anon 100\ninactive_file 200\nactive_file 300"
    write_group(machine / "groups", memory_dot_current=5000)
    write_group(
        machine / "groups/job", memory_dot_max=1000, memory_dot_current=700, memory_dot_stat=stat
    )
    write_group(machine / "groups/job/step", memory_dot_max="max", memory_dot_current=600)
    assert free_host_memory() == 1000 - 700 + 200


def test_a_container_sees_its_own_group_as_the_root(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/docker/1234\n")
    write_group(machine / "groups", memory_dot_max=900, memory_dot_current=400)
    assert free_host_memory() == 500


def test_groups_of_the_first_version_have_other_names(machine: Path) -> None:
    (machine / "cgroup").write_text("9:pids:/x\n4:memory:/job\n0::/\n")
    group = machine / "groups/memory/job"
    stat = "inactive_file 5\ntotal_inactive_file 50"
    limit = {"memory_dot_limit_in_bytes": 900, "memory_dot_usage_in_bytes": 400}
    write_group(group, **limit, memory_dot_stat=stat)
    assert free_host_memory() == 550


def test_a_group_that_is_full_leaves_nothing(machine: Path) -> None:
    (machine / "cgroup").write_text("0::/\n")
    write_group(machine / "groups", memory_dot_max=900, memory_dot_current=1000)
    assert free_host_memory() == 0


def test_ulimit_counts(machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (machine / "statm").write_text("10 5 1 1 0 1 0\n")
    monkeypatch.setattr(module, "STATM", machine / "statm")
    monkeypatch.setattr(resource, "getrlimit", lambda _: (12 * resource.getpagesize(), -1))
    assert free_host_memory() == 2 * resource.getpagesize()


def test_a_system_that_says_nothing_has_an_unknown_amount(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SYSTEM_MEMORY", "STATM"):
        monkeypatch.setattr(module, name, machine / "missing")
    assert free_host_memory() is None
