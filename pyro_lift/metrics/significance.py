"""Tests of the difference between two methods: paired over tasks, pooled and Welch's over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

__all__ = ["MeanTest", "PairedTest", "paired_test", "pooled_t_test", "welch_t_test"]


class PairedTest(NamedTuple):
    """Mean difference of two methods over paired cases, its standard error, and the two-sided p-value."""

    difference: float
    standard_error: float
    p_value: float


def paired_test(first: Sequence[float], second: Sequence[float]) -> PairedTest:
    """Run Student's paired t-test of ``first - second``, two-sided.

    Raises:
        ValueError: unequal lengths or fewer than two pairs.
    """
    from scipy.stats import t

    if len(first) != len(second) or len(first) < 2:
        raise ValueError(f"{len(first)} and {len(second)} values: expected the same number of each, at least two.")
    gap = torch.tensor(first, dtype=torch.float64) - torch.tensor(second, dtype=torch.float64)
    mean, error = float(gap.mean()), float(gap.std() / math.sqrt(len(first)))
    if error == 0.0:
        return PairedTest(mean, 0.0, 1.0 if mean == 0.0 else 0.0)
    return PairedTest(mean, error, float(2.0 * t.sf(abs(mean / error), len(first) - 1)))


class MeanTest(NamedTuple):
    """Difference of two means, Student's t, its degrees of freedom, and the two-sided p-value."""

    difference: float
    t: float
    degrees: float
    p_value: float


def pooled_t_test(mean: float, sd: float, n: int, other_mean: float, other_sd: float, other_n: int) -> MeanTest:
    r"""Run Student's t-test with pooled variance, from printed "mean ± sd" whose sd has ddof 0 (a *population's*).

    .. math:: s^2 = \frac{n_1 s_1^2 + n_2 s_2^2}{n_1 + n_2 - 2},\qquad
              t = \frac{\bar x_1 - \bar x_2}{s\sqrt{1/n_1 + 1/n_2}}

    It is this reading of the paper's Table 14 (five runs against five) that gives its p-values; a sample sd or Welch's
    test do not.

    Args:
        mean: of the first method over its n runs.
        sd: of the first method, divided by n and not by n - 1.
        n: runs of the first method.
        other_mean: of the second method.
        other_sd: of the second method.
        other_n: runs of the second method.
    """
    _check_moments(sd, n, other_sd, other_n)
    degrees = n + other_n - 2
    variance = (n * sd**2 + other_n * other_sd**2) / degrees
    return _mean_test(mean - other_mean, variance * (1 / n + 1 / other_n), degrees)


def welch_t_test(mean: float, sd: float, n: int, other_mean: float, other_sd: float, other_n: int) -> MeanTest:
    """Run Welch's test on the same printed numbers, for variances that differ; arguments as :func:`pooled_t_test`."""
    _check_moments(sd, n, other_sd, other_n)
    first, second = sd**2 / (n - 1), other_sd**2 / (other_n - 1)
    total = first + second
    degrees = total**2 / (first**2 / (n - 1) + second**2 / (other_n - 1)) if total else float(n + other_n - 2)
    return _mean_test(mean - other_mean, total, degrees)


def _mean_test(difference: float, variance: float, degrees: float) -> MeanTest:
    from scipy.stats import t

    if variance == 0.0:
        return MeanTest(
            difference, math.copysign(math.inf, difference) if difference else 0.0, degrees, 0.0 + (not difference)
        )
    value = difference / math.sqrt(variance)
    return MeanTest(difference, value, degrees, float(2.0 * t.sf(abs(value), degrees)))


def _check_moments(sd: float, n: int, other_sd: float, other_n: int) -> None:
    if min(n, other_n) < 2 or min(sd, other_sd) < 0.0:
        raise ValueError(
            f"n={n} and {other_n}, sd={sd} and {other_sd}: expected at least two runs each, sds of 0 or more."
        )
