r"""Minimum Bayes risk: of several texts the one that the others agree with most.

.. math:: \hat y = \arg\max_{y \in Y} \frac{1}{S - 1} \sum_{y' \in Y \setminus y} F_1(y, y'), \qquad Y = \{y_1 .. y_S\}

References:
    Kumar and Byrne, Minimum Bayes-risk decoding for statistical machine translation, NAACL 2004.
"""

from __future__ import annotations

from collections.abc import Sequence

from pyro_lift.metrics.text import token_f1

__all__ = ["agreement", "most_agreed"]


def agreement(one: str, other: str) -> float:
    """Compute the token F1 of two texts; 1 for equal ones, two empty ones included."""
    return 1.0 if one == other else token_f1(one, other)


def most_agreed(texts: Sequence[str]) -> int:
    """Return the number of the text with the highest mean agreement with the others; of equal ones the first."""
    if not texts:
        raise ValueError("no text to choose from.")
    sums = [sum(agreement(text, other) for k, other in enumerate(texts) if k != i) for i, text in enumerate(texts)]
    return max(range(len(texts)), key=lambda i: sums[i])
