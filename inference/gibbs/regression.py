r"""Regression at the upper level: theta_i ~ N(A_i phi + c_i, Sigma), A_i known covariates of the task, phi normal.

``Normal(W @ z[i] + b, tau)``, ``Normal(g0 + g1 * u[index], tau)``, ``MultivariateNormal(torch.stack(...), ...)``: the
mean of a local family is linear in several global sites, whose values one after another are phi ``[K]``. With
:math:`r_i = \theta_i - A_i\phi - c_i` at the phi of the chain, running sums

.. math:: G_{de} = \sum_i a_{id} a_{ie}^\top,\quad C_{de} = \sum_i a_{id}\, r_{ie},\quad
          Q_{de} = \sum_i r_{id}\, r_{ie}

(d = e alone where the coordinates are uncorrelated) give the exact draw of phi + delta given all theta_i,

.. math:: \Lambda = \mathrm{diag}(\sigma^{-2}) + \sum_{de} \Sigma^{-1}_{de} G_{de},\quad
          \delta \sim \mathcal N\Big(\Lambda^{-1}\big[\sigma^{-2}(m_0 - \phi) + \sum_{de}\Sigma^{-1}_{de} C_{de}\big],
          T \Lambda^{-1}\Big),

and after it :math:`Q_{de} - C_{de}^\top\delta - C_{ed}^\top\delta + \delta^\top G_{de}\,\delta` is what the draw of
the scales needs. Sums around the chain's own phi have no difference of large numbers in them. A_i is read off the
program's graph at a task's first visit, when its form is held against that of the first tasks too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.dependence import Links, hangs_on
from pyro_lift.inference.gibbs.dense import CorrelationSite, Dense, correlation_fault, correlation_of, covariance_of
from pyro_lift.inference.gibbs.laws import known_at, with_law
from pyro_lift.inference.gibbs.normal_sites import (
    dense_normal,
    described,
    direct_fault,
    listed,
    local_normal,
    plain_normal,
    scalar_if_constant,
    variance_by_task,
)
from pyro_lift.inference.gibbs.scales import ScaleLaw, ScaleSite, law_fault
from pyro_lift.inference.program import Evaluation, Latent, Program, Rows

__all__ = [
    "Coefficients",
    "Regression",
    "by_task",
    "coefficients",
    "draw",
    "find_regressions",
    "moved",
    "regression_fault",
]

#: Numbers in G, and in the A of all tasks, beyond which a regression is not drawn exactly.
MOST_SUMS, MOST_COVARIATES = 4_000_000, 20_000_000


class Regression(NamedTuple):
    """A local family whose mean is linear in several global sites; see the module's text.

    Attributes:
        family: of the local sites.
        sites: whose values, one after another, are phi.
        shape: of one task's theta.
        prior_mean: m_0 ``[K]``, in float64.
        prior_precision: 1/sigma^2 ``[K]``.
        local_variance: of theta around its mean, one number or of its shape; that of the start where it is unknown.
        law: how the variance hangs on a scale site; None where it is known.
        dense: the correlations of the coordinates; None where there are none.
    """

    family: str
    sites: tuple[str, ...]
    shape: torch.Size
    prior_mean: Tensor
    prior_precision: Tensor
    local_variance: Tensor
    law: ScaleLaw | None = None
    dense: Dense | None = None

    @property
    def cross(self) -> str:
        """Name of C among the running sums."""
        return f"{self.family}: covariates times rest"

    @property
    def square(self) -> str:
        """Name of Q among the running sums."""
        return f"{self.family}: rest squared"

    def at(self, sites: Mapping[str, ScaleSite | CorrelationSite], values: Mapping[str, Tensor]) -> Regression:
        """Return it with its variances and correlations at some values of the global sites, unconstrained."""
        return known_at(self, sites, values)

    def zeros(self) -> dict[str, Tensor]:
        """Return C and Q of tasks that stand at their mean."""
        D = (self.shape.numel(),) * (1 if self.dense is None else 2)
        return {
            self.cross: self.prior_mean.new_zeros(*D, len(self.prior_mean)),
            self.square: self.prior_mean.new_zeros(*D),
        }


@dataclass
class Coefficients:
    """A_i of the tasks that were visited, and their G; it grows at first visits.

    Attributes:
        A: ``[N, D, K]``, zero where a task was not visited yet; float64.
        seen: which tasks were.
        dense: whether G has all pairs of coordinates, or each with itself alone.
    """

    A: Tensor
    seen: Tensor
    dense: bool
    _gram: Tensor | None = None

    @classmethod
    def empty(cls, level: Regression, num_tasks: int) -> Coefficients:
        """Return those of no task."""
        A = level.prior_mean.new_zeros(num_tasks, level.shape.numel(), len(level.prior_mean))
        return cls(A, torch.zeros(num_tasks, dtype=torch.bool, device=A.device), level.dense is not None)

    def take(self, tasks: list[int], A: Tensor) -> None:
        """Take up tasks that are visited for the first time."""
        index = torch.tensor(tasks, device=self.A.device)
        self.A[index], self.seen[index], self._gram = A, True, None

    @property
    def complete(self) -> bool:
        """Whether every task was visited."""
        return bool(self.seen.all())

    @property
    def gram(self) -> Tensor:
        """G: ``[D, K, K]``, or ``[D, D, K, K]`` of correlated coordinates."""
        if self._gram is None:
            form = "ndk,nel->dekl" if self.dense else "ndk,ndl->dkl"
            self._gram = torch.einsum(form, self.A, self.A)
        return self._gram


# ---------------------------------------------------------------------------------------------------- recognition


def find_regressions(
    program: Program,
    runs: list[tuple[Evaluation, Links]],
    unpaired: Mapping[str, str],
    scales: list[str],
    generator: torch.Generator,
) -> list[Regression]:
    """Return the families whose mean is linear in global sites that are no pair's.

    Args:
        program: the model.
        runs: of the first tasks and of others, with their links.
        unpaired: global sites that may be part of a regression.
        scales: global sites that may be scales.
        generator: of minibatches.
    """
    run, links = runs[0]
    found: list[Regression] = []
    for family in dict.fromkeys(site.family for site in run.locals.values()):
        child = next(site for site in run.locals.values() if site.family == family)
        level = _level(child, run, unpaired, 1 if program.plate is None else run.plates[program.plate].size)
        if level is None:
            continue
        whole = with_law(level, child, level.shape, program, (run, links), scales, generator)
        if isinstance(whole, str) or any(regression_fault(whole, *seen) is not None for seen in runs):
            continue
        if _is_linear(whole, child, program, run, generator):
            found.append(whole)
    return found


def _level(child: Latent, run: Evaluation, unpaired: Mapping[str, str], num_tasks: int) -> Regression | None:
    normal = local_normal(child)
    if normal is None or not normal.mean.requires_grad:
        return None
    sites = [name for name, site in run.globals.items() if hangs_on(normal.mean, site.leaf)]
    priors = [plain_normal(run.globals[name]) for name in sites]
    if not sites or any(name not in unpaired for name in sites) or any(prior is None for prior in priors):
        return None
    leaves = [run.globals[name].leaf for name in sites]
    means = [_spread(p.mean, leaf) for p, leaf in zip(priors, leaves, strict=True) if p is not None]
    precisions = [_spread(p.precision, leaf) for p, leaf in zip(priors, leaves, strict=True) if p is not None]
    variance = variance_by_task(child, normal)[0]
    shape, K = variance.shape, sum(leaf.numel() for leaf in leaves)
    multivariate, D = dense_normal(child), variance.numel()
    if multivariate is not None and multivariate.event_shape[0] != D:
        return None  # several vectors a task
    if (D if multivariate is None else D * D) * K * K > MOST_SUMS:
        return None
    if num_tasks * D * K > MOST_COVARIATES:
        return None
    dense = None if multivariate is None else Dense(correlation_of(multivariate)[0])
    return Regression(
        child.family,
        tuple(sites),
        shape,
        torch.cat(means),
        torch.cat(precisions),
        scalar_if_constant(variance.detach()),
        dense=dense,
    )


def _spread(value: Tensor, leaf: Tensor) -> Tensor:
    return torch.broadcast_to(value.detach(), leaf.shape).reshape(-1).double()


def regression_fault(level: Regression, run: Evaluation, links: Links) -> str | None:
    """Why the exact draw of a regression does not hold for the tasks of one run; None where it does."""
    for name in level.sites:
        if name not in run.globals:
            return f"{name!r} is not a global site of every task"
        fault = direct_fault(name, run, links)
        if fault is not None:
            return fault
        others = {run.locals[c].family for c in links.children(name) if c in run.locals} - {level.family}
        if others:
            return f"another local family depends on {name!r} too ({listed(others)})"
    children = [site for site in run.locals.values() if site.family == level.family]
    tasks = [child.task for child in children]
    if len(set(tasks)) != len(tasks) or (None not in tasks and set(tasks) != set(run.tasks)):
        return f"a task does not have exactly one site of the family {level.family!r}"
    for child in children:
        fault = _child_fault(level, child, run, links)
        if fault is not None:
            return fault
    return None


def _child_fault(level: Regression, child: Latent, run: Evaluation, links: Links) -> str | None:
    normal, say = local_normal(child), f"the local site {child.name!r}"
    if normal is None:
        return f"{say} is {described(child)}, not a plain normal"
    free = {level.law and level.law.site, level.dense and level.dense.site}
    others = links.laws[child.name] - set(level.sites) - free
    if others:
        return f"the distribution of {say} depends on another site too ({listed(others)})"
    leaves = [run.globals[name].leaf for name in level.sites]
    if any(hangs_on(normal.precision, leaf) for leaf in leaves):
        return f"the scale of {say} depends on what its mean depends on"
    if (dense_normal(child) is None) != (level.dense is None):
        return f"{say} is {described(child)}, as that of the first tasks is not"
    if not _has_constant_slope(normal.mean, leaves):
        return f"the mean of {say} is not linear in {listed(level.sites)}"
    fault = None if level.dense is None else correlation_fault(level.dense, child, run)
    if fault is not None:
        return fault
    variance = variance_by_task(child, normal)
    if variance[0].shape != level.shape:
        return f"{say} has another shape than that of the first tasks"
    if level.law is not None:
        return law_fault(level.law, child, normal, run)
    if not torch.allclose(variance, torch.broadcast_to(level.local_variance, variance.shape), atol=0.0):
        return f"the scale of {say} differs by task"
    return None


def _has_constant_slope(mean: Tensor, leaves: list[Tensor]) -> bool:
    """Whether no derivative of a mean hangs on where it is taken."""
    if not mean.requires_grad:
        return True
    probe = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    slopes = torch.autograd.grad(mean, leaves, probe, create_graph=True, allow_unused=True)
    return not any(g is not None and any(hangs_on(g, leaf) for leaf in leaves) for g in slopes)


def _is_linear(level: Regression, child: Latent, program: Program, run: Evaluation, generator: torch.Generator) -> bool:
    """Whether the mean at another phi is where its slope says: a kink has a constant slope on either side."""
    source = torch.Generator().manual_seed(1)
    values = {name: site.leaf.detach() for name, site in run.globals.items()}
    moves = {k: torch.randn(values[k].shape, generator=source).to(values[k]) for k in level.sites}
    elsewhere = program.run(
        {k: v + moves[k] if k in moves else v for k, v in values.items()},
        {},
        torch.tensor(run.tasks),
        generator,
        want_grad=False,
    )
    before, after = local_normal(child), local_normal(elsewhere.locals[child.name])
    assert before is not None and after is not None
    delta = torch.cat([moves[k].reshape(-1).double() for k in level.sites])
    expected = mean_by_task(child, before.mean) + coefficients(level, child, run) @ delta
    there = mean_by_task(child, after.mean)
    size = 1e-4 * (1.0 + there.abs().max() + before.precision.detach().max().rsqrt())
    return bool(((there - expected).abs() <= size).all())


# ---------------------------------------------------------------------------------------------------- covariates


def by_task(child: Latent, value: Tensor) -> Tensor:
    """A value of a local site's shape as ``[tasks, D]``, in float64."""
    value = value.detach().double()
    if child.task is None and child.plate_dim is not None:
        return value.movedim(child.plate_dim, 0).reshape(value.shape[child.plate_dim], -1)
    return value.reshape(1, -1)


