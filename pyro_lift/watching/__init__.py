"""Watching a run: small callbacks with one protocol, and the trackers that are built on it."""

from __future__ import annotations

from pyro_lift.watching.json_lines import JsonLines
from pyro_lift.watching.steps import Callback, Run, Step
from pyro_lift.watching.trackers import MLflow, TensorBoard, Trackio, WandB
from pyro_lift.watching.watch import Watchers, watch

__all__ = ["Callback", "JsonLines", "MLflow", "Run", "Step", "TensorBoard", "Trackio", "WandB", "Watchers", "watch"]
