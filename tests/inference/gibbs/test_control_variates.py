"""Control variates for minibatches of rows: unbiased, without noise where rows curve alike, saved, and refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import sequential, vectorised
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.gibbs import control_variates
from pyro_lift.inference.gibbs.state import Streams

TASKS, ROWS, BATCH = 400, 12, 2
#: Rows of every task, in an order of its own: far apart, so that two of them say little of the mean.
ORDER = torch.rand(TASKS, ROWS, generator=torch.Generator().manual_seed(0)).argsort(1)
Y = torch.linspace(-6.0, 8.0, ROWS, dtype=torch.float64)[ORDER]


def means(logistic: bool = False, block: int | None = None) -> Callable[[], None]:
    """Theta of each task, seen by a few of its rows; phi is all but known."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros((), dtype=torch.float64), 1e-6))
        with pyro.plate("tasks", TASKS, subsample_size=block, dim=-2) as tasks:
            theta = pyro.sample("theta", dist.Normal(phi, 1.0))
            with pyro.plate("rows", ROWS, subsample_size=BATCH, dim=-1) as rows:
                seen = Y[tasks][:, rows]
                if logistic:
                    pyro.sample("y", dist.Bernoulli(logits=theta + 0.3 * seen), obs=(seen > 1.0).double())
                else:
                    pyro.sample("y", dist.Normal(theta, 2.0), obs=seen)

    return model


def run(kernel: SGLDGibbs, draws: int = 4, warmup: int = 4, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, draws, warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def theta_of(kernel: SGLDGibbs) -> Tensor:
    return torch.stack([kernel.theta(i)["theta"] for i in range(TASKS)]).reshape(-1)


def euler_variance(eta: float) -> float:
    precision = 1.0 + ROWS / 4.0
    return 1.0 / (precision - eta / 4.0 * precision**2)


@pytest.mark.parametrize(("update", "steps"), [("sgld", 1), ("sgld", 2), ("underdamped", 1)])
def test_rows_that_curve_alike_leave_the_law_of_whole_gradients(
    update: Literal["sgld", "underdamped"], steps: int
) -> None:
    """The discretised law with every row; minibatches alone leave theta three times as wide (the next test)."""
    kernel = SGLDGibbs(
        means(),
        theta_update=update,
        step_size=0.2,
        momentum=0.5,
        control_variates=7,
        theta_steps_per_visit=steps,
        integrator="euler" if update == "sgld" else "exponential",
        seed=1,
    )
    run(kernel, 1, 50)
    theta, precision = theta_of(kernel), 1.0 + ROWS / 4.0
    variance = euler_variance(0.2) if update == "sgld" else 1.0 / precision
    assert abs(float(theta.mean()) - float(Y[0].mean()) * ROWS / 4.0 / precision) < 4.0 * math.sqrt(variance / TASKS)
    assert abs(float(theta.var()) / variance - 1.0) < 4.0 * math.sqrt(2.0 / TASKS)


def test_the_same_minibatches_without_them_leave_theta_far_too_wide() -> None:
    kernel = SGLDGibbs(means(), step_size=0.2, integrator="euler", check_stability=False, seed=1)
    run(kernel, 1, 50)
    assert float(theta_of(kernel).var()) > 2.5 * euler_variance(0.2)


def test_a_gradient_is_unbiased_and_less_noisy_the_nearer_its_reference() -> None:
    kernel = SGLDGibbs(means(logistic=True), step_size=0.01, control_variates=10**6, seed=2)
    run(kernel, 1, 1)
    chain, state = kernel.chain, kernel.state
    assert chain.variates is not None
    index = torch.arange(TASKS)

    def gradients(theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values: dict[int | None, dict[str, Tensor]] = {None: {"theta": theta}}
        full = chain.variates.program.run(state.phi, values, index, None)  # type: ignore[union-attr]
        stream, plain, better = torch.Generator().manual_seed(3), [], []
        for _ in range(60):
            before = stream.get_state()
            now = chain.program.run(state.phi, values, index, stream)
            drift = now.drift(now.locals)
            plain.append(drift.gradient["theta"])
            streams = Streams(stream)
            better.append(control_variates.corrected(state, chain, now, drift, streams, before).drift.gradient["theta"])
        whole = full.drift(full.locals).gradient["theta"]
        return whole[0], torch.stack(plain)[:, 0], torch.stack(better)[:, 0]

    stood = torch.stack([row[:1] for row in chain.variates.store.read(range(TASKS))])
    sds = []
    for apart in (0.05, 0.5):
        whole, plain, better = gradients(stood + apart)
        assert abs(float(better.mean() - whole)) < 4.0 * float(better.std()) / math.sqrt(60) + 1e-9
        sds.append(float(better.std() / plain.std()))
    assert sds[0] < 0.02 < sds[1] < 0.3


def test_a_reference_is_renewed_at_the_visit_that_is_said() -> None:
    kernel = SGLDGibbs(means(block=TASKS // 2), step_size=0.02, control_variates=3, seed=3)
    kernel.setup(0)
    assert kernel.chain.variates is not None
    ages = []
    for _ in range(16):  # two visits make a round
        kernel.sample(kernel.initial_params)
        ages.append(float(kernel.chain.variates.store.read([0])[0][-1]))
    assert ages[::2] == [1.0, 2.0, 3.0, 1.0, 2.0, 3.0, 1.0, 2.0]


@pytest.mark.parametrize("model", [sequential, lambda: means(block=TASKS // 2)], ids=["loop", "block"])
def test_a_resumed_chain_is_the_whole_one_to_the_bit(model: Callable[[], Any], tmp_path: Path) -> None:
    options: dict[str, Any] = {"step_size": 0.02, "control_variates": 3, "seed": 4}
    whole = run(SGLDGibbs(model(), **options), 8, 5).get_samples()["phi"]
    begun = MCMC(SGLDGibbs(model(), **options), 3, warmup_steps=5, disable_progbar=True)
    begun.run(checkpoint=tmp_path / "run")
    rest = MCMC(SGLDGibbs(model(), **options), 8, warmup_steps=5, disable_progbar=True)
    rest.run(resume=tmp_path / "run")
    assert torch.equal(whole, rest.get_samples()["phi"])


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "langevin": ({"phi_update": "langevin", "phi_step_size": 1e-3}, 'phi_update="langevin": phi may stand'),
    "mala": ({"theta_update": "mala"}, 'theta_update="mala"'),
    "saga": ({"translation": "saga"}, 'translation="saga"'),
    "clipped": ({"max_grad_norm": 1.0}, "max_grad_norm"),
    "a number": ({"control_variates": -1}, "control_variates=-1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_do_not_go_with_is_refused_by_name(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        run(SGLDGibbs(vectorised(3), **{"step_size": 0.02, "control_variates": 5, **options}))