def mean_by_task(child: Latent, mean: Tensor) -> Tensor:
    """The mean of a local site, likewise."""
    return by_task(child, torch.broadcast_to(mean, child.leaf.shape))


def coefficients(level: Regression, child: Latent, run: Evaluation) -> Tensor:
    r"""Read A_i off the graph of a run: ``[tasks, D, K]``, in float64.

    :math:`A^\top v` is a backward pass, linear in v; its derivative in v is a column of A, for all tasks at once.
    """
    normal = local_normal(child)
    assert normal is not None
    mean = torch.broadcast_to(normal.mean, child.leaf.shape)
    leaves = [run.globals[name].leaf for name in level.sites]
    columns: list[Tensor] = []
    if not mean.requires_grad:
        return torch.stack([by_task(child, torch.zeros_like(mean))] * len(level.prior_mean), -1)
    v = torch.zeros_like(mean, requires_grad=True)
    slopes = torch.autograd.grad(mean, leaves, v, create_graph=True, allow_unused=True)
    for leaf, slope in zip(leaves, slopes, strict=True):
        for k in range(leaf.numel()):
            column: Tensor | None = None
            if slope is not None and slope.requires_grad:
                (column,) = torch.autograd.grad(slope.reshape(-1)[k], v, retain_graph=True, allow_unused=True)
            columns.append(by_task(child, torch.zeros_like(mean) if column is None else column))
    return torch.stack(columns, -1)


