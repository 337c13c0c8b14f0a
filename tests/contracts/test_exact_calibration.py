"""Simulated truths for what one program cannot hold a thousand of: correlations, and regressions at the upper level.

One kernel is set up once; for each data set its program's data are written anew and the chain is put at the truth,
which is a draw of the posterior already. After enough visits to forget it, the truth's rank among the draws is uniform
if every update leaves the posterior as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch import Tensor

from pyro_lift import SGLDGibbs
from pyro_lift.inference.gibbs.rows import task_rows

NOISE, DRAWS = 0.3, 7
Truth = dict[str, Tensor]


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


class Correlated:
    """theta_i ~ MVN(phi, diag(sd) L L^T diag(sd)), all of it unknown."""

    tasks, copies, data_sets, thinning, theta_update = 8, 1, 1_000, 6, "mala"

    def __init__(self) -> None:
        self.y = torch.zeros(self.tasks, 2, dtype=torch.float64)

    def model(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        sd = pyro.sample("sd", dist.LogNormal(torch.full((2,), -0.3).double(), 0.5).to_event(1))
        L = pyro.sample("L", dist.LKJCholesky(2, number(1.5)))
        with pyro.plate("tasks", self.tasks) as index:
            theta = pyro.sample("theta", dist.MultivariateNormal(phi, scale_tril=sd.unsqueeze(-1) * L))
            pyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=self.y[index])

    @staticmethod
    def ranked(values: Truth) -> dict[str, Tensor]:
        """What is ranked: one column a copy."""
        correlation = values["L"][..., 1, 0]
        return {"phi": values["phi"][..., :1], "sd": values["sd"][..., 1:], "L": correlation.unsqueeze(-1)} | (
            {"theta": values["theta"][..., 3, :1]}
        )


class Regressed:
    """theta_i ~ N(w z_i + b, tau), a data set in each coordinate."""

    tasks, copies, data_sets, thinning, theta_update = 6, 20, 50, 8, "mala"

    def __init__(self) -> None:
        self.y = torch.zeros(self.tasks, self.copies, dtype=torch.float64)
        self.z = torch.linspace(-1.0, 1.5, self.tasks, dtype=torch.float64).unsqueeze(-1)

    def model(self) -> None:
        zeros = torch.zeros(self.copies, dtype=torch.float64)
        w = pyro.sample("w", dist.Normal(zeros, 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(zeros, 0.5).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(zeros - 0.3, 0.5).to_event(1))
        with pyro.plate("tasks", self.tasks) as index:
            theta = pyro.sample("theta", dist.Normal(self.z[index] * w + b, tau).to_event(1))
            pyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=self.y[index])

    @staticmethod
    def ranked(values: Truth) -> dict[str, Tensor]:
        """What is ranked: one column a copy."""
        return {"w": values["w"], "b": values["b"], "tau": values["tau"], "theta": values["theta"][..., 3, :]}


class Plain:
    """theta_i ~ N(phi, tau), a data set in each coordinate; phi and theta drawn together, then tau, then a factor."""

    tasks, copies, data_sets, thinning, theta_update = 5, 50, 20, 40, "exact"

    def __init__(self) -> None:
        self.y = torch.zeros(self.tasks, self.copies, dtype=torch.float64)

    def model(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(self.copies).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(self.copies).double()).to_event(1))
        with pyro.plate("tasks", self.tasks) as index:
            theta = pyro.sample("theta", dist.Normal(phi, tau).to_event(1))
            pyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=self.y[index])

    @staticmethod
    def ranked(values: Truth) -> dict[str, Tensor]:
        """What is ranked: one column a copy."""
        return {"phi": values["phi"], "tau": values["tau"], "theta": values["theta"][..., 3, :]}


class Stepwise(Plain):
    """The same of scales not near zero, theta by a step that is tested: one step for all 20 data sets of a chain."""

    tasks, copies, data_sets, thinning, theta_update = 5, 20, 50, 8, "mala"

    def model(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(self.copies).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.LogNormal(torch.full((self.copies,), -0.3).double(), 0.4).to_event(1))
        with pyro.plate("tasks", self.tasks) as index:
            theta = pyro.sample("theta", dist.Normal(phi, tau).to_event(1))
            pyro.sample("y", dist.Normal(theta, NOISE).to_event(1), obs=self.y[index])


class Trajectories(Stepwise):
    """Likewise, by trajectories of three steps."""

    thinning, theta_update = 4, "hmc"


def simulated(case: Any, seed: int) -> Truth:
    """Draw a truth from the program's prior, and write data made from it into the program."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        trace = pyro.poutine.trace(pyro.poutine.uncondition(case.model)).get_trace()
        truth = {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "sample"}
    case.y.copy_(truth.pop("y"))
    truth.pop("tasks")
    return truth


