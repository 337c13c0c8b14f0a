r"""The exact draw of phi given all theta_i, where the program is normal given normal.

.. math:: \phi \mid \theta_{1..N} \sim
          \mathcal N\!\Big(v\,\big(\tfrac{m_0}{\sigma^2} + \tfrac{S}{\beta^2}\big),\; T\,v\Big), \qquad
          v = \Big(\tfrac{1}{\sigma^2} + \tfrac{N}{\beta^2}\Big)^{-1},\quad S = \sum_i \theta_i

It does not see the data, so no minibatch can bias it; it has no step size, so nothing can make it unstable.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.dependence import Links, hangs_on, links_of
from pyro_lift.inference.gibbs.dense import (
    CorrelationSite,
    Dense,
    correlation_fault,
    correlation_of,
    correlation_site_fault,
    covariance_of,
    draw_mean,
    is_correlation,
)
from pyro_lift.inference.gibbs.laws import known_at, with_law
from pyro_lift.inference.gibbs.normal_sites import (
    children_of,
    dense_normal,
    described,
    direct_fault,
    listed,
    local_normal,
    plain_normal,
    scalar_if_constant,
    variance_by_task,
)
from pyro_lift.inference.gibbs.regression import Regression, find_regressions
from pyro_lift.inference.gibbs.scales import (
    ScaleLaw,
    ScaleSite,
    is_scale,
    law_fault,
    scale_fault,
    scale_site,
)
from pyro_lift.inference.program import Evaluation, Latent, Program
from pyro_lift.inference.supports import innermost
from pyro_lift.models.priors import LocalGaussian

__all__ = ["NormalPair", "Structures", "adopt", "draw", "family_fault", "find_pairs", "pair_fault", "values_of"]


class NormalPair(NamedTuple):
    """A global site phi ~ N(prior_mean, 1/prior_precision) and the local family theta_i ~ N(phi, local_variance).

    Attributes:
        law: how the variance hangs on a scale site; None where it is known. ``local_variance`` is then that of the
            start.
        dense: the correlations of the coordinates; None where there are none.
    """

    global_site: str
    family: str
    prior_mean: Tensor
    prior_precision: Tensor
    local_variance: Tensor
    law: ScaleLaw | None = None
    dense: Dense | None = None

    @property
    def is_free(self) -> bool:
        """Whether its variances or correlations are unknown."""
        return self.law is not None or (self.dense is not None and self.dense.site is not None)

    def at(self, sites: Mapping[str, ScaleSite | CorrelationSite], values: Mapping[str, Tensor]) -> NormalPair:
        """Return the pair with its variances and correlations at some values of the global sites, unconstrained."""
        return known_at(self, sites, values)


class Structures(NamedTuple):
    """What :func:`find_pairs` finds.

    Attributes:
        pairs: by global site that is the mean of one normal local family.
        scales: by global site that is the scale, or the correlations, of paired families and enters nowhere else.
        reasons: for every other global site, why it is neither.
        regressions: by local family whose mean is linear in several global sites.
    """

    pairs: dict[str, NormalPair]
    scales: dict[str, ScaleSite | CorrelationSite]
    reasons: dict[str, str]
    regressions: dict[str, Regression]


def draw(pair: NormalPair, S: Tensor, num_tasks: int, temperature: float, noise: Tensor) -> Tensor:
    """One exact draw of phi; S in float64, the draw in the dtype of ``noise``."""
    if pair.dense is not None:
        covariance = covariance_of(pair.local_variance, pair.dense.correlation)
        spread = noise * temperature**0.5
        return draw_mean(pair.prior_mean, pair.prior_precision, covariance, S, num_tasks, spread)
    precision = pair.prior_precision.double() + num_tasks / pair.local_variance.double()
    mean = (pair.prior_precision.double() * pair.prior_mean.double() + S / pair.local_variance.double()) / precision
    return (mean + (temperature / precision).sqrt() * noise.double()).to(noise.dtype)


def find_pairs(
    program: Program,
    run: Evaluation,
    index: Tensor,
    generator: torch.Generator | None,
    *,
    unknown_scales: bool = True,
) -> Structures:
    """Which global sites are the mean of exactly one normal local family, and which are the scale of such families.

    The structure is read off the graphs of two runs: ``run``, and one for other tasks, ``index``. Every other block is
    held against it at its first visit (:func:`pair_fault`). Where a scale is unknown, a few runs more show how the
    variance hangs on it.

    Args:
        program: the model.
        run: of the first tasks, with gradients.
        index: of other tasks.
        generator: of minibatches.
        unknown_scales: whether a scale may be a global site.
    """
    generator = generator if generator is not None else torch.Generator()
    links = links_of(run)
    reasons = {}
    scales = [name for name, site in run.globals.items() if unknown_scales and _is_free(site, run, links)]
    for name in scales:
        fault = _site_fault(name, run, links)
        if fault is not None:
            reasons[name] = fault
    pairs = {}
    for name in [name for name in run.globals if name not in scales]:
        pair = _pair(name, run, links)
        if isinstance(pair, NormalPair) and pair.dense is not None and not unknown_scales:
            pair = "its local family is multivariate normal, which only the exact draw knows"
        if isinstance(pair, NormalPair) and scales:
            child = children_of(name, run, links)[0]
            pair = with_law(pair, child, run.globals[name].leaf.shape, program, (run, links), scales, generator)
        if isinstance(pair, str):
            reasons[name] = pair
        else:
            pairs[name] = pair
    other = program.run({name: site.leaf.detach() for name, site in run.globals.items()}, {}, index, generator)
    other_links = links_of(other)
    adopt(program, pairs, other, other_links)
    for name, pair in list(pairs.items()):
        sequential = any(site.task is not None for site in run.locals.values())
        fault = pair_fault(pair, run, links, sequential) or pair_fault(pair, other, other_links, sequential)
        if fault is not None:
            reasons[name] = fault
            del pairs[name]
    runs, regressions = [(run, links), (other, other_links)], {}
    if unknown_scales:
        unpaired = {name: reason for name, reason in reasons.items() if name not in scales}
        for level in find_regressions(program, runs, unpaired, scales, generator):
            regressions[level.family] = level
            for name in level.sites:
                del reasons[name]
    _settle_scales([s for s in scales if s not in reasons], pairs, regressions, reasons, runs)
    order = list(run.globals)
    return Structures(
        {name: pairs[name] for name in order if name in pairs},
        {name: _free_site(run.globals[name]) for name in scales if name not in reasons},
        {name: reasons[name] for name in order if name in reasons},
        regressions,
    )


def _settle_scales(
    scales: list[str],
    pairs: dict[str, NormalPair],
    regressions: dict[str, Regression],
    reasons: dict[str, str],
    runs: list[tuple[Evaluation, Links]],
) -> None:
    """Refuse a scale site that another task uses otherwise, or whose families are not all known; and their levels."""
    levels: dict[str, NormalPair | Regression] = {**pairs, **{f"{f} (regression)": r for f, r in regressions.items()}}
    families = {level.family for level in levels.values()}
    for name in scales:
        faults = [family_fault(name, families, run, links) for run, links in runs]
        fault = next((fault for fault in faults if fault is not None), None)
        if fault is not None:
            reasons[name] = fault
    dense = {x.law.site: key for key, x in levels.items() if x.law is not None and x.dense is not None}
    for name, owner in dense.items():
        if any(x.law is not None and x.law.site == name for key, x in levels.items() if key != owner):
            reasons[name] = "it is the scale of a multivariate normal family and of another one"
    for name, pair in list(pairs.items()):
        fault = _scale_refusal(pair, reasons)
        if fault is not None:
            reasons[name] = fault
            del pairs[name]
    for family, level in list(regressions.items()):
        fault = _scale_refusal(level, reasons)
        if fault is not None:
            reasons.update(dict.fromkeys(level.sites, fault))
            del regressions[family]


def _scale_refusal(level: NormalPair | Regression, reasons: Mapping[str, str]) -> str | None:
    """Why a level's scale or correlations cannot be drawn, where they are sites that are refused."""
    for site in (level.law and level.law.site, level.dense and level.dense.site):
        if site is not None and site in reasons:
            return f"the scale of its family, {site!r}, cannot be drawn: {reasons[site]}"
    return None


