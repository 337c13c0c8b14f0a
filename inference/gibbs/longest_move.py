r"""A limit on what a task's data move a coordinate of theta in one visit.

The preconditioner P is one for all tasks. A task whose gradients are many times those of the others, because the
network is wrong about it and sure of that, would be thrown far away by its first steps, where its gradients are larger
still; and the translation would pull phi after it. With a limit m the likelihood's gradient g of a task with the step
factor f is

.. math:: \operatorname{clamp}\Big(g,\; -\frac{m}{f P},\; \frac{m}{f P}\Big),

so that it moves no coordinate by more than :math:`m\,\eta / 2`, with :math:`\eta` the step size. Where the limit binds
it changes the target, which is counted (``clipped``). The translation sees the same gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import Settings
from pyro_lift.inference.gibbs.task_factors import factor_of
from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.sgld import Drift, precondition, shortened
from pyro_lift.support.options import check_number

__all__ = ["check_limits", "limited"]


def check_limits(max_grad_norm: float | None, max_move: float | None, preconditioner: str | None) -> None:
    """Refuse limits that are not above zero, and one that has no scale to be in.

    Raises:
        ValueError: with the way out.
    """
    if max_grad_norm is not None:
        check_number("max_grad_norm", max_grad_norm)
    if max_move is None:
        return
    check_number("max_move", max_move)
    if preconditioner is None:
        raise ValueError(
            f'max_move={max_move:g} counts in steps of a preconditioner: give preconditioner="rms", or max_grad_norm, '
            "which limits the gradient's norm."
        )


def limited(run: Evaluation, drift: Drift, squares: Mapping[str, Tensor], settings: Settings) -> tuple[Drift, Tensor]:
    """Shorten the gradients of sites that have a preconditioner, and tell whether any was.

    Args:
        run: of the block.
        drift: of it.
        squares: the preconditioner's mean squares by site.
        settings: of the visit; ``max_move`` is given.

    Returns:
        The drift, and one boolean on the device.
    """
    assert settings.max_move is not None
    gradients, clipped = dict(drift.gradient), torch.zeros((), dtype=torch.bool, device=drift.log_likelihood.device)
    for name, square in squares.items():
        own = factor_of(run.locals[name], run.tasks, settings.task_step_scale)
        most = settings.max_move / (own * precondition(square, settings.damping))
        gradients[name], shorter = shortened(drift.gradient[name], most)
        clipped = clipped | shorter
    return drift._replace(gradient=gradients), clipped
