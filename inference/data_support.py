"""Data outside the support of the law that they are observed under, refused at set-up with the value and its place.

Pyro's chains run without validation, and a negative count or a missing number then shows as a density that is not
finite, or not at all. Rows that are masked may hold anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, constraints

from pyro_lift.inference.sgld import DivergedError, Drift, check_finite
from pyro_lift.inference.supports import innermost

__all__ = ["DataOutsideSupportError", "check_start", "check_values", "outside_support", "values_outside"]

#: By how much shares that add up to one may miss it: torch's own 1e-6 is less than the rounding of long vectors.
ROUNDING = 1e-3
_WHOLE = "whole numbers from "


class DataOutsideSupportError(DivergedError, ValueError):
    """An observed value that its law does not allow; an error of the chain, too, as which it showed before."""


def check_values(run: Any) -> None:
    """Refuse observed values that are not finite, or outside the support of their law.

    Args:
        run: an evaluation of the program, with gradients: a support that hangs on a latent site is not held against
            the data.

    Raises:
        DataOutsideSupportError: names the site, the first such value and its index.
    """
    if words := outside_support(run):
        raise DataOutsideSupportError(words, 0, run.tasks)


def outside_support(run: Any) -> str:
    """Return the sentences about the first site with data outside its law's support; empty where all are in it."""
    for site in run.observed:
        if words := values_outside(site.name, site.fn, site.value, site.mask):
            return words
    return ""


def values_outside(name: str, fn: Distribution, value: Any, mask: Any = None) -> str:
    """Return the sentences about values of one site outside its law's support; empty where all are in it.

    Args:
        name: of the site.
        fn: its law.
        value: observed, ``[..., event]``.
        mask: of the site beside that of its law; True is seen.
    """
    if not isinstance(value, Tensor) or not value.numel():
        return ""
    law = innermost(fn)
    event = len(law.event_shape)
    seen, value = _seen(fn, mask), value.detach()
    place = _first(~_finite(value, event), seen)
    if place is not None:
        return (
            f"the site {name!r} observes values that are not finite, the first at {place} "
            f"({_told(value, event, place)}). Leave such rows out, or mask them: fill them with a number, and "
            "dist....mask(known)."
        )
    support = _support(law)
    inside = None if support is None else _inside(support, value)
    place = None if inside is None else _first(~inside, seen)
    if place is None:
        return ""
    return (
        f"the site {name!r} observes {_told(value, event, place)} at {place}, and {type(law).__name__} allows "
        f"{_words(support, place)}. Correct the data, take another law, or mask what is not known: fill it with a "
        "number, and dist....mask(known). Where such values are meant, write the term itself: "
        f"pyro.factor({name!r}, ...)."
    )


def check_start(drift: Drift, run: Any) -> None:
    """Refuse a start at which the density is not finite, and say whose data it is that no step can mend.

    Args:
        drift: of the run.
        run: at the start.

    Raises:
        DivergedError: names the first observed value without a finite log density, where there is one.
    """
    try:
        check_finite(drift, 0, run.tasks)
    except DivergedError as error:
        if words := outside_support(run):
            raise DataOutsideSupportError(words, 0, run.tasks) from None
        if words := _no_density(run):
            raise DivergedError(f"the density is not finite at the start: {words}", 0, run.tasks) from None
        raise error from None


def _no_density(run: Any) -> str:
    """Return the sentences about the first observed value whose log density is not finite; empty where all are."""
    for site in run.observed:
        if not isinstance(site.value, Tensor) or not site.value.numel():
            continue
        density = site.fn.log_prob(site.value).detach()
        place = _first(~density.isfinite(), [] if site.mask is None else [torch.as_tensor(site.mask).bool()])
        if place is not None:
            event = len(site.fn.event_shape)
            return (
                f"the site {site.name!r} observes {_told(site.value.detach(), event, place)} at {place}, where "
                f"{type(innermost(site.fn)).__name__} has a log density of {float(density[tuple(place)])}. Look at "
                "this value, at the law, and at where the latent sites start (init_strategy, initial_params)."
            )
    return ""


