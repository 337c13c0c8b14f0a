"""The scaling move: it leaves the law of a chain as it is, keeps the sums, and is made where all tasks are seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import SGLDGibbs
from pyro_lift.inference.gibbs.scaling import Scaled, scale

Model = Callable[[], None]
N, D = 4, 2
Y = torch.linspace(-2.0, 3.0, N * D, dtype=torch.float64).view(N, D).sin()


def hierarchy(fn: Any, root: Callable[[Tensor], Tensor], loop: bool = False, block: int | None = None) -> Model:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", fn)
        if loop:
            for i in pyro.plate("tasks", N, subsample_size=block or N):
                theta = pyro.sample(f"theta_{i}", dist.Normal(phi, root(tau)).to_event(1))
                pyro.sample(f"y_{i}", dist.Normal(theta, 1.0).to_event(1), obs=Y[i])
            return
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, root(tau)).to_event(1))
            pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=Y[index])

    return model


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def set_up(model: Model, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, **{"step_size": 0.1, "seed": 1, **options})
    kernel.setup(0)
    for _ in range(2 * N):
        kernel.sample(kernel.initial_params)
    return kernel


CASES: dict[str, tuple[Any, Callable[[Tensor], Tensor], bool]] = {
    "a scale": (dist.LogNormal(number(0.0), 1.0), lambda t: t, False),
    "a precision, in a loop": (dist.Gamma(number(2.0), number(1.0)), lambda t: t.rsqrt(), True),
    "an interval": (dist.Uniform(number(0.0), number(4.0)), lambda t: t, False),
    "by coordinate": (dist.HalfNormal(torch.ones(D).double()).to_event(1), lambda t: t, False),
}


@pytest.mark.parametrize("name", CASES)
def test_scaling_alone_has_the_law_of_the_orbit_by_a_grid(name: str) -> None:
    """The standardised residuals stay; along their orbit the law is p(x), x = log tau, times the likelihood."""
    fn, root, loop = CASES[name]
    kernel = set_up(hierarchy(fn, root, loop))
    chain, state = kernel.chain, kernel.state
    assert chain.structure.scaling
    index, generator = torch.arange(N), torch.Generator().manual_seed(3)
    theta = torch.stack([kernel.theta(i)["theta"] for i in range(N)])
    values: Any = {i: {"theta": theta[i]} for i in range(N)} if loop else {None: {"theta": theta}}
    phi, site = state.phi["phi"], chain.structure.scales["tau"]
    start = site.value(state.phi["tau"])
    now, logs = Scaled(values, state.phi, state.sums, state.squares, {}), []
    for step in range(1_200):
        now = scale(chain, index, now, step, False, generator)
        logs.append(site.value(now.phi["tau"]).log().reshape(-1)[0])
    # The sums follow what the move has done to theta.
    moved = torch.stack([now.values[i]["theta"] for i in range(N)]) if loop else now.values[None]["theta"]
    torch.testing.assert_close(now.sums["phi"], moved.sum(0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(now.squares["phi"], (moved - phi).square().sum(0), rtol=1e-10, atol=1e-10)
    grid = torch.linspace(-7.0, 5.0, 1_201, dtype=torch.float64)
    tau = grid.exp()[:, None] if start.dim() else grid.exp()
    inside = torch.ones_like(grid, dtype=torch.bool) if not isinstance(fn, dist.Uniform) else tau < 4.0
    tau = tau.clamp(max=3.999) if isinstance(fn, dist.Uniform) else tau
    base = fn.base_dist if isinstance(fn, dist.Independent) else fn
    factor = (root(tau) / root(start.reshape(-1)[0])).reshape(-1)[:, None]
    columns = 1 if start.dim() else D  # with a scale of its own, the first coordinate goes by itself
    along = phi[:columns] + factor[:, None] * (theta - phi)[:, :columns]
    prior = base.log_prob(tau)
    density = (prior[:, 0] if prior.dim() == 2 else prior) + grid
    density = density + dist.Normal(along, 1.0).log_prob(Y[:, :columns]).sum((1, 2))
    weight = torch.softmax(torch.where(inside, density, -torch.inf), 0)
    mean = float((weight * grid).sum())
    sd = float((weight * (grid - mean) ** 2).sum().sqrt())
    parts = torch.stack(logs).view(20, -1)
    error = float(parts.mean(1).std()) / 20**0.5
    assert abs(float(parts.mean()) - mean) < 4.0 * error < sd
    squares = (parts - mean).square().mean(1)
    assert abs(float(squares.mean()) - sd**2) < 4.0 * float(squares.std()) / 20**0.5


@pytest.mark.parametrize(
    "kernel",
    [
        lambda: set_up(hierarchy(*CASES["a scale"][:2], block=2)),
        lambda: set_up(hierarchy(*CASES["a scale"][:2]), temperature=0.5),
        lambda: set_up(hierarchy(*CASES["a scale"][:2]), site_temperature={"theta": 0.5}),
    ],
)
def test_it_is_not_made_where_a_visit_does_not_see_all_tasks_or_the_law_is_tempered(
    kernel: Callable[[], SGLDGibbs],
) -> None:
    assert not kernel().chain.structure.scaling


def test_the_width_adapts_in_the_warm_up_alone() -> None:
    kernel = SGLDGibbs(hierarchy(*CASES["by coordinate"][:2]), step_size=0.1, seed=1)
    kernel.setup(12)
    seen = []
    for _ in range(16):
        kernel.sample(kernel.initial_params)
        seen.append(kernel.state.widths["tau"].clone() if kernel.state.widths else torch.zeros(D).double())
    assert not torch.equal(seen[11], torch.zeros(D).double())
    assert torch.equal(seen[11], seen[15])