def family_fault(name: str, families: Collection[str], run: Evaluation, links: Links) -> str | None:
    """Why a global site is not the scale of paired families alone, in the tasks of one run; None where it is."""
    fault = _site_fault(name, run, links)
    if fault is not None:
        return fault
    for child in children_of(name, run, links):
        if child.family not in families:
            return f"the local site {child.name!r} hangs on it, and is not normal around a global site of its own"
    return None


def _is_free(site: Latent, run: Evaluation, links: Links) -> bool:
    return is_correlation(site) or is_scale(site.name, run, links)


def _site_fault(name: str, run: Evaluation, links: Links) -> str | None:
    if name in run.globals and is_correlation(run.globals[name]):
        return correlation_site_fault(name, run, links)
    return scale_fault(name, run, links)


def _free_site(site: Latent) -> ScaleSite | CorrelationSite:
    if is_correlation(site):
        assert site.transform is not None
        return CorrelationSite(site.name, innermost(site.fn), site.transform)
    return scale_site(site)


def values_of(evaluation: Evaluation) -> Mapping[int | None, dict[str, Tensor]]:
    """The local values of a run, in the form :meth:`Program.run` takes them."""
    values: dict[int | None, dict[str, Tensor]] = {}
    for site in evaluation.locals.values():
        values.setdefault(site.task, {})[site.family] = site.leaf.detach()
    return values


