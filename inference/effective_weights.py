r"""How many of a task's weights its data move: the effective number of parameters of MacKay (1992)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["effective_weights"]


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
