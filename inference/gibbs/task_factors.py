"""Factors of the tasks: on their gradients in joint training, and on their steps in the chain."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from pyro_lift.inference.gibbs.state import Settings
from pyro_lift.inference.program import Latent
from pyro_lift.support.options import check_number

__all__ = ["check_factors", "checked_factors", "factor_of", "largest_factor", "mean_factor"]


def checked_factors(name: str, factors: Sequence[float] | None) -> tuple[float, ...] | None:
    """Return the tasks' factors as they are kept.

    Args:
        name: of the option.
        factors: one a task, or None.

    Raises:
        ValueError: one that is not above zero.
    """
    for task, factor in enumerate(() if factors is None else factors):
        check_number(f"{name}[{task}]", factor)
    return None if factors is None else tuple(float(factor) for factor in factors)


def check_factors(settings: Settings, num_tasks: int) -> None:
    """Refuse factors of other tasks than the program's, and steps of their own where nothing takes them.

    Args:
        settings: of a visit.
        num_tasks: N.

    Raises:
        ValueError: with the reason and the way out.
    """
    for name in ("sgd_weights", "task_step_scale"):
        factors = getattr(settings, name)
        if factors is not None and len(factors) != num_tasks:
            raise ValueError(f"{name} has {len(factors)} factors for {num_tasks} tasks; give one a task.")
    if settings.task_step_scale is not None and settings.theta_update not in ("auto", "sgld"):
        raise ValueError(
            f'task_step_scale does not go with theta_update="{settings.theta_update}": it scales the steps of "sgld".'
        )


def largest_factor(tasks: Sequence[int], factors: Sequence[float] | None) -> float:
    """Return the largest factor of a block's tasks; 1 where there are none."""
    return 1.0 if factors is None else max(factors[task] for task in tasks)


def mean_factor(tasks: Sequence[int], factors: Sequence[float] | None) -> float:
    """Return the mean factor of a block's tasks; 1 where there are none."""
    return 1.0 if factors is None else sum(factors[task] for task in tasks) / len(tasks)


def factor_of(site: Latent, tasks: Sequence[int], factors: Sequence[float] | None) -> float | Tensor:
    """Return the factor of the tasks that a local site belongs to.

    Args:
        site: of one task, or of a block of them.
        tasks: of the block, in the order of the site's plate.
        factors: of all tasks; None is 1 for each.

    Returns:
        One number for a site of one task or where there are no factors, else a tensor that broadcasts over the site.
    """
    if factors is None:
        return 1.0
    if site.task is not None:
        return factors[site.task]
    assert site.plate_dim is not None
    shape = [1] * site.leaf.dim()
    shape[site.plate_dim] = -1
    return site.leaf.detach().new_tensor([factors[task] for task in tasks]).reshape(shape)
