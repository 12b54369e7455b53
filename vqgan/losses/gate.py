"""When the discriminator trains, and when and how much its gradient counts."""

from codegrid.engine.clock import Budget, Mark, Now
from codegrid.engine.errors import InputError


class Gate:
    """When the discriminator trains and how much of its gradient reaches the generator.

    `start` is the moment at which its gradient first reaches the generator: a step (int) or a fraction of the run (float).
    The weight rises from 0 to 1 over `ramp`. The discriminator trains alone for `warmup` before `start`, so that its
    gradient means something by then. All three are steps or all three are fractions.
    """

    def __init__(self, start: Mark, ramp: Mark, warmup: Mark) -> None:
        kinds = {type(mark) for mark in (start, ramp, warmup) if mark}
        if not kinds <= {int, float} or len(kinds) > 1:
            raise InputError(
                f"gate start={start}, ramp={ramp}, warmup={warmup} must be all steps (whole) or all fractions (with a point)"
            )
        if min(start, ramp, warmup) < 0 or (kinds == {float} and max(start, ramp, warmup) > 1):
            raise InputError(
                f"gate start={start}, ramp={ramp}, warmup={warmup}: steps are at least 0, fractions 0 to 1"
            )
        self.start, self.ramp, self.warmup = start, ramp, warmup
        self._in_steps = kinds == {int}

    def _clock(self, now: Now) -> float:
        return now.step if self._in_steps else now.progress

    def training(self, now: Now) -> bool:
        """Whether the discriminator trains."""
        return self._clock(now) >= self.start - self.warmup

    def open(self, now: Now) -> bool:
        """Whether its gradient reaches the generator."""
        return self._clock(now) >= self.start

    def list_phases(self, budget: Budget) -> dict[str, Mark]:
        """The phases that a run with this budget reaches, by names, each with a moment in it; the last with the gate fully open."""
        warmup: Mark = max(self.start - self.warmup, type(self.start)(0))
        phases: dict[str, Mark] = {"before the gate": 0}
        if self.warmup and budget.reaches(warmup):
            phases["discriminator warms up"] = warmup
        if budget.reaches(self.start):
            phases["gate open"] = self.start + self.ramp
        if self.start <= self.warmup:
            del phases["before the gate"]
        return phases

    def phase(self, now: Now) -> float:
        """Progress, 0 to 1, within the part of the run before the opening or after it."""
        if not self.open(now):
            return self._clock(now) / self.start
        opened = now.progress * self.start / now.step if self._in_steps and now.step else self.start
        return (now.progress - opened) / (1 - opened) if opened < 1 else 1.0

    def weight(self, now: Now) -> float:
        """The share, 0 to 1, of the discriminator's gradient that reaches the generator."""
        since = self._clock(now) - self.start
        if since < 0:
            return 0.0
        return min(1.0, since / self.ramp) if self.ramp else 1.0
