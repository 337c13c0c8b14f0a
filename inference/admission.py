"""Admission of a program to a kernel: what is checked once, at set-up, before any step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from pyro_lift.inference.data_support import check_start
from pyro_lift.inference.dependence import Links, coupled_families, reached
from pyro_lift.inference.program import Evaluation, Latent, discrete_refusal
from pyro_lift.inference.sgld import Integrator, Preconditioner
from pyro_lift.inference.supports import innermost
from pyro_lift.support.options import check_literal, check_number

__all__ = [
    "NotExactError",
    "check_block",
    "check_common",
    "check_fixed_supports",
    "check_latents",
    "needs_rerun",
    "refuse_discrete",
    "site_factors",
    "site_transforms",
    "start_values",
]


class NotExactError(ValueError):
    """A program whose phi has no exact draw, or whose tasks one visit to some of them does not see.

    Attributes:
        reason: in a sentence.
        mistake: whether it looks like a mistake in the program, which is then not to be sampled as it stands.
    """

    def __init__(self, message: str, reason: str, mistake: bool = False) -> None:
        super().__init__(message)
        self.reason, self.mistake = reason, mistake

    def __reduce__(self) -> tuple[type[NotExactError], tuple[str, str, bool]]:
        return type(self), (str(self), self.reason, self.mistake)


def check_common(
    temperature: float,
    n_inflate: float,
    integrator: str,
    preconditioner: str | None,
    decay: float,
    damping: float,
) -> None:
    """Refuse options of either kernel that are out of range."""
    check_number("temperature", temperature, open_below=False)
    check_number("n_inflate", n_inflate)
    check_literal("integrator", integrator, Integrator)
    if preconditioner is not None:
        check_literal("preconditioner", preconditioner, Preconditioner)
    check_number("damping", damping, open_below=False)
    if not 0.0 <= decay < 1.0:
        raise ValueError(f"decay={decay!r}: expected at least 0 and below 1.")


def refuse_discrete(run: Evaluation) -> None:
    """Refuse a program with a latent site that no gradient can move: a discrete one, or a point mass."""
    for name, site in run.latents.items():
        if site.discrete:
            raise ValueError(discrete_refusal(name, site.fn))
        if isinstance(innermost(site.fn), Delta):
            raise ValueError(
                f"the latent site {name!r} is a point mass (Delta); no gradient can move it. Write it as "
                f"pyro.deterministic({name!r}, ...)."
            )


def check_latents(run: Evaluation) -> None:
    """Refuse a program that SGLD cannot sample: no latent site, one in a subsampled plate, a density not finite."""
    if not run.latents:
        raise ValueError("the program has no latent site: there is nothing to sample.")
    for name, site in run.latents.items():
        if site.subsampled is not None:
            raise ValueError(
                f"the latent site {name!r} stands inside a subsampled plate ({site.subsampled!r}): its value would "
                "belong to other rows at each step. Use SGLDGibbs, or a plate without subsample_size."
            )
    check_fixed_supports(run, run.latents)
    check_start(run.drift(run.latents), run)


def check_block(run: Evaluation, links: Links, tasks: str = "", *, together: bool = False) -> None:
    """Refuse a block of tasks that no update of SGLD-Gibbs can sample.

    Args:
        run: of the block.
        links: of the run.
        tasks: a name for the tasks, where they are not the first ones.
        together: whether the block is all tasks, which move together: they may then depend on each other.

    Raises:
        NotExactError: what only tasks that move together allow.
        ValueError: what no update allows.
    """
    refuse_discrete(run)
    say = f"{tasks}: " if tasks else ""
    for site in run.latents.values():
        if site.subsampled is not None:
            kind = "global" if site.name in run.globals else "local"
            raise ValueError(
                f"{say}the {kind} site {site.name!r} stands inside a second subsampled plate ({site.subsampled!r}): "
                "its value would belong to other rows at each visit. Take it out of that plate."
            )
    with_sites = {site.task for site in run.locals.values()}
    for task in [] if None in with_sites else sorted(set(run.tasks) - with_sites):
        raise ValueError(
            f"the task {task} has no latent site of its own, so there is nothing to sample for it. Give it one, or put "
            "what it observes outside the plate."
        )
    if len(with_sites) > 1 and None in with_sites:
        raise ValueError(f"{say}the task plate is both entered and iterated over; local sites need one of the two.")
    if not together:
        _check_independent(run, links, say)


def _check_independent(run: Evaluation, links: Links, say: str) -> None:
    """Refuse tasks that are seen outside the plate, or by each other."""
    own = {o.name: o for o in run.observed}
    for name, parents in [*links.laws.items(), *links.observed.items()]:
        inside = own[name].local if name in own else name in run.locals
        at = own[name].task if name in own else run.latents[name].task
        for parent in sorted(parents & run.locals.keys()):
            if not inside:
                reason = f"the site {name!r} stands outside the task plate and depends on the local site {parent!r}"
                raise NotExactError(
                    f"{say}{reason}: it would see the tasks of one visit only. Put it inside the plate, or use SGLD.",
                    f"{reason}.",
                )
            if run.locals[parent].task != at:
                reason = f"the site {name!r} of task {at} depends on {parent!r} of task {run.locals[parent].task}"
                raise NotExactError(
                    f"{say}{reason}: tasks must be independent given the global sites. Use SGLD.", f"{reason}."
                )


def check_fixed_supports(run: Evaluation, sites: Mapping[str, Latent]) -> None:
    """Refuse draws whose support moves with another site: Pyro maps them back by one transform for all draws."""
    for name, site in sites.items():
        parents = () if site.transform is None else reached(site.transform(site.leaf.detach()), run.latents)
        if parents:
            raise ValueError(
                f"the support of the site {name!r} moves with {', '.join(map(repr, sorted(parents)))}, and its draws "
                "could not be mapped back. Sample it on a fixed support, and stretch it in the program."
            )


def needs_rerun(run: Evaluation, links: Links) -> bool:
    """Whether the gradient of phi needs a run of its own after theta has moved.

    The likelihood hangs on a global site, or local sites on each other.
    """
    local = {o.name for o in run.observed if o.local}
    direct = any(parents & run.globals.keys() for name, parents in links.observed.items() if name in local)
    return direct or bool(coupled_families(run, links))


def site_transforms(run: Evaluation) -> dict[str, Any]:
    """Return the bijections from constrained to unconstrained space, by site, as Pyro's MCMC wants them."""
    return {name: site.transform.inv for name, site in run.latents.items() if site.transform is not None}


