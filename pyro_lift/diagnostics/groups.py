"""The groups of ArviZ's container before they are one: variables with names of their dimensions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.diagnostics.columns import adapter_of, numpy_of, posterior_columns
from pyro_lift.diagnostics.layout import Layout, Place, gathered
from pyro_lift.diagnostics.passes import Pointwise, log_likelihoods, predictions, prior_draws
from pyro_lift.inference.whole import whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Asked", "Group", "Variable", "dims_of", "draws_as_sites", "named_arguments", "second_groups"]

#: Draws of the prior where their number is not said.
PRIOR_DRAWS = 500


class Variable(NamedTuple):
    """Values, and names of their dimensions after chain and draw; None where one has none.

    ``name`` is the site's, where a group has two of that name.
    """

    values: NDArray[Any]
    dims: Sequence[str | None]
    name: str | None = None


Group = dict[str, Variable]


class Sites(NamedTuple):
    """The posterior, and coordinates of dimensions that were made for it."""

    group: Group
    coords: dict[str, Any]


class Asked(NamedTuple):
    """What second passes are asked for; see :func:`pyro_lift.from_mcmc`."""

    log_likelihood: bool
    posterior_predictive: bool | Mapping[str, Any]
    prior: bool | int | Mapping[str, Any]
    pointwise: Pointwise
    seed: int


def draws_as_sites(mcmc: Any, layout: Layout, max_size: int, coordinates: int, seed: int) -> Sites:
    """Return the draws by site, those of a loop over tasks under their family; large ones by what stands for them."""
    keeps = bool(getattr(getattr(mcmc, "kernel", None), "keep_theta", False))
    small: dict[str, NDArray[Any]] = {}
    for name, place in layout.latent.items():
        if place.local <= max_size and (place.plates or place.task is not None) and mcmc._samples.get(name) is not None:
            small[name] = numpy_of(mcmc._samples[name])
    places = layout.latent if keeps else {n: p._replace(task=None) for n, p in layout.latent.items()}
    values, dims = gathered(small, places, 2)
    group = {name: Variable(value, dims[name]) for name, value in values.items()}
    if getattr(mcmc, "_samples", None) is not None and small.keys() == mcmc._samples.keys():
        return Sites(group, {})
    columns, coords = posterior_columns(mcmc, adapter_of(mcmc), max_size, coordinates, seed, leave=frozenset(small))
    for column in columns:
        key = column.name
        while key in group:
            key += "'"
        group[key] = Variable(column.values, column.dims or (), column.name)
    return Sites(group, coords)


def second_groups(mcmc: Any, layout: Layout, shape: tuple[int, ...], asked: Asked) -> dict[str, Group]:
    """Run the program over the draws and return what was asked for, the data, and deterministic sites (``derived``)."""
    model, args, kwargs = whole(mcmc.kernel.model), mcmc._args or (), mcmc._kwargs or {}
    draws = {name: value.flatten(0, 1) for name, value in mcmc._samples.items()}
    groups: dict[str, Group] = {}
    if asked.log_likelihood:
        each, derived = log_likelihoods(model, args, kwargs, draws, asked.pointwise)
        groups["log_likelihood"] = _group(each, layout.observed, shape)
        groups["derived"] = _group(derived, layout.deterministic, shape)
    if asked.posterior_predictive is not False:
        given = asked.posterior_predictive
        drawn = given if isinstance(given, Mapping) else predictions(model, args, kwargs, draws, asked.seed)
        groups["posterior_predictive"] = _group(drawn, layout.observed, shape)
    if asked.prior is not False:
        latent, data = _prior(asked, model, args, kwargs, layout)
        latent = {name: _as_drawn(value, mcmc._samples.get(name)) for name, value in latent.items()}
        groups["prior"] = _group(latent, {**layout.latent, **layout.deterministic}, (1, -1))
        groups["prior_predictive"] = _group(data, layout.observed, (1, -1))
    observed, dims = gathered({n: numpy_of(v) for n, v in layout.values.items()}, layout.observed, 0, rows=True)
    groups["observed_data"] = {name: Variable(value, dims[name]) for name, value in observed.items()}
    return {name: group for name, group in groups.items() if group}


def _prior(asked: Asked, model: Any, args: Any, kwargs: Any, layout: Layout) -> tuple[dict[str, Any], dict[str, Any]]:
    given = asked.prior
    if not isinstance(given, Mapping):
        count = PRIOR_DRAWS if given is True else int(given)
        return prior_draws(model, args, kwargs, count, asked.seed)
    return (
        {name: value for name, value in given.items() if name not in layout.observed},
        {name: value for name, value in given.items() if name in layout.observed},
    )


def _as_drawn(value: Any, draws: Tensor | None) -> Any:
    """Return draws of a site in the shape of the run's: ``pyro.infer.Predictive`` gives plates it is not in."""
    alike = draws is not None and isinstance(value, Tensor) and value[0].numel() == draws[0, 0].numel()
    return value.reshape(len(value), *draws.shape[2:]) if alike and draws is not None else value


def _group(values: Mapping[str, Any], places: Mapping[str, Place], shape: tuple[int, ...]) -> Group:
    arrays = {name: numpy_of(value) for name, value in values.items()}
    shaped = {name: value.reshape(*shape[:2], *value.shape[1:]) for name, value in arrays.items()}
    merged, dims = gathered(shaped, places, 2, rows=True)
    return {name: Variable(value, dims[name]) for name, value in merged.items()}


def named_arguments(mcmc: Any, layout: Layout) -> dict[str, Tensor]:
    """Return the tensors that the program was run with, by the names of its arguments; data that it observes apart."""
    try:
        bound = inspect.signature(mcmc.kernel.model).bind(*(mcmc._args or ()), **(mcmc._kwargs or {}))
    except (TypeError, ValueError):
        return {}
    data = [value for value in layout.values.values() if isinstance(value, Tensor)]
    return {
        name: value
        for name, value in bound.arguments.items()
        if isinstance(value, Tensor) and not any(value.shape == y.shape and torch.equal(value, y) for y in data)
    }


def dims_of(name: str, variable: Variable, lead: int, given: Sequence[str] | None) -> list[str] | None:
    """Return names of all dimensions after chain and draw; None where ArviZ's own will do.

    Raises:
        ValueError: names that are neither of all dimensions nor of those that are no plates.
    """
    count = variable.values.ndim - lead
    known: list[str | None] = [*variable.dims, *[None] * (count - len(variable.dims))]
    free = known.count(None)
    if given is not None:
        if len(given) == count:
            known = list(given)
        elif len(given) == free:
            names = iter(given)
            known = [next(names) if dim is None else dim for dim in known]
        else:
            raise ValueError(
                f"dims[{name!r}] names {len(given)} dimensions; {name!r} has {count} after chain and draw, "
                f"{free} of them no plates."
            )
    if all(dim is None for dim in known):
        return None
    return [f"{name}_dim_{k}" if dim is None else dim for k, dim in enumerate(known)]
