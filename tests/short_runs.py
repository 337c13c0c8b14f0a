"""Settings of a run that is over at once: two rounds of burn-in, six draws, no joint training."""

from __future__ import annotations

from typing import Any

from pyro_lift.settings import AdaptSettings

__all__ = ["SHORT"]

SHORT: dict[str, Any] = {
    "adapt": AdaptSettings(steps=20, draws=6),
    "sgd_steps": 0,
    "burn_in": 2,
    "samples": 6,
    "seed": 0,
}