# ---------------------------------------------------------------------------------------------------- running sums


def moved(
    level: Regression,
    known: Coefficients,
    run: Evaluation,
    sums: tuple[Tensor, Tensor],
    after: Mapping[int | None, Rows],
    before: Mapping[int | None, Rows],
) -> tuple[Tensor, Tensor]:
    """Return C and Q after a block's theta have moved, around the phi that they moved under.

    Args:
        level: the regression.
        known: A of the tasks.
        run: of the block, at that phi, with a graph.
        sums: C and Q before.
        after: theta by task and family.
        before: where they stood.
    """
    C, Q = sums
    whole = len(run.tasks) == len(known.A)  # all rests are at hand: made anew, no rounding stays in the sums
    if whole:
        C, Q = torch.zeros_like(C), torch.zeros_like(Q)
    for child in run.locals.values():
        if child.family != level.family:
            continue
        normal = local_normal(child)
        assert normal is not None
        mean = mean_by_task(child, normal.mean)
        new = by_task(child, after[child.task][level.family]) - mean
        old = torch.zeros_like(new) if whole else by_task(child, before[child.task][level.family]) - mean
        A = known.A[torch.tensor(run.tasks if child.task is None else [child.task], device=known.A.device)]
        if level.dense is None:
            C = C + torch.einsum("ndk,nd->dk", A, new - old)
            Q = (Q + (new.square() - old.square()).sum(0)).clamp_min(0.0)
        else:
            C = C + torch.einsum("ndk,ne->dek", A, new - old)
            Q = Q + new.T @ new - old.T @ old
    return C, Q


