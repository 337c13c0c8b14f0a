r"""Local sites that are solved in place of stepped: convex given the rest, as a task's linear head is.

Given phi and a task's other sites, the sites w of some families have a density whose logarithm is concave. Before theta
moves, they are brought to its mode by L-BFGS, from where they stood,

.. math:: \hat w_i = \arg\max_w\; \kappa \log p(D_i \mid \theta_i, w, \phi) + \log p(w, \theta_i \mid \phi),

and ``"laplace"`` draws them from the Gaussian around it,

.. math:: w_i \sim \mathcal N(\hat w_i,\; T H_i^{-1}),\qquad H_i = -\nabla_w^2 \log p \,\big|_{\hat w_i},

which is their exact conditional where it is Gaussian, and after one Newton step the mode is then exact too. Tasks are
independent given phi, so that H is a block a task. Each iteration is a run of the program; second derivatives do not
pass through what lies below w.

References:
    On the limited memory BFGS method for large scale optimization, Liu and Nocedal, 1989.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.rows import Values, regrouped
from pyro_lift.inference.gibbs.state import Chain, Settings, SGLDGibbsState, Streams
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.sgld import check_moved
from pyro_lift.support.options import check_choice

__all__ = ["SiteUpdate", "checked_updates", "solved"]

SiteUpdate = Literal["langevin", "mode", "laplace"]

#: Iterations of L-BFGS, at most, and the steps that it remembers.
ITERATIONS, MEMORY = 100, 20
#: Coordinates of one task that a Hessian is made for, at most.
LARGEST = 2048


def checked_updates(site_update: Mapping[str, SiteUpdate] | None) -> dict[str, str]:
    """Return the families that are solved, and how; ``"langevin"`` is what is done without being asked.

    Raises:
        ValueError: an unknown update.
    """
    for family, update in (site_update or {}).items():
        check_choice(f"site_update[{family!r}]", update, ["langevin", "mode", "laplace"])
    return {family: update for family, update in (site_update or {}).items() if update != "langevin"}


def solved(state: SGLDGibbsState, chain: Chain, values: Values, index: Tensor, streams: Streams) -> Values:
    """Return a block's local values with the solved families at their mode, or drawn around it.

    Raises:
        DivergedError: a mode that is not finite; the family names it.
        ValueError: a density that is not log-concave at its mode, or a Hessian that is too large.
    """
    updates = chain.settings.site_update
    if not updates:
        return values

    def run_at(at: Values) -> Evaluation:
        return chain.program.run(state.phi, at, index, streams.rows)

    run = run_at(values)
    sites = {name: site for name, site in run.locals.items() if site.family in updates}
    if not sites:
        return values
    all_values = {name: site.leaf.detach() for name, site in run.locals.items()}

    def density(point: Mapping[str, Tensor]) -> tuple[Tensor, list[Tensor]]:
        again = run_at(regrouped(run, {**all_values, **point}))
        total = chain.settings.n_inflate * again.log_likelihood + again.log_prior(again.locals)
        return total, [again.locals[name].leaf for name in sites]

    point = _mode(density, {name: all_values[name] for name in sites})
    drawn = {name: site for name, site in sites.items() if updates[site.family] == "laplace"}
    if drawn:
        point |= _around_mode(density, point, list(sites), drawn, chain.settings, streams.noise)
    check_moved(point, state.step, tuple(index.tolist()), chain.cache.watch)
    return regrouped(run, {**all_values, **point})


Density = Callable[[Mapping[str, Tensor]], tuple[Tensor, list[Tensor]]]


def _mode(density: Density, start: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Maximise a density from a start."""
    point = {name: value.clone() for name, value in start.items()}
    parameters = list(point.values())
    precise = parameters[0].dtype == torch.float64
    optimiser = torch.optim.LBFGS(
        parameters,
        max_iter=ITERATIONS,
        history_size=MEMORY,
        tolerance_grad=1e-9 if precise else 1e-4,
        tolerance_change=0.0 if precise else 1e-9,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        total, leaves = density(point)
        gradient = torch.autograd.grad(total, leaves, allow_unused=True)
        for parameter, g in zip(parameters, gradient, strict=True):
            parameter.grad = torch.zeros_like(parameter) if g is None else -g
        return -total.detach()

    optimiser.step(closure)  # type: ignore[no-untyped-call]
    return {name: value.detach() for name, value in point.items()}


def _around_mode(
    density: Density,
    mode: Mapping[str, Tensor],
    names: Sequence[str],
    drawn: Mapping[str, Latent],
    settings: Settings,
    noise: torch.Generator | None,
) -> dict[str, Tensor]:
    """Draw some sites from the Gaussian around the mode, each of whose tasks is a draw of its own."""
    total, leaves = density(mode)
    at = dict(zip(names, leaves, strict=True))
    gradient = dict(zip(names, torch.autograd.grad(total, leaves, create_graph=True), strict=True))
    moved: dict[str, Tensor] = {}
    for task in dict.fromkeys(site.task for site in drawn.values()):
        own = {name: site for name, site in drawn.items() if site.task == task}
        moved |= _drawn(own, at, gradient, settings, noise)
    return moved


def _drawn(
    sites: Mapping[str, Latent],
    at: Mapping[str, Tensor],
    gradient: Mapping[str, Tensor],
    settings: Settings,
    noise: torch.Generator | None,
) -> dict[str, Tensor]:
    """Draw the sites of one task, or of all tasks of a vectorised block."""
    flat = torch.cat([_packed(site, gradient[name]) for name, site in sites.items()], 1)  # [B, d]
    count, size = flat.shape
    families = ", ".join(dict.fromkeys(site.family for site in sites.values()))
    if size > LARGEST:
        raise ValueError(
            f'site_update="laplace" makes a Hessian of the {size} coordinates that a task has in {families}; {LARGEST} '
            'are the most. Use "mode".'
        )
    # Tasks are independent: the derivative of the sum over tasks of coordinate j is row j of every task's block.
    rows = torch.autograd.grad(
        flat.sum(0),
        [at[name] for name in sites],
        torch.eye(size, dtype=flat.dtype, device=flat.device),
        is_grads_batched=True,
        retain_graph=True,
        materialize_grads=True,
    )
    parts = [_packed_rows(site, part, count) for site, part in zip(sites.values(), rows, strict=True)]
    precision = -torch.cat(parts, -1).movedim(0, 1)  # [B, d, d]
    factor, failed = torch.linalg.cholesky_ex(0.5 * (precision + precision.mT))
    if bool(failed.any()):
        raise ValueError(
            f'site_update="laplace": the density of {families} given the rest is not log-concave where it was solved. '
            'Use "mode", or let it step.'
        )
    newton = torch.cholesky_solve(flat.detach().unsqueeze(-1), factor).squeeze(-1)
    heat = [settings.temperature * settings.site_temperature.get(site.family, 1.0) for site in sites.values()]
    widths = [part.shape[-1] for part in parts]
    scale = torch.cat([torch.full((w,), h**0.5).to(flat) for w, h in zip(widths, heat, strict=True)])
    xi = torch.randn(flat.shape, dtype=flat.dtype, device=flat.device, generator=noise)
    step = newton + scale * torch.linalg.solve_triangular(factor.mT, xi.unsqueeze(-1), upper=True).squeeze(-1)
    places = zip(sites.items(), step.split(widths, -1), strict=True)
    return {name: at[name].detach() + _unpacked(site, part, at[name]) for (name, site), part in places}


def _packed(site: Latent, value: Tensor) -> Tensor:
    """A site's value by task, ``[B, d]``; of a site of one task's, ``[1, d]``."""
    if site.task is not None:
        return value.reshape(1, -1)
    moved = value.movedim(site.plate_dim or 0, 0)
    return moved.reshape(len(moved), -1)


def _packed_rows(site: Latent, rows: Tensor, count: int) -> Tensor:
    """Rows of a Hessian ``[d, ...]`` by task, ``[d, B, d_s]``."""
    if site.task is None:
        place = site.plate_dim or 0
        rows = rows.movedim(place + 1 if place >= 0 else place, 1)
    return rows.reshape(len(rows), count, -1)


def _unpacked(site: Latent, part: Tensor, like: Tensor) -> Tensor:
    """Undo :func:`_packed`."""
    if site.task is not None:
        return part.reshape(like.shape)
    shape = like.movedim(site.plate_dim or 0, 0).shape
    return part.reshape(shape).movedim(0, site.plate_dim or 0)
