"""Draws of every theta_i are those of the chain, under the names that the program gives them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model, constrained, sequential, vectorised
from pyro.infer import Predictive
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, whole

N = 6


def bounded() -> None:
    """Tasks whose support has bounds of its own."""
    top = torch.arange(1.0, 6.0)
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("tasks", 5, subsample_size=2) as i:
        u = pyro.sample("u", dist.Uniform(torch.zeros(2), top[i]))
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        pyro.sample("y", dist.Normal(theta + u, 1.0), obs=torch.ones(2))


def run(model: Model, draws: int = 9, warmup: int = 2, hook: Any = None, **options: Any) -> tuple[MCMC, SGLDGibbs]:
    kernel = SGLDGibbs(model, keep_theta=True, seed=5, **{"step_size": 0.02, **options})
    mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup, hook_fn=hook, disable_progbar=True)
    mcmc.run()
    return mcmc, kernel


TABLE: dict[str, Any] = {"phi_update": "langevin", "accumulator": "table", "phi_step_size": 1e-3, "step_size": 5e-3}
CASES: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "one task a visit": (vectorised, {}),
    "blocks that go round": (lambda: vectorised(4), {}),
    "all tasks at once": (lambda: vectorised(None), {}),
    "thinned, on the disk": (vectorised, {"thinning": 4, "store": "disk"}),
    "at random": (lambda: vectorised(2), {"scan": "random"}),
    "shifted together": (vectorised, {"translation": "saga"}),
    "constrained": (constrained, TABLE),
    "a loop": (sequential, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_draw_is_what_the_chain_holds_of_every_task(case: str) -> None:
    make, options = CASES[case]
    held: list[list[dict[str, Tensor]]] = []

    def hold(kernel: SGLDGibbs, params: dict[str, Tensor], stage: str, i: int) -> None:
        del params, i
        if stage.lower().startswith("sample"):
            held.append([{k: v.clone() for k, v in kernel.theta(task).items()} for task in range(N)])

    mcmc, _ = run(make(), hook=hold, **options)
    draws = mcmc.get_samples()
    assert len(held) == 9
    for family in held[0][0]:
        for task in range(N):
            chain = torch.stack([rows[task][family] for rows in held])
            if f"{family}_{task}" in draws:
                kept = draws[f"{family}_{task}"]
            else:
                kept = draws[family][:, task]
                if case == "constrained" and family == "noise":
                    chain = chain.exp()
            torch.testing.assert_close(kept, chain)


def test_keeping_theta_changes_no_draw_of_phi() -> None:
    kept, _ = run(vectorised())
    plain = MCMC(SGLDGibbs(vectorised(), step_size=0.02, seed=5), 9, warmup_steps=2, disable_progbar=True)
    plain.run()
    assert set(plain.get_samples()) == {"phi"}
    torch.testing.assert_close(kept.get_samples()["phi"], plain.get_samples()["phi"], rtol=0, atol=0)


def test_each_task_has_its_own_bounds() -> None:
    draws = run(bounded, step_size=0.3, draws=60, phi_update="gibbs")[0].get_samples()["u"]
    assert draws.shape == (60, 5)
    assert bool((draws > 0).all()) and bool((draws < torch.arange(1.0, 6.0)).all())
    assert bool((draws.amax(0)[1:] > torch.arange(1.0, 5.0) - 0.5).all())


def test_a_resumed_run_keeps_the_same_theta(tmp_path: Path) -> None:
    whole_run = run(sequential())[0].get_samples()
    options: dict[str, Any] = {"keep_theta": True, "seed": 5, "step_size": 0.02}
    first = MCMC(SGLDGibbs(sequential(), **options), 4, warmup_steps=2, disable_progbar=True)
    first.run(checkpoint=tmp_path / "run")
    rest = MCMC(SGLDGibbs(sequential(), **options), 9, warmup_steps=2, disable_progbar=True)
    rest.run(resume=tmp_path / "run")
    for name, value in rest.get_samples().items():
        torch.testing.assert_close(value, whole_run[name], rtol=0, atol=0)


def test_the_draws_are_those_that_predictive_takes() -> None:
    draws = run(sequential())[0].get_samples()
    free = pyro.poutine.uncondition(whole(sequential()))
    predicted = Predictive(free, draws)()
    assert set(predicted) == {f"y_{i}" for i in range(N)}
    centre = torch.stack([draws[f"theta_{i}"] + draws[f"head_{i}"].sum(-1, keepdim=True) for i in range(N)])
    noise = torch.stack([predicted[f"y_{i}"] for i in range(N)]) - centre.unsqueeze(-2)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.15)  # the likelihood's own, and no more


def test_memory_is_reckoned_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.inference.footprint.free_bytes", lambda device: 100_000)
    run(vectorised(), draws=9)
    with pytest.raises(MemoryError, match=r"draws of theta .*fewer draws \(thinning=\) or keep_theta=False"):
        run(vectorised(), draws=2_000)


def test_two_tasks_with_one_name_are_refused() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        for _ in pyro.plate("tasks", 3, subsample_size=1):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.tensor(1.0))

    with pytest.raises(ValueError, match=r"the tasks 0 and 1 both name a site 'theta'.*theta_\{i\}"):
        run(model)


def test_diagnostics_leave_thousands_of_coordinates_out_and_say_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    mcmc, _ = run(vectorised(None))
    whole_report = mcmc.diagnostics()
    assert whole_report["theta"]["r_hat"].shape == (N, 2) and not caplog.records
    monkeypatch.setattr("pyro_lift.inference.mcmc.DIAGNOSED", 11)
    report = mcmc.diagnostics()
    assert set(whole_report) - set(report) == {"theta"}
    assert r"diagnostics() leaves out theta (12 coordinates); pyro_lift.summarise(mcmc)" in caplog.text
    assert mcmc.get_samples()["theta"].shape == (9, N, 2)
