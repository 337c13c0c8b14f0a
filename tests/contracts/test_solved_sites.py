"""Local sites that are solved, or drawn around their mode: against closed forms, and in every setting of the kernel."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.gibbs.rows import block_values
from pyro_lift.inference.gibbs.solved_sites import solved
from pyro_lift.inference.gibbs.state import Streams

GENERATOR = torch.Generator().manual_seed(5)
N, ROWS, BETA, HEAD_SD, NOISE = 4, 12, 0.5, 1.5, 0.7
X = torch.randn(N, ROWS, 3, generator=GENERATOR, dtype=torch.float64)
Z = torch.randn(N, ROWS, 2, generator=GENERATOR, dtype=torch.float64)
Y = torch.randn(N, ROWS, generator=GENERATOR, dtype=torch.float64) + X.sum(-1)
PLAIN: dict[str, Any] = {"step_size": 1e-3, "seed": 3}


def vectorised(
    block: int | None = 1, x: Tensor = X, y: Tensor = Y, law: Literal["normal", "logistic"] = "normal"
) -> Callable[[], None]:
    """A linear head beside theta, tasks stacked."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        with pyro.plate("tasks", len(x), subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, BETA).to_event(1))
            head = pyro.sample("head", dist.Normal(torch.zeros(3).double(), HEAD_SD).to_event(1))
            means = torch.einsum("bnd,bd->bn", x[index], head) + torch.einsum("bnd,bd->bn", Z[index % N], theta)
            if law == "normal":
                pyro.sample("y", dist.Normal(means, NOISE).to_event(1), obs=y[index])
            else:
                pyro.sample("y", dist.Bernoulli(logits=means).to_event(1), obs=(y[index] > 0).double())

    return model


