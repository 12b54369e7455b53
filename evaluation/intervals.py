"""How far a score would move if it were measured on other images from the same sources: standard errors and 95% intervals."""

import math
from dataclasses import dataclass

from torch import Tensor

NORMAL_95 = 1.959964  # standard deviations on either side of the mean that hold 95% of a normal distribution

Interval = tuple[float, float]


@dataclass(frozen=True)
class Estimate:
    """A score of a set of images and its standard error over such sets; the error is NaN where it can't be estimated."""

    value: float
    error: float

    def interval(self, least: float = -math.inf) -> Interval | None:
        """The 95% interval around the value, cut off at the least value that the score can have; None without an error."""
        if not math.isfinite(self.error):
            return None
        reach = NORMAL_95 * self.error
        return max(least, self.value - reach), self.value + reach


def jackknife_variance(left_out: Tensor) -> float:
    """The variance of a statistic of n images from its values without each of them (n,) (Efron and Stein 1981, eq. 1.3)."""
    n = len(left_out)
    return float((left_out - left_out.mean()).square().sum()) * (n - 1) / n


def share_interval(count: float, n: int) -> Interval:
    """The 95% interval of a probability of which `count` of n trials are evidence (Wilson 1927)."""
    share, z2 = count / n, NORMAL_95**2
    middle = (share + z2 / (2 * n)) / (1 + z2 / n)
    reach = NORMAL_95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, middle - reach), min(1.0, middle + reach)
