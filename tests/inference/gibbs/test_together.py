"""Phi and all theta moved together: the density is Pyro's own in either coordinates, and the chain has its law."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import arviz as az
import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import constrained, sequential, vectorised
from pyro_reference import log_density
from torch import Tensor

from pyro_lift import MCMC, SGLDGibbs, from_mcmc, summarise, whole
from pyro_lift.inference.gibbs import together
from pyro_lift.inference.gibbs.together import PLAIN, RAREST, RAW, STEPS, Posterior, made_later, raw_families
from pyro_lift.inference.nuts_tuning import window_ends

TASKS = 6


def number(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def set_up(model: Any, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, **{"seed": 3, "phi_update": "nuts", **options})
    kernel.setup(4)
    return kernel


def correlated() -> None:
    """Correlated coordinates, a positive site around another, rows outside the task plate with the task of each."""
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2).double()).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, number(2.0)))
    with pyro.plate("tasks", TASKS):
        theta = pyro.sample("theta", dist.MultivariateNormal(phi, scale_tril=sd.unsqueeze(-1) * L))
        width = pyro.sample("width", dist.LogNormal(theta[:, 0], 0.5))
    owner = torch.arange(10) % TASKS
    with pyro.plate("rows", 10):
        y = torch.linspace(-1.0, 1.0, 10).double()
        pyro.sample("y", dist.Normal(theta[owner].sum(-1), width[owner]), obs=y)


def named(posterior: Posterior, vector: Tensor) -> dict[str, Tensor]:
    """Unconstrained values by the names of the sites."""
    run = posterior.run(vector)
    return {name: site.leaf.detach() for name, site in run.latents.items()}


PROGRAMS: dict[str, tuple[Any, set[str]]] = {
    "Student-t around a location and a scale": (constrained(None), {"theta"}),
    "a loop, with sites of unequal shapes": (sequential(batch=None, block=None), {"theta"}),
    "correlated, rows outside": (correlated, {"theta", "width"}),
}


@pytest.mark.parametrize("power", [1.0, 2.5])
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_density_is_that_of_pyro_in_either_coordinates(name: str, power: float) -> None:
    model, raw = PROGRAMS[name]
    kernel = set_up(model, n_inflate=power, temperature=0.7)
    run = kernel.chain.program.run(kernel.state.phi, {}, torch.arange(TASKS), None)
    assert raw_families(run) == raw and kernel.chain.raw == frozenset(raw)
    plain, other = Posterior(kernel.chain, run), Posterior(kernel.chain, run, kernel.chain.raw)
    generator = torch.Generator().manual_seed(0)
    begin = plain.flat(run)
    for _ in range(2):
        z = 0.4 * torch.randn(begin.shape, generator=generator, dtype=torch.float64)
        values = named(other, z)
        wanted = log_density(model, values, TASKS).total(power) / 0.7
        x = plain.flat(other.run(z))
        assert plain.at(x).density == pytest.approx(float(wanted), rel=1e-9, abs=1e-9)
        torch.testing.assert_close(other.flat(plain.run(x)), z, rtol=1e-8, atol=1e-8)
        # The Jacobian of x in z, by autograd through the program itself.
        jacobian = numerical_jacobian(other, plain, z)
        density = other.at(z).density
        assert density - float(wanted) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]) / 0.7, abs=1e-5)
        slope = torch.stack([difference(other, z, k) for k in range(len(z))])
        torch.testing.assert_close(other.at(z).gradient, slope, rtol=1e-5, atol=1e-5)


def numerical_jacobian(other: Posterior, plain: Posterior, z: Tensor, h: float = 1e-6) -> Tensor:
    columns = []
    for k in range(len(z)):
        e = torch.zeros_like(z)
        e[k] = h
        columns.append((plain.flat(other.run(z + e)) - plain.flat(other.run(z - e))) / (2.0 * h))
    return torch.stack(columns, 1)


def difference(posterior: Posterior, z: Tensor, k: int, h: float = 1e-5) -> Tensor:
    e = torch.zeros_like(z)
    e[k] = h
    return number((posterior.at(z + e).density - posterior.at(z - e).density) / (2.0 * h))


# ---------------------------------------------------------------------------------------------------- the choice


def update_of(model: Any, **options: Any) -> str:
    kernel = SGLDGibbs(model, seed=1, **options)
    kernel.setup(2)
    return kernel.chain.settings.phi_update


def noisy(block: int | None, rows: int = 4) -> Any:
    """A noise that nobody knows, in the likelihood."""
    y = torch.linspace(-1.0, 2.0, TASKS * rows).view(TASKS, rows)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        sigma = pyro.sample("sigma", dist.HalfNormal(1.0))
        with pyro.plate("tasks", TASKS, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample(
                "y", dist.Normal(theta.unsqueeze(-1), sigma).expand([len(index), rows]).to_event(1), obs=y[index]
            )

    return model


def counts(exposure: float) -> Any:
    """Counts, one a task: the more exposure, the more they say of it."""
    rate = torch.linspace(-1.0, 1.0, TASKS).exp()

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
        tau = pyro.sample("tau", dist.HalfNormal(1.0))
        with pyro.plate("tasks", TASKS):
            theta = pyro.sample("theta", dist.Normal(phi, tau))
            pyro.sample("y", dist.Poisson(exposure * theta.exp()), obs=(exposure * rate).round())

    return model


def normal_data() -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("tasks", TASKS):
        theta = pyro.sample("theta", dist.Normal(phi, tau))
        pyro.sample("y", dist.Normal(theta, 2.0), obs=torch.linspace(-1.0, 2.0, TASKS))


def test_what_has_no_exact_draw_moves_together_and_the_rest_as_before() -> None:
    assert update_of(vectorised(1)) == "gibbs"
    assert update_of(noisy(None)) == "nuts"
    assert update_of(noisy(1)) == "nuts"  # a small program: its subsampling is taken out
    assert update_of(correlated) == "nuts"
    # Exact draws that would be slow: the data say little of single tasks.
    assert update_of(counts(200.0)) == "gibbs" and update_of(counts(1.0)) == "nuts"
    assert update_of(counts(1.0), theta_update="mala") == "gibbs"
    assert update_of(counts(1.0), theta_update="sgld") == "gibbs"
    # They are not slow where phi is drawn with theta integrated out.
    assert update_of(normal_data) == "gibbs"


@pytest.mark.parametrize(
    "options",
    [{"step_size": 0.01}, {"phi_update": "gibbs"}, {"block_size": 6}, {"theta_update": "mala"}, {"max_grad_norm": 1.0}],
)
def test_where_something_else_was_asked_for_a_program_without_an_exact_draw_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r'(?s)\'sigma\'.*accumulator="table".*phi_update="nuts"'):
        update_of(noisy(None), **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"translation": "saga"}, "translation does not go with it"),
        ({"theta_update": "hmc"}, "theta_update does not go with it"),
        ({"control_variates": 5}, "control_variates does not go with it"),
        ({"step_size": 0.1}, "step_size does not go with it"),
        ({"temperature": 0.0}, "temperature=0 does not go with it"),
        ({"block_size": 2}, "block_size=2"),
        ({"site_update": {"theta": "mode"}}, "site_update does not go with it"),
    ],
)
def test_what_does_not_go_with_it_is_refused_with_the_way_out(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        set_up(noisy(None), **options)


def test_a_subsampled_plate_is_told_how_to_take_all() -> None:
    with pytest.raises(ValueError, match=r"takes 1 of 6. Hand over pyro_lift.whole\(model\)"):
        set_up(noisy(1))
    assert set_up(whole(noisy(1))).chain.structure.block_size == TASKS


def test_the_choice_is_said_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="pyro_lift"):
        update_of(noisy(None))
    assert "moved together" in caplog.text and "'sigma' has no exact draw" in caplog.text


# ---------------------------------------------------------------------------------------------------- the chain


def shifted() -> None:
    """A non-centred program of known scales: its posterior is normal, in closed form."""
    phi = pyro.sample("phi", dist.Normal(number(1.0), 2.0))
    with pyro.plate("tasks", TASKS):
        eta = pyro.sample("eta", dist.Normal(number(0.0), 1.0))
        pyro.sample("y", dist.Normal(phi + 0.5 * eta, 0.8), obs=torch.linspace(-1.0, 2.0, TASKS).double())


def test_a_chain_has_the_closed_form_of_a_normal_posterior() -> None:
    mcmc = MCMC(SGLDGibbs(shifted, seed=2, keep_theta=True), 150, warmup_steps=60, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    precision = 1.0 / 4.0 + TASKS / (0.25 + 0.64)
    mean = (1.0 / 4.0 + 0.5 * TASKS / (0.25 + 0.64)) / precision
    z = (draws["phi"] - mean) * precision**0.5
    assert abs(float(z.mean())) < 0.4 and 0.75 < float(z.std()) < 1.3
    assert draws["eta"].shape == (150, TASKS)
    assert summarise(mcmc).steps["phi_update"] == "nuts"
    assert float(from_mcmc(mcmc)["sample_stats"]["acceptance"].mean()) > 0.5


def test_a_chain_goes_on_from_a_checkpoint_to_the_same_draws(tmp_path: Path) -> None:
    def run(num_samples: int, **how: Any) -> Tensor:
        mcmc = MCMC(SGLDGibbs(noisy(None), seed=5), num_samples, warmup_steps=25, disable_progbar=True)
        mcmc.run(**how)
        draws: Tensor = mcmc.get_samples()["sigma"]
        return draws

    longer = run(6)
    run(3, checkpoint=tmp_path / "run")
    torch.testing.assert_close(run(6, resume=tmp_path / "run"), longer, rtol=0.0, atol=0.0)


def test_the_longer_of_two_trajectories_is_made_in_its_turn() -> None:
    tuning = {PLAIN + STEPS: torch.tensor(63.0), RAW + STEPS: torch.tensor(15.0)}

    def made(label: str, phase: Any, **changed: Any) -> list[int]:
        now = tuning | {key: torch.tensor(value) for key, value in changed.items()}
        return [step for step in range(40) if not made_later(now, label, step, phase, 40)]

    assert made(RAW, "sample") == list(range(40))
    assert made(PLAIN, "sample") == list(range(0, 40, 4))
    # The first half of the warm-up makes both, and so does a visit at which a window of the metric ends.
    assert set(made(PLAIN, "burn-in")) == {*range(20), 20, 24, 28, 32, 36, *(end - 1 for end in window_ends(40)[1])}
    assert made(PLAIN, "sample", **{PLAIN + STEPS: 1e6}) == list(range(0, 40, RAREST))
    assert made(PLAIN, "sample", **{PLAIN + STEPS: 20.0}) == list(range(40))
    assert not made_later({}, PLAIN, 3, "sample", 0)


def test_the_law_holds_where_a_trajectory_is_left_out_of_most_visits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The known law of a prior without data, its scale far from the location's coordinates."""
    monkeypatch.setattr(together, "made_later", lambda tuning, label, step, *rest: label == PLAIN and step % 3 != 0)

    def model() -> None:
        tau = pyro.sample("tau", dist.LogNormal(number(0.0), 0.5))
        with pyro.plate("tasks", 3):
            pyro.sample("theta", dist.Normal(number(1.0), tau))

    kernel = SGLDGibbs(model, seed=3, phi_update="nuts", keep_theta=True)
    mcmc = MCMC(kernel, 600, warmup_steps=100, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()
    log_tau = draws["tau"].log()
    error = 1.0 / float(az.ess(log_tau[None].numpy())) ** 0.5
    assert abs(float(log_tau.mean()) / 0.5) < 4.0 * error
    assert abs(float(log_tau.std()) / 0.5 - 1.0) < 4.0 * error
    standard = (draws["theta"] - 1.0) / draws["tau"].reshape(-1, 1)
    assert abs(float(standard.mean())) < 4.0 * error