def adopt(program: Program, pairs: Mapping[str, NormalPair], run: Evaluation, links: Links) -> None:
    """Give each pair's family its label in every task of a run, whatever the task calls the site that hangs on phi."""
    for name, pair in pairs.items():
        by_task: dict[int | None, list[Latent]] = {}
        for child in children_of(name, run, links):
            by_task.setdefault(child.task, []).append(child)
        for task, children in by_task.items():
            if task is not None and len(children) == 1 and children[0].family != pair.family:
                program.families.rename(task, children[0].name, pair.family)
    run.relabel(program.families)


def pair_fault(pair: NormalPair, run: Evaluation, links: Links, sequential: bool) -> str | None:
    """Why the exact draw of a pair does not hold for the tasks of one run; None where it does.

    It rests on all of this, in every task: one local site hangs on phi and nothing else does; its mean is phi itself,
    for every phi; its scale is the pair's; it is neither masked nor scaled; it hangs on no other site.
    """
    name = pair.global_site
    if name not in run.globals:
        return "it is not a global site of every task"
    fault = direct_fault(name, run, links)
    if fault is not None:
        return fault
    children = children_of(name, run, links)
    for task in run.tasks if sequential else (None,):
        own = [child for child in children if child.task == task]
        if len(own) != 1:
            count = f"{len(own)} local sites" if task is not None else f"{len(own)} local families"
            listed = f" ({sorted(child.name for child in own)})" if own else ""
            where = "" if task is None else f" in task {task}"
            return f"{count} depend on it{where}{listed}; exactly one is needed"
    for child in children:
        fault = _child_fault(pair, child, run, links)
        if fault is not None:
            return fault
    return None


def _pair(name: str, run: Evaluation, links: Links) -> NormalPair | str:
    """The pair as the first tasks show it, or why there is none."""
    fault = direct_fault(name, run, links)
    if fault is not None:
        return fault
    children = children_of(name, run, links)
    families = {child.family for child in children}
    if len(families) != 1:
        return f"{len(families)} local families depend on it ({sorted(families)}); exactly one is needed"
    prior = plain_normal(run.globals[name])
    normal = local_normal(children[0])
    if prior is None or normal is None:
        return f"the local site {children[0].name!r} is {described(children[0])}, not a plain normal"
    phi = run.globals[name].leaf
    variance = variance_by_task(children[0], normal)[0]
    if not _stands_beside(phi, children[0]):
        return _other_shape(children[0], name, phi)
    precision = scalar_if_constant(prior.precision.detach())
    variance = scalar_if_constant(variance.reshape(phi.shape))
    multivariate = dense_normal(children[0])
    if multivariate is None:
        return NormalPair(name, children[0].family, prior.mean.detach(), precision, variance)
    if phi.dim() != 1:
        return f"the local site {children[0].name!r} is multivariate normal, and {name!r} is no vector"
    dense = Dense(correlation_of(multivariate)[0])
    return NormalPair(name, children[0].family, prior.mean.detach(), precision, variance, dense=dense)


