"""Likelihoods by name: from a network's output and the targets to one log probability a row."""

from __future__ import annotations

from typing import Literal, get_args

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_lift.options import check_choice

__all__ = ["IGNORED", "LossKind", "log_likelihood", "probabilities"]

LossKind = Literal["classification", "matching", "regression", "tokens"]
#: Target of tokens that count for nothing, as transformers pads labels.
IGNORED = -100


def log_likelihood(kind: LossKind, output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    r"""Log probability of each row's target, summed over the row's own parts, never averaged.

    ``classification``
        :math:`\log \mathrm{softmax}(o)_y`; output ``[..., b, C]``, target ``[..., b]``.
    ``matching``
        the same, the logits being similarities of the encoded input to the encoded label texts.
    ``regression``
        :math:`\log \mathcal N(y; o, s^2)` summed over outputs; output and target ``[..., b]`` or ``[..., b, M]``.
    ``tokens``
        :math:`\sum_t \log \mathrm{softmax}(o_t)_{y_t}` over the tokens whose target is not ``-100``; output
        ``[b, L, V]``, target ``[b, L]``.

    Args:
        kind: of the four above.
        output: the network's output.
        target: what was observed.
        scale: s, standard deviation of the regression noise.

    Returns:
        Shape ``[..., b]``.
    """
    check_choice("kind", kind, get_args(LossKind))
    if kind in ("classification", "matching"):
        return torch.as_tensor(dist.Categorical(logits=output, validate_args=False).log_prob(target))
    if kind == "regression":
        output = output.squeeze(-1) if output.dim() == target.dim() + 1 else output
        density = torch.as_tensor(dist.Normal(output, scale, validate_args=False).log_prob(target))
        return density.flatten(1).sum(-1) if density.dim() > 1 else density
    losses = cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(target.shape).sum(-1)


def probabilities(kind: LossKind, output: Tensor) -> Tensor:
    """What may be averaged over draws: class or token probabilities; for regression the output itself."""
    return output if kind == "regression" else torch.softmax(output, dim=-1)
