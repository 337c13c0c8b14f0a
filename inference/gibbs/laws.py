"""The law of the variance of a local family, whatever its mean is: read off a few runs at other values of its scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from pyro_lift.inference.dependence import Links
from pyro_lift.inference.gibbs.dense import CorrelationSite, Dense, correlation_fault, is_correlation
from pyro_lift.inference.gibbs.normal_sites import listed, local_normal, variance_by_task
from pyro_lift.inference.gibbs.scales import Reading, ScaleSite, read_law
from pyro_lift.inference.program import Evaluation, Latent, Program

__all__ = ["known_at", "with_law"]

#: A pair or a regression: a named tuple with ``local_variance``, ``law`` and ``dense``.
Level = TypeVar("Level", bound=Any)


def known_at(level: Level, sites: Mapping[str, ScaleSite | CorrelationSite], values: Mapping[str, Tensor]) -> Level:
    """Return a level with its variances and correlations at some values of the global sites, unconstrained."""
    if level.law is not None:
        name = level.law.site
        level = level._replace(local_variance=level.law.variance(sites[name].value(values[name].detach())))
    if level.dense is not None and level.dense.site is not None:
        name = level.dense.site
        L = sites[name].value(values[name].detach().double())
        level = level._replace(dense=Dense(L @ L.T, name))
    return level


def with_law(
    level: Level,
    child: Latent,
    shape: torch.Size,
    program: Program,
    seen: tuple[Evaluation, Links],
    scales: list[str],
    generator: torch.Generator,
) -> Level | str:
    """Return a level with the law of its variance, where that hangs on one scale site; as it is where it is known.

    Args:
        level: a pair or a regression.
        child: a local site of its family.
        shape: of one task's theta.
        program: the model.
        seen: the run that the child is of, and its links.
        scales: global sites that may be scales or correlations.
        generator: of minibatches.

    Returns:
        The level, or why its variance has no law.
    """
    run, links = seen
    correlations = [name for name in scales if is_correlation(run.globals[name]) and name in links.laws[child.name]]
    if level.dense is not None and len(correlations) == 1:
        level = level._replace(dense=level.dense._replace(site=correlations[0]))
    own = [name for name in scales if name in links.laws[child.name] and name not in correlations]
    if len(own) > 1:
        return f"the scale of the local site {child.name!r} depends on several sites ({listed(own)})"
    values = {k: s.leaf.detach() for k, s in run.globals.items()}
    index = torch.tensor(run.tasks)
    if level.dense is not None and (own or correlations):
        source = torch.Generator().manual_seed(0)
        others = {
            k: values[k] + 0.5 * torch.randn(values[k].shape, generator=source).to(values[k])
            for k in own + correlations
        }
        elsewhere = program.run({**values, **others}, {}, index, generator, want_grad=False)
        fault = correlation_fault(level.dense, elsewhere.locals[child.name], elsewhere)
        if fault is not None:
            return fault
    if not own:
        return level

    def measure(leaf: Tensor) -> Reading:
        other = program.run({**values, own[0]: leaf}, {}, index, generator, want_grad=False)
        site = other.locals[child.name]
        normal = local_normal(site)
        assert normal is not None
        variance = variance_by_task(site, normal)[0].reshape(shape)
        value = other.globals[own[0]].value.detach().double()
        return Reading(value, variance.double().log(), torch.finfo(variance.dtype).eps)

    law = read_law(run.globals[own[0]], measure)
    if law is None:
        return (
            f"the variance of the local site {child.name!r} is no constant times a power of {own[0]!r}, coordinate by "
            f"coordinate, and no exponential of it"
        )
    lawful: Level = level._replace(law=law)
    return lawful
