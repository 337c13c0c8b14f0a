"""Slices of one number in floats: the densities are torch's, and the draws have their law."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from scipy import stats
from torch.distributions import biject_to

from pyro_lift.inference.gibbs.scalar_slices import is_exponential, plain_density, scalar_density, scalar_slice
from pyro_lift.inference.gibbs.scales import ScaleSite

LAWS: dict[str, Any] = {
    "HalfCauchy": dist.HalfCauchy(torch.tensor(1.7).double()),
    "HalfNormal": dist.HalfNormal(torch.tensor(0.6).double()),
    "Exponential": dist.Exponential(torch.tensor(2.5).double()),
    "LogNormal": dist.LogNormal(torch.tensor(0.3).double(), 0.8),
    "Gamma": dist.Gamma(torch.tensor(2.0).double(), 3.0),
    "InverseGamma": dist.InverseGamma(torch.tensor(3.0).double(), 2.0),
    "Uniform": dist.Uniform(torch.tensor(0.2).double(), 5.0),
}
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", LAWS)
def test_a_density_in_floats_is_that_of_torch_up_to_a_constant(name: str) -> None:
    law = LAWS[name]
    plain = plain_density(law)
    assert plain is not None
    values = [0.3, 0.7, 1.9, 4.4]
    apart = [plain(v) - float(law.log_prob(torch.tensor(v, dtype=torch.float64))) for v in values]
    assert max(apart) - min(apart) < 1e-9
    outside = 6.0 if name == "Uniform" else math.inf
    assert plain(outside) == -math.inf


def test_a_law_that_is_not_of_one_number_or_not_known_has_none() -> None:
    assert plain_density(dist.HalfNormal(torch.ones(2))) is None
    assert plain_density(dist.FoldedDistribution(dist.StudentT(3.0))) is None

    class Own(dist.HalfNormal):  # type: ignore[misc]
        def log_prob(self, value: torch.Tensor) -> torch.Tensor:
            return -value

    assert plain_density(Own(1.0)) is None


def test_an_exponential_map_is_recognised_as_pyro_writes_it() -> None:
    assert is_exponential(biject_to(dist.HalfCauchy(1.0).support))
    assert is_exponential(biject_to(dist.LogNormal(0.0, 1.0).support))
    assert not is_exponential(biject_to(dist.Uniform(0.0, 1.0).support)) and not is_exponential(None)
    assert not is_exponential(biject_to(torch.distributions.constraints.greater_than(1.0)))


@pytest.mark.parametrize("width", [0.1, 1.0, 30.0])
def test_a_chain_of_slices_has_the_law_at_any_width(width: float) -> None:
    stream, x, draws = torch.Generator().manual_seed(0), 0.5, []
    for k in range(8_000):
        x = scalar_slice(lambda u: 2.0 * u - math.exp(u), x, width, stream, CPU)  # the log of a gamma(2) number
        if k % 8 == 0:
            draws.append(math.exp(x))
    if width < 1.0:  # steps out by tenths: exact as the others, and as quick to mix
        assert len(draws) == 1_000
    assert stats.kstest(draws, stats.gamma(2.0).cdf).pvalue > 1e-3


def test_a_density_that_cannot_be_sliced_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite where slice sampling starts"):
        scalar_slice(lambda x: -math.inf, 0.0, 1.0, None, CPU)
    with pytest.raises(RuntimeError, match="does not fall off"):
        scalar_slice(lambda x: 0.0, 0.0, 1.0, None, CPU)


@pytest.mark.parametrize("count", [1, 3])
def test_the_density_of_a_logarithm_is_the_priors_with_its_jacobian(count: int) -> None:
    law = dist.HalfNormal(torch.tensor([0.6, 1.5, 2.0]).double()[:count])
    site = ScaleSite("tau", law, biject_to(law.support))
    leaf = torch.linspace(-0.5, 0.5, count).double()
    density = scalar_density(site, leaf, count - 1)
    x = np.array([-2.0, 0.0, 1.3])
    expected = stats.halfnorm(scale=float(law.scale[count - 1])).logpdf(np.exp(x)) + x
    apart = np.array([density(float(at)) for at in x]) - expected
    assert float(np.ptp(apart)) < 1e-9
