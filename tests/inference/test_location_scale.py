"""Sites as distances from their location: the density is that of the site times the Jacobian, at any scale."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor
from torch.distributions import biject_to

from pyro_lift import SGLDGibbs
from pyro_lift.inference.gibbs.together import Posterior
from pyro_lift.inference.location_scale import location_scale

TRIL = torch.tensor([[0.7, 0.0], [0.3, 1.4]], dtype=torch.float64)
LOC = torch.tensor([0.4, -1.0], dtype=torch.float64)
LAWS: dict[str, Any] = {
    "Normal": dist.Normal(LOC, 0.3),
    "Student t": dist.StudentT(torch.tensor([3.0, 9.0], dtype=torch.float64), LOC, 0.3),
    "Laplace": dist.Laplace(LOC, 0.3),
    "Cauchy": dist.Cauchy(LOC, 0.3),
    "Gumbel": dist.Gumbel(LOC, 0.3),
    "log-normal": dist.LogNormal(LOC, 0.3),
    "multivariate normal": dist.MultivariateNormal(LOC, scale_tril=TRIL),
}


@pytest.mark.parametrize("name", LAWS)
def test_the_density_of_the_distance_is_the_sites_times_the_jacobian(name: str) -> None:
    law = LAWS[name]
    transform = biject_to(law.support) if name == "log-normal" else None
    around = location_scale(law, transform)
    assert around is not None
    raw = torch.tensor([0.8, -0.5], dtype=torch.float64)
    leaf = around.leaf(raw)
    assert torch.allclose(around.raw(leaf), raw)
    value, jacobian = leaf, torch.autograd.functional.jacobian(around.leaf, raw)
    expected = torch.linalg.slogdet(jacobian).logabsdet
    if transform is not None:
        value = transform(leaf)
        expected = expected + transform.log_abs_det_jacobian(leaf, value).sum()
    expected = expected + law.log_prob(value).sum()
    assert float(around.log_density(raw)) == pytest.approx(float(expected), rel=1e-10)


@pytest.mark.parametrize("kind", ["normal", "multivariate"])
def test_a_scale_that_is_lost_to_rounding_beside_the_location_is_no_likelier_for_it(kind: str) -> None:
    """In single precision m + s z is m where s is below 1e-7 m; z must count all the same."""

    def model() -> None:
        mean = pyro.sample("mean", dist.Normal(0.0, 5.0))
        sd = pyro.sample("sd", dist.HalfNormal(1.0))
        with pyro.plate("tasks", 40):
            if kind == "normal":
                theta = pyro.sample("theta", dist.Normal(mean, sd))
            else:
                tril = sd.unsqueeze(-1).unsqueeze(-1) * torch.eye(2)
                theta = pyro.sample("theta", dist.MultivariateNormal(mean.expand(2), scale_tril=tril))[..., 0]
            pyro.sample("y", dist.StudentT(4.0, theta, 1.0), obs=torch.ones(40))

    kernel = SGLDGibbs(model, phi_update="nuts", seed=0)
    kernel.setup(4)
    values: dict[int | None, dict[str, Tensor]] = {}
    values[None] = {"theta": torch.randn(40, *([2] * (kind != "normal")), generator=torch.Generator().manual_seed(0))}

    def density(log_sd: float) -> Tensor:
        phi = {"mean": torch.tensor(2.0), "sd": torch.tensor(log_sd)}
        run = kernel.chain.program.run(
            phi, values, torch.arange(40), None, want_grad=False, raw=kernel.chain.raw or frozenset()
        )
        posterior = Posterior(kernel.chain, run, kernel.chain.raw or frozenset())
        vector = torch.cat([torch.tensor([2.0, log_sd]), values[None]["theta"].reshape(-1)]).double()
        return torch.tensor(posterior.at(vector).density)

    assert kernel.chain.raw
    # The likelihood has become flat, so that only the half normal's e^x is left of the change.
    assert float(density(-10.0) - density(-30.0)) == pytest.approx(20.0, abs=0.01)
