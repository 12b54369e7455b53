"""Values that change over the course of training."""

from codegrid.engine.errors import InputError


class Anneal:
    """A value that moves from `first` to `last` over `updates` updates and then stays there.

    Geometric if both ends are above 0, else linear. Raises InputError for a negative argument.
    """

    def __init__(self, first: float, last: float, updates: int) -> None:
        if min(first, last) < 0 or updates < 0:
            raise InputError(
                f"an annealed value from {first} to {last} over {updates} updates must have no part below 0"
            )
        self.first = first
        self.last = last
        self.updates = updates

    def __call__(self, update: int) -> float:
        """The value after `update` updates."""
        fraction = min(1.0, update / self.updates) if self.updates else 1.0
        if self.first > 0 and self.last > 0:
            return self.first * (self.last / self.first) ** fraction
        return self.first + (self.last - self.first) * fraction
