"""Names of the benchmarks' tuner in earlier versions; the one tuner is :mod:`pyro_lift.tuning`."""

from __future__ import annotations

from pyro_lift.bench.grids import Choice as Choice
from pyro_lift.tuning.choosing import FAILED as FAILED
from pyro_lift.tuning.choosing import Tuned as Tuned
from pyro_lift.tuning.choosing import choose as choose
from pyro_lift.tuning.choosing import tune as tune

__all__ = ["FAILED", "Choice", "Tuned", "choose", "tune"]