def _seen(fn: Any, mask: Any) -> list[Tensor]:
    """The masks on and in a law, with a dimension more for each that the law takes into its event inside of them."""
    layers = list(_layers(fn))
    inside = sum(layer.reinterpreted_batch_ndims for kind, layer in layers if kind == "Independent")
    masks = [] if mask is None else [(mask, inside)]
    for kind, layer in layers:
        if kind == "MaskedDistribution":
            masks.append((layer._mask, inside))
        elif kind == "Independent":
            inside -= layer.reinterpreted_batch_ndims
    tensors = [(torch.as_tensor(value).bool(), dims) for value, dims in masks]
    return [value.reshape(value.shape + (1,) * dims) for value, dims in tensors]


def _layers(fn: Any) -> Iterator[tuple[str, Any]]:
    while type(fn).__name__ in ("Independent", "MaskedDistribution", "ExpandedDistribution"):
        yield type(fn).__name__, fn
        fn = fn.base_dist


def _finite(value: Tensor, event: int) -> Tensor:
    finite = value.isfinite()
    return finite if not event else finite.flatten(-event).all(-1)


def _first(odd: Tensor, seen: list[Tensor]) -> list[int] | None:
    """Where the first odd value stands that is seen; None where there is none."""
    if not bool(odd.any()):
        return None
    for mask in seen:
        odd = odd & mask.to(odd.device)
    places = odd.nonzero()
    return places[0].tolist() if len(places) else None


def _told(value: Tensor, event: int, place: list[int]) -> str:
    """Return a value, or an event of several numbers, in words."""
    event_shape = value.shape[value.dim() - event :]
    shown = torch.broadcast_to(value, (*_lead(value, event, place), *event_shape))[tuple(place)]
    text = f"{shown.item():g}" if not event else str(shown.tolist())
    return text if len(text) <= 60 else f"{text[:57]}..."


def _lead(value: Tensor, event: int, place: list[int]) -> list[int]:
    """The shape before the event, wide enough for a place that broadcasting made."""
    own = list(value.shape[: value.dim() - event])
    own = [1] * (len(place) - len(own)) + own
    return [max(size, at + 1) if size == 1 else size for size, at in zip(own, place, strict=True)]


def _support(law: Any) -> Any:
    """The support of a law; None where it has none, or one that moves with latent sites."""
    try:
        support = law.support
    except (NotImplementedError, AttributeError):
        return None
    return None if support is None or _hangs_on_latents(support) else support


def _hangs_on_latents(support: Any) -> bool:
    parts = list(vars(support).values())
    parts += [part for many in parts if isinstance(many, (list, tuple)) for part in many]
    return any(
        part.requires_grad if isinstance(part, Tensor) else _hangs_on_latents(part)
        for part in parts
        if isinstance(part, (Tensor, constraints.Constraint))
    )


def _inside(support: Any, value: Tensor) -> Tensor | None:
    """Whether each event is in the support; None where that cannot be told."""
    if support is constraints.simplex:
        return (value >= 0.0).all(-1) & ((value.sum(-1) - 1.0).abs() < ROUNDING)
    try:
        inside = support.check(value)
    except (NotImplementedError, RuntimeError, TypeError, ValueError):  # the density says more of shapes
        return None
    return torch.as_tensor(inside).bool()


def _words(support: Any, place: list[int]) -> str:
    """Say in words what a support holds, at a place where its bounds differ."""
    low, high = (_bound(getattr(support, name, None), place) for name in ("lower_bound", "upper_bound"))
    whole = bool(support.is_discrete) and not support.event_dim
    if support is constraints.boolean:
        return "0 and 1"
    if support is constraints.simplex:
        return "shares that add up to one"
    if low is not None and high is not None:
        return f"{_WHOLE if whole else 'numbers from '}{low} to {high}"
    if low is not None:
        above = "above " if isinstance(support, type(constraints.positive)) else "from "
        return f"{_WHOLE}{low}" if whole else f"numbers {above}{low}"
    return f"what torch calls {support!r}"


def _bound(value: Any, place: list[int]) -> str | None:
    if value is None:
        return None
    bound = torch.as_tensor(value)
    if bound.dim():
        bound = torch.broadcast_to(bound, _lead(bound, 0, place))[tuple(place)]
    return f"{bound.item():g}"
