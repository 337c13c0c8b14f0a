"""Likelihood of several tasks in one pass: minibatches stacked to a block ``[B, b, ...]``, padded and weighted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.likelihoods import IGNORED, LossKind, among_classes, log_likelihood
from pyro_lift.models.task import Rows

__all__ = ["Block", "block_log_likelihood", "block_outputs", "stack_rows"]

#: Inputs that may be longer in one task than in another, as long as a mask says where they end.
MASKED = (
    *("input_ids", "attention_mask", "token_type_ids"),
    *("option_input_ids", "option_attention_mask", "option_token_type_ids"),
)
SHARED_MASKED = ("label_input_ids", "label_attention_mask", "label_token_type_ids")
DECODER = ("decoder_input_ids", "decoder_attention_mask")


class Block(NamedTuple):
    """Rows of B tasks.

    Attributes:
        rows: inputs, targets and shared inputs, ``[B, b, ...]`` and ``[B, ...]``.
        weight: what a row counts, ``[B, b]``: rows of the task over rows of its minibatch; 0 for padding.
        classes: of each task, where it declares them.
    """

    rows: Rows
    weight: Tensor
    classes: Sequence[int | None] = ()


def stack_rows(batches: Sequence[Rows], sizes: Sequence[int], kind: LossKind) -> Block:
    """Stack the minibatches of several tasks to one block.

    Shorter minibatches repeat their first row, with weight 0. Texts are padded where a mask tells them from padding,
    and targets of a decoder, which ignores what follows; everything else must have one shape.

    Args:
        batches: a minibatch of each task.
        sizes: rows that each of them stands for.
        kind: of the likelihood.

    Raises:
        ValueError: other inputs or shapes in one task than in another.
    """
    names = set(batches[0].inputs)
    for rows in batches:
        if set(rows.inputs) != names or set(rows.shared) != set(batches[0].shared):
            raise ValueError(
                f"the tasks of a block have different inputs, {sorted(names)} and {sorted(rows.inputs)}. "
                "Use block_size=1."
            )
    count = max(len(rows) for rows in batches)
    taken = [torch.arange(count, device=rows.target.device) for rows in batches]
    taken = [torch.where(index < len(rows), index, 0) for index, rows in zip(taken, batches, strict=True)]
    full = [rows.take(index) for rows, index in zip(batches, taken, strict=True)]
    ends = {name for name in (*MASKED, *SHARED_MASKED) if _mask_of(name) in {*names, *batches[0].shared}}
    ends |= set(DECODER) if kind == "tokens" else set()
    inputs = {name: _stack(name, [rows.inputs[name] for rows in full], name in ends) for name in full[0].inputs}
    shared = {name: _stack(name, [rows.shared[name] for rows in full], name in ends) for name in full[0].shared}
    target = _stack("target", [rows.target for rows in full], kind == "tokens", IGNORED)
    weight = torch.zeros(len(batches), count, device=target.device)
    for k, (rows, size) in enumerate(zip(batches, sizes, strict=True)):
        weight[k, : len(rows)] = size / len(rows)
    return Block(Rows(inputs, target, shared), weight, [rows.classes for rows in batches])


def _mask_of(name: str) -> str:
    prefix = name.removesuffix("input_ids").removesuffix("attention_mask").removesuffix("token_type_ids")
    return f"{prefix}attention_mask"


def _stack(name: str, parts: Sequence[Tensor], may_pad: bool, fill: int = 0) -> Tensor:
    shapes = {part.shape for part in parts}
    if len(shapes) == 1:
        return torch.stack(list(parts))
    dims = {part.dim() for part in parts}
    if not may_pad or len(dims) > 1:
        listed = ", ".join(str(tuple(shape[1:])) for shape in sorted(shapes))
        raise ValueError(
            f"the tasks of a block differ in the shape of {name!r} ({listed}), and no mask says where it ends. "
            "Bring them to one shape, or use block_size=1."
        )
    wide = [max(part.shape[d] for part in parts) for d in range(parts[0].dim())]
    return torch.stack([_padded(part, wide, fill) for part in parts])


def _padded(x: Tensor, wide: Sequence[int], fill: int) -> Tensor:
    amounts: list[int] = []
    for d in reversed(range(x.dim())):
        amounts += [0, wide[d] - x.shape[d]]
    return pad(x, amounts, value=fill)


def block_outputs(adapter: RandomAdapter, block: Block, theta: Tensor, *, head_inputs: bool = False) -> Tensor:
    """Compute the network's output ``[B, b, ...]`` on the rows of a block, each task's at its own theta ``[B, D]``.

    With ``head_inputs``, what heads of the tasks' own take, where that is something else.
    """
    named: Mapping[str, Tensor] = block.rows.named
    if head_inputs and adapter.matches(named):
        output: Tensor = adapter(*block.rows.positional, theta=theta, head_inputs=True, **named)
    else:
        output = adapter(*block.rows.positional, theta=theta, **named)
    return output


def block_log_likelihood(
    adapter: RandomAdapter,
    kind: LossKind,
    block: Block,
    theta: Tensor,
    head: Tensor | None,
    noise_scale: float,
) -> Tensor:
    r"""Estimate the log likelihood of each task of a block, ``[B]``, scaled from its minibatch to its data.

    .. math:: \tfrac{N_i}{b_i} \sum_{(x, y) \in \text{minibatch}_i} \log p(y \mid x, \theta_i)

    Args:
        adapter: the network as a function of theta.
        kind: of the likelihood.
        block: of B tasks.
        theta: ``[B, D]``.
        head: the tasks' own heads ``[B, C, width + 1]``, or None.
        noise_scale: standard deviation of the noise in regression.
    """
    output, rows = block_outputs(adapter, block, theta, head_inputs=head is not None), block.rows
    if head is not None:
        output = apply_head(output, head)
    elif any(classes is not None and classes < output.shape[-1] for classes in block.classes):
        output = torch.stack([among_classes(o, k) for o, k in zip(output, block.classes, strict=True)])
    each = log_likelihood(kind, output.flatten(0, 1), rows.target.flatten(0, 1), noise_scale)
    return (each.view(block.weight.shape) * block.weight).sum(-1)