def put_at(kernel: SGLDGibbs, truth: Truth) -> None:
    """Begin a chain that has visited every task at a truth, with the sums of that."""
    chain, state = kernel.chain, kernel.state
    transforms = kernel.transforms or {}
    phi = {name: transforms[name](truth[name]) if name in transforms else truth[name] for name in state.phi}
    theta, sums, squares = truth["theta"], dict(state.sums), dict(state.squares)
    tasks = tuple(range(len(theta)))
    chain.store.write(tasks, task_rows(chain, tasks, {None: {"theta": theta}}))
    for name in chain.structure.pairs:
        rest = theta - phi[name]
        correlated = chain.structure.pairs[name].dense is not None
        sums[name], squares[name] = theta.sum(0), rest.T @ rest if correlated else rest.square().sum(0)
    # Those of a regression are made anew where a visit sees all tasks.
    kernel.state = state._replace(phi=phi, sums=sums, squares=squares)


def begun(case: Any, seed: int, options: dict[str, Any]) -> SGLDGibbs:
    """Return a kernel after its warm-up: the step is tuned, and from there on the same."""
    options = {"phi_update": "gibbs", "theta_update": case.theta_update, "leapfrog_steps": 3, **options}
    kernel = SGLDGibbs(case.model, seed=seed, **options)
    warmup = 10 if case.theta_update == "exact" else 100
    kernel.setup(warmup)
    for _ in range(warmup):
        kernel.sample(kernel.initial_params)
    return kernel


def ranks(case: Any, count: int, **options: Any) -> dict[str, Tensor]:
    """Ranks of the truth in some data sets, by what is ranked."""
    found: dict[str, list[Tensor]] = {}
    truth, kernel = simulated(case, 1), begun(case, 1, options)
    for seed in range(1, count + 1):
        if seed > 1:
            truth = simulated(case, seed)
            if case.theta_update == "exact":  # its likelihoods are read at set-up
                kernel = begun(case, seed, options)
        put_at(kernel, truth)
        below: dict[str, Tensor] = {}
        true = case.ranked(truth)
        for _ in range(DRAWS):
            for _ in range(case.thinning):
                kernel.sample(kernel.initial_params)
            transforms = kernel.transforms or {}
            draw = {k: transforms[k].inv(v) if k in transforms else v for k, v in kernel.state.phi.items()}
            draw["theta"] = torch.stack([kernel.theta(i)["theta"] for i in range(case.tasks)])
            for name, value in case.ranked(draw).items():
                below[name] = below.get(name, torch.zeros_like(value)) + (value < true[name])
        for name, rank in below.items():
            found.setdefault(name, []).append(rank)
    return {name: torch.cat(rows).long() for name, rows in found.items()}


def p_values(found: dict[str, Tensor]) -> dict[str, float]:
    return {
        name: float(stats.chisquare(torch.bincount(rank, minlength=DRAWS + 1).numpy()).pvalue)
        for name, rank in found.items()
    }


CASES = [Correlated, Regressed, Plain, Stepwise, Trajectories]


@pytest.mark.parametrize("case", CASES)
def test_the_harness_ranks_every_truth(case: Callable[[], Any]) -> None:
    chosen = case()
    found = ranks(chosen, 1)
    assert all(len(rank) == chosen.copies and 0 <= int(rank.min()) <= DRAWS for rank in found.values())


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_truth_has_a_uniform_rank_among_a_thousand_data_sets(case: Callable[[], Any]) -> None:
    chosen = case()
    found = ranks(chosen, chosen.data_sets)
    pvalues = p_values(found)
    print(f"{case.__name__}: {pvalues}")
    assert all(len(rank) == 1_000 for rank in found.values())
    assert min(pvalues.values()) > 0.01 / (len(CASES) * len(pvalues)), pvalues


@pytest.mark.slow
def test_draws_of_another_model_are_not_uniform() -> None:
    """The harness can tell: a chain that counts each row a third has draws too wide."""

    chosen = Regressed()
    found = ranks(chosen, 20, n_inflate=0.3)
    assert min(p_values(found).values()) < 0.01
