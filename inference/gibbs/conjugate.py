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
from torch.distributions import MixtureSameFamily

from pyro_lift.inference.dependence import Links, hangs_on, links_of
from pyro_lift.inference.program import Evaluation, Latent, Program
from pyro_lift.inference.supports import innermost, unmasked, wrappers
from pyro_lift.models.priors import LocalGaussian

__all__ = ["NormalPair", "adopt", "draw", "find_pairs", "pair_fault", "values_of"]


class NormalPair(NamedTuple):
    """A global site phi ~ N(prior_mean, 1/prior_precision) and the local family theta_i ~ N(phi, local_variance)."""

    global_site: str
    family: str
    prior_mean: Tensor
    prior_precision: Tensor
    local_variance: Tensor


def draw(pair: NormalPair, S: Tensor, num_tasks: int, temperature: float, noise: Tensor) -> Tensor:
    """One exact draw of phi; S in float64, the draw in the dtype of ``noise``."""
    precision = pair.prior_precision.double() + num_tasks / pair.local_variance.double()
    mean = (pair.prior_precision.double() * pair.prior_mean.double() + S / pair.local_variance.double()) / precision
    return (mean + (temperature / precision).sqrt() * noise.double()).to(noise.dtype)


def find_pairs(
    program: Program, run: Evaluation, index: Tensor, generator: torch.Generator | None
) -> tuple[dict[str, NormalPair], dict[str, str]]:
    """Which global sites are the mean of exactly one normal local family, with everything else held fixed.

    The structure is read off the graphs of two runs: ``run``, and one for other tasks, ``index``. Every other block is
    held against it at its first visit (:func:`pair_fault`).

    Returns:
        The pairs by global site, and for every other global site the reason why it is none.
    """
    generator = generator if generator is not None else torch.Generator()
    links = links_of(run)
    pairs, reasons = {}, {}
    for name in run.globals:
        pair = _pair(name, run, links)
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
    return pairs, reasons


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
        for child in _children(name, run, links):
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
    fault = _direct_fault(name, run, links)
    if fault is not None:
        return fault
    children = _children(name, run, links)
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


def _children(name: str, run: Evaluation, links: Links) -> list[Latent]:
    return [run.locals[child] for child in links.children(name) if child in run.locals]


def _direct_fault(name: str, run: Evaluation, links: Links) -> str | None:
    """What else than local sites ties a global site."""
    site = run.globals[name]
    if _plain_normal(site) is None:
        return f"its own distribution is {_described(site)}, not a plain normal"
    if links.laws[name]:
        return f"its own distribution depends on another site ({_listed(links.laws[name])})"
    others = [child for child in links.children(name) if child in run.globals]
    if others:
        return f"another global site depends on it ({_listed(others)})"
    observed = [o for o, parents in links.observed.items() if name in parents]
    if observed:
        return f"an observed site depends on it directly ({_listed(observed)})"
    return None


def _listed(names: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(names)))


def _plain_normal(site: Latent) -> LocalGaussian | None:
    """The normal distribution of a site; None for a mixture of normals too, which ``site.gaussian()`` touches."""
    return None if isinstance(unmasked(site.fn), MixtureSameFamily) else site.gaussian()


def _described(site: Latent) -> str:
    masked = site.mask is not None or any(kind == "MaskedDistribution" for kind in wrappers(site.fn))
    scaled = isinstance(site.scale, Tensor) or site.scale != 1.0
    return ("masked " if masked else "") + ("scaled " if scaled else "") + type(innermost(site.fn)).__name__


def _pair(name: str, run: Evaluation, links: Links) -> NormalPair | str:
    """The pair as the first tasks show it, or why there is none."""
    fault = _direct_fault(name, run, links)
    if fault is not None:
        return fault
    children = _children(name, run, links)
    families = {child.family for child in children}
    if len(families) != 1:
        return f"{len(families)} local families depend on it ({sorted(families)}); exactly one is needed"
    prior = _plain_normal(run.globals[name])
    normal = _plain_normal(children[0])
    if prior is None or normal is None:
        return f"the local site {children[0].name!r} is {_described(children[0])}, not a plain normal"
    phi = run.globals[name].leaf
    variance = _variance_by_task(children[0], normal)[0]
    if not _stands_beside(phi, children[0]):
        return _other_shape(children[0], name, phi)
    precision = _scalar_if_constant(prior.precision.detach())
    variance = _scalar_if_constant(variance.reshape(phi.shape))
    return NormalPair(name, children[0].family, prior.mean.detach(), precision, variance)


def _other_shape(child: Latent, name: str, phi: Tensor) -> str:
    shapes = f"shape {list(child.leaf.shape)}, and {name!r} {list(phi.shape)}"
    return f"the mean of the local site {child.name!r} is not the site {name!r} itself: it has {shapes}"


def _child_fault(pair: NormalPair, child: Latent, run: Evaluation, links: Links) -> str | None:
    name, normal = pair.global_site, _plain_normal(child)
    if normal is None:
        return f"the local site {child.name!r} is {_described(child)}, not a plain normal"
    others = links.laws[child.name] - {name}
    if others:
        return f"the distribution of the local site {child.name!r} depends on another site too ({_listed(others)})"
    phi = run.globals[name].leaf
    if not _stands_beside(phi, child):
        return _other_shape(child, name, phi)
    if not _is_itself(normal, phi):
        return f"the mean of the local site {child.name!r} is not the site {name!r} itself"
    if hangs_on(normal.precision, phi):
        return f"the scale of the local site {child.name!r} depends on {name!r}"
    for task, own in zip(_tasks(child, run), _variance_by_task(child, normal), strict=True):
        if not torch.allclose(own.reshape(phi.shape), pair.local_variance.expand(phi.shape), atol=0.0):
            which = f" (task {task})" if len(run.tasks) > 1 else ""
            return f"the scale of the local site {child.name!r} differs by task{which}"
    return None


def _tasks(child: Latent, run: Evaluation) -> tuple[int, ...]:
    return run.tasks if child.task is None else (child.task,)


def _variance_by_task(child: Latent, normal: LocalGaussian) -> Tensor:
    """Variance of a normal local site, the tasks of its block first."""
    spread = torch.broadcast_to(1.0 / normal.precision.detach(), child.leaf.shape)
    if child.task is None and child.plate_dim is not None:
        return spread.movedim(child.plate_dim, 0)
    return spread.unsqueeze(0)


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


def _scalar_if_constant(value: Tensor) -> Tensor:
    """One number where all are equal: phi may have a hundred million coordinates."""
    first = value.reshape(-1)[0]
    return first.clone() if bool((value == first).all()) else value.clone()
