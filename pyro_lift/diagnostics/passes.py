"""Second passes of a program over draws: pointwise log likelihoods, and data that the draws predict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Unit
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.support.random_streams import own_global_stream

__all__ = ["Pointwise", "log_likelihoods", "predictions", "prior_draws"]

#: ``"program"``: one number for each independent draw that the program makes; ``"rows"``: also inside ``.to_event``.
Pointwise = Literal["program", "rows"]
Model = Callable[..., Any]


class _Resampled(Messenger):
    """Draws what is observed anew, as wide as the data are where the program broadcasts a law to them."""

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if not msg["is_observed"] or _is_no_data(msg):
            return
        law = _as_wide(msg["fn"], msg["value"])
        msg["value"], msg["done"] = law.sample(), True


def _is_no_data(site: Mapping[str, Any]) -> bool:
    fn = site["fn"]
    return type(fn) is _Subsample or isinstance(fn, Unit) or bool(site["infer"].get("_deterministic", False))


def _as_wide(fn: Distribution, value: Any) -> Distribution:
    """Return the law with an event as wide as a value that it is broadcast to."""
    if not isinstance(value, Tensor) or fn.batch_shape + fn.event_shape == value.shape:
        return fn
    inner, events = fn, 0
    while type(inner).__name__ in ("Independent", "MaskedDistribution"):
        events += getattr(inner, "reinterpreted_batch_ndims", 0)
        inner = inner.base_dist  # type: ignore[attr-defined]
    shape = torch.broadcast_shapes(inner.batch_shape + inner.event_shape, value.shape)
    wide = inner.expand(shape[: len(shape) - len(inner.event_shape)])
    return wide.to_event(events) if events else wide  # type: ignore[attr-defined, no-any-return]


def _traces(
    model: Model, args: Any, kwargs: Mapping[str, Any], draws: Mapping[str, Tensor], count: int, seed: int
) -> Iterator[Any]:
    for s in range(count):
        values = {name: value[s] for name, value in draws.items()}
        with torch.no_grad(), own_global_stream(seed + s), validation_enabled(False), poutine.block():
            yield poutine.trace(poutine.condition(model, values)).get_trace(*args, **kwargs)


def log_likelihoods(
    model: Model, args: Any, kwargs: Mapping[str, Any], draws: Mapping[str, Tensor], pointwise: Pointwise = "program"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Evaluate the log likelihood of each observation at each draw, one run of the program a draw.

    Args:
        model: without subsampling.
        args: of the program.
        kwargs: of the program.
        draws: of every latent site, ``[S, ...]``.
        pointwise: what counts as one observation.

    Returns:
        By observed site ``[S, ...]``, with masks and weights of the program; and the deterministic sites ``[S, ...]``.

    Raises:
        ValueError: a latent site without draws.
    """
    found: dict[str, list[Tensor]] = {}
    derived: dict[str, list[Tensor]] = {}
    count = len(next(iter(draws.values())))
    for trace in _traces(model, args, kwargs, draws, count, 0):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or type(site["fn"]) is _Subsample or name in draws:
                continue
            if site["infer"].get("_deterministic", False):
                derived.setdefault(name, []).append(site["value"])
            elif not site["is_observed"]:
                raise ValueError(_undrawn(name))
            elif not _is_no_data(site):
                found.setdefault(name, []).append(_each(site, pointwise))
    return _stacked(found), _stacked(derived)


def _undrawn(name: str) -> str:
    return (
        f"the run keeps no draws of the site {name!r}, and what is observed depends on them. Keep them: "
        "SGLDGibbs(model, keep_theta=True)."
    )


def _each(site: Mapping[str, Any], pointwise: Pointwise) -> Tensor:
    law, value = site["fn"], site["value"]
    each: Tensor = law.log_prob(value)
    if pointwise == "rows":
        inner, mask = law, site["mask"]
        while type(inner).__name__ == "Independent":
            inner = inner.base_dist
        if inner is not law:
            parts = inner.log_prob(value)
            spread = parts.dim() - each.dim()
            mask = mask.reshape(*mask.shape, *[1] * spread) if isinstance(mask, Tensor) else mask
            return torch.as_tensor(scale_and_mask(parts, site["scale"], mask))
    return torch.as_tensor(scale_and_mask(each, site["scale"], site["mask"]))


def predictions(
    model: Model, args: Any, kwargs: Mapping[str, Any], draws: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Tensor]:
    """Draw data anew at each draw of the latent sites, ``[S, ...]`` by observed site; see :func:`log_likelihoods`."""
    found: dict[str, list[Tensor]] = {}
    count = len(next(iter(draws.values())))
    for trace in _traces(_Resampled()(model), args, kwargs, draws, count, seed):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or name in draws or _is_no_data(site):
                continue
            if not site["is_observed"]:
                raise ValueError(_undrawn(name))
            found.setdefault(name, []).append(site["value"])
    return _stacked(found)


def prior_draws(
    model: Model, args: Any, kwargs: Mapping[str, Any], count: int, seed: int = 0
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw a program from its prior: latent and deterministic sites, and the data that they predict, ``[S, ...]``."""
    latent: dict[str, list[Tensor]] = {}
    data: dict[str, list[Tensor]] = {}
    for trace in _traces(_Resampled()(model), args, kwargs, {}, count, seed):
        for name, site in trace.nodes.items():
            if site["type"] != "sample" or type(site["fn"]) is _Subsample or isinstance(site["fn"], Unit):
                continue
            derived = site["infer"].get("_deterministic", False)
            (data if site["is_observed"] and not derived else latent).setdefault(name, []).append(site["value"])
    return _stacked(latent), _stacked(data)


def _stacked(found: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([torch.as_tensor(value) for value in values]) for name, values in found.items()}