def start_values(start: Mapping[str, Tensor], read: Evaluation) -> dict[str, Tensor]:
    """Return a chain's start, unconstrained, as values of the program's own shapes, type and device; copies.

    Raises:
        ValueError: a site that the chain does not start, another shape, values not finite.
    """
    values = {}
    for name, value in start.items():
        if name not in read.globals:
            local = (
                " It stands inside the plate; such sites start around the global ones." if name in read.locals else ""
            )
            raise ValueError(
                f"initial_params: {name!r} is no site that a start can be given for (one of: "
                f"{', '.join(map(repr, read.globals)) or 'none'}).{local}"
            )
        leaf = read.globals[name].leaf
        if value.shape != leaf.shape:
            raise ValueError(
                f"initial_params[{name!r}] has shape {list(value.shape)} for one chain; the site's, unconstrained, is "
                f"{list(leaf.shape)}."
            )
        value = value.detach().to(leaf, copy=True)
        if not torch.isfinite(value).all():
            raise ValueError(f"initial_params[{name!r}] holds values that are not finite.")
        values[name] = value
    return values


def site_factors(
    step_scale: Mapping[str, float] | None, temperature: Mapping[str, float] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Both as dicts; refuses factors out of range."""
    for name, factor in (step_scale or {}).items():
        check_number(f"site_step_scale[{name!r}]", factor)
    for name, factor in (temperature or {}).items():
        check_number(f"site_temperature[{name!r}]", factor, open_below=False)
    return dict(step_scale or {}), dict(temperature or {})
