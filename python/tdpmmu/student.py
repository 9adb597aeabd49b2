"""Student's t distribution, as far as intervals and tests of means need it. No units: all of it is ratios."""

from __future__ import annotations

import math

__all__ = ["holm", "t_quantile", "welch_above", "welch_interval"]

_TINY = 1e-300


def t_quantile(probability: float, freedom: float) -> float:
    """Return the `probability` quantile (above 0.5) of Student's t with `freedom` degrees of freedom.

    >>> round(t_quantile(0.975, 4), 3)
    2.776
    """
    low, high = 0.0, 1.0
    while _t_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def welch_interval(a: list[float], b: list[float], level: float = 0.95) -> tuple[float, float]:
    """Return the interval of mean(b) - mean(a) by Welch's t: the two sides may scatter differently.

    Both need two values at least. Where neither side scatters the interval is a point.
    """
    mean_a, share_a = _mean_and_share(a)
    mean_b, share_b = _mean_and_share(b)
    error = share_a + share_b
    if error == 0:
        return mean_b - mean_a, mean_b - mean_a
    freedom = error**2 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1))
    half = t_quantile((1 + level) / 2, freedom) * math.sqrt(error)
    return mean_b - mean_a - half, mean_b - mean_a + half


def welch_above(a: list[float], b: list[float], bound: float) -> float:
    """Return how likely a mean(b) - mean(a) as large as this is, were it not above `bound`: one-sided Welch.

    Both need two values at least. Where neither side scatters the answer is 0 or 1.
    """
    mean_a, share_a = _mean_and_share(a)
    mean_b, share_b = _mean_and_share(b)
    above, error = mean_b - mean_a - bound, share_a + share_b
    if error == 0:
        return float(above <= 0)
    freedom = error**2 / (share_a**2 / (len(a) - 1) + share_b**2 / (len(b) - 1))
    # Not 1 minus the distribution: of a small tail that leaves no digits.
    tail = 0.5 * _beta_ratio(freedom / (freedom + above**2 / error), freedom / 2, 0.5)
    return tail if above > 0 else 1 - tail


def holm(chances: list[float], level: float = 0.05) -> list[bool]:
    """Return which of many tests hold if at most `level` of all such families may hold one by chance.

    >>> holm([0.04, 0.001, 0.02])
    [True, True, True]
    >>> holm([0.04, 0.001, 0.03])
    [False, True, False]
    """
    holds = [False] * len(chances)
    for rank, at in enumerate(sorted(range(len(chances)), key=chances.__getitem__)):
        if chances[at] > level / (len(chances) - rank):
            break
        holds[at] = True
    return holds


def _mean_and_share(values: list[float]) -> tuple[float, float]:
    mean = math.fsum(values) / len(values)
    spread = math.fsum((value - mean) ** 2 for value in values)
    return mean, spread / (len(values) - 1) / len(values)


def _t_cdf(t: float, freedom: float) -> float:
    """Return P(T <= t) for t >= 0."""
    return 1 - 0.5 * _beta_ratio(freedom / (freedom + t * t), freedom / 2, 0.5)


def _beta_ratio(x: float, a: float, b: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b)."""
    if x <= 0 or x >= 1:
        return float(x >= 1)
    front = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x)
    )
    # The continued fraction converges quickly on one side of the mean only.
    if x < (a + 1) / (a + b + 2):
        return front * _beta_fraction(x, a, b) / a
    return 1 - front * _beta_fraction(1 - x, b, a) / b


def _beta_fraction(x: float, a: float, b: float) -> float:
    """Evaluate the continued fraction of I_x(a, b) from the front, by Lentz's method."""
    upper, lower = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1))
    value = lower
    for m in range(1, 300):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        for part in (even, odd):
            lower = 1 / _away_from_zero(1 + part * lower)
            upper = _away_from_zero(1 + part / upper)
            value *= upper * lower
        if abs(upper * lower - 1) < 1e-14:
            break
    return value


def _away_from_zero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY
