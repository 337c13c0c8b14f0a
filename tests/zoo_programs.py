"""The hierarchical programs that statisticians write first, as they write them, with data of their own.

Each is a program without arguments; the task plate is ``"tasks"``, and no plate is subsampled. Default dtype, as in a
script of a new user.
"""

from __future__ import annotations

from collections.abc import Callable

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

Model = Callable[[], None]
_source = torch.Generator().manual_seed(20)


def _normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=_source)


def _uniform(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=_source)


# ---------------------------------------------------------------------------------------------------- eight schools

SCHOOLS = torch.tensor([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
SCHOOLS_SD = torch.tensor([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def schools() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("tasks", 8):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("y", dist.Normal(theta, SCHOOLS_SD), obs=SCHOOLS)


def schools_raw() -> None:
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("tasks", 8):
        eta = pyro.sample("eta", dist.Normal(0.0, 1.0))
        theta = pyro.deterministic("theta", mu + tau * eta)
        pyro.sample("y", dist.Normal(theta, SCHOOLS_SD), obs=SCHOOLS)


# ---------------------------------------------------------------------------------------------------- radon

GROUPS = 80
_sizes = torch.randint(3, 20, (GROUPS,), generator=_source)
MOST = int(_sizes.max())
COUNTY = torch.repeat_interleave(torch.arange(GROUPS), _sizes)
U = 0.7 * _normal(GROUPS)
FLOOR = (_uniform(len(COUNTY)) < 0.2).float()
_effects = torch.stack([1.4 + 0.7 * U, torch.full((GROUPS,), -0.6)], -1)
_effects = _effects + _normal(GROUPS, 2) @ torch.tensor([[0.3, 0.1], [0.0, 0.25]])
RADON = _effects[COUNTY, 0] + _effects[COUNTY, 1] * FLOOR + 0.75 * _normal(len(COUNTY))
MASK = torch.arange(MOST) < _sizes.unsqueeze(-1)
PAD_Y, PAD_X = torch.zeros(GROUPS, MOST), torch.zeros(GROUPS, MOST)
PAD_Y[MASK], PAD_X[MASK] = RADON, FLOOR
#: The design of each county's rows ``[GROUPS, MOST, 2]``, zero at padding.
PAD_ROWS = torch.stack([MASK.to(PAD_X), PAD_X], -1)


def _independent_level() -> tuple[Tensor, ...]:
    """Sample what all counties share where intercepts and slopes are independent."""
    g0 = pyro.sample("g0", dist.Normal(0.0, 5.0))
    g1 = pyro.sample("g1", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    sd_a = pyro.sample("sd_a", dist.HalfCauchy(1.0))
    sd_b = pyro.sample("sd_b", dist.HalfCauchy(1.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    return g0, g1, b, sd_a, sd_b, sigma


def radon_rows_outside() -> None:
    """Rows in a plate of their own, with the county of each: the commonest way."""
    g0, g1, b, sd_a, sd_b, sigma = _independent_level()
    with pyro.plate("tasks", GROUPS):
        alpha = pyro.sample("alpha", dist.Normal(g0 + g1 * U, sd_a))
        beta = pyro.sample("beta", dist.Normal(b, sd_b))
    with pyro.plate("rows", len(COUNTY)):
        pyro.sample("y", dist.Normal(alpha[COUNTY] + beta[COUNTY] * FLOOR, sigma), obs=RADON)


def radon_rows_outside_collapsed() -> None:
    """The same law of what all counties share, each county's intercept and slope integrated out: easy for NUTS."""
    g0, g1, b, sd_a, sd_b, sigma = _independent_level()
    _collapsed(torch.stack([g0 + g1 * U, b.expand(GROUPS)], -1), torch.stack([sd_a, sd_b]), torch.eye(2), sigma)


def _correlated_level() -> tuple[Tensor, ...]:
    """Sample what all counties share where intercepts and slopes are correlated."""
    g0 = pyro.sample("g0", dist.Normal(0.0, 5.0))
    g1 = pyro.sample("g1", dist.Normal(0.0, 5.0))
    b = pyro.sample("b", dist.Normal(0.0, 5.0))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    sigma = pyro.sample("sigma", dist.HalfCauchy(1.0))
    return g0, g1, b, sd, L, sigma


def radon_lkj() -> None:
    """Correlated intercepts and slopes, rows padded and masked in a plate inside."""
    g0, g1, b, sd, L, sigma = _correlated_level()
    with pyro.plate("tasks", GROUPS, dim=-2) as index:
        mean = torch.stack([g0 + g1 * U[index], b.expand(GROUPS)], -1).unsqueeze(-2)
        ab = pyro.sample("ab", dist.MultivariateNormal(mean, scale_tril=sd.unsqueeze(-1) * L))
        with pyro.plate("rows", MOST, dim=-1), pyro.poutine.mask(mask=MASK[index]):
            level = ab[..., 0] + ab[..., 1] * PAD_X[index]
            pyro.sample("y", dist.Normal(level, sigma), obs=PAD_Y[index])


def radon_lkj_known_noise() -> None:
    """As above with a known noise, rows as an event: every global site has an exact draw."""
    g = pyro.sample("g", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    with pyro.plate("tasks", GROUPS) as index:
        mean = torch.stack([g[0] + g[1] * U[index], g[2].expand(len(index))], -1)
        ab = pyro.sample("ab", dist.MultivariateNormal(mean, scale_tril=sd.unsqueeze(-1) * L))
        level = ab[..., :1] + ab[..., 1:] * PAD_X[index]
        pyro.sample("y", dist.Normal(level, 0.75).mask(MASK[index]).to_event(1), obs=PAD_Y[index])


def _collapsed(mean: Tensor, sd: Tensor, L: Tensor, sigma: Tensor) -> None:
    """Observe the rows with each county's intercept and slope ``[GROUPS, 2]`` integrated out."""
    factor = PAD_ROWS @ (sd.unsqueeze(-1) * L)
    noise = torch.where(MASK, sigma.square(), torch.ones(()))  # of padding: a constant
    covariance = factor @ factor.mT + torch.diag_embed(noise)
    level = (PAD_ROWS @ mean.unsqueeze(-1)).squeeze(-1)
    pyro.sample("y", dist.MultivariateNormal(level, covariance).to_event(1), obs=PAD_Y)


def radon_lkj_collapsed() -> None:
    """The program ``radon_lkj`` without its local sites: the same law of the others, and one that NUTS finds easy."""
    g0, g1, b, sd, L, sigma = _correlated_level()
    _collapsed(torch.stack([g0 + g1 * U, b.expand(GROUPS)], -1), sd, L, sigma)


def radon_lkj_known_noise_collapsed() -> None:
    """The program ``radon_lkj_known_noise`` likewise."""
    g = pyro.sample("g", dist.Normal(torch.zeros(3), 5.0).to_event(1))
    sd = pyro.sample("sd", dist.HalfNormal(torch.ones(2)).to_event(1))
    L = pyro.sample("L", dist.LKJCholesky(2, 2.0))
    _collapsed(torch.stack([g[0] + g[1] * U, g[2].expand(GROUPS)], -1), sd, L, torch.tensor(0.75))


def radon_plain() -> None:
    """Intercepts with a predictor of the county, by its index; noise known; rows masked."""
    g0 = pyro.sample("g0", dist.Normal(0.0, 5.0))
    g1 = pyro.sample("g1", dist.Normal(0.0, 5.0))
    sd_a = pyro.sample("sd_a", dist.HalfCauchy(1.0))
    with pyro.plate("tasks", GROUPS) as index:
        alpha = pyro.sample("alpha", dist.Normal(g0 + g1 * U[index], sd_a))
        y = dist.Normal(alpha.unsqueeze(-1) - 0.6 * PAD_X[index], 0.75).mask(MASK[index]).to_event(1)
        pyro.sample("y", y, obs=PAD_Y[index])


# ---------------------------------------------------------------------------------------------------- others

LOGIT_X = torch.cat([torch.ones(15, 30, 1), _normal(15, 30, 2)], -1)
_weights = torch.tensor([0.4, -1.0, 0.7]) + torch.tensor([0.8, 0.3, 0.6]) * _normal(15, 3)
LOGIT_Y = (_uniform(15, 30) < torch.einsum("gnd,gd->gn", LOGIT_X, _weights).sigmoid()).float()


def logistic() -> None:
    """Hierarchical logistic regression, a scale for each coordinate."""
    mu = pyro.sample("mu", dist.Normal(torch.zeros(3), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.tensor(1.0)).expand([3]).to_event(1))
    with pyro.plate("tasks", 15) as index:
        w = pyro.sample("w", dist.Normal(mu, tau).to_event(1))
        logits = torch.einsum("gnd,gd->gn", LOGIT_X[index], w)
        pyro.sample("y", dist.Bernoulli(logits=logits).to_event(1), obs=LOGIT_Y[index])


EXPOSURE = 1.0 + 9.0 * _uniform(20)
RATES = 0.3 + 2.0 * _uniform(20)
COUNTS = torch.poisson(RATES * EXPOSURE, generator=_source)


def poisson() -> None:
    """Rates with a gamma upper level of unknown shape and rate."""
    a = pyro.sample("a", dist.Gamma(2.0, 1.0))
    b = pyro.sample("b", dist.Gamma(2.0, 1.0))
    with pyro.plate("tasks", 20) as index:
        rate = pyro.sample("rate", dist.Gamma(a, b))
        pyro.sample("y", dist.Poisson(rate * EXPOSURE[index]), obs=COUNTS[index])


STUDENT_Y = torch.cat([0.5 + 0.4 * _normal(10), torch.tensor([4.0, -3.0])]).unsqueeze(-1) + 0.6 * _normal(12, 4)


def student() -> None:
    """A Student-t upper level of known degrees of freedom."""
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    with pyro.plate("tasks", 12) as index:
        theta = pyro.sample("theta", dist.StudentT(4.0, phi, tau))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 0.6).expand([12, 4]).to_event(1), obs=STUDENT_Y[index])


def student_unknown_freedom() -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 2.0))
    tau = pyro.sample("tau", dist.HalfCauchy(1.0))
    nu = pyro.sample("nu", dist.Gamma(2.0, 0.1))
    with pyro.plate("tasks", 12) as index:
        theta = pyro.sample("theta", dist.StudentT(nu, phi, tau))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 0.6).expand([12, 4]).to_event(1), obs=STUDENT_Y[index])


def scale_alone() -> None:
    """Effects around zero: a scale, and no mean."""
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("tasks", 12) as index:
        theta = pyro.sample("theta", dist.Normal(0.0, tau))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 0.6).expand([12, 4]).to_event(1), obs=STUDENT_Y[index])


LOG_Y = (0.3 + 0.5 * _normal(15)).exp().unsqueeze(-1) + 0.4 * _normal(15, 5)


def lognormal() -> None:
    """Positive effects."""
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    tau = pyro.sample("tau", dist.HalfNormal(1.0))
    with pyro.plate("tasks", 15) as index:
        theta = pyro.sample("theta", dist.LogNormal(phi, tau))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 0.4).expand([15, 5]).to_event(1), obs=LOG_Y[index])


Z = _normal(30, 2)
_slopes = torch.tensor([[1.0, -0.5], [0.3, 0.8]])
UPPER_Y = (Z @ _slopes.T + torch.tensor([0.5, -1.0]) + 0.5 * _normal(30, 2)).unsqueeze(-2) + 0.8 * _normal(30, 5, 2)


def regression() -> None:
    """A regression at the upper level: theta_i ~ N(W z_i + b, tau), tau by coordinate."""
    W = pyro.sample("W", dist.Normal(torch.zeros(2, 2), 2.0).to_event(2))
    b = pyro.sample("b", dist.Normal(torch.zeros(2), 2.0).to_event(1))
    tau = pyro.sample("tau", dist.HalfNormal(torch.ones(2)).to_event(1))
    with pyro.plate("tasks", 30) as index:
        theta = pyro.sample("theta", dist.Normal(Z[index] @ W.T + b, tau).to_event(1))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-2), 0.8).expand([30, 5, 2]).to_event(2), obs=UPPER_Y[index])


ZOO: dict[str, Model] = {
    "schools": schools,
    "schools, non-centred": schools_raw,
    "radon, rows outside": radon_rows_outside,
    "radon, LKJ": radon_lkj,
    "radon, LKJ, known noise": radon_lkj_known_noise,
    "radon, intercepts": radon_plain,
    "logistic": logistic,
    "poisson": poisson,
    "student": student,
    "student, unknown freedom": student_unknown_freedom,
    "a scale alone": scale_alone,
    "lognormal": lognormal,
    "regression": regression,
}
#: Programs whose reference is another one of the same law: in the program as it stands NUTS is stuck, or slow to move.
EASIER = {
    "schools": schools_raw,
    "radon, rows outside": radon_rows_outside_collapsed,
    "radon, LKJ": radon_lkj_collapsed,
    "radon, LKJ, known noise": radon_lkj_known_noise_collapsed,
}