def sequential(rows: int | None = None) -> Callable[[], None]:
    """The same, the plate iterated over; the head in two sites, weights and offset, the first of another shape."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 2.0).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, BETA).to_event(1))
            weights = pyro.sample(f"head_{i}", dist.Normal(torch.zeros(2, 1).double(), HEAD_SD).to_event(2))
            offset = pyro.sample(f"offset_{i}", dist.Normal(torch.zeros(()).double(), HEAD_SD))
            means = X[i, :, :2] @ weights.squeeze(-1) + offset * X[i, :, 2] + Z[i] @ theta
            with pyro.plate(f"rows_{i}", ROWS, subsample_size=rows) as row:
                pyro.sample(f"y_{i}", dist.Normal(means[row], NOISE), obs=Y[i, row])

    return model


def conditional(task: int, theta: Tensor, power: float = 1.0) -> tuple[Tensor, Tensor]:
    """Mean and covariance of a head given theta."""
    x, rest = X[task], Y[task] - Z[task] @ theta
    precision = torch.eye(3).double() / HEAD_SD**2 + power * x.T @ x / NOISE**2
    covariance = torch.linalg.inv(precision)
    return covariance @ (power * x.T @ rest) / NOISE**2, covariance


def kernel_of(model: Callable[[], None], update: Any, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, site_update=update, **{**PLAIN, **options})
    kernel.setup(4)
    return kernel


def solved_once(kernel: SGLDGibbs, index: Tensor) -> tuple[Any, Any]:
    """Values of a block as they stand, and once its heads are solved."""
    streams = Streams(torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), 0)
    before = block_values(kernel.state, kernel.chain, index, streams)
    return before, solved(kernel.state, kernel.chain, before, index, streams)


def test_a_linear_gaussian_head_is_at_its_mode_for_several_tasks_at_once() -> None:
    kernel = kernel_of(vectorised(2), {"head": "mode"}, n_inflate=2.0)
    before, after = solved_once(kernel, torch.tensor([2, 3]))
    for k, task in enumerate((2, 3)):
        mean, _ = conditional(task, before[None]["theta"][k], power=2.0)
        torch.testing.assert_close(after[None]["head"][k], mean, rtol=0, atol=1e-7)
    assert torch.equal(before[None]["theta"], after[None]["theta"])


def test_sites_of_several_shapes_are_solved_together() -> None:
    kernel = kernel_of(sequential(), {"head": "mode", "offset": "mode"})
    before, after = solved_once(kernel, torch.tensor([1]))
    mean, _ = conditional(1, before[1]["theta"])
    assert after[1]["head"].shape == (2, 1)
    torch.testing.assert_close(
        torch.cat([after[1]["head"].flatten(), after[1]["offset"].reshape(1)]), mean, rtol=0, atol=1e-7
    )


def test_around_the_mode_of_two_sites_draws_have_the_covariance_of_both_together() -> None:
    kernel = kernel_of(sequential(), {"head": "laplace", "offset": "laplace"}, temperature=0.5)
    streams = Streams(torch.Generator().manual_seed(0), torch.Generator().manual_seed(1), 0)
    values = block_values(kernel.state, kernel.chain, torch.tensor([1]), streams)
    mean, covariance = conditional(1, values[1]["theta"])  # type: ignore[index]
    found = []
    for _ in range(100):
        values = solved(kernel.state, kernel.chain, values, torch.tensor([1]), streams)
        found.append(torch.cat([values[1]["head"].flatten(), values[1]["offset"].reshape(1)]))  # type: ignore[index]
    _check_law(torch.stack(found), mean, 0.5 * covariance)


def test_the_laplace_draw_of_a_linear_gaussian_head_is_its_exact_conditional() -> None:
    many = 1200  # tasks that are all the first one: as many independent draws
    kernel = kernel_of(
        vectorised(many, X[:1].expand(many, -1, -1), Y[:1].expand(many, -1)),
        {"head": "laplace"},
        site_temperature={"head": 0.25},
    )
    before, after = solved_once(kernel, torch.arange(many))
    theta, head = before[None]["theta"][::N], after[None]["head"][::N]  # those with the first one's Z
    assert torch.equal(theta, theta[:1].expand_as(theta))
    mean, covariance = conditional(0, theta[0])
    _check_law(head, mean, 0.25 * covariance)


def _check_law(draws: Tensor, mean: Tensor, covariance: Tensor) -> None:
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (draws - mean).T, upper=False)
    count = len(draws)
    assert float(white.mean(1).abs().max()) < 4.0 / math.sqrt(count)
    spread = white @ white.T / count - torch.eye(len(mean)).double()
    assert float(spread.abs().max()) < 4.0 * math.sqrt(2.0 / count)


def test_a_logistic_head_is_where_scikit_learn_puts_it() -> None:
    kernel = kernel_of(vectorised(1, law="logistic"), {"head": "mode"})
    before, after = solved_once(kernel, torch.tensor([0]))
    assert not before[None]["theta"].any()  # so that the head is all there is
    oracle = LogisticRegression(C=HEAD_SD**2, fit_intercept=False, tol=1e-10, max_iter=1000)
    oracle.fit(X[0].numpy(), (Y[0] > 0).numpy())
    torch.testing.assert_close(after[None]["head"][0], torch.tensor(oracle.coef_[0]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("store", ["device", "host", "disk"])
@pytest.mark.parametrize("program", [vectorised(1), vectorised(2), vectorised(None), sequential()])
def test_every_visit_leaves_the_head_where_it_belongs_in_any_store_and_block(program: Any, store: str) -> None:
    updates = {"head": "mode", "offset": "mode"} if program.__qualname__.startswith("sequential") else {"head": "mode"}
    kernel = kernel_of(program, updates, store=store, step_size=1e-14, check_stability=False)
    for _ in range(4):
        kernel.sample(kernel.state.phi)
    for task in range(N):
        site = kernel.theta(task)
        head = torch.cat([site[name].flatten() for name in updates])
        # theta has hardly moved since its head was solved
        torch.testing.assert_close(head, conditional(task, site["theta"])[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("update", ["mode", "laplace"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preconditioner": "rms", "sgd_steps": 2},
        {"phi_update": "langevin", "accumulator": "table"},
        {"translation": "saga"},
        {"step_size": None},
    ],
    ids=["gibbs", "rms", "table", "saga", "adapting"],
)
def test_the_same_seed_gives_the_same_chain_and_a_stopped_one_goes_on(
    update: str, options: dict[str, Any], tmp_path: Path
) -> None:
    def chain(samples: int, **where: Any) -> dict[str, Tensor]:
        kernel = SGLDGibbs(vectorised(1), site_update={"head": update}, **{**PLAIN, **options})  # type: ignore[dict-item]
        mcmc = MCMC(kernel, samples, warmup_steps=4, disable_progbar=True)
        mcmc.run(**where)
        return {**mcmc.get_samples(), **{f"head {i}": kernel.theta(i)["head"] for i in range(N)}}

    whole, again = chain(6), chain(6)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    assert all(torch.isfinite(value).all() for value in whole.values())

    class StoppedError(Exception):
        pass

    def stop(kernel: Any, samples: Any, stage: str, i: int) -> None:
        if stage != "Warmup" and i == 3:
            raise StoppedError

    kernel = SGLDGibbs(vectorised(1), site_update={"head": update}, **{**PLAIN, **options})  # type: ignore[dict-item]
    mcmc = MCMC(kernel, 6, warmup_steps=4, disable_progbar=True, hook_fn=stop)
    with pytest.raises(StoppedError):
        mcmc.run(checkpoint=tmp_path, checkpoint_every=1)
    gone_on = chain(6, resume=tmp_path)
    assert all(torch.equal(whole[name], gone_on[name]) for name in whole)


def test_a_solved_site_has_no_say_in_the_steps_of_the_others() -> None:
    steep = 1e3 * X  # a head whose curvature no step would stand
    with pytest.raises(ValueError, match="step_size"):
        kernel_of(vectorised(1, x=steep), None, step_size=0.05)
    kernel = kernel_of(vectorised(1, x=steep), {"head": "mode"}, step_size=0.05)
    for _ in range(4):
        kernel.sample(kernel.state.phi)
    assert torch.isfinite(kernel.state.phi["phi"]).all()


@pytest.mark.parametrize(
    ("update", "options", "model", "said"),
    [
        ({"heads": "mode"}, {}, vectorised(1), "no local site 'heads'"),
        ({"head": "modes"}, {}, vectorised(1), "did you mean 'mode'"),
        ({"head": "mode"}, {"theta_update": "hmc"}, vectorised(1), "test is of all local sites"),
        ({"theta": "mode"}, {"translation": "saga"}, vectorised(1), "shifted together with 'phi'"),
        ({"theta": "mode", "head": "mode"}, {}, vectorised(1), "none left to step"),
        ({"head": "mode"}, {}, sequential(rows=4), "takes 4 of 12"),
    ],
)
def test_what_cannot_be_solved_is_refused_with_the_way_out(update: Any, options: Any, model: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        kernel_of(model, update, **options)


def test_to_step_is_what_is_done_without_being_asked() -> None:
    plain, asked = kernel_of(vectorised(1), None), kernel_of(vectorised(1), {"head": "langevin"})
    assert plain.fingerprint() == asked.fingerprint()
    assert plain.fingerprint() != kernel_of(vectorised(1), {"head": "mode"}).fingerprint()


def test_a_density_that_is_not_concave_is_refused_where_it_would_be_drawn() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(1).double(), 1.0).to_event(1))
        with pyro.plate("tasks", 2, subsample_size=1):
            theta = pyro.sample("theta", dist.Normal(phi, 1.0).to_event(1))
            head = pyro.sample("head", dist.Normal(torch.zeros(1).double(), 10.0).to_event(1))
            # two modes, and a head that starts on the saddle between them
            pyro.sample("y", dist.Normal(head.square().sum(-1) + theta.sum(-1), 0.1), obs=torch.ones(1).double())

    kernel = kernel_of(model, {"head": "laplace"})
    with pytest.raises(ValueError, match="not log-concave"):
        kernel.sample(kernel.state.phi)


@pytest.mark.slow
def test_a_chain_with_exact_heads_has_the_exact_posterior_of_what_is_left() -> None:
    def posterior() -> tuple[Tensor, Tensor]:
        precision, pull = torch.eye(2).double() / 4.0, torch.zeros(2).double()
        for i in range(N):  # y = z theta + noise, the head and theta integrated out
            covariance = HEAD_SD**2 * X[i] @ X[i].T + NOISE**2 * torch.eye(ROWS).double() + BETA**2 * Z[i] @ Z[i].T
            weight = torch.linalg.solve(covariance, Z[i])
            precision, pull = precision + Z[i].T @ weight, pull + weight.T @ Y[i]
        covariance = torch.linalg.inv(precision)
        return covariance @ pull, covariance

    kernel = SGLDGibbs(vectorised(None), site_update={"head": "laplace"}, step_size=0.01, seed=1)
    mcmc = MCMC(kernel, 6000, warmup_steps=200, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["phi"]
    mean, covariance = posterior()
    sd = covariance.diagonal().sqrt()
    assert float(((draws.mean(0) - mean) / sd).abs().max()) < 0.2
    assert float((draws.var(0) / covariance.diagonal() - 1.0).abs().max()) < 0.25