def _other_shape(child: Latent, name: str, phi: Tensor) -> str:
    shapes = f"shape {list(child.leaf.shape)}, and {name!r} {list(phi.shape)}"
    return f"the mean of the local site {child.name!r} is not the site {name!r} itself: it has {shapes}"


def _child_fault(pair: NormalPair, child: Latent, run: Evaluation, links: Links) -> str | None:
    name, normal = pair.global_site, local_normal(child)
    if normal is None:
        return f"the local site {child.name!r} is {described(child)}, not a plain normal"
    free = {pair.law and pair.law.site, pair.dense and pair.dense.site}
    others = links.laws[child.name] - {name} - free
    if others:
        return f"the distribution of the local site {child.name!r} depends on another site too ({listed(others)})"
    phi = run.globals[name].leaf
    if not _stands_beside(phi, child):
        return _other_shape(child, name, phi)
    if not _is_itself(normal, phi):
        return f"the mean of the local site {child.name!r} is not the site {name!r} itself"
    if hangs_on(normal.precision, phi):
        return f"the scale of the local site {child.name!r} depends on {name!r}"
    if (dense_normal(child) is None) != (pair.dense is None):
        return f"the local site {child.name!r} is {described(child)}, as that of the first tasks is not"
    fault = None if pair.dense is None else correlation_fault(pair.dense, child, run)
    if fault is not None:
        return fault
    if pair.law is not None:
        return law_fault(pair.law, child, normal, run)
    variance = variance_by_task(child, normal)
    near = torch.isclose(variance.reshape(-1, *phi.shape), pair.local_variance.expand(phi.shape), atol=0.0)
    same = near.reshape(len(variance), -1).all(1)
    if not bool(same.all()):
        task = _tasks(child, run)[int(same.logical_not().nonzero()[0])]
        which = f" (task {task})" if len(run.tasks) > 1 else ""
        return f"the scale of the local site {child.name!r} differs by task{which}"
    return None


def _tasks(child: Latent, run: Evaluation) -> tuple[int, ...]:
    return run.tasks if child.task is None else (child.task,)


def _stands_beside(phi: Tensor, child: Latent) -> bool:
    """Whether phi broadcasts to one value per task and coordinate of a local site."""
    count = child.leaf.shape[child.plate_dim] if child.task is None and child.plate_dim is not None else 1
    try:
        torch.broadcast_to(phi.detach(), child.leaf.shape)
    except RuntimeError:
        return False
    return child.leaf.numel() == count * phi.numel()


#: Graph nodes that hand every number on as it is, in the same order.
_HANDING_ON = re.compile(r"(Expand|View|UnsafeView|ReshapeAlias|Unsqueeze|Squeeze|Alias)Backward\d*$")


def _is_itself(normal: LocalGaussian, phi: Tensor) -> bool:
    """Whether a mean is phi, for every phi.

    It is where the graph between them only expands. It is, too, where it equals phi at the point where the program
    stands, has the identity for its derivative, and that derivative does not itself hang on phi.
    """
    mean = normal.mean
    node: Any = mean.grad_fn
    while node is not None and _HANDING_ON.search(node.name()):
        node = node.next_functions[0][0]
    if mean is phi or (node is not None and getattr(node, "variable", None) is phi):
        return True
    rounding = 4.0 * torch.finfo(mean.dtype).eps * phi.detach().abs().max()
    if not bool(((mean - phi).detach().abs() <= 1e-5 * normal.precision.detach().rsqrt() + rounding).all()):
        return False
    probe = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0)).to(mean)
    (derivative,) = torch.autograd.grad(mean, phi, probe, create_graph=True, allow_unused=True)
    if derivative is None or (derivative.requires_grad and hangs_on(derivative, phi)):
        return False
    return torch.allclose(derivative.detach(), probe.sum_to_size(phi.shape), rtol=1e-4, atol=1e-5)
