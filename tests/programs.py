"""Small hierarchical programs that several tests share."""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Model = Callable[[], None]


def data(num_tasks: int = 6, n: int = 4, d: int = 2, device: str = "cpu") -> Tensor:
    """Observations ``[N, n, d]`` around task means spread by 0.5 around (1, -1)."""
    generator = torch.Generator().manual_seed(3)
    centre = torch.tensor([1.0, -1.0, 0.5][:d], dtype=torch.float64)
    means = centre + 0.5 * torch.randn(num_tasks, d, generator=generator, dtype=torch.float64)
    noise = torch.randn(num_tasks, n, d, generator=generator, dtype=torch.float64)
    return (means[:, None] + noise).to(device)


def vectorised(block: int | None = 1, num_tasks: int = 6, device: str = "cpu") -> Model:
    y = data(num_tasks, device=device)
    zero = torch.zeros(2, dtype=torch.float64, device=device)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(zero, 2.0).to_event(1))
        with pyro.plate("tasks", num_tasks, subsample_size=block, device=device) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).to_event(2), obs=y[index])

    return model


def sequential(num_tasks: int = 6, batch: int | None = 2, block: int | None = 1) -> Model:
    """Tasks iterated over, with heads of their own of unequal widths and minibatches inside."""
    y = data(num_tasks)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        for i in pyro.plate("tasks", num_tasks, subsample_size=block):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
            head = pyro.sample(f"head_{i}", dist.Normal(torch.zeros(1 + i % 3).double(), 1.0).to_event(1))
            with pyro.plate(f"data_{i}", 4, subsample_size=batch) as rows:
                pyro.sample(f"y_{i}", dist.Normal(theta + head.sum(), 1.0).to_event(1), obs=y[i, rows])

    return model


def constrained(block: int | None = 1, num_tasks: int = 6) -> Model:
    """Two global sites, one of them positive, and a positive local one: nothing here is normal given normal."""
    y = data(num_tasks, d=1).squeeze(-1)

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.tensor(0.0).double(), 2.0))
        spread = pyro.sample("spread", dist.Gamma(torch.tensor(4.0).double(), 4.0))
        with pyro.plate("tasks", num_tasks, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.StudentT(5.0, mu, spread))
            noise = pyro.sample("noise", dist.Gamma(torch.tensor(5.0).double(), 5.0))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), noise.unsqueeze(-1)).to_event(1), obs=y[index])

    return model