def draw(
    level: Regression,
    gram: Tensor,
    sums: tuple[Tensor, Tensor],
    phi: Rows,
    temperature: float,
    noise: Tensor,
) -> tuple[dict[str, Tensor], tuple[Tensor, Tensor]]:
    """Draw phi given all theta exactly, and return it by site, and C and Q around it.

    Args:
        level: at the variances and correlations of the chain.
        gram: G.
        sums: C and Q around the phi given.
        phi: the global sites.
        temperature: T.
        noise: standard normal ``[K]``, in float64.
    """
    C, Q = sums
    if level.dense is None:
        weight = torch.broadcast_to(level.local_variance.double(), level.shape).reshape(-1).reciprocal()
        precision, pull = torch.einsum("d,dkl->kl", weight, gram), torch.einsum("d,dk->k", weight, C)
    else:
        inverse = torch.cholesky_inverse(
            torch.linalg.cholesky(covariance_of(level.local_variance, level.dense.correlation))
        )
        precision, pull = torch.einsum("de,dekl->kl", inverse, gram), torch.einsum("de,dek->k", inverse, C)
    here = torch.cat([phi[name].detach().reshape(-1).double() for name in level.sites])
    root = torch.linalg.cholesky(torch.diag(level.prior_precision) + precision)
    target = level.prior_precision * (level.prior_mean - here) + pull
    delta = torch.cholesky_solve(target.unsqueeze(-1), root).squeeze(-1)
    spread = torch.linalg.solve_triangular(root.T, noise.unsqueeze(-1), upper=True).squeeze(-1)
    there = here + delta + temperature**0.5 * spread
    parts = there.split([phi[name].numel() for name in level.sites])
    drawn = {
        name: part.view(phi[name].shape).to(phi[name].dtype) for name, part in zip(level.sites, parts, strict=True)
    }
    # What phi is after rounding to its dtype.
    delta = torch.cat([drawn[name].reshape(-1).double() for name in level.sites]) - here
    along: Any = torch.einsum("...k,k->...", C, delta)
    back = along if level.dense is None else along.transpose(0, 1)
    Q = Q - along - back + torch.einsum("...kl,k,l->...", gram, delta, delta)
    return drawn, (C - gram @ delta, Q.clamp_min(0.0) if level.dense is None else Q)
