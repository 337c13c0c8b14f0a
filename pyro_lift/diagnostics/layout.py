"""Where the sites of a program stand: which dimensions are plates, and which sites of a loop belong together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Unit
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_lift.inference.families import Families
from pyro_lift.support.random_streams import own_global_stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Layout", "Place", "gathered", "read_layout"]


class Place(NamedTuple):
    """Where one site stands.

    Attributes:
        plates: names of plates by dimension of a value, counted from the left; other dimensions have none.
        local: how many coordinates one element of the plates has.
        family: label of the site without its task, in a plate that is iterated over; else its name.
        task: its task there; None in a vectorised plate, or outside.
        loop: the plate that is iterated over.
    """

    plates: dict[int, str]
    local: int
    family: str
    task: int | None = None
    loop: str | None = None


@dataclass
class Layout:
    """Places of a program's sites by kind; ``values`` are of the observed ones."""

    latent: dict[str, Place] = field(default_factory=dict)
    observed: dict[str, Place] = field(default_factory=dict)
    deterministic: dict[str, Place] = field(default_factory=dict)
    values: dict[str, Tensor] = field(default_factory=dict)

    def place(self, name: str) -> Place | None:
        """Return where a site of any kind stands."""
        return self.latent.get(name) or self.observed.get(name) or self.deterministic.get(name)


def read_layout(
    model: Callable[..., Any], args: Any, kwargs: Mapping[str, Any], values: Mapping[str, Tensor]
) -> Layout:
    """Run a program once, at some values of its latent sites, and note where its sites stand.

    Raises:
        NotImplementedError, RuntimeError, ValueError: the program, or a distribution that cannot be sampled from.
    """
    with torch.no_grad(), own_global_stream(0), validation_enabled(False), poutine.block():
        trace = poutine.trace(poutine.condition(model, dict(values))).get_trace(*args, **kwargs)
    layout, families, sizes = Layout(), Families(), _sizes(trace)
    for name, site in trace.nodes.items():
        if site["type"] != "sample" or type(site["fn"]) is _Subsample:
            continue
        place = _place(name, site, families, sizes)
        if site["infer"].get("_deterministic", False):
            layout.deterministic[name] = place
        elif isinstance(site["fn"], Unit):
            continue  # pyro.factor: no data
        elif site["is_observed"] and name not in values:
            layout.observed[name], layout.values[name] = place, site["value"]
        else:
            layout.latent[name] = place
    return layout


def _sizes(trace: Any) -> dict[str, int]:
    return {
        name: len(site["value"])
        for name, site in trace.nodes.items()
        if site["type"] == "sample" and type(site["fn"]) is _Subsample and site["value"] is not None
    }


def _place(name: str, site: Mapping[str, Any], families: Families, sizes: Mapping[str, int]) -> Place:
    value, event = site["value"], site["fn"].event_dim
    plates, family, task, loop = {}, name, None, None
    for frame in site["cond_indep_stack"]:
        if not frame.vectorized:
            task = (frame.counter - 1) % sizes.get(frame.name, frame.counter)
            loop, family = frame.name, families.label(task, name)
            continue
        at = value.dim() - event + frame.dim if isinstance(value, Tensor) else -1
        if at >= 0 and value.shape[at] == frame.size:
            plates[at] = frame.name
    if isinstance(value, Tensor) and site["infer"].get("_deterministic", False) and event == value.dim():
        plates = _plates_of_value(value.shape, [frame for frame in site["cond_indep_stack"] if frame.vectorized])
    total = value.numel() if isinstance(value, Tensor) else 1
    whole = int(np.prod([value.shape[at] for at in plates])) if plates else 1
    return Place(plates, total // max(whole, 1), family, task, loop)


def _plates_of_value(shape: torch.Size, frames: list[Any]) -> dict[int, str]:
    """Find the plates in a deterministic value of which the program did not say which dimensions are its event.

    Pyro then takes all of them for it, plates too. Batch dimensions stand on the left: all plates are where they would
    be with the others behind them; or, in a value that was squeezed or summed, each in the first dimension of its size.
    """
    wide = -min((frame.dim for frame in frames), default=0)
    places = {wide + frame.dim: frame for frame in frames}
    if len(shape) >= wide and all(shape[at] == frame.size for at, frame in places.items()):
        return {at: frame.name for at, frame in places.items()}
    plates: dict[int, str] = {}
    for _, frame in sorted(places.items()):
        free = [at for at, size in enumerate(shape) if size == frame.size and at not in plates]
        if free:
            plates[free[0]] = frame.name
    return plates


def gathered(
    values: Mapping[str, NDArray[Any]], places: Mapping[str, Place], lead: int, *, rows: bool = False
) -> tuple[dict[str, NDArray[Any]], dict[str, list[str | None]]]:
    """Put the sites of a loop together under their family, and name dimensions by plates.

    Args:
        values: by site; ``lead`` dimensions (chain and draw) come first.
        places: of these sites.
        lead: dimensions in front.
        rows: whether tasks of unequal shapes are put one behind the other along ``<family>_row``; else each stays.

    Returns:
        Values by name, and names of their dimensions after ``lead``; None where a dimension has none.
    """
    families: dict[str, list[str]] = {}
    for name in values:
        place = places.get(name)
        families.setdefault(place.family if place and place.task is not None else name, []).append(name)
    merged: dict[str, NDArray[Any]] = {}
    dims: dict[str, list[str | None]] = {}
    for family, names in families.items():
        parts, first = [values[name] for name in names], places.get(names[0])
        looped = first is not None and first.task is not None and first.loop is not None
        if looped and len(names) > 1 and len({part.shape for part in parts}) == 1:
            merged[family] = np.stack(parts, lead)
            assert first is not None
            dims[family] = [first.loop, *_plate_dims(parts[0].ndim - lead, first)]
        elif looped and len(names) > 1 and rows:
            merged[family] = np.concatenate([part.reshape(*part.shape[:lead], -1) for part in parts], lead)
            dims[family] = [f"{family}_row"]
        else:
            for name, part in zip(names, parts, strict=True):
                merged[name], dims[name] = part, _plate_dims(part.ndim - lead, places.get(name))
    return merged, dims


def _plate_dims(count: int, place: Place | None) -> list[str | None]:
    return [None if place is None else place.plates.get(k) for k in range(count)]
