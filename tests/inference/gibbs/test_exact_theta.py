"""Theta drawn exactly where its likelihood is Gaussian: what is read of a program, the laws of the draws, refusals."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import arviz as az
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, summarise
from pyro_lift.inference.stores.memory import DeviceStore, HostStore

N, ROWS = 12, 5
X = torch.linspace(-1.0, 2.0, N * ROWS, dtype=torch.float64).view(N, ROWS)
Y = 1.0 + (7.0 * X).sin() + 0.7 * X


def zero() -> Tensor:
    return torch.zeros((), dtype=torch.float64)


def lines(scale: Callable[[], Any] = lambda: 0.6, seen: Callable[[Tensor], Any] = lambda m: dist.Normal(m, 0.8)) -> Any:
    """Intercepts and slopes by task, two families that each task's likelihood ties."""

    def model() -> None:
        a0, b0 = (pyro.sample(name, dist.Normal(zero(), 1.5)) for name in ("a0", "b0"))
        tau = scale()
        with pyro.plate("tasks", N, dim=-2) as index:
            a = pyro.sample("a", dist.Normal(a0, tau))
            b = pyro.sample("b", dist.Normal(b0, 0.4))
            with pyro.plate("rows", ROWS, dim=-1):
                pyro.sample("y", seen(a + b * X[index]), obs=Y[index])

    return model


