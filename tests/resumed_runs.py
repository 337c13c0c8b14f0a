"""Small runs whose every number can be compared."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.ops.streaming import StatsOfDict, StreamingStats
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, StreamingMCMC
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.projections import ProjectedTrace

N, D = 6, 3


class Program:
    """Tasks of unequal sizes, iterated over, with minibatches: every source of randomness a run has."""

    def __init__(self, shift: float = 0.0, block: int = 1) -> None:
        self.block = block
        generator = torch.Generator().manual_seed(1)
        self.x = [torch.randn(8 + i, D, generator=generator) for i in range(N)]
        self.y = [x.sum(1) + shift + 0.1 * torch.randn(len(x), generator=generator) for x in self.x]

    def __call__(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(D), 1.0).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=self.block):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
            with pyro.plate(f"data_{i}", len(self.x[i]), subsample_size=4) as rows:
                pyro.sample(f"y_{i}", dist.Normal(self.x[i][rows] @ theta, 0.3), obs=self.y[i][rows])


def gibbs(block: int = 1, **options: Any) -> SGLDGibbs:
    defaults: dict[str, Any] = {"step_size": 0.01, "preconditioner": "rms", "sgd_steps": 6, "thinning": 2}
    return SGLDGibbs(Program(block=block), **{**defaults, **options})


def table() -> SGLDGibbs:
    options: dict[str, Any] = {"phi_update": "langevin", "accumulator": "table", "phi_step_size": 0.002}
    return gibbs(2, scan="random", sgd_steps=0, thinning=1, **options)


def stops_at(visits: int) -> Callable[[], None]:
    """Make a hook that interrupts a run at so many of its transitions."""
    count = 0

    def stop() -> None:
        nonlocal count
        count += 1
        if count == visits:
            raise KeyboardInterrupt

    return stop


class Both(StreamingStats):
    """A mixture and a trace of the same draws."""

    def __init__(self) -> None:
        self.mixture = OnlineGaussianMixture(2, buffer_size=12)
        self.trace = ProjectedTrace(4)

    def update(self, sample: Tensor) -> None:
        self.mixture.update(sample)
        self.trace.update(sample)

    def merge(self, other: Both) -> Both:
        raise NotImplementedError

    def get(self) -> dict[str, Any]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"mixture": self.mixture.state_dict(), "trace": self.trace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.mixture.load_state_dict(state["mixture"])
        self.trace.load_state_dict(state["trace"])


def outcome(mcmc: Any) -> dict[str, Tensor]:
    """Everything that a run leaves: draws or statistics, the store, the table, the diagnostics."""
    kernel = mcmc.kernel
    found = {f"store.{task}": kernel.store.read([task])[0] for task in kernel.store.tasks()}
    found |= {f"state.{name}": x for name, x in kernel.state.sums.items()}
    found |= {f"J.{name}": x for name, x in kernel.state.J.items()}
    found |= {f"moment.{name}": x for name, x in kernel.state.second_moment.items()}
    found["generator"] = kernel._generator.get_state()
    found["global"] = torch.get_rng_state()
    if kernel.chain.cache.table is not None:
        found["table"] = torch.stack(kernel.chain.cache.table.rows)
    stats = mcmc._diagnostics[0]["sample_stats"]
    found |= {f"stats.{name}": torch.tensor(values) for name, values in stats.items()}
    if isinstance(mcmc, MCMC):
        return {**found, "draws": mcmc.get_samples()["phi"]}
    both = mcmc._statistics.stats[(0, "phi")]
    found |= {f"mixture.{name}": x for name, x in both.mixture.state_dict().items()}
    return {**found, **{f"trace.{name}": x for name, x in both.trace.state_dict().items()}}


def run(kind: str, **options: Any) -> dict[str, Tensor]:
    """One run of each kind, from one seed."""
    pyro.set_rng_seed(7)
    random.seed(7)
    if kind == "streaming":
        mcmc: Any = StreamingMCMC(gibbs(), 40, 20, statistics=StatsOfDict(default=Both), disable_progbar=True)
    else:
        mcmc = MCMC(table(), 40, warmup_steps=20, disable_progbar=True)
    mcmc.run(**options)
    return outcome(mcmc)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]), name
