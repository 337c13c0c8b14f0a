"""Regression at the upper level: which programs have one, what its sums are, and that its draws are exact."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, from_mcmc
from pyro_lift.inference.gibbs import regression
from pyro_lift.inference.gibbs.regression import Coefficients, Regression

Model = Callable[[], None]
N, D, P = 6, 2, 3
_source = torch.Generator().manual_seed(5)
Z = torch.randn(N, P, generator=_source, dtype=torch.float64)
Y = torch.randn(N, 4, D, generator=_source, dtype=torch.float64)


def double(*values: float) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def observe(theta: Tensor, index: Tensor) -> None:
    pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 1.0).expand([len(index), 4, D]).to_event(2), obs=Y[index])


def matrix(block: int | None = 2, tau: Any = None) -> Model:
    """theta_i ~ N(W z_i + b, tau)."""

    def model() -> None:
        W = pyro.sample("W", dist.Normal(torch.zeros(D, P).double(), 1.5).to_event(2))
        b = pyro.sample("b", dist.Normal(double(0.3, -0.2), 2.0).to_event(1))
        sd = double(0.4, 0.9) if tau is None else pyro.sample("tau", tau)
        with pyro.plate("tasks", N, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(Z[index] @ W.T + b, sd).to_event(1))
            observe(theta, index)

    return model


def numbers(block: int | None = 1) -> Model:
    """Intercepts with a predictor, by the task's index, and a known offset; one number a task."""

    def model() -> None:
        g0 = pyro.sample("g0", dist.Normal(double(0.0), 5.0))
        g1 = pyro.sample("g1", dist.Normal(double(1.0), 2.0))
        sd = pyro.sample("sd", dist.HalfCauchy(double(1.0)))
        with pyro.plate("tasks", N, subsample_size=block) as index:
            a = pyro.sample("a", dist.Normal(g0 + g1 * Z[index, 0] + Z[index, 1], sd))
            pyro.sample("y", dist.Normal(a.unsqueeze(-1), 1.0).expand([len(index), 4]).to_event(1), obs=Y[index, :, 0])

    return model


