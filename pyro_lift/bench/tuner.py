"""Settings of a method that benchmarks tune; the rule by which one is chosen is :mod:`pyro_lift.tuning.choosing`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pyro_lift.tuning.choosing import FAILED as FAILED  # its place, and the next three's, in earlier versions
from pyro_lift.tuning.choosing import Tuned as Tuned
from pyro_lift.tuning.choosing import choose as choose
from pyro_lift.tuning.choosing import tune as tune

__all__ = ["FAILED", "Choice", "Tuned", "choose", "tune"]


class Choice(NamedTuple):
    """Settings of a method that are tuned; a method ignores those it has no use for.

    Attributes:
        learning_rate: of adaptation.
        meta_learning_rate: of meta-training.
        options: the method's own settings.
        lift: fields of :class:`~pyro_lift.settings.LiFTSettings`, for the methods that have them.
        warm_share: fraction of meta-training's minibatches that go into joint training first; None takes what the
            benchmark's settings say.
    """

    learning_rate: float = 5e-3
    meta_learning_rate: float = 1e-3
    options: Mapping[str, Any] = {}
    lift: Mapping[str, Any] = {}
    warm_share: float | None = None
