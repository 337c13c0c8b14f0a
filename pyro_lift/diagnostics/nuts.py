"""A sampler beside Pyro's NUTS on the same program, in standard errors of their difference."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import numpy as np
from pyro.infer import NUTS

from pyro_lift.diagnostics.columns import numpy_of
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.inference.whole import whole
from pyro_lift.support.random_streams import own_global_stream

__all__ = ["Difference", "NutsComparison", "compare_with_nuts"]


@dataclass(frozen=True)
class Difference:
    """One coordinate under both samplers; ``z_mean`` and ``z_sd`` are differences in standard errors."""

    name: str
    mean: float
    nuts_mean: float
    z_mean: float
    sd: float
    nuts_sd: float
    z_sd: float
    ess: float
    nuts_ess: float


@dataclass(frozen=True)
class NutsComparison:
    """Differences by coordinate; ``str()`` is a table."""

    rows: list[Difference]

    @property
    def worst(self) -> float:
        """The largest difference, of a mean or an sd, in standard errors."""
        return max(max(abs(row.z_mean), abs(row.z_sd)) for row in self.rows)

    @property
    def least_ess(self) -> float:
        """The least effective sample size of either: below some 100, a small difference says little."""
        return min(min(row.ess, row.nuts_ess) for row in self.rows)

    def __str__(self) -> str:
        head = f"{'':<16}{'mean':>10}{'NUTS':>10}{'z':>7}{'sd':>10}{'NUTS':>10}{'z':>7}{'ess':>8}{'NUTS':>8}"
        rows = [
            f"{r.name:<16}{r.mean:>10.4g}{r.nuts_mean:>10.4g}{r.z_mean:>7.1f}{r.sd:>10.4g}{r.nuts_sd:>10.4g}{r.z_sd:>7.1f}"
            f"{r.ess:>8.0f}{r.nuts_ess:>8.0f}"
            for r in self.rows
        ]
        foot = f"worst difference: {self.worst:.1f} standard errors; least ESS: {self.least_ess:.0f}"
        return "\n".join([head, *rows, foot])


class NutsOptions(TypedDict, total=False):
    """Options of :func:`compare_with_nuts` that are seldom set."""

    nuts_samples: int
    nuts_warmup: int
    seed: int


def compare_with_nuts(
    model: Callable[..., Any],
    *args: Any,
    kernel: Callable[[Callable[..., Any]], Any] | None = None,
    num_samples: int = 4_000,
    warmup_steps: int = 1_000,
    sites: Sequence[str] | None = None,
    **options: Unpack[NutsOptions],
) -> NutsComparison:
    r"""Run a kernel and Pyro's NUTS on a small program, and compare means and sds of every coordinate.

    .. math:: z = (\bar x - \bar x') / \sqrt{\mathrm{MCSE}^2 + \mathrm{MCSE}'^2}

    Both errors come from ArviZ's effective sample sizes; a chain that has not mixed knows its own error badly, so look
    at ``least_ess`` first.

    Args:
        model: a Pyro program; NUTS runs it without subsampling (:func:`pyro_lift.whole`).
        args: of the program.
        kernel: from the program to a kernel; None is ``SGLDGibbs(model, keep_theta=True)``.
        num_samples: draws of that kernel.
        warmup_steps: before them.
        sites: that are compared; None takes all that both have draws of.
        options: ``nuts_samples`` (1,000), ``nuts_warmup`` (500), ``seed`` (0) of both chains.

    Raises:
        ValueError: no site that both have draws of.
        TypeError: an unknown option.
    """
    if odd := set(options) - set(NutsOptions.__annotations__):
        raise TypeError(
            f"unknown option {min(odd)!r} of compare_with_nuts; known are: nuts_samples, nuts_warmup, seed."
        )
    seed = options.get("seed", 0)
    with own_global_stream(seed):
        chosen = SGLDGibbs(model, keep_theta=True, seed=seed) if kernel is None else kernel(model)
        ours = MCMC(chosen, num_samples=num_samples, warmup_steps=warmup_steps, disable_progbar=True)
        ours.run(*args)
        nuts = MCMC(
            NUTS(whole(model)),
            num_samples=options.get("nuts_samples", 1_000),
            warmup_steps=options.get("nuts_warmup", 500),
            disable_progbar=True,
        )
        nuts.run(*args)
    mine, other = ours.get_samples(group_by_chain=True), nuts.get_samples(group_by_chain=True)
    names = [name for name in mine if name in other and (sites is None or name in sites)]
    if not names:
        raise ValueError(f"no site to compare: the kernel draws {sorted(mine)}, NUTS {sorted(other)}.")
    return NutsComparison([row for name in names for row in _rows(name, numpy_of(mine[name]), numpy_of(other[name]))])


def _rows(name: str, mine: Any, other: Any) -> list[Difference]:
    import arviz as az

    shape, rows = mine.shape[2:], []
    flat, flat_other = mine.reshape(*mine.shape[:2], -1), other.reshape(*other.shape[:2], -1)
    for k in range(flat.shape[-1]):
        x, y = flat[..., k].astype(float), flat_other[..., k].astype(float)
        errors = [[float(az.mcse(z, method=method)) for z in (x, y)] for method in ("mean", "sd")]
        means, sds = (x.mean(), y.mean()), (x.std(ddof=1), y.std(ddof=1))
        index = np.unravel_index(k, shape) if shape else ()
        rows.append(
            Difference(
                f"{name}[{', '.join(map(str, index))}]" if len(index) else name,
                float(means[0]),
                float(means[1]),
                float((means[0] - means[1]) / math.hypot(*errors[0])),
                float(sds[0]),
                float(sds[1]),
                float((sds[0] - sds[1]) / math.hypot(*errors[1])),
                float(az.ess(x, method="bulk")),
                float(az.ess(y, method="bulk")),
            )
        )
    return rows
