"""The budget of a run and the learning-rate schedule."""

import math
from itertools import pairwise

import pytest

from codegrid.engine.clock import Budget, CommonClock, Now, Schedule, StableSchedule
from codegrid.engine.errors import InputError


def test_progress_counts_steps() -> None:
    budget = Budget(max_steps=10)
    assert [budget.now(step, 1e9).progress for step in (0, 5, 10, 12)] == [0, 0.5, 1, 1]


def test_progress_counts_minutes() -> None:
    budget = Budget(max_minutes=2)
    assert [budget.now(10**9, seconds).progress for seconds in (0, 30, 120, 500)] == [0, 0.25, 1, 1]


def test_progress_is_that_of_the_budget_which_ends_first() -> None:
    budget = Budget(max_steps=10, max_minutes=1)
    assert budget.now(5, 6).progress == 0.5
    assert budget.now(1, 45).progress == 0.75


@pytest.mark.parametrize(
    "limits", [{}, {"max_steps": 0}, {"max_minutes": -1}, {"max_steps": "many"}]
)
def test_a_run_without_a_valid_end_is_refused(limits: dict[str, int]) -> None:
    with pytest.raises(InputError, match=r"trainer\.max_"):
        Budget(**limits)


def test_the_learning_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    schedule = Schedule(warmup=4, floor=0.1)
    assert [schedule(Now(step, 0)) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert schedule(Now(100, 0.5)) == pytest.approx(0.55)
    assert schedule(Now(100, 1)) == pytest.approx(0.1)
    assert schedule(Now(100, 0.25)) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)


def test_without_a_warm_up_the_first_rate_is_the_peak() -> None:
    assert Schedule(warmup=0, floor=0.02)(Now(0, 0)) == 1


def test_a_stable_rate_falls_at_the_end_alone() -> None:
    schedule = StableSchedule(warmup=4, floor=0.1, cooldown=0.25)
    assert [schedule(Now(step, 0)) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1]
    assert [schedule(Now(100, progress)) for progress in (0.5, 0.75)] == [1, 1]
    assert schedule(Now(100, 0.75 + 0.25 / 4)) == pytest.approx(0.55)
    assert schedule(Now(100, 1)) == pytest.approx(0.1)


def test_a_cooldown_over_the_whole_run_or_none_of_it() -> None:
    assert StableSchedule(warmup=0, floor=0, cooldown=0)(Now(9, 1)) == 1
    whole = StableSchedule(warmup=0, floor=0, cooldown=1)
    assert [whole(Now(9, progress)) for progress in (0, 0.25, 1)] == [1, 0.5, 0]


def test_a_cooldown_longer_than_the_run_is_refused() -> None:
    with pytest.raises(InputError, match=r"schedule\.cooldown=2 must be a number from 0 to 1"):
        StableSchedule(warmup=0, floor=0, cooldown=2)


def count_together(paces: list[float], steps: int) -> tuple[list[list[float]], list[list[int]]]:
    """The seconds of each rank after each update, and the updates after which it meets the others; rank 0 is the main one."""
    clocks = [CommonClock(0, 0.0) for _ in paces]
    seconds: list[list[float]] = [[] for _ in paces]
    meetings: list[list[int]] = [[] for _ in paces]
    for step in range(1, steps + 1):
        main = step * paces[0]
        for rank, pace in enumerate(paces):
            seconds[rank].append(clocks[rank].tick(step, step * pace, lambda _own, main=main: main))
            if clocks[rank].meets:
                meetings[rank].append(step)
    return seconds, meetings


def test_ranks_of_different_pace_count_the_main_ranks_seconds_and_meet_after_the_same_updates() -> (
    None
):
    (main, other), (meetings, of_other) = count_together([0.25, 0.4], 12)
    assert main == other == pytest.approx([0.25 * step for step in range(1, 13)])
    assert meetings == of_other == [1, 5, 9]


@pytest.mark.parametrize(("pace", "apart"), [(3.0, 1), (0.5, 2), (0.001, 100), (0.0, 100)])
def test_ranks_meet_about_once_a_second(pace: float, apart: int) -> None:
    _, [meetings] = count_together([pace], 201)
    assert {b - a for a, b in pairwise(meetings)} == {apart}


def test_the_common_clock_never_runs_backward() -> None:
    """Updates that get faster are counted too slow until the next meeting, and then the clock waits."""
    clock, real, seconds = CommonClock(7, 100.0), 100.0, [100.0]
    for step in range(8, 200):
        real += 0.3 if step % 7 else 0.01
        seconds.append(clock.tick(step, real, lambda own: own))
    assert all(b >= a for a, b in pairwise(seconds))
    assert seconds[-1] == pytest.approx(real, abs=1.0)
