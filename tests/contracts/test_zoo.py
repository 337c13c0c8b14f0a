"""What statisticians write first, with no option set: the posterior of Pyro's NUTS, or of a grid, within its error."""

from __future__ import annotations

from typing import Any

import arviz as az
import numpy as np
import pyro
import pytest
from pyro.infer import NUTS
from pyro.infer import mcmc as pyro_mcmc
from zoo_programs import EASIER, ZOO

from pyro_lift import MCMC, SGLDGibbs

#: Programs whose global sites all have an exact draw, and which of them are scales.
EXACT = {
    "schools": {"tau"},
    "radon, LKJ, known noise": {"sd", "L"},
    "radon, intercepts": {"sd_a"},
    "logistic": {"tau"},
    "regression": {"tau"},
}


def set_up(name: str, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(ZOO[name], seed=1, **options)
    kernel.setup(4)
    return kernel


@pytest.mark.parametrize("name", ZOO)
def test_each_program_is_taken_as_it_stands(name: str) -> None:
    kernel = set_up(name)
    assert kernel.chain.settings.phi_update in (("gibbs", "nuts") if name in EXACT else ("nuts",))
    kernel.sample(kernel.initial_params)
    assert all(np.isfinite(value.numpy()).all() for value in kernel.state.phi.values())


@pytest.mark.parametrize("name", ZOO)
def test_asked_for_exact_draws_it_gives_them_or_says_why_not(name: str) -> None:
    if name not in EXACT:
        with pytest.raises(ValueError, match=r'phi_update="nuts"|Put it inside the plate'):
            set_up(name, phi_update="gibbs")
        return
    structure = set_up(name, phi_update="gibbs").chain.structure
    assert set(structure.scales) == EXACT[name] and not structure.reasons


def quantities(draws: Any) -> Any:
    """Mean, sd, 10 % and 90 % quantile with their Monte-Carlo errors; ``[4, 2]``."""
    x = draws[None]
    kinds: list[dict[str, Any]] = [{"method": "mean"}, {"method": "sd"}]
    kinds += [{"method": "quantile", "prob": p} for p in (0.1, 0.9)]
    values = [x.mean(), x.std(), np.quantile(x, 0.1), np.quantile(x, 0.9)]
    return np.array([[v, float(az.mcse(x, **kind))] for v, kind in zip(values, kinds, strict=True)])


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_it_has_the_posterior_of_nuts_within_monte_carlo_error(name: str) -> None:
    pyro.set_rng_seed(0)
    program = EASIER.get(name, ZOO[name])
    reference = pyro_mcmc.MCMC(NUTS(program, target_accept_prob=0.9), 1_000, 500, disable_progbar=True)
    reference.run()
    ours = MCMC(SGLDGibbs(ZOO[name], seed=1), 1_000, 500, disable_progbar=True)
    ours.run()
    theirs, mine = reference.get_samples(), ours.get_samples()
    for site, draws in mine.items():
        flat, other = (x.reshape(len(x), -1).double().numpy() for x in (draws, theirs[site]))
        for k in range(flat.shape[1]):
            if flat[:, k].std() == 0.0 and other[:, k].std() == 0.0:
                continue  # a constant corner of a Cholesky factor
            for whose, x in (("ours", flat), ("the reference", other)):  # a reference that is stuck is none
                assert float(az.ess(x[None, :, k])) > 100.0, (whose, site, k)
            a, b = quantities(flat[:, k]), quantities(other[:, k])
            z = (a[:, 0] - b[:, 0]) / np.hypot(a[:, 1], b[:, 1])
            assert np.abs(z).max() < 4.5, (site, k, a, b)