def looped(block: int = 1) -> Model:
    def model() -> None:
        g = pyro.sample("g", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        for i in pyro.plate("tasks", N, subsample_size=block):
            theta = pyro.sample(f"theta_{i}", dist.Normal(g[0] * Z[i, :2] + g[1], 0.7).to_event(1))
            pyro.sample(f"y_{i}", dist.Normal(theta.expand(4, D), 1.0).to_event(2), obs=Y[i])

    return model


def correlated(block: int | None = 3) -> Model:
    """Correlated intercepts and slopes, a predictor of the first."""

    def model() -> None:
        g0 = pyro.sample("g0", dist.Normal(double(0.0), 5.0))
        g1 = pyro.sample("g1", dist.Normal(double(0.0), 5.0))
        b = pyro.sample("b", dist.Normal(double(0.0), 5.0))
        sd = pyro.sample("sd", dist.HalfNormal(double(1.0, 0.7)).to_event(1))
        L = pyro.sample("L", dist.LKJCholesky(2, double(2.0)))
        with pyro.plate("tasks", N, subsample_size=block) as index:
            mean = torch.stack([g0 + g1 * Z[index, 0], b.expand(len(index))], -1)
            theta = pyro.sample("theta", dist.MultivariateNormal(mean, scale_tril=sd.unsqueeze(-1) * L))
            observe(theta, index)

    return model


def beside_a_pair() -> None:
    """A regression and a pair whose scale they share."""
    mu = pyro.sample("mu", dist.Normal(double(0.0), 1.0))
    w = pyro.sample("w", dist.Normal(torch.zeros(P).double(), 1.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(double(1.0)))
    with pyro.plate("tasks", N, subsample_size=2) as index:
        slope = pyro.sample("slope", dist.Normal(mu, tau))
        level = pyro.sample("level", dist.Normal(Z[index] @ w, 2.0 * tau))
        mean = torch.stack([slope, level], -1)
        observe(mean, index)


WAYS: dict[str, tuple[Model, set[str], set[str]]] = {
    "a matrix and an offset": (matrix(), {"W", "b"}, set()),
    "all tasks at once": (matrix(None), {"W", "b"}, set()),
    "an unknown scale by coordinate": (matrix(2, dist.HalfNormal(double(1.0, 2.0)).to_event(1)), {"W", "b"}, {"tau"}),
    "numbers": (numbers(), {"g0", "g1"}, {"sd"}),
    "a loop": (looped(), {"g"}, set()),
    "correlated": (correlated(), {"g0", "g1", "b"}, {"sd", "L"}),
    "beside a pair": (beside_a_pair, {"w"}, {"tau"}),
}


def set_up(model: Model, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, **{"step_size": 0.05, "seed": 3, **options})
    kernel.setup(4)
    return kernel


@pytest.mark.parametrize("name", WAYS)
def test_the_sums_are_those_of_the_stored_theta_and_the_programs_own_means(name: str) -> None:
    model, sites, scales = WAYS[name]
    kernel = set_up(model)
    structure = kernel.chain.structure
    assert structure.regressed == sites and set(structure.scales) == scales and not structure.reasons
    for _ in range(3 * N // structure.block_size):
        kernel.sample(kernel.initial_params)
    program, state = kernel.chain.program, kernel.state
    for family, level in structure.regressions.items():
        known = kernel.chain.cache.coefficients[family]
        assert known.complete
        theta = torch.stack([kernel.theta(i)[family].reshape(-1) for i in range(N)])

        def means(phi: dict[str, Tensor], family: str = family) -> Tensor:
            found: dict[int, Tensor] = {}
            for begin in range(0, N, structure.block_size):
                run = program.run(phi, {}, torch.arange(begin, begin + structure.block_size), None, want_grad=False)
                for site in run.locals.values():
                    if site.family == family:
                        rows = regression.by_task(site, torch.broadcast_to(site.fn.mean, site.leaf.shape))
                        found |= dict(zip(run.tasks if site.task is None else [site.task], rows, strict=True))
            return torch.stack([found[i] for i in range(N)])

        # The covariates by differences of the program's own means, one coordinate of phi after another.
        columns, here = [], means(state.phi)
        for site in level.sites:
            for k in range(state.phi[site].numel()):
                other = state.phi[site].clone()
                other.view(-1)[k] += 1.0
                columns.append(means({**state.phi, site: other}) - here)
        A, rest = torch.stack(columns, -1), theta - here
        torch.testing.assert_close(known.A, A, rtol=1e-9, atol=1e-9)
        C, Q = torch.einsum("ndk,ne->dek", A, rest), rest.T @ rest
        if level.dense is None:
            C, Q = torch.einsum("ddk->dk", C), Q.diagonal()
        torch.testing.assert_close(state.squares[level.cross], C, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(state.squares[level.square], Q, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("name", ["an unknown scale by coordinate", "correlated"])
def test_a_draw_has_the_law_of_a_linear_regression_in_closed_form(name: str) -> None:
    kernel = set_up(WAYS[name][0])
    for _ in range(N):
        kernel.sample(kernel.initial_params)
    structure, state = kernel.chain.structure, kernel.state
    ((family, level),) = structure.regressions.items()
    known, at = kernel.chain.cache.coefficients[family], level.at(structure.scales, state.phi)
    # The textbook's way: stack all rows, each with its own covariance.
    sd = torch.broadcast_to(at.local_variance, (D,)).sqrt()
    Sigma = torch.outer(sd, sd) * (torch.eye(D).double() if at.dense is None else at.dense.correlation)
    inverse = torch.linalg.inv(torch.block_diag(*[Sigma] * N))
    A = known.A.reshape(N * D, -1)
    theta = torch.cat([kernel.theta(i)[family] for i in range(N)])
    precision = torch.diag(level.prior_precision) + A.T @ inverse @ A
    covariance = torch.linalg.inv(precision)
    mean = covariance @ (level.prior_precision * level.prior_mean + A.T @ inverse @ theta)
    sums = state.squares[level.cross], state.squares[level.square]

    def drawn(noise: Tensor, temperature: float = 1.0) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        values, around = regression.draw(at, known.gram, sums, state.phi, temperature, noise)
        return torch.cat([values[k].reshape(-1) for k in level.sites]), around

    K = len(mean)
    centre, _ = drawn(torch.zeros(K).double())
    torch.testing.assert_close(centre, mean, rtol=1e-8, atol=1e-8)
    root = torch.stack([drawn(e)[0] - centre for e in torch.eye(K).double()], 1)
    torch.testing.assert_close(root @ root.T, covariance, rtol=1e-8, atol=1e-10)
    hot = torch.stack([drawn(e, 4.0)[0] - centre for e in torch.eye(K).double()], 1)
    torch.testing.assert_close(hot, 2.0 * root)
    # What it says of the sums after the draw is what they are.
    there, (C, Q) = drawn(torch.linspace(-1.0, 1.0, K).double())
    rest = (theta - A @ there).view(N, D)
    wanted = torch.einsum("ndk,ne->dek", known.A, rest), rest.T @ rest
    if level.dense is None:
        wanted = torch.einsum("ddk->dk", wanted[0]), wanted[1].diagonal()
    torch.testing.assert_close(C, wanted[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(Q, wanted[1], rtol=1e-8, atol=1e-8)


def quiet() -> None:
    """A regression without data: its posterior is its prior, and theta's step is exact however long."""
    w = pyro.sample("w", dist.Normal(double(0.5, -1.0), double(1.0, 2.0)).to_event(1))
    tau = pyro.sample("tau", dist.LogNormal(double(-0.5), 0.5))
    with pyro.plate("tasks", N, subsample_size=3) as index:
        pyro.sample("theta", dist.Normal(Z[index, :2] @ w, tau))


def test_a_chain_without_data_has_the_prior_for_its_law() -> None:
    kernel = SGLDGibbs(quiet, step_size=200.0, seed=2, thinning=2, phi_update="gibbs")
    mcmc = MCMC(kernel, 300, warmup_steps=20, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    z = torch.cat([(draws["w"] - double(0.5, -1.0)) / double(1.0, 2.0), ((draws["tau"].log() + 0.5) / 0.5)[:, None]], 1)
    batches = z.view(20, -1, 3)
    error = batches.mean(1).std(0) / 20**0.5
    assert bool((z.mean(0).abs() < 4.0 * error).all()) and bool((error < 0.3).all())
    squares = batches.square().mean(1)
    assert bool(((squares.mean(0) - 1.0).abs() < 4.0 * squares.std(0) / 20**0.5).all())


def other(mean: Callable[[Tensor, Tensor, Tensor], Tensor], **also: Any) -> Model:
    def model() -> None:
        a = pyro.sample("a", also.get("prior", dist.Normal(double(0.0), 1.0)))
        b = pyro.sample("b", dist.Normal(double(0.0), 1.0))
        with pyro.plate("tasks", N, subsample_size=2) as index:
            theta = pyro.sample("theta", dist.Normal(mean(a, b, Z[index, 0]), also.get("sd", lambda a: 1.0)(a)))
            seen = theta + a if "seen" in also else theta
            pyro.sample("y", dist.Normal(seen.unsqueeze(-1), 1.0).expand([2, 4]).to_event(1), obs=Y[index, :, 0])

    return model


REFUSED: dict[str, Model] = {
    "a product of two": other(lambda a, b, z: a * b * z),
    "a kink": other(lambda a, b, z: torch.relu(a) + b * z),
    "a curve": other(lambda a, b, z: a.exp() + b * z),
    "in the likelihood too": other(lambda a, b, z: a + b * z, seen=True),
    "in the scale too": other(lambda a, b, z: a + b * z, sd=lambda a: a.exp()),
    "no normal prior": other(lambda a, b, z: a + b * z, prior=dist.Laplace(double(0.0), 1.0)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_regression_is_refused_with_the_way_out(name: str) -> None:
    with pytest.raises(ValueError, match=r'(?s)\'gibbs\' needs.*accumulator="table".*phi_update="nuts"'):
        set_up(REFUSED[name], phi_update="gibbs")


def test_a_later_task_that_breaks_the_form_is_refused_by_its_number() -> None:
    def model() -> None:
        a = pyro.sample("a", dist.Normal(double(0.0), 1.0))
        b = pyro.sample("b", dist.Normal(double(0.0), 1.0))
        for i in pyro.plate("tasks", N, subsample_size=1):
            mean = a.exp() + b if i == 3 else a + b * Z[i, 0]
            theta = pyro.sample(f"theta_{i}", dist.Normal(mean, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=Y[i, 0, 0])

    kernel = set_up(model)
    for _ in range(3):
        kernel.sample(kernel.initial_params)
    with pytest.raises(ValueError, match=r"task 3: the mean of .* is not linear in 'a', 'b'"):
        kernel.sample(kernel.initial_params)


@pytest.mark.parametrize("options", [{"sgd_steps": 2}, {"translation": "saga"}])
def test_options_that_know_of_pairs_alone_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*linear in several"):
        set_up(matrix(), **options)


def test_a_chain_goes_on_from_a_checkpoint_to_the_same_draws(tmp_path: Path) -> None:
    def run(count: int, **how: Any) -> Tensor:
        kernel = SGLDGibbs(numbers(2), step_size=0.05, seed=5, keep_theta=True)
        mcmc = MCMC(kernel, count, warmup_steps=2, disable_progbar=True)
        mcmc.run(**how)
        draws: Tensor = mcmc.get_samples()["g1"]
        assert from_mcmc(mcmc)["posterior"]["a"].shape == (1, count, N)
        return draws

    longer = run(12)
    run(5, checkpoint=tmp_path / "run")
    assert torch.equal(run(12, resume=tmp_path / "run"), longer)


def test_theta_moved_with_a_test_keeps_the_closed_form() -> None:
    """All normal with known scales: the posterior of phi is a linear regression of the tasks' means."""
    kernel = SGLDGibbs(matrix(None), theta_update="hmc", leapfrog_steps=3, seed=1)
    mcmc = MCMC(kernel, 160, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    flat = torch.cat([draws["W"].flatten(1), draws["b"]], 1)
    X = torch.cat([Z, torch.ones(N, 1).double()], 1)
    for d, sd in enumerate((0.4, 0.9)):
        prior = double(*([1.5**-2] * P), 0.25)
        precision = torch.diag(prior) + X.T @ X / (sd**2 + 0.25)
        centre = torch.cat([torch.zeros(P).double(), double(0.3, -0.2)[d : d + 1]])
        mean = torch.linalg.solve(precision, prior * centre + X.T @ Y[..., d].mean(1) / (sd**2 + 0.25))
        which = [*range(d * P, d * P + P), D * P + d]
        z = (flat[:, which] - mean) @ torch.linalg.cholesky(precision)
        batches = z.view(20, -1, P + 1).mean(1)
        assert bool((batches.mean(0).abs() < 4.0 * batches.std(0) / 20**0.5).all())
        assert bool((z.std(0) > 0.6).all()) and bool((z.std(0) < 1.5).all())


def test_the_gram_is_of_visited_tasks_alone() -> None:
    level = Regression("t", ("a",), torch.Size([1]), double(0.0, 0.0), double(1.0, 1.0), double(1.0))
    known = Coefficients.empty(level, 3)
    assert not known.complete and not bool(known.gram.any())
    known.take([2, 0], torch.tensor([[[1.0, 2.0]], [[3.0, 0.0]]]).double())
    torch.testing.assert_close(known.gram[0], torch.tensor([[10.0, 2.0], [2.0, 4.0]]).double())
    known.take([1], torch.zeros(1, 1, 2).double())
    assert known.complete
