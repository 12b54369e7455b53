"""How long a run lasts and where in it we are: the clock of every gate, schedule and stopping rule."""

import math
from dataclasses import dataclass

from codegrid.engine.errors import InputError, check_int, check_range

Mark = int | float  # a moment of a run: a step (int) or a fraction of the run (float)


@dataclass(frozen=True)
class Now:
    """`step`, the model's updates so far, and `progress`, the share of the run that is over, 0 to 1."""

    step: int
    progress: float


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
