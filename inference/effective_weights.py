r"""How many of a task's weights its data move: the effective number of parameters of MacKay (1992)."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from pyro_lift.models.observation import WHOLE
from pyro_lift.models.task import Task, mean_rows

__all__ = ["effective_weights", "warn_of_few", "weights_moved"]

log = logging.getLogger("pyro_lift")

#: The name of the number among a run's results.
MOVED = "weights that a task's data move"


def effective_weights(
    second_moment: Tensor, beta: float | Tensor, *, rows: float, batch_size: float, power: float = 1.0
) -> float:
    r"""Estimate the number of weights that the data of a task determine, rather than their prior.

    .. math:: \gamma = \sum_d \frac{h_d \beta_d^2}{1 + h_d \beta_d^2}, \qquad
              h_d = \kappa \sum_n \mathbb E\, g_{nd}^2 \approx \frac{b}{\kappa N}\, v_d

    h is the Fisher information of a task's N rows at power kappa, read off the preconditioner: v is the mean square of
    :math:`\kappa \tfrac Nb \sum_{\text{batch}} g`, in which the rows' gradients add up like noise. Where they add up
    like a mean, as far from a mode, h is too large. The temperature is no part of it: it scales both densities.

    Args:
        second_moment: v, ``[D]``, of the gradient of a task's log likelihood.
        beta: standard deviation of a task's weights around phi; one number or ``[D]``.
        rows: N.
        batch_size: b.
        power: kappa.

    References:
        Bayesian interpolation, MacKay, Neural Computation 1992, Eq. 4.9.
    """
    h = second_moment.double() * (min(batch_size, rows) / (power * rows))
    pull = h * torch.as_tensor(beta, dtype=torch.float64, device=h.device).square()
    return float((pull / (1.0 + pull)).sum())


def weights_moved(
    moments: Mapping[str, Tensor],
    beta: float | Tensor,
    tasks: Sequence[Task],
    *,
    batch_size: int,
    power: float,
) -> dict[str, float]:
    """Report how many weights a task's data move.

    Args:
        moments: mean squares of the preconditioner by local family; without theta's the curvature is not known, and
            nothing is reported.
        beta: standard deviation of a task's weights around phi; one number or ``[D]``.
        tasks: of the run.
        batch_size: rows of a minibatch; 0 for whole tasks.
        power: on the likelihood.
    """
    if "theta" not in moments:
        return {}
    rows = mean_rows(tasks)
    batch = float(batch_size) if batch_size else min(rows, float(WHOLE))
    return {MOVED: effective_weights(moments["theta"], beta, rows=rows, batch_size=batch, power=power)}


def warn_of_few(
    moved: Mapping[str, float],
    dim: int,
    tasks: Sequence[Task],
    *,
    power: float,
    temperature: float = 1.0,
    given: Collection[str] = (),
    heads: bool = False,
) -> None:
    """Warn where a task's data move less than one weight, with what helps.

    Args:
        moved: what :func:`weights_moved` reports.
        dim: weights of the adapter.
        tasks: of the run.
        power: on the likelihood.
        temperature: of the run.
        given: names of settings that the user chose, which advice may turn to.
        heads: whether tasks have heads of their own, which learn from the rows all the same.
    """
    if moved.get(MOVED, 1.0) >= 1.0:
        return
    rows, values = mean_rows(tasks), any(task.kind == "regression" for task in tasks)
    log.warning(
        "the data of a task move less than one of the adapter's %d weights (%.2g): %s, as it should be where the tasks "
        "are alike. %s",
        dim,
        moved[MOVED],
        "a new task has an adapter close to phi, and what is its own is its head"
        if heads
        else "a new task is predicted as phi predicts it",
        _way_out(rows, power, temperature, given, values=values, heads=heads),
    )


def _way_out(
    rows: float, power: float, temperature: float, given: Collection[str], *, values: bool, heads: bool
) -> str:
    """Say what to do about tasks whose data move nothing; of settings only what the user chose can be left open."""
    ways = []
    if "beta" in given:
        ways.append("leave beta open, or give it a larger value")
    if "temperature" in given:
        ways.append(f"lower the temperature ({temperature:g}), so that the prior's noise drowns less")
    if "n_inflate" not in given or power <= 1.0:  # who raised it knows of it, and there is no end to ever larger ones
        # Where n_inflate is given, a temperature that is left open is another.
        beside = f", together with temperature={temperature:g}, which this run has and n_inflate alone would change"
        kept = "" if "temperature" in given else beside
        ways.append(f"let every row count more often: n_inflate={10.0 * power:g}, say, in place of {power:g}{kept}")
    if values:
        ways.append("give noise_scale a smaller value, if predictions are closer to the targets than it says")
    ways.append(f"give tasks more rows ({rows:.0f} on average here)")
    if heads:  # which may be all that the tasks ask for
        return (
            f"It need not be changed: `pyro-lift compare` says whether predictions are better than a linear probe's. "
            f"What lets the adapter move: {'; '.join(ways)}."
        )
    return (
        f"What helps: {'; '.join(ways)}. Where none does, the network says little of these tasks: `pyro-lift compare` "
        "holds it against a linear probe, which may do as well."
    )
