r"""Methods ranked over tasks: Friedman's test, Nemenyi's critical difference, and pairs that cannot be told apart.

.. math:: \mathrm{CD} = q_{\alpha}\sqrt{\frac{k (k + 1)}{6 N}}

for k methods and N tasks, with q the studentised range over root two. Two methods whose mean ranks differ by less
cannot be told apart at level alpha.

References:
    Statistical comparisons of classifiers over multiple data sets, Demšar, 2006, JMLR 7.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

__all__ = ["Ranking", "critical_difference", "ranked"]

LEVEL = 0.05


class Ranking(NamedTuple):
    """Methods by their mean rank, the best first.

    Attributes:
        methods: names.
        mean_ranks: 1 is best; ties share their ranks.
        cases: N, tasks that all methods were judged by.
        p_value: of Friedman's test that all are alike; None with fewer than three methods or two cases.
        difference: Nemenyi's critical difference; None likewise.
    """

    methods: list[str]
    mean_ranks: list[float]
    cases: int
    p_value: float | None
    difference: float | None

    def groups(self) -> list[tuple[int, int]]:
        """Return the longest runs of neighbours that cannot be told apart: first and last place of each."""
        if self.difference is None:
            return []
        found: list[tuple[int, int]] = []
        for first in range(len(self.methods)):
            last = first
            while last + 1 < len(self.methods) and self.mean_ranks[last + 1] - self.mean_ranks[first] < self.difference:
                last += 1
            if last > first and (not found or found[-1][1] < last):
                found.append((first, last))
        return found


def ranked(losses: Mapping[str, Mapping[Any, float]], *, lower: bool = True) -> Ranking | None:
    """Rank methods over the cases that all of them have.

    Args:
        losses: by method and case.
        lower: whether less is better.

    Returns:
        None where there are fewer than two methods or no case that all have.
    """
    from scipy.stats import friedmanchisquare, rankdata

    methods = list(losses)
    shared = sorted(set.intersection(*(set(found) for found in losses.values()))) if losses else []
    if len(methods) < 2 or not shared:
        return None
    sign = 1.0 if lower else -1.0
    rows = [[sign * losses[method][case] for method in methods] for case in shared]
    ranks = [rankdata(row) for row in rows]
    means = [float(sum(row[k] for row in ranks)) / len(ranks) for k in range(len(methods))]
    order = sorted(range(len(methods)), key=means.__getitem__)
    p_value = difference = None
    if len(methods) >= 3 and len(shared) >= 2:
        columns = [[row[k] for row in rows] for k in range(len(methods))]
        if any(len(set(row)) > 1 for row in rows):
            p_value = float(friedmanchisquare(*columns).pvalue)
        difference = critical_difference(len(methods), len(shared))
    return Ranking([methods[k] for k in order], [means[k] for k in order], len(shared), p_value, difference)


def critical_difference(methods: int, cases: int, level: float = LEVEL) -> float:
    """Return Nemenyi's critical difference of mean ranks.

    Example:
        >>> round(critical_difference(4, 14), 2)  # Demšar's section 3.2.3 has q = 2.569 and CD = 1.25
        1.25
    """
    from scipy.stats import studentized_range

    q = float(studentized_range.ppf(1.0 - level, methods, math.inf)) / math.sqrt(2.0)
    return q * math.sqrt(methods * (methods + 1) / (6.0 * cases))


def place_of(ranking: Ranking, methods: Sequence[str]) -> int:
    """Return the place, from 1, of the best of some methods."""
    return 1 + min(ranking.methods.index(name) for name in methods if name in ranking.methods)