def means(likelihood: Callable[[Tensor], Any], prior: Any = None, num_tasks: int = N) -> Callable[[], None]:
    """One number a task."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(zero(), 2.0))
        tau = 0.7 if prior is None else pyro.sample("tau", prior)
        with pyro.plate("tasks", num_tasks):
            theta = pyro.sample("theta", dist.Normal(phi, tau))
            pyro.sample("y", likelihood(theta), obs=Y[:num_tasks, 0])

    return model


def run(kernel: SGLDGibbs, draws: int = 4, warmup: int = 4, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, draws, warmup, disable_progbar=True, **options)
    mcmc.run()
    return mcmc


def update_of(kernel: SGLDGibbs) -> str:
    run(kernel)
    return str(kernel.chain.settings.theta_update)


def within_error(draws: Tensor, mean: float, sd: float, least: float = 200.0) -> None:
    x = draws.double().numpy()[None]
    assert float(az.ess(x)) > least
    assert abs(float(x.mean()) - mean) < 4.0 * float(az.mcse(x, method="mean"))
    assert abs(float(x.std()) - sd) < 4.0 * float(az.mcse(x, method="sd"))


def test_phi_and_theta_of_two_tied_families_have_their_exact_posterior() -> None:
    """The joint law of (a0, b0, all a, all b) is normal; its precision is written down as the program reads."""
    kernel = SGLDGibbs(lines(), seed=1, keep_theta=True)
    draws = run(kernel, 500, 5).get_samples()
    size = 2 + 2 * N
    precision, pull = np.zeros((size, size)), np.zeros(size)
    precision[0, 0] = precision[1, 1] = 1.5**-2
    for i in range(N):
        for site, sd in ((0, 0.6), (1, 0.4)):
            theta = 2 + 2 * i + site
            precision[[site, theta], [site, theta]] += sd**-2
            precision[[site, theta], [theta, site]] -= sd**-2
        design = np.stack([np.ones(ROWS), X[i].numpy()])
        own = slice(2 + 2 * i, 4 + 2 * i)
        precision[own, own] += design @ design.T / 0.64
        pull[own] += design @ Y[i].numpy() / 0.64
    covariance = np.linalg.inv(precision)
    centre: Any = covariance @ pull
    spread: Any = np.sqrt(np.diag(covariance))
    within_error(draws["a0"], centre[0], spread[0])
    within_error(draws["b0"], centre[1], spread[1])
    within_error(draws["a"][:, 3, 0], centre[8], spread[8])
    within_error(draws["b"][:, 11, 0], centre[25], spread[25])
    product = (draws["a"][:, 3, 0] - centre[8]) * (draws["b"][:, 3, 0] - centre[9])
    assert abs(float(product.mean()) - covariance[8, 9]) < 4.0 * float(product.std()) / math.sqrt(400)


def test_a_cold_inflated_target_is_drawn_by_its_own_law() -> None:
    """Power 3 and temperature 0.5: phi, given y alone, has precision (1/4 + N / (0.49 + 1/(3 * 0.25^-1))) / 0.5."""
    model = means(lambda theta: dist.Normal(theta, 0.5))
    draws = run(SGLDGibbs(model, n_inflate=3.0, temperature=0.5, seed=2), 500, 5).get_samples()["phi"]
    between = 0.49 + 0.25 / 3.0
    precision = 0.25 + N / between
    mean = float(Y[:, 0].sum()) / between / precision
    within_error(draws, mean, math.sqrt(0.5 / precision))


PRIORS: dict[str, Any] = {
    "a half-Cauchy law": dist.HalfCauchy(torch.tensor(1.0).double()),
    "an interval": dist.Uniform(zero(), torch.tensor(3.0).double()),
    "a law that is not known in floats": dist.FoldedDistribution(dist.StudentT(torch.tensor(3.0).double(), 0.0, 1.0)),
}


@pytest.mark.parametrize("name", PRIORS)
def test_phi_and_an_unknown_scale_have_their_exact_posterior_by_quadrature(name: str) -> None:
    prior, sd = PRIORS[name], 1.2
    model = means(lambda theta: dist.Normal(theta, sd), prior)
    known = "not known" not in name
    draws = run(SGLDGibbs(model, seed=3), 600 if known else 200, 20).get_samples()
    grid = torch.linspace(-9.0, 4.0, 4_001, dtype=torch.float64)
    tau, y = grid.exp(), Y[:, :1]
    inside = tau < 3.0
    variance = sd**2 + tau.square()
    precision = N / variance + 0.25
    mean = y.sum() / variance / precision
    density = -0.5 * (N * variance.log() + precision.log() + y.square().sum() / variance - mean.square() * precision)
    log_prior = torch.where(inside, prior.log_prob(torch.where(inside, tau, 1.0)), -torch.inf)
    if not isinstance(prior, dist.Uniform):
        log_prior = prior.log_prob(tau)
    weight = torch.softmax(density + log_prior + grid, 0)
    of_phi, of_tau = (weight * mean).sum(), (weight * tau).sum()
    phi_sd = ((weight * (1.0 / precision + mean.square())).sum() - of_phi.square()).sqrt()
    tau_sd = ((weight * tau.square()).sum() - of_tau.square()).sqrt()
    within_error(draws["phi"], float(of_phi), float(phi_sd), least=50.0)
    within_error(draws["tau"], float(of_tau), float(tau_sd), least=50.0)


def test_correlated_families_are_drawn_given_their_whole_covariance() -> None:
    """Theta given phi, scales and data, all tasks alike: its covariance over tasks is that of the conditional law."""
    tasks, root = 4_000, torch.tensor([[0.9, 0.0], [-0.5, 0.6]]).double()

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1e-6).to_event(1))
        with pyro.plate("tasks", tasks):
            theta = pyro.sample("theta", dist.MultivariateNormal(phi, scale_tril=root))
            pyro.sample("y", dist.Normal(theta.sum(-1), 0.5), obs=torch.ones(tasks).double())

    kernel = SGLDGibbs(model, seed=4, keep_theta=True)
    theta = run(kernel, 1, 1).get_samples()["theta"][0]
    assert kernel.chain.settings.theta_update == "exact"
    one = torch.ones(2).double()
    covariance = torch.linalg.inv(torch.linalg.inv(root @ root.T) + torch.outer(one, one) / 0.25)
    mean = covariance @ one / 0.25
    error = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), (theta - mean).T, upper=False)
    assert bool((error.mean(1).abs() < 4.0 / math.sqrt(tasks)).all())
    assert bool(((error @ error.T / tasks - torch.eye(2)).abs() < 4.0 * math.sqrt(2.0 / tasks)).all())


def test_correlations_and_scales_of_a_family_are_unknown_together() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
        tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2).double()).to_event(1))
        L = pyro.sample("L", dist.LKJCholesky(2, torch.tensor(2.0).double()))
        with pyro.plate("tasks", N):
            theta = pyro.sample("theta", dist.MultivariateNormal(phi, scale_tril=tau.unsqueeze(-1) * L))
            pyro.sample("y", dist.Normal(theta[:, :1] + theta[:, 1:] * X, 0.8).to_event(1), obs=Y)

    kernel = SGLDGibbs(model, seed=5)
    assert update_of(kernel) == "exact"
    theta = torch.stack([kernel.theta(i)["theta"] for i in range(N)])
    rest = theta - kernel.state.phi["phi"]
    torch.testing.assert_close(kernel.state.sums["phi"], theta.sum(0))
    torch.testing.assert_close(kernel.state.squares["phi"], rest.T @ rest)


READ: dict[str, tuple[Callable[[], None], bool]] = {
    "normal": (means(lambda theta: dist.Normal(theta, 0.5)), True),
    "masked": (means(lambda theta: dist.Normal(theta, 0.5).mask(torch.arange(N) > 3)), True),
    "of many scales": (means(lambda theta: dist.Normal(3.0 * theta - 1.0, 0.1 * (1.0 + torch.arange(N)))), True),
    "without data": (means(lambda theta: dist.Normal(zero(), 1.0).expand([N])), True),
    "far from zero": (means(lambda theta: dist.Normal(theta + 1e5, 0.5)), True),
    "Student-t": (means(lambda theta: dist.StudentT(20.0, theta, 0.5)), False),
    "bent far away": (means(lambda theta: dist.Normal(theta.clamp(max=6.0), 0.5)), False),
    "bent at one task": (means(lambda theta: dist.Normal(theta + (torch.arange(N) == 7) * theta.sin(), 0.5)), False),
}


@pytest.mark.parametrize("name", READ)
def test_a_quadratic_likelihood_is_told_from_others_whatever_it_is_called(name: str) -> None:
    model, gaussian = READ[name]
    assert update_of(SGLDGibbs(model, seed=0)) == ("exact" if gaussian else "sgld")


def test_a_likelihood_that_is_not_quadratic_is_refused_by_the_task_where_it_was_asked_for() -> None:
    model, _ = READ["bent at one task"]
    with pytest.raises(ValueError, match=r"the log likelihood of task 7 is not quadratic.*use \"sgld\" or \"hmc\""):
        run(SGLDGibbs(model, theta_update="exact", seed=0))


def test_a_quadratic_form_is_that_of_the_program_anywhere() -> None:
    kernel = SGLDGibbs(lines(), n_inflate=2.0, seed=0)
    run(kernel)
    tasks = kernel.chain.gaussian
    assert tasks is not None
    theta = torch.randn(N, 2, generator=torch.Generator().manual_seed(1)).double() * 5.0
    values = {"a": theta[:, :1], "b": theta[:, 1:]}
    there = kernel.chain.program.run(kernel.state.phi, {None: values}, torch.arange(N), None)
    grads = torch.autograd.grad(2.0 * there.log_likelihood, [there.locals[k].leaf for k in ("a", "b")])
    torch.testing.assert_close(tasks.gradients(theta), torch.cat(grads, 1))
    torch.testing.assert_close(tasks.value(theta, tasks.gradients(theta)), there.log_likelihood.detach())
    assert kernel.last_visit is not None
    stood = {k: torch.stack([kernel.theta(i)[k] for i in range(N)]) for k in ("a", "b")}
    again = kernel.chain.program.run(kernel.state.phi, {None: stood}, torch.arange(N), None)
    torch.testing.assert_close(kernel.last_visit.log_likelihood, again.log_likelihood.detach())


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "langevin": ({"phi_update": "langevin"}, 'does not go with phi_update="langevin"'),
    "rms": ({"preconditioner": "rms"}, 'preconditioner="rms"'),
    "clipped": ({"max_grad_norm": 1.0}, "max_grad_norm"),
    "site scale": ({"site_step_scale": {"a": 2.0}}, "site_step_scale"),
    "joint training": ({"sgd_steps": 2}, "sgd_steps"),
    "a step of the shift": ({"translation": "saga", "translation_step_size": 0.1}, "translation_step_size"),
    "euler": ({"integrator": "euler"}, 'integrator="euler"'),
    "blocks": ({"block_size": 3}, "does not take all tasks at once; write the plate vectorised"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_exact_draw_does_not_go_with_is_refused_by_name(name: str) -> None:
    options, words = REFUSED[name]
    with pytest.raises(ValueError, match=words):
        run(SGLDGibbs(lines(), theta_update="exact", **options))


@pytest.mark.parametrize("options", [{"step_size": 0.01}, {"translation": "saga"}, {"block_size": 3}], ids=str)
def test_a_step_that_was_chosen_is_taken(options: dict[str, Any]) -> None:
    assert update_of(SGLDGibbs(lines(), seed=0, **options)) == "sgld"


def test_a_resumed_chain_is_the_whole_one_to_the_bit(tmp_path: Path) -> None:
    prior = dist.HalfNormal(torch.tensor(1.0).double())
    whole = run(SGLDGibbs(lines(lambda: pyro.sample("tau", prior)), seed=6, keep_theta=True), 9, 5)

    def again(draws: int) -> MCMC:
        kernel = SGLDGibbs(lines(lambda: pyro.sample("tau", prior)), seed=6, keep_theta=True)
        return MCMC(kernel, draws, warmup_steps=5, disable_progbar=True)

    again(4).run(checkpoint=tmp_path / "run")
    rest = again(9)
    rest.run(resume=tmp_path / "run")
    for name, draws in whole.get_samples().items():
        assert torch.equal(draws, rest.get_samples()[name]), name


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_every_store_gives_the_same_chain(store: str) -> None:
    draws = [run(SGLDGibbs(lines(), seed=7, store=kind)).get_samples() for kind in ("device", store)]
    assert all(torch.equal(draws[0][name], draws[1][name]) for name in draws[0])


@pytest.mark.filterwarnings("ignore:num_chains")
def test_chains_have_streams_of_their_own_and_agree() -> None:
    draws = run(SGLDGibbs(lines(), seed=8), 60, 5, num_chains=2).get_samples(group_by_chain=True)["a0"]
    assert not torch.equal(draws[0], draws[1])
    assert float(az.rhat(draws.numpy())) < 1.05


def test_a_summary_says_that_theta_is_drawn_and_doubts_nothing() -> None:
    summary = summarise(run(SGLDGibbs(lines(), seed=9), 300, 20))
    assert summary.reach["theta (a0)"] is None and "theta (a0) exact" in str(summary)
    assert not summary.doubts


def test_a_store_reads_and_writes_all_rows_as_a_matrix() -> None:
    store = DeviceStore(3)
    assert store.read_all() is None and not store.has(0) and store.nbytes == 0
    store.write([0, 1, 2], [torch.full((2,), float(k)) for k in range(3)])
    matrix = store.read_all()
    assert matrix is not None and torch.equal(matrix, torch.arange(3.0).unsqueeze(1).expand(3, 2))
    store.write_all(matrix + 1.0)
    assert store.has(2) and list(store.tasks()) == [0, 1, 2] and store.nbytes == 24
    assert torch.equal(store.read([2])[0], torch.tensor([3.0, 3.0]))
    store.write([1], [torch.zeros(5)])
    assert store.read_all() is None and torch.equal(store.read([0])[0], torch.ones(2))
    with pytest.raises(ValueError, match=r"\[2, 2\] holds no row for each of 3"):
        store.write_all(torch.zeros(2, 2))
    assert not hasattr(HostStore(3), "read_all")
