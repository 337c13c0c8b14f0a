r"""The default step of phi with the stored gradients (``accumulator="table"``), for any program: 2 % of the limit.

The table is a feedback loop with a mean delay of N/(2B) visits. Where one task pulls phi with a curvature h, it is
stable for :math:`\eta < \pi^2 B / (N^2 h)` (:func:`~pyro_lift.inference.gibbs.accumulator.langevin_limit` has
:math:`h = 1/\beta^2`). h is measured at the start, by power iteration.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.stability import CURVATURE_DIMENSIONS, largest_curvature

__all__ = ["TABLE_SHARE", "measured_table_limit"]

#: A default step of phi with the table is this share of the largest stable one: phi's variance is then 2 % too wide.
TABLE_SHARE = 0.02


def measured_table_limit(run: Evaluation, num_tasks: int, n_inflate: float) -> float | None:
    """Return the step size of phi at which the table loses stability; None where no curvature can be measured.

    Theta stands at the mean of its distribution at the start, where a scale has no curvature; normal local sites are
    looked at one standard deviation away, where it has what it has in the mean.

    Args:
        run: of the first block, with a graph.
        num_tasks: N.
        n_inflate: power on the likelihood.
    """
    leaves = [site.leaf for site in run.globals.values()]
    if not leaves or sum(leaf.numel() for leaf in leaves) > CURVATURE_DIMENSIONS:
        return None
    total: Tensor = n_inflate * run.log_likelihood
    for site in run.locals.values():
        normal, leaf = site.gaussian(), site.leaf.detach()
        total = total + site.log_prob_at(leaf if normal is None else leaf + normal.precision.detach().rsqrt())
    block = len(run.tasks)
    of_block = largest_curvature(total, leaves) if total.requires_grad else None
    of_prior = largest_curvature(run.log_prior(run.globals), leaves)
    if of_block is None or of_block == 0.0 or not torch.isfinite(torch.tensor(of_block)):
        return None
    of_task = abs(of_block) / block
    fresh = 4.0 / (num_tasks * of_task + max(of_prior or 0.0, 0.0))
    return float(min(torch.pi**2 * block / (num_tasks**2 * of_task), fresh))
