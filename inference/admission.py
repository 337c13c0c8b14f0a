"""Admission of a program to a kernel: what is checked once, at set-up, before any step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lift.inference import sgld
from pyro_lift.inference.program import Evaluation, depends
from pyro_lift.inference.sgld import Integrator, Preconditioner
from pyro_lift.support.options import check_literal, check_number

__all__ = [
    "check_common",
    "check_latents",
    "coupled_families",
    "refuse_discrete",
    "site_factors",
    "site_transforms",
    "start_values",
]


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
    """Refuse a program with a discrete latent site."""
    for name, site in run.latents.items():
        if site.discrete:
            raise ValueError(
                f"the latent site {name!r} is discrete ({type(site.fn).__name__}); no gradient can move it. "
                "Marginalise it out, or write it as a mixture."
            )


def check_latents(run: Evaluation) -> None:
    """Refuse a program that SGLD cannot sample: no latent site, one in a subsampled plate, a density not finite."""
    if not run.latents:
        raise ValueError("the program has no latent site: there is nothing to sample.")
    for name, site in run.latents.items():
        if site.scale != 1.0:
            raise ValueError(
                f"the latent site {name!r} stands inside a subsampled plate (scale {site.scale:g}): its value would "
                "belong to other rows at each step. Use SGLDGibbs, or a plate without subsample_size."
            )
    drift = run.drift(run.latents)
    sgld.check_finite(drift, 0)


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


def coupled_families(sites: Mapping[str, Any]) -> frozenset[str]:
    """Families whose distribution hangs on another of the sites."""
    return frozenset(
        site.family
        for name, site in sites.items()
        if any(depends(site.log_prob_at(site.leaf.detach()), other.leaf) for k, other in sites.items() if k != name)
    )


def site_factors(
    step_scale: Mapping[str, float] | None, temperature: Mapping[str, float] | None
) -> tuple[dict[str, float], dict[str, float]]:
    """Both as dicts; refuses factors out of range."""
    for name, factor in (step_scale or {}).items():
        check_number(f"site_step_scale[{name!r}]", factor)
    for name, factor in (temperature or {}).items():
        check_number(f"site_temperature[{name!r}]", factor, open_below=False)
    return dict(step_scale or {}), dict(temperature or {})
