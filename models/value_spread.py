r"""How far a regression's solved head may be off, for each input.

The head of a few rows is one of many that fit them. Under normal noise of standard deviation :math:`\tau` and the prior
that it was solved under it is normal around its mode, and so is what it predicts,

.. math:: \operatorname{Var} h(x) = u^\top \Big(I + \tfrac{1}{\tau^2} \sum_n u_n u_n^\top\Big)^{-1} u, \qquad
          u = \Big(s\,\tfrac{x - m}{d},\; s_b\Big),

with the ratio of s to :math:`\tau` that was chosen (:mod:`~pyro_lift.models.value_head`). It is what a Bayesian last
layer adds to the noise: nearly nothing among many rows, and all that the prior leaves open far from them, or of one or
two of them. The noise is the program's, so the errors of a task's own few left-out rows, which say little of how sure
they may be, are not asked.

References:
    Bayesian linear regression; on features of a network, Snoek et al. 2015, "Scalable Bayesian Optimization Using Deep
    Neural Networks", equations 4 and 5.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.heads import HeadModel, Scaling, scaling_of

__all__ = ["ValueSpread", "scaling_under", "spread_of"]


class ValueSpread(NamedTuple):
    """The variance of what a head predicts, at one theta; the same for each of its values.

    Attributes:
        basis: orthonormal directions of u that the task's rows have, ``[k, E + 1]``.
        left: share of the variance that the rows leave in each, ``[k]``.
        scale: s over d, and the bias's standard deviation, ``[E + 1]``.
        centre: m, ``[E]``.
    """

    basis: Tensor
    left: Tensor
    scale: Tensor
    centre: Tensor

    def variance(self, features: Tensor) -> Tensor:
        """Return the variance ``[n]`` of what the head predicts at features ``[n, E]``, in float64."""
        basis, left, scale, centre = (part.to(features.device, torch.float64) for part in self)
        u = _coordinates(features, scale, centre)
        seen = u @ basis.T
        unseen = u.square().sum(-1) - seen.square().sum(-1)  # in directions that no row has
        return unseen.clamp_min(0.0) + (left * seen.square()).sum(-1)


def scaling_under(model: HeadModel, x: Tensor) -> Scaling:
    """Return what features ``[n, E]`` in float64 are divided by where it counts how far a head may be off.

    Those that are level on the rows by what they vary by elsewhere, where the model says so.
    """
    m, d = model.limited(scaling_of(x))
    if model.level_spread and model.least_spread is not None:
        level = (x - m).abs().amax(0) <= 1e-9 * (1.0 + m.abs())
        d = torch.where(level, model.least_spread.to(d), d)
    return Scaling(m, d)


@torch.no_grad()
def spread_of(features: Tensor, choice: HeadChoice, noise_scale: float) -> ValueSpread:
    """Find how far a regression's head may be off.

    Args:
        features: of the task's rows, ``[n, E]``.
        choice: what its head is solved under (:func:`~pyro_lift.models.value_head.choose_value_head`).
        noise_scale: standard deviation of the program's noise.

    Returns:
        The spread, its tensors in single precision at least.
    """
    x, model = features.double(), choice.model
    assert isinstance(model.bias_sd, float) and isinstance(model.noise_scale, float)
    m, d = scaling_under(model, x)
    unit = noise_scale / model.noise_scale  # the choice is in units of the noise that the task's left-out rows showed
    scale = torch.cat([choice.sd * unit / d, d.new_tensor([model.bias_sd * unit])])
    _, size, basis = torch.linalg.svd(_coordinates(x, scale, m) / noise_scale, full_matrices=False)
    parts = (basis, 1.0 / (1.0 + size.square()), scale, m)
    return ValueSpread(*(part.to(torch.promote_types(features.dtype, torch.float32)) for part in parts))


def _coordinates(features: Tensor, scale: Tensor, centre: Tensor) -> Tensor:
    """Return u ``[n, E + 1]``: features and bias in coordinates in which the head's prior is standard normal."""
    x = features.double() - centre
    return torch.cat([x, x.new_ones(len(x), 1)], -1) * scale
