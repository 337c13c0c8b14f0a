"""Distributions and factors that are made without reading values: on a device each reading is a wait."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

__all__ = ["factor", "normal"]


def factor(name: str, log_factor: Tensor) -> None:
    """Add a log probability to the program, as ``pyro.factor`` does, without a look at whether it is a number.

    The kernels look at the sum of all of them, and name the task.
    """
    unit = dist.Unit(log_factor, validate_args=False)
    pyro.sample(name, unit, obs=unit.sample(), infer={"is_auxiliary": True})


def normal(mean: Tensor, sd: float | Tensor) -> dist.Normal:
    """Make a normal distribution around a vector; its standard deviation, if a number, is filled in where the mean is.

    Given as a number it would be copied there from the host, which waits for it. Arguments are not validated either:
    that costs a pass over each vector, and the kernels look at every value anyway.
    """
    scale = sd if isinstance(sd, Tensor) else mean.new_full((), sd)
    return dist.Normal(mean, scale, validate_args=False)
