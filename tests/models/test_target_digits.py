"""Float64 targets that lie so far from zero that float32 would round them away."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from pyro_lift import Task


@pytest.mark.parametrize("form", ["array", "list", "column", "columns of targets"])
def test_float64_targets_whose_digits_float32_has_not_are_refused(form: str) -> None:
    x = np.random.default_rng(0).normal(size=(20, 3))
    y = 1.7e9 + x.sum(1)
    given: dict[str, Any] = {
        "array": (x, y),
        "list": (x, y.tolist()),
        "column": {"x": x, "labels": y},
        "columns of targets": (x, np.stack([x[:, 0], y], 1)),
    }
    with pytest.raises(
        ValueError, match=r"task 'late', train data: .*lie around 1[67]\d{8}.*vary by 1.*y - y.mean\(\)"
    ):
        Task("late", given[form], "regression")
    Task("late", (x, torch.as_tensor(y)), "regression")  # a tensor keeps its digits
    Task("late", (x, y - y.mean()), "regression")
    Task("far", (x, 1.7e9 + 1e5 * x.sum(1)), "regression")
    Task("constant", (x, np.full(20, 0.1) + 1e-17 * x[:, 0]), "regression")
    Task("one row", (x[:1], y[:1]), "regression")
