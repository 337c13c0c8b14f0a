"""From Pyro's MCMC to ArviZ, on ArviZ 0.23 and 1.x."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from pyro_lift.diagnostics.columns import Column, named_columns, numpy_of
from pyro_lift.diagnostics.groups import (
    Asked,
    Group,
    Variable,
    dims_of,
    draws_as_sites,
    named_arguments,
    second_groups,
)
from pyro_lift.diagnostics.layout import Layout, read_layout
from pyro_lift.diagnostics.passes import Pointwise
from pyro_lift.inference.whole import whole
from pyro_lift.support.archive import versions

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["SAMPLE_STATS", "from_mcmc", "plain_data"]

#: sample_stats that our kernels report for each draw, under ArviZ's names where they mean the same. The log likelihood
#: of the visited tasks is no pointwise one, which is what ``az.loo`` and ``az.compare`` take ``log_likelihood`` for.
SAMPLE_STATS = ("visit_log_likelihood", "grad_norm", "step_size", "clipped", "task")
#: And where steps are tested: the mean probability with which the visit's proposals were taken.
TESTED_STATS = ("acceptance",)
_REPORTED_AS = {"visit_log_likelihood": "log_likelihood"}


class FromMCMCOptions(TypedDict, total=False):
    """Options of :func:`from_mcmc` that are seldom set."""

    constant_data: Mapping[str, Any]
    pointwise: Pointwise
    max_size: int
    coordinates: int
    seed: int


def from_mcmc(
    mcmc: Any,
    *,
    log_likelihood: bool = False,
    posterior_predictive: bool | Mapping[str, Any] = False,
    prior: bool | int | Mapping[str, Any] = False,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
    **options: Unpack[FromMCMCOptions],
) -> Any:
    """Convert a finished run of ``MCMC`` or ``StreamingMCMC``, of any kernel, to ArviZ's container.

    Dimensions are named by the program's plates. The program is run once, to read them, and once for each draw that
    ``log_likelihood`` and ``posterior_predictive`` ask for, with full plates (:func:`pyro_lift.whole`); a program with
    a site of more than ``max_size`` coordinates, an adapter, is not run unless these are asked for.

    Args:
        mcmc: a finished run. ``StreamingMCMC`` keeps no draws: give it a
            :class:`~pyro_lift.inference.projections.ProjectedTrace` among its statistics.
        log_likelihood: add the group ``log_likelihood``, of each observation at each draw, which ``az.loo`` and
            ``az.compare`` take. The draws must be of every latent site: ``SGLDGibbs(model, keep_theta=True)``. The
            power ``n_inflate`` and the temperature are not in it.
        posterior_predictive: add data drawn at each draw; or such data, ``[S, ...]`` by site, the draws of all chains
            one after another, as ``pyro.infer.Predictive`` gives them.
        prior: add the groups ``prior`` and ``prior_predictive``: True draws 500 times, a number that often; or such
            draws ``[S, ...]`` by site.
        coords: labels by dimension, as ``{"tasks": names}``.
        dims: names of the dimensions of a variable, after chain and draw; of all, or of those that are no plates.
        options: ``constant_data``, arrays by name (tensors that ``run`` was given are taken by the names of the model's
            arguments); ``pointwise="rows"``, to count each number inside ``.to_event`` as an observation and not
            each independent draw of the program (``"program"``); ``max_size`` (64): sites of more coordinates (in one
            element of their plates) are replaced by ``<site>_projection``, a fixed random projection, and
            ``<site>_norm``, one norm per adapted module where the model has an adapter; ``coordinates`` (32) and
            ``seed`` (0) of that projection and of what is drawn.

    Returns:
        ``InferenceData`` (ArviZ 0.x) or ``DataTree`` (1.x) with the groups ``posterior`` and ``sample_stats``, and, if
        one of the three is asked for, ``observed_data`` and ``constant_data``. A site
        whose name is that of a dimension (``chain``, ``draw``, ``x_dim_0``) or has a slash in it, which no variable of
        ArviZ's can have, stands under one with ``_`` behind it, or with dots; its attribute ``site`` has its own name.

    Raises:
        ValueError: the run has not happened, or kept nothing; or not the draws that are asked for.
        TypeError: an unknown option.
    """
    for name in options:
        if name not in FromMCMCOptions.__annotations__:
            raise TypeError(
                f"unknown option {name!r} of from_mcmc; known are: log_likelihood, posterior_predictive, prior, "
                f"coords, dims, {', '.join(FromMCMCOptions.__annotations__)}."
            )
    size, seed = options.get("max_size", 64), options.get("seed", 0)
    kept = getattr(mcmc, "_samples", None)
    asked = log_likelihood is not False or posterior_predictive is not False or prior is not False
    if asked and kept is None:
        raise ValueError(
            "this run keeps no draws: it has not been run, or it is a StreamingMCMC. Use MCMC for log likelihoods and "
            "predictions."
        )
    layout = _layout(mcmc, kept, size, asked)
    sites = draws_as_sites(mcmc, layout, size, options.get("coordinates", 32), seed)
    groups: dict[str, Group] = {"posterior": sites.group}
    shape = next(iter(sites.group.values())).values.shape[:2]
    if stats := _sample_stats(mcmc, shape):
        groups["sample_stats"] = {name: Variable(value, []) for name, value in stats.items()}
    if asked:
        asks = Asked(log_likelihood, posterior_predictive, prior, options.get("pointwise", "program"), seed)
        groups |= second_groups(mcmc, layout, shape, asks)
        groups["posterior"] |= groups.pop("derived", {})
        constants = {**named_arguments(mcmc, layout), **options.get("constant_data", {})}
        if constants:
            groups["constant_data"] = {name: Variable(numpy_of(value), []) for name, value in constants.items()}
    return _container(groups, sites.coords, coords or {}, dims or {})


def plain_data(mcmc: Any, max_size: int, coordinates: int) -> Any:
    """Convert a run without a look at its program: theta of many tasks are one large site, shown by projections."""
    sites = draws_as_sites(mcmc, Layout(), max_size, coordinates, 0)
    groups = {"posterior": sites.group}
    if stats := _sample_stats(mcmc, next(iter(sites.group.values())).values.shape[:2]):
        groups["sample_stats"] = {name: Variable(value, []) for name, value in stats.items()}
    return _container(groups, sites.coords, {}, {})


def _layout(mcmc: Any, kept: Any, max_size: int, asked: bool) -> Layout:
    """Read the program of a run; a run of a large one is let be, unless its second passes are asked for."""
    kernel = getattr(mcmc, "kernel", None)
    model = getattr(kernel, "model", None)
    if model is None or kept is None:
        return Layout()
    keeps = bool(getattr(kernel, "keep_theta", False))
    if not asked and not keeps and any(value[0, 0].numel() > max_size for value in kept.values()):
        return Layout()
    values = {name: value[0, 0] for name, value in kept.items()}
    program = whole(model) if asked or keeps else model
    try:
        return read_layout(program, mcmc._args or (), mcmc._kwargs or {}, values)
    except (NotImplementedError, RuntimeError, ValueError):
        if asked:
            raise
        return Layout()


def _container(
    groups: Mapping[str, Group],
    made: Mapping[str, Any],
    coords: Mapping[str, Any],
    user_dims: Mapping[str, Sequence[str]],
) -> Any:
    import arviz as az

    known = {name for group in groups.values() for name in group}
    if odd := sorted(set(user_dims) - known):
        raise ValueError(f"dims: there is no variable {odd[0]!r} (one of: {', '.join(map(repr, sorted(known)))}).")
    attrs = {"inference_library": "pyro_lift", "inference_library_version": versions().get("pyro-lift", "")}
    arrays: dict[str, dict[str, NDArray[Any]]] = {}
    dims: dict[str, list[str]] = {}
    renamed: dict[tuple[str, str], str] = {}
    for group, variables in groups.items():
        lead = 0 if group in ("observed_data", "constant_data") else 2
        columns = [
            Column(
                variable.name or name,
                variable.values,
                dims_of(variable.name or name, variable, lead, user_dims.get(name)),
            )
            for name, variable in variables.items()
        ]
        arrays[group], own, sites = named_columns(columns)
        dims |= own
        renamed |= {(group, name): site for name, site in sites.items()}
    used = {dim for names in dims.values() for dim in names}
    if odd := sorted(set(coords) - used - {"chain", "draw"}):
        known_dims = ", ".join(map(repr, sorted(used))) or "none"
        raise ValueError(f"coords: no variable has a dimension {odd[0]!r} (named ones: {known_dims}).")
    coords = {**made, **coords}
    if az.__version__.startswith("0."):
        data = az.from_dict(**arrays, dims=dims, coords=coords)
    else:
        data = az.from_dict(arrays, dims=dims, coords=coords)
    data["posterior"].attrs.update(attrs)
    for (group, name), site in renamed.items():
        data[group][name].attrs["site"] = site
    return data


def _sample_stats(mcmc: Any, shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    chains, draws = shape
    reports = [report or {} for report in mcmc._diagnostics]
    if all("sample_stats" in report for report in reports):
        stats = {
            name: np.array([report["sample_stats"][_REPORTED_AS.get(name, name)] for report in reports])
            for name in (*SAMPLE_STATS, *TESTED_STATS)
            if all(_REPORTED_AS.get(name, name) in report["sample_stats"] for report in reports)
        }
        stats = {name: value for name, value in stats.items() if value.shape == (chains, draws)}
        return stats | (_diverging(reports, shape) if any(report.get("divergences") for report in reports) else {})
    return _diverging(reports, shape) if all("divergences" in report for report in reports) else {}


def _diverging(reports: list[Any], shape: tuple[int, int]) -> dict[str, NDArray[Any]]:
    diverging = np.zeros(shape, dtype=bool)
    for chain, report in enumerate(reports):
        diverging[chain, list(report["divergences"])] = True
    return {"diverging": diverging}
