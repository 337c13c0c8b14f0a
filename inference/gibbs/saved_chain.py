"""What of an SGLD-Gibbs chain is saved beside its state: what it has learned of its tasks, and what names the chain."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import Chain, Settings
from pyro_lift.inference.program import LocalSite
from pyro_lift.inference.schedules import Schedule
from pyro_lift.support import distributed

__all__ = ["learned_of", "options_of", "probed", "put_learned"]


def probed(schedule: Schedule) -> list[float]:
    """A schedule by a few of its values."""
    return [schedule(step) for step in (0, 1, 10, 100, 1_000, 10_000, 100_000)]


def learned_of(chain: Chain, *, shared: bool) -> dict[str, Any]:
    """Return what a chain has learned of its tasks: their layouts, starts, and what hangs on what.

    Args:
        chain: that is saved.
        shared: whether processes share it, each of which has seen its own tasks.
    """
    cache = chain.cache
    layouts = [
        [task, [[site.family, list(site.shape), site.plate_dim] for site in sites]]
        for task, sites in cache.layouts.items()
    ]
    learned: list[Any] = [sorted(cache.coupled), cache.reruns]
    if shared:
        known = {task: [task, sites] for found in distributed.collected(layouts) for task, sites in found}
        layouts = [known[task] for task in sorted(known, key=lambda task: -1 if task is None else task)]
        both = distributed.collected(learned)
        learned = [sorted({family for families, _ in both for family in families}), any(r for _, r in both)]
    covariates = {family: [known.A, known.seen] for family, known in cache.coefficients.items()}
    tree = {"layouts": layouts, "start": dict(cache.start), "learned": learned}
    return tree | ({"coefficients": covariates} if covariates else {})


def put_learned(chain: Chain, tree: Mapping[str, Any], like: Tensor) -> None:
    """Give a chain what :func:`learned_of` saved, on the device of ``like``."""
    cache = chain.cache
    cache.start = {name: value.to(like.device) for name, value in tree["start"].items()}
    cache.layouts = {
        task: tuple(LocalSite(family, torch.Size(shape), dim) for family, shape, dim in sites)
        for task, sites in tree["layouts"]
    }
    for task, sites in cache.layouts.items():
        if task is not None:
            chain.program.families.learn(task, [site.family for site in sites])
    for family, (A, seen) in tree.get("coefficients", {}).items():
        known = cache.coefficients[family]
        known.take(seen.nonzero().reshape(-1).tolist(), A.to(known.A)[seen.to(known.seen.device)])
    coupled, reruns = tree.get("learned", [[], False])  # of a run that was saved before these were kept
    cache.coupled |= frozenset(coupled)
    cache.reruns |= reruns


def options_of(settings: Settings) -> dict[str, Any]:
    """Return the options of a visit as plain data; those that came later only where they are used.

    A run that was saved before an option existed so is the run without it.
    """
    options = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings)}
    options |= {name: probed(value) for name, value in options.items() if callable(value)}
    if settings.translation == "none":
        options = {name: value for name, value in options.items() if not name.startswith("translation")}
    del options["adapts"]  # said by the step and the warm-up
    unused = {"site_update"} if not settings.site_update else set()
    unused |= {name for name in ("sgd_weights", "task_step_scale", "max_move") if getattr(settings, name) is None}
    unused |= {"control_variates"} if not settings.control_variates else set()
    unused |= {"momentum"} if settings.theta_update != "underdamped" else set()
    unused |= {"theta_update", "leapfrog_steps"} if settings.theta_update == "sgld" else set()
    return {name: value for name, value in options.items() if name not in unused}
