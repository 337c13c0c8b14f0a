"""Maps from unconstrained space to the supports of distributions."""

from __future__ import annotations

from typing import Any

from torch.distributions import Distribution, MixtureSameFamily, Transform, biject_to, constraints
from torch.distributions.transforms import IndependentTransform, identity_transform

__all__ = ["Supports", "bijection", "innermost", "unmasked", "wrappers"]

_WRAPPERS = ("Independent", "MaskedDistribution", "ExpandedDistribution")


def innermost(fn: Distribution) -> Distribution:
    """A distribution without the masks, expansions and event dimensions around it."""
    while type(fn).__name__ in _WRAPPERS:
        fn = fn.base_dist  # type: ignore[attr-defined]
    return fn


def unmasked(fn: Distribution) -> Distribution:
    """A distribution without masks that let everything pass."""
    while type(fn).__name__ == "MaskedDistribution" and fn._mask is True:  # type: ignore[attr-defined]
        fn = fn.base_dist  # type: ignore[attr-defined]
    return fn


def wrappers(fn: Distribution) -> list[str]:
    """What stands around a distribution, from the outside in."""
    names = []
    while type(fn).__name__ in _WRAPPERS:
        names.append(type(fn).__name__)
        fn = fn.base_dist  # type: ignore[attr-defined]
    return names


def fixed_kind(fn: Distribution) -> tuple[Any, ...] | None:
    """What fixes the support of a distribution whatever its parameters are; None where they have a say."""
    kind: list[Any] = [len(fn.event_shape)]
    while True:
        kind.append(type(fn))
        if type(fn).__name__ in _WRAPPERS:
            fn = fn.base_dist  # type: ignore[attr-defined]
        elif isinstance(fn, MixtureSameFamily):
            fn = fn.component_distribution
        else:
            break
    support = getattr(type(fn), "support", None)
    return tuple(kind) if isinstance(support, constraints.Constraint) and not isinstance(support, property) else None


def bijection(name: str, fn: Distribution) -> Transform | None:
    """The map from unconstrained space to the support of a distribution; None for the identity and for a discrete one.

    Raises:
        ValueError: PyTorch knows no such map.
    """
    try:
        support = _support(fn)
        if support is not None and support.is_discrete:  # refused at the door, where there is more to say
            return None
        transform = base = biject_to(support)
    except (NotImplementedError, AttributeError):
        raise ValueError(
            f"the latent site {name!r} ({type(innermost(fn)).__name__}) has a support to which PyTorch knows no map "
            "from unconstrained space. Write it as a function of sites that have one."
        ) from None
    while isinstance(base, IndependentTransform):
        base = base.base_transform
    return None if base == identity_transform else transform


def _support(fn: Any) -> Any:
    """The support of a distribution; of a mixture that of its components: torch knows no bijection to the mixture's."""
    if isinstance(fn, MixtureSameFamily):
        return _support(fn.component_distribution)
    if type(fn).__name__ == "Independent":
        return constraints.independent(_support(fn.base_dist), fn.reinterpreted_batch_ndims)
    return _support(fn.base_dist) if type(fn).__name__ in _WRAPPERS else fn.support


class Supports:
    """Bijections by distribution: looked up once where its class fixes the support, at every call where it does not.

    ``Uniform(0, h[i])`` has another support for every task, and ``Uniform(0, phi)`` for every value of phi.
    """

    def __init__(self) -> None:
        self._fixed: dict[tuple[Any, ...], Transform | None] = {}

    def transform(self, name: str, fn: Distribution) -> Transform | None:
        """The bijection for one site; None for the identity."""
        kind = fixed_kind(fn)
        if kind is None:
            return bijection(name, fn)
        if kind not in self._fixed:
            self._fixed[kind] = bijection(name, fn)
        return self._fixed[kind]
