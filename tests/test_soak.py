"""Long runs leak no memory, files or processes; `python -m benchmarks.soak` tests 2,000 steps."""

from collections.abc import Iterator
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

import pytest

from benchmarks.soak import SMALL, SMALL_PRIOR, crash, list_leaked_memory, list_shared_memory, soak


@pytest.fixture
def block() -> Iterator[SharedMemory]:
    block = SharedMemory(create=True, size=4096)
    yield block
    block.close()
    block.unlink()


def test_only_shared_memory_that_no_process_has_open_is_leaked(block: SharedMemory) -> None:
    before = list_shared_memory() - {block.name}
    assert block.name not in list_leaked_memory(before)
    block.close()
    assert block.name in list_leaked_memory(before, seconds=0)


@pytest.mark.slow
def test_a_long_run_of_each_stage_does_not_grow_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    for stage, words in {"vqgan": SMALL, "prior": [*SMALL_PRIOR, "ckpt=vqgan"]}.items():
        leaks = soak([f"stage={stage}", *words], tmp_path, 300, stage)
        assert leaks["growth"] < 0.02
        assert leaks["open_files"][1] <= leaks["open_files"][0] + 1
        assert (leaks["processes_left"], leaks["shared_memory_left"]) == (0, [])


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_and_no_shared_memory_behind(tmp_path: Path) -> None:
    leaks = crash(["stage=vqgan", *SMALL, "data.num_workers=2"], tmp_path, "killed")
    assert leaks == {"workers": 2, "processes_left": 0, "shared_memory_left": []}
