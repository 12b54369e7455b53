"""How long a run lasts and where in it we are: the clock of every gate, schedule and stopping rule."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from codegrid.engine.errors import InputError, check_int, check_range

Mark = int | float  # a moment of a run: a step (int) or a fraction of the run (float)


@dataclass(frozen=True)
class Now:
    """`step`, the model's updates so far, and `progress`, the share of the run that is over, 0 to 1."""

    step: int
    progress: float

    def reached(self, mark: Mark) -> bool:
        """Whether a moment of the run is here or over."""
        return self.step >= mark if isinstance(mark, int) else self.progress >= mark


class Budget:
    """`max_steps` updates or `max_minutes` of training, whichever ends first; at least one of them is set.

    Under max_minutes the schedules follow the clock: the learning rate reaches its end when the time does, on any
    hardware. Such a run can be resumed, but not repeated to the bit.
    """

    def __init__(self, max_steps: int | None = None, max_minutes: float | None = None) -> None:
        if max_steps is None and max_minutes is None:
            raise InputError("a run needs an end; set trainer.max_steps or trainer.max_minutes")
        for name, value in (("max_steps", max_steps), ("max_minutes", max_minutes)):
            if value is not None and (not isinstance(value, int | float) or value <= 0):
                raise InputError(f"trainer.{name}={value} must be a number above 0")
        self.max_steps = max_steps
        self.max_minutes = max_minutes

    def now(self, step: int, seconds: float) -> Now:
        """Where a run is after `step` updates and `seconds` of training."""
        by_steps = step / self.max_steps if self.max_steps else 0.0
        by_time = seconds / (60 * self.max_minutes) if self.max_minutes else 0.0
        return Now(step, min(1.0, max(by_steps, by_time)))

    def now_at(self, mark: Mark) -> Now:
        """Where a run is at a moment, as far as its steps say that of a step."""
        if isinstance(mark, int):
            return self.now(mark, 0.0)
        return Now(math.ceil(mark * (self.max_steps or 0)), mark)

    def reaches(self, mark: Mark) -> bool:
        """Whether a run makes an update at a moment or after it, as far as its steps decide that."""
        steps = self.max_steps
        if isinstance(mark, int):
            return steps is None or mark < steps
        return mark < 1 if steps is None else mark <= (steps - 1) / steps


MEETING_EVERY = 1.0  # seconds between two exchanges of the ranks, or an update if that takes longer
MAX_UPDATES_APART = 100


class CommonClock:
    """The seconds of training that all ranks count alike: those of the main rank, exchanged after `every` seconds or more.

    An exchange waits for the device and for all ranks. The updates in between count with the pace of those before, on every
    rank the same, and the clock never runs backward.
    """

    def __init__(self, step: int, seconds: float, every: float = MEETING_EVERY) -> None:
        self.seconds = seconds
        self.every = every
        self.meets = (
            True  # whether ranks exchange what one of them alone knows, before the next update
        )
        self._last_meeting = (step, seconds)
        self._next_meeting = step + 1
        self._pace = 0.0  # seconds of an update

    def tick(self, step: int, seconds: float, exchange: Callable[[float], float]) -> float:
        """The common seconds after update number `step`; `seconds` are this rank's own, and `exchange` returns the main one's."""
        self.meets = step >= self._next_meeting
        if not self.meets:
            self.seconds += self._pace
            return self.seconds
        main_seconds = exchange(seconds)
        last_step, last_seconds = self._last_meeting
        self._pace = max(0.0, main_seconds - last_seconds) / (step - last_step)
        apart = int(self.every / max(self._pace, MEETING_EVERY / MAX_UPDATES_APART))
        self._next_meeting = step + max(1, apart)
        self._last_meeting = (step, main_seconds)
        self.seconds = max(self.seconds, main_seconds)
        return self.seconds


class Schedule:
    """Learning-rate factor: a linear warm-up over `warmup` steps, then a cosine from 1 down to `floor` at the end."""

    def __init__(self, warmup: int, floor: float) -> None:
        check_int("schedule.warmup", warmup, 0, "step")
        check_range("schedule.floor", floor, 0, 1)
        self.warmup = warmup
        self.floor = floor

    def __call__(self, now: Now) -> float:
        rise = min(1.0, (now.step + 1) / self.warmup) if self.warmup else 1.0
        return rise * (self.floor + (1 - self.floor) * self.fall(now.progress))

    def fall(self, progress: float) -> float:
        """How much of the way from the peak to the floor is left, 1 to 0."""
        return (1 + math.cos(math.pi * progress)) / 2


class StableSchedule(Schedule):
    """Learning-rate factor: a linear warm-up over `warmup` steps, then 1 (Hu et al. 2024, section 4), then, over the last share
    `cooldown` of the run, down to `floor` by 1 - sqrt (Hägele et al. 2024, eq. 3)."""

    def __init__(self, warmup: int, floor: float, cooldown: float) -> None:
        super().__init__(warmup, floor)
        check_range("schedule.cooldown", cooldown, 0, 1)
        self.cooldown = cooldown

    def fall(self, progress: float) -> float:
        begin = 1 - self.cooldown
        return 1.0 if progress <= begin else 1 - math.sqrt((progress - begin) / self.cooldown)
