"""The prior that knows nothing."""

from prior.models.counted import Counted, Pairs


class Uniform(Counted):
    """p(code) = 1 / K: what every prior starts from, log K nats."""

    def fit(self, train: Pairs, val: Pairs) -> None:
        """There is nothing to count."""
