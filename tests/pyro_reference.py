"""What Pyro itself says a program's log density is, in unconstrained space, term by term.

One messenger puts unconstrained values into the program, mapped to each site's support; ``poutine.trace`` and its
``compute_log_prob`` do the rest. The Jacobian of each map counts once, whatever the site's scale and mask, as in
``pyro.infer.mcmc.util.initialize_model``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import biject_to

__all__ = ["Density", "latent_sites", "local_sites", "log_density"]


class Density(NamedTuple):
    """Log density of a program over all its tasks, in its parts.

    Attributes:
        shared: of the global latent sites.
        local: of the local latent sites, by task ``[N]``.
        outside: of what is observed outside the task plate.
        observed: of what is observed inside it, by task ``[N]``.
    """

    shared: Tensor
    local: Tensor
    outside: Tensor
    observed: Tensor

    def total(self, power: float) -> Tensor:
        """The whole, with the likelihood raised to a power."""
        return self.shared + self.local.sum() + power * (self.outside + self.observed.sum())


class _Unconstrained(Messenger):
    """Gives each latent site its value, from unconstrained space; zero where there is none."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values
        self.jacobian: dict[str, Tensor] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["is_observed"] or type(msg["fn"]) is _Subsample:
            return
        fn = msg["fn"]
        transform = _bijection(fn)
        leaf = self.values.get(msg["name"])
        if leaf is None:
            leaf = torch.zeros(transform.inverse_shape(fn.shape()), dtype=torch.float64)
        value = transform(leaf)
        self.jacobian[msg["name"]] = transform.log_abs_det_jacobian(leaf, value)
        msg["value"], msg["done"] = value, True


def _bijection(fn: Any) -> Any:
    while isinstance(fn, dist.MaskedDistribution):
        fn = fn.base_dist
    mixture = isinstance(fn, torch.distributions.MixtureSameFamily)  # torch knows no bijection to its support
    return biject_to(fn.component_distribution.support if mixture else fn.support)


def _traced(program: Callable[[], None], values: Mapping[str, Tensor]) -> tuple[Any, dict[str, Tensor]]:
    messenger = _Unconstrained(values)
    with poutine.trace() as tracer, messenger:
        program()
    tracer.trace.compute_log_prob()
    return tracer.trace, messenger.jacobian


def _task_of(site: dict[str, Any], order: Sequence[int]) -> tuple[bool, int | None, int | None]:
    """Whether a site is local, its task in a sequential plate, the plate's dimension in a vectorised one."""
    for frame in site["cond_indep_stack"]:
        if frame.name == "tasks":
            return True, None if frame.vectorized else order[(frame.counter - 1) % len(order)], frame.dim
    return False, None, None


def log_density(program: Callable[[], None], values: Mapping[str, Tensor], num_tasks: int) -> Density:
    """The parts of the log density at unconstrained values, by site."""
    trace, jacobian = _traced(program, values)
    zero = torch.zeros((), dtype=torch.float64)
    shared, outside = zero, zero
    local, observed = [zero] * num_tasks, [zero] * num_tasks
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]) is _Subsample:
            continue
        inside, task, dim = _task_of(site, range(num_tasks))
        terms = [site["log_prob"]] + ([jacobian[name]] if name in jacobian else [])
        for k in range(num_tasks) if inside else ():
            if task in (None, k):
                part = sum((t if dim is None else t.select(dim, k)).sum() for t in terms)
                (observed if site["is_observed"] else local)[k] = (observed if site["is_observed"] else local)[k] + part
        if not inside:
            total = sum((t.sum() for t in terms), zero)
            shared, outside = (shared, outside + total) if site["is_observed"] else (shared + total, outside)
    return Density(shared, torch.stack(local), outside, torch.stack(observed))


def latent_sites(program: Callable[[], None]) -> dict[str, tuple[int, ...]]:
    """Names of all latent sites and the shapes of their unconstrained values, in the program's order."""
    trace, _ = _traced(program, {})
    return {
        name: tuple(_bijection(site["fn"]).inverse_shape(site["fn"].shape()))
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and not site["is_observed"] and type(site["fn"]) is not _Subsample
    }


def local_sites(program: Callable[[], None], num_tasks: int) -> dict[int | None, list[str]]:
    """Names of the local latent sites in the program's order, by task; under None in a vectorised plate."""
    trace, _ = _traced(program, {})
    names: dict[int | None, list[str]] = {}
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and not site["is_observed"] and type(site["fn"]) is not _Subsample:
            inside, task, _ = _task_of(site, range(num_tasks))
            if inside:
                names.setdefault(task, []).append(name)
    return names
