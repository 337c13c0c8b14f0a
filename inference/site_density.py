"""The log density of one site, and what is said of a site that has none, or is given values of another shape."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.inference.data_support import DataOutsideSupportError, values_outside
from pyro_lift.inference.supports import innermost

__all__ = ["site_density"]


def site_density(name: str, fn: Distribution, value: Tensor) -> Tensor:
    """Compute the log density of a site, element by element of its plates.

    Args:
        name: of the site.
        fn: its distribution.
        value: of it.

    Raises:
        ValueError: a distribution without a density, or values that do not fit its shape; with the way out.
    """
    try:
        return fn.log_prob(value)
    except NotImplementedError:
        raise ValueError(
            f"the site {name!r} ({type(innermost(fn)).__name__}) has no density that can be computed. Rewrite it, by "
            "hand or with pyro.infer.reparam."
        ) from None
    except (RuntimeError, ValueError) as error:
        batch, event = list(fn.batch_shape), list(fn.event_shape)
        if _fits(value.shape, [*batch, *event]):
            if words := values_outside(name, fn, value):
                raise DataOutsideSupportError(words, 0) from None
            raise
        if 0 in value.shape and 0 not in [*batch, *event]:
            raise ValueError(
                f"the site {name!r}: values of shape {list(value.shape)} are none at all, and its distribution has "
                f"{[*batch, *event]}: the data are empty."
            ) from error
        raise ValueError(
            f"the site {name!r}: values of shape {list(value.shape)} do not fit its distribution, which gives "
            f"{[*batch, *event]} (batch {batch} from plates and parameters, event {event}). Plates inside each other "
            'take the last dimensions, the outer one -1 first: name them, with pyro.plate("tasks", N, dim=-2) and '
            'pyro.plate("rows", n, dim=-1) inside; or, without a plate of rows, add .to_event(1) to the distribution.'
        ) from error


def _fits(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether two shapes broadcast."""
    return all(1 in (a, b) or a == b for a, b in zip(reversed(shape), reversed(to), strict=False))
