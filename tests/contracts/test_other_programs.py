"""Programs that are not ours, against Pyro's NUTS: means and standard deviations within Monte-Carlo error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS

from pyro_lift import SGLDGibbs

Program = Callable[[int | None], Callable[[], None]]
generator = torch.Generator().manual_seed(11)


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def number(value: float) -> torch.Tensor:
    return torch.tensor(value, dtype=torch.float64)


def logistic(block: int | None) -> Callable[[], None]:
    """Hierarchical logistic regression: unknown population mean (a vector), fixed population scale."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(torch.zeros(3).double(), 1.5).to_event(1))
        with pyro.plate("groups", 6, subsample_size=block) as index:
            weights = pyro.sample("weights", dist.Normal(mu, 0.6).to_event(1))
            logits = torch.einsum("gnd,gd->gn", LOGISTIC_X[index], weights)
            pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=LOGISTIC_Y[index])

    return model


LOGISTIC_X = normal(6, 25, 3)
LOGISTIC_Y = (
    torch.einsum("gnd,gd->gn", LOGISTIC_X, torch.tensor([1.0, -1.0, 0.3]).double() + 0.6 * normal(6, 3)).sigmoid()
    > torch.rand(6, 25, generator=generator)
).double()


def non_centred(block: int | None) -> Callable[[], None]:
    """Hierarchical normal model with unknown population mean and scale; the scale enters the likelihood."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
        tau = pyro.sample("tau", dist.LogNormal(number(-0.5), 0.7))
        with pyro.plate("groups", 6, subsample_size=block) as index:
            z = pyro.sample("z", dist.Normal(number(0.0), 1.0))
            mean = (mu + tau * z).unsqueeze(-1)
            pyro.sample("y", dist.Normal(mean, 1.5).expand([len(index), 6]).to_event(1), obs=NORMAL_Y[index])

    return model


NORMAL_Y = 1.0 + 0.8 * normal(6, 1) + 1.5 * normal(6, 6)


def student(block: int | None) -> Callable[[], None]:
    """A Student-t conditional p(theta | phi), with one outlying group."""

    def model() -> None:
        mu = pyro.sample("mu", dist.Normal(number(0.0), 2.0))
        with pyro.plate("groups", 6, subsample_size=block) as index:
            theta = pyro.sample("theta", dist.StudentT(4.0, mu, 0.5))
            y = dist.Normal(theta.unsqueeze(-1), 1.0).expand([len(index), 6]).to_event(1)
            pyro.sample("y", y, obs=STUDENT_Y[index])

    return model


STUDENT_Y = normal(6, 6) + torch.tensor([0.2, -0.3, 0.5, 0.1, -0.1, 4.0]).double()[:, None]

TABLE: dict[str, Any] = {"phi_update": "langevin", "accumulator": "table"}
#: The program, its block, the kernel's options, visits, and the sites to compare. A Euler step h adds about h/4 to the
#: variance of its site: 1 to 2 % of mu's here, well inside the Monte-Carlo errors of these lengths.
PROGRAMS: dict[str, tuple[Program, int | None, dict[str, Any], int, list[str]]] = {
    "logistic, gibbs": (logistic, 1, {"step_size": 0.06}, 24_000, ["mu"]),
    "logistic, gibbs, block": (logistic, 3, {"step_size": 0.06}, 12_000, ["mu"]),
    "non-centred scale, table": (
        non_centred,
        3,
        {**TABLE, "step_size": 0.06, "phi_step_size": 0.012},
        40_000,
        ["mu", "tau"],
    ),
    "student, table": (student, 2, {**TABLE, "step_size": 0.04, "phi_step_size": 0.008}, 40_000, ["mu"]),
}


def moments(draws: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and their Monte-Carlo errors, of draws ``[S]`` or ``[S, d]``."""
    import arviz as az

    values = draws.reshape(1, len(draws), -1).numpy()
    ess = {m: np.array([az.ess(values[..., k], method=m) for k in range(values.shape[-1])]) for m in ("mean", "sd")}
    assert min(float(v.min()) for v in ess.values()) > 150, ess
    sd = values.std((0, 1), ddof=1)
    return values.mean((0, 1)), sd, sd / np.sqrt(ess["mean"]), sd / np.sqrt(2 * ess["sd"])


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_agreement_with_nuts(name: str) -> None:
    program, block, options, visits, sites = PROGRAMS[name]
    pyro.set_rng_seed(0)
    nuts = MCMC(NUTS(program(None)), num_samples=1_000, warmup_steps=300, disable_progbar=True)
    nuts.run()
    pyro.set_rng_seed(1)
    kernel = SGLDGibbs(program(block), plate="groups", **options)
    ours = MCMC(kernel, num_samples=visits, warmup_steps=visits // 10, disable_progbar=True)
    ours.run()
    for site in sites:
        a, b = (moments(m.get_samples()[site]) for m in (nuts, ours))
        assert np.abs((a[0] - b[0]) / np.hypot(a[2], b[2])).max() < 4.0, (site, a, b)
        assert np.abs((a[1] - b[1]) / np.hypot(a[3], b[3])).max() < 4.0, (site, a, b)


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_kernel_knows_what_applies(name: str) -> None:
    """The exact draw is offered where the program is normal given normal, and refused with the reason elsewhere."""
    program, block, options, _, sites = PROGRAMS[name]
    kernel = SGLDGibbs(program(block), plate="groups", **options)
    kernel.setup(0)
    assert kernel.structure is not None
    assert sorted(kernel.initial_params) == sites
    if "gibbs" in name:
        assert list(kernel.structure.pairs) == sites
        return
    assert not kernel.structure.pairs
    with pytest.raises(ValueError, match="which works for any program"):
        SGLDGibbs(program(block), plate="groups", step_size=0.02).setup(0)
    assert kernel.structure.reruns == ("non-centred" in name)
