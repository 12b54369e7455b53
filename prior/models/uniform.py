"""The prior that knows nothing: all codes are equally likely."""

from prior.models.counted import Counted, Pairs


class Uniform(Counted):
    """p(code) = 1 / K: where every learned prior starts, at log K nats per token."""

    def fit(self, train: Pairs, val: Pairs) -> None:
        """There is nothing to fit."""
