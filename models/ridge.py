r"""A ridge head's predictions of rows it was not fitted on, in closed form and differentiable in the features.

With standardised features of prior width s and a bias of its own width gathered in Z, the predictions of n ridge
regressions, each without one row, follow from one that has all rows:

.. math:: G = (Z Z^\top + \tau^2 I)^{-1}, \qquad \hat y_{-i} = y_i - \frac{(G y)_i}{G_{ii}}.

So the loss that an adapter is trained by can be that of rows its head has not seen: a head that has memorised its own
rows earns nothing.

References:
    Meta-learning with differentiable closed-form solvers, Bertinetto, Henriques, Torr and Vedaldi, 2019,
    arXiv:1805.08136 (the ridge head); Pattern recognition and neural networks, Ripley, 1996 (leaving one out).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, one_hot

from pyro_lift.models.heads import BIAS_SD
from pyro_lift.support.options import check_number

__all__ = ["leave_one_out_loss", "leave_one_out_values"]


def leave_one_out_values(features: Tensor, target: Tensor, *, prior_sd: float, noise_scale: float = 1.0) -> Tensor:
    """Predict each row by the ridge head of the others, ``[..., n, C]``; differentiable in the features.

    Args:
        features: ``[..., n, E]``. They are standardised by all n rows, the one that is left out among them: it tells
            the head where features lie, and nothing of its target.
        target: values ``[..., n, C]``.
        prior_sd: s, standard deviation of a weight on a standardised feature.
        noise_scale: tau, standard deviation of the targets around the head.

    Raises:
        ValueError: fewer than two rows.
    """
    check_number("prior_sd", prior_sd)
    check_number("noise_scale", noise_scale)
    n = features.shape[-2]
    if n < 2:
        raise ValueError(f"features {tuple(features.shape)}: leaving one row out needs at least two.")
    x, y = features.double(), target.double()
    deviation = x - x.mean(-2, keepdim=True)
    variance = deviation.square().mean(-2, keepdim=True)
    # A constant feature is left at zero; one inside the root keeps its gradient finite.
    spread = torch.where(variance > 1e-18, variance, torch.ones_like(variance)).sqrt()
    z = prior_sd * deviation / spread
    gram = z @ z.mT + BIAS_SD**2 + noise_scale**2 * torch.eye(n, dtype=z.dtype, device=z.device)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    fitted = y - (inverse @ y) / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return fitted.to(features.dtype)


def leave_one_out_loss(
    features: Tensor, target: Tensor, num_classes: int, *, prior_sd: float, noise_scale: float = 1.0, scale: float = 1.0
) -> Tensor:
    """Mean cross entropy of the left-out predictions of a ridge head on one-hot targets, ``[...]``.

    Args:
        features: ``[..., n, E]``.
        target: class numbers ``[..., n]``.
        num_classes: C.
        prior_sd: s, as for :func:`leave_one_out_values`.
        noise_scale: tau.
        scale: by which the predicted values are multiplied to be logits.
    """
    values = leave_one_out_values(features, one_hot(target, num_classes), prior_sd=prior_sd, noise_scale=noise_scale)
    losses = cross_entropy((scale * values).flatten(0, -2), target.flatten(), reduction="none")
    return losses.view(target.shape).mean(-1)
