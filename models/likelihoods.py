"""Likelihoods by name: from a network's output and the targets to one log probability a row.

Scaling, everywhere: a row's log probability is the *sum* over its own parts (tokens, outputs), and a task's is the sum
over its rows. Nothing is averaged, so that a minibatch of b of n rows estimates the task's by the factor n / b.

Some likelihoods need more of the network than one call with the row's inputs. What they do instead is a *readout*:
it is given the network and the named inputs and returns what :func:`log_likelihood` wants.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from pyro_lift.support.moved import names_moved_from
from pyro_lift.support.options import check_literal

__all__ = [
    "IGNORED",
    "LossKind",
    "among_classes",
    "log_likelihood",
    "next_tokens",
    "probabilities",
    "shift_left",
    "shift_right",
    "token_log_probs",
]

LossKind = Literal["classification", "matching", "regression", "tokens"]
#: Target of tokens that count for nothing, as transformers pads labels.
IGNORED = -100
#: Score of a class that a task has not. Its probability is exactly zero, and differences of scores stay finite.
NEVER = -1e30


def log_likelihood(kind: LossKind, output: Tensor, target: Tensor, scale: float = 1.0) -> Tensor:
    r"""Compute the log probability of each row's target, summed over the row's own parts, never averaged.

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

    Raises:
        ValueError: shapes that would broadcast against each other.
    """
    check_literal("kind", kind, LossKind)
    if kind == "regression":
        output = shaped_as(output, target)
    _check_shapes(kind, output, target)
    if kind in ("classification", "matching"):
        return torch.as_tensor(dist.Categorical(logits=output, validate_args=False).log_prob(target))
    if kind == "regression":
        density = torch.as_tensor(dist.Normal(output, scale, validate_args=False).log_prob(target))
        return density.flatten(1).sum(-1) if density.dim() > 1 else density
    return token_log_probs(output, target).sum(-1)


def token_log_probs(output: Tensor, target: Tensor) -> Tensor:
    """Compute the log probability of each token ``[b, L]``, zero where it does not count; output ``[b, L, V]``."""
    losses = cross_entropy(output.flatten(0, -2), target.flatten(), ignore_index=IGNORED, reduction="none")
    return -losses.view(target.shape)


def shaped_as(values: Tensor, target: Tensor) -> Tensor:
    """Drop the last dimension of values ``[..., 1]`` beside targets ``[...]``, against which they would broadcast."""
    return values.squeeze(-1) if values.dim() == target.dim() + 1 and values.shape[-1] == 1 else values


def _check_shapes(kind: LossKind, output: Tensor, target: Tensor) -> None:
    """Refuse what would broadcast: ``[b, 1]`` against ``[b]`` scores every row against every row's target."""
    expected = output.shape if kind == "regression" else output.shape[:-1]
    if target.shape != expected:
        shapes = {"regression": "one shape, [..., b] or [..., b, M]", "tokens": "[..., b, L, V] and [..., b, L]"}
        raise ValueError(
            f"{kind}: the network's output has shape {list(output.shape)} and the target {list(target.shape)}; "
            f"expected {shapes.get(kind, '[..., b, C] and [..., b]')}."
        )


def among_classes(output: Tensor, classes: int | None) -> Tensor:
    """Give no probability to scores ``[..., K]`` of classes that a task has not, those from ``classes`` on.

    Args:
        output: of a head that tasks share.
        classes: of the task; None for all.
    """
    if classes is None or output.dim() < 2 or classes >= output.shape[-1]:
        return output
    return output.masked_fill(torch.arange(output.shape[-1], device=output.device) >= classes, NEVER)


def probabilities(kind: LossKind, output: Tensor) -> Tensor:
    """Turn outputs into class or token probabilities, which can be averaged over draws; for regression return them."""
    return output if kind == "regression" else torch.softmax(output, dim=-1)


def shift_right(target: Tensor, start_token: int) -> Tensor:
    """Make the decoder's input for target tokens ``[..., L]``: the start token, then all but the last target.

    Padding (``-100``) becomes the start token: no position that counts ever looks at it.
    """
    start = torch.full_like(target[..., :1], start_token)
    shifted = torch.cat([start, target[..., :-1]], -1)
    return shifted.masked_fill(shifted == IGNORED, start_token)


def shift_left(labels: Tensor) -> Tensor:
    """Make the targets of a causal model from transformers' labels ``[..., L]``: each goes to the place before it.

    Args:
        labels: the tokens of a text, each at its own place, and -100 over prompts and padding.
    """
    return torch.cat([labels[..., 1:], torch.full_like(labels[..., :1], IGNORED)], -1)


def next_tokens(input_ids: Tensor, attention_mask: Tensor, prompt: Tensor | None = None) -> Tensor:
    """Make the targets of a causal model, ``[..., L]``: at each place the token that follows.

    Args:
        input_ids: ``[..., L]``.
        attention_mask: 1 where there is a token, ``[..., L]``.
        prompt: number of leading tokens that are given, not predicted, ``[...]``; None predicts all but the first.
    """
    follows = torch.cat([input_ids[..., 1:], input_ids[..., :1]], -1)
    counts = torch.cat([attention_mask[..., 1:], torch.zeros_like(attention_mask[..., :1])], -1) * attention_mask
    if prompt is not None:  # leading padding is before the prompt
        counts = counts * (attention_mask.cumsum(-1) >= prompt.unsqueeze(-1))
    return follows.masked_fill(counts == 0, IGNORED)


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
