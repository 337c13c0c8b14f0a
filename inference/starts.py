"""Where a latent site starts that was given no value."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from pyro.infer.autoguide.initialization import init_to_median
from torch import Tensor
from torch.distributions import Transform

from pyro_lift.inference.supports import innermost

__all__ = ["InitStrategy", "start_of"]

InitStrategy = Callable[[dict[str, Any]], Tensor]


def start_of(msg: dict[str, Any], transform: Transform | None, initial: InitStrategy) -> Tensor:
    """The start in unconstrained space: what ``initial`` says, the median where that is infinite, zero without either.

    The mean of a half-Cauchy is infinite, that of an improper distribution does not exist.

    Raises:
        ValueError: a value of the caller's own that is not inside the support.
    """
    fn, start = msg["fn"], None
    with contextlib.suppress(NotImplementedError):  # an improper distribution has neither mean nor samples
        start = initial(msg)
    if start is not None:
        leaf = _unconstrained(start, transform)
        if _usable(leaf):
            return leaf
        if getattr(start, "_pyro_custom_init", True):
            raise ValueError(
                f"the site {msg['name']!r} would start at {_shown(start)}, which is not inside the support of its "
                f"{type(innermost(fn)).__name__}. Start it at a finite value inside."
            )
    for strategy in (_exact_median, init_to_median):
        try:
            with torch.random.fork_rng(devices=[]):  # Pyro's median is of random draws
                leaf = _unconstrained(strategy(msg), transform)
        except (NotImplementedError, ValueError, RuntimeError):
            continue
        if _usable(leaf):
            return leaf if start is None else leaf.to(start)
    zeros = torch.zeros(fn.shape() if transform is None else transform.inverse_shape(fn.shape()))
    return zeros if start is None else zeros.to(start)


def _unconstrained(value: Tensor, transform: Transform | None) -> Tensor:
    return (value if transform is None else transform.inv(value)).detach().clone()


def _usable(leaf: Tensor) -> bool:
    return not leaf.is_floating_point() or bool(torch.isfinite(leaf).all())


def _shown(value: Tensor) -> str:
    return f"{float(value):g}" if value.numel() == 1 else f"a value of shape {list(value.shape)}"


def _exact_median(msg: dict[str, Any]) -> Tensor:
    base: Any = innermost(msg["fn"])
    if base.event_shape:
        raise NotImplementedError
    median: Tensor = base.icdf(base.mean.new_full(base.batch_shape, 0.5))
    return median.expand(msg["fn"].shape())
