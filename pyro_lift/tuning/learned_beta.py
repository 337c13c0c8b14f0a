r"""Beta learned with all else: one unknown variance for each adapter tensor, drawn from running sums.

With :math:`\theta_i \mid \phi, v \sim \mathcal N(\phi, \beta_0^2\,v_g)` and an inverse gamma prior, the kernel draws
v_g exactly given :math:`\sum_i \sum_{d: g(d) = g} (\theta_{id} - \phi_d)^2`, which it keeps in O(D)
(:mod:`~pyro_lift.inference.gibbs.scale_draws`). Two things are particular to it:

- The temperature is 1. Raised to 1/T the law of a width has :math:`\beta^{-ND/T}` where its theta integrate to
  :math:`\beta^{ND}`, and goes to zero with it. So the default's cold law is stated as the same law at temperature 1,
  with the power 1/T.
- All theta_i begin at phi, so a width that was drawn from the start would shrink at once. It is held for
  :data:`~pyro_lift.inference.gibbs.plan.HELD_ROUNDS` rounds of the tasks, and as many more are given to it before
  anything is kept.

Where the data move few of a tensor's weights it learns slowly: a round brings it nearer by the share of weights that
they move. Of what it has come to, the geometric mean of the draws is kept, and is the beta of new tasks.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from pyro_lift.inference.chain_summary import LogMean
from pyro_lift.inference.gibbs.plan import HELD_ROUNDS
from pyro_lift.settings import LiFTSettings

__all__ = ["learned_beta", "with_rounds_to_learn"]

log = logging.getLogger("pyro_lift")


def with_rounds_to_learn(settings: LiFTSettings, tasks: int) -> LiFTSettings:
    """Lengthen the burn-in to twice the rounds for which widths are held, where it is shorter.

    Args:
        settings: filled in.
        tasks: N.
    """
    least = 2 * HELD_ROUNDS * -(-tasks // settings.block_size)
    if settings.burn_in >= least:
        return settings
    log.info("beta is learned, which takes %d rounds of the tasks: burn_in is %d, not %d.", 2 * HELD_ROUNDS, least,
             settings.burn_in)  # fmt: skip
    return replace(settings, burn_in=least)


def learned_beta(beta: float | list[float] | str | None, variances: LogMean | None) -> float | list[float] | str | None:
    """Return beta by adapter tensor: the one that the run began with times the root of the variances' geometric mean.

    Args:
        beta: filled in; one number, or one a tensor.
        variances: of the draws so far; None where beta is not learned, and stays.
    """
    if variances is None:
        return beta
    assert beta is not None and not isinstance(beta, str)
    factors = variances.get().sqrt().reshape(-1).tolist()
    widths = beta if isinstance(beta, (list, tuple)) else [float(beta)] * len(factors)  # type: ignore[arg-type]
    if variances.count:
        log.info("beta has been learned: between %.3g and %.3g of what it was.", min(factors), max(factors))
        return [float(width) * factor for width, factor in zip(widths, factors, strict=True)]
    return list(map(float, widths))
