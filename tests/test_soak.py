"""Long runs leak no memory, files or processes; `python -m benchmarks.soak` tests 2,000 steps."""

from pathlib import Path

import pytest

from benchmarks.soak import SMALL, SMALL_PRIOR, crash, soak


@pytest.mark.slow
def test_a_long_run_of_each_stage_does_not_grow_and_leaves_nothing_behind(
    tmp_path: Path,
) -> None:
    for stage, words in {"vqgan": SMALL, "prior": [*SMALL_PRIOR, "ckpt=vqgan"]}.items():
        leaks = soak([f"stage={stage}", *words], tmp_path, 300, stage)
        assert leaks["growth"] < 0.02
        assert leaks["open_files"][1] <= leaks["open_files"][0] + 1
        assert (leaks["processes_left"], leaks["shared_memory_left"]) == (0, 0)


@pytest.mark.slow
def test_a_killed_run_leaves_no_worker_and_no_shared_memory_behind(tmp_path: Path) -> None:
    leaks = crash(["stage=vqgan", *SMALL, "data.num_workers=2"], tmp_path, "killed")
    assert leaks == {"workers": 2, "processes_left": 0, "shared_memory_left": 0}
