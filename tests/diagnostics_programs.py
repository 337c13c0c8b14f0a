"""A small program with known answers, for the groups of ArviZ and the checks."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

N, ROWS = 5, 4


def data() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    theta = 1.0 + 0.5 * torch.randn(N, 1, generator=generator, dtype=torch.float64)
    return theta + 0.8 * torch.randn(N, ROWS, generator=generator, dtype=torch.float64)


def rows_in_a_plate(block: int | None = 1) -> Callable[[Tensor], None]:
    """Each row an observation of its own, in a plate; a deterministic site and a factor beside."""

    def model(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 2.0))
        with pyro.plate("tasks", N, subsample_size=block, dim=-2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.deterministic("double", 2.0 * theta)
            pyro.factor("nothing", 0.0 * theta)
            with pyro.plate("rows", ROWS, dim=-1):
                pyro.sample("y", dist.Normal(theta, 0.8), obs=y[index])

    return model


def looped(sizes: tuple[int, ...] = (ROWS,) * N) -> Callable[[Tensor], None]:
    """The same, iterated over its tasks, of so many rows each."""

    def model(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 2.0))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
            with pyro.plate(f"rows_{i}", sizes[i]):
                pyro.sample(f"y_{i}", dist.Normal(theta, 0.8), obs=y[i, : sizes[i]])

    return model


def vector_rows(block: int | None = 1) -> Callable[[Tensor], None]:
    """The same, a task's rows one event, of a law that is broadcast to them."""

    def model(y: Tensor) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0).double(), 2.0))
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 0.8).to_event(1), obs=y[index])

    return model
