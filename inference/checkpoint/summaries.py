"""State of Pyro's streaming statistics and of ours, as tensors and plain data."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from pyro.ops.streaming import CountMeanStats, CountMeanVarianceStats, CountStats, StackStats, StatsOfDict
from torch import Tensor

__all__ = ["T", "check_statistics", "load_statistics", "moved", "statistics_state"]


T = TypeVar("T")


def check_statistics(statistics: Any) -> None:
    """Refuse statistics that cannot be saved, before the run.

    Raises:
        ValueError: names the kind, and what it would have to have.
    """
    if not (hasattr(statistics, "state_dict") and hasattr(statistics, "load_state_dict")):
        _codec(statistics)


def statistics_state(statistics: Any) -> Any:
    """Return the state of a streaming summary as tensors and plain data, nested."""
    if hasattr(statistics, "state_dict"):
        return statistics.state_dict()
    return _codec(statistics)[0](statistics)


def load_statistics(statistics: Any, state: Any) -> None:
    """Put a streaming summary back where :func:`statistics_state` found it."""
    if hasattr(statistics, "load_state_dict"):
        statistics.load_state_dict(state)
    else:
        _codec(statistics)[1](statistics, state)


def _codec(statistics: Any) -> tuple[Callable[[Any], Any], Callable[[Any, Any], None]]:
    if isinstance(statistics, StatsOfDict):
        return _dict_state, _load_dict
    attributes = _ATTRIBUTES.get(type(statistics))
    if attributes is not None:
        return lambda s: _get_all(s, attributes), lambda s, state: _put_all(s, state)
    raise ValueError(
        f"statistics of the kind {type(statistics).__name__} cannot be saved: give it state_dict() and "
        "load_state_dict(), of tensors and plain data, or run without checkpoints."
    )


#: What Pyro's own statistics consist of.
_ATTRIBUTES: dict[type, tuple[str, ...]] = {
    CountStats: ("count",),
    CountMeanStats: ("count", "mean"),
    CountMeanVarianceStats: ("shape", "welford.n_samples", "welford._mean", "welford._m2"),
    StackStats: ("samples",),
}


def _get_all(statistics: Any, names: Sequence[str]) -> dict[str, Any]:
    return {name: _plain(operator.attrgetter(name)(statistics)) for name in names}


def _put_all(statistics: Any, state: Mapping[str, Any]) -> None:
    for name, value in state.items():
        holder, _, last = name.rpartition(".")
        place = operator.attrgetter(holder)(statistics) if holder else statistics
        setattr(place, last, torch.Size(value) if last == "shape" and value is not None else value)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, torch.Size) else value


def _dict_state(statistics: StatsOfDict) -> Any:
    return [[_plain_key(key), statistics_state(entry)] for key, entry in statistics.stats.items()]


def _load_dict(statistics: StatsOfDict, state: Any) -> None:
    for key, entry in state:
        load_statistics(statistics.stats[tuple(key) if isinstance(key, list) else key], entry)


def _plain_key(key: Any) -> Any:
    return list(key) if isinstance(key, tuple) else key


def moved(tree: Any, device: torch.device) -> Any:
    """Return the nested state with its tensors on a device."""
    if isinstance(tree, Tensor):
        return tree.to(device)
    if isinstance(tree, dict):
        return {key: moved(value, device) for key, value in tree.items()}
    return [moved(value, device) for value in tree] if isinstance(tree, list) else tree
