"""Figures of benchmarks: :mod:`pyro_lift.support.figures`, by its name of earlier versions."""

from __future__ import annotations

from pyro_lift.support.figures import COLOURS as COLOURS
from pyro_lift.support.figures import new_figure as new_figure
from pyro_lift.support.figures import save_figure as save_figure

__all__ = ["COLOURS", "new_figure", "save_figure"]
