"""A program with other data in the place of those it observes: for simulated data, and for predictive checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger
from torch import Tensor

__all__ = ["with_data"]


def with_data(model: Callable[..., Any], data: Mapping[str, Tensor]) -> Callable[..., Any]:
    """Return a program that observes other data at its observed sites, with the rows that its plates show.

    Whatever else the program computes from its own data stays as it is.

    Args:
        model: a Pyro program.
        data: by observed site, of full plates.
    """
    return _WithData(model, data)


class _WithData:
    """The program of :func:`with_data`; it pickles where the program does."""

    def __init__(self, model: Callable[..., Any], data: Mapping[str, Tensor]) -> None:
        self.model, self.data = model, dict(data)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with _Replaced(self.data):
            return self.model(*args, **kwargs)


class _Replaced(Messenger):
    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.data = data

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] not in self.data or not msg["is_observed"]:
            return
        value, event = self.data[msg["name"]], msg["fn"].event_dim
        plates = {p.name: p for p in _PYRO_STACK if isinstance(p, SubsampleMessenger)}
        for frame in msg["cond_indep_stack"]:
            plate = plates.get(frame.name)
            if plate is None or not frame.vectorized:
                continue
            dim = value.dim() - event + frame.dim
            if dim >= 0 and value.shape[dim] == plate.size:
                value = value.index_select(dim, plate.indices.to(value.device))
        msg["value"] = value
