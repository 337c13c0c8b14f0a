"""How sure a posterior's predictions are, in its folder's config.json: temperature, noise, rows of each class."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pyro_lift.saving.choices import saved_positive, saved_positives
from pyro_lift.saving.parts import SavablePosterior
from pyro_lift.support.archive import DamagedError

__all__ = ["described_sureness", "saved_sureness"]


def described_sureness(posterior: SavablePosterior) -> dict[str, Any]:
    """Return what is written of a posterior."""
    counts = posterior.class_counts
    return {
        "prediction_temperature": posterior.prediction_temperature,
        "noise_scale": posterior.noise_scale,
        "class_counts": None if counts is None else counts.tolist(),
        "dispersion": None if posterior.dispersion is None else posterior.dispersion.tolist(),
    }


def saved_sureness(path: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Read what was written; folders from before have factors of 1, no rows of classes and tasks that are alike.

    Raises:
        DamagedError: values that were never written; names the file and the key.
    """
    factors: dict[str, Any] = {
        name: saved_positive(path, config, name) for name in ("prediction_temperature", "noise_scale")
    }
    if config.get("dispersion") is not None:
        factors["dispersion"] = torch.tensor(saved_positives(path, "dispersion", config["dispersion"])).double()
    counts = config.get("class_counts")
    if counts is None:
        return factors
    if not isinstance(counts, list) or not all(type(count) is int and count >= 0 for count in counts):
        raise DamagedError(f"{path}: key 'class_counts' is {counts!r}; expected the number of rows of each class.")
    return {**factors, "class_counts": torch.tensor(counts)}
