"""Texts in the order of their lengths: a batch goes through the network in a few passes, each as long as its longest.

A task is padded to its longest text, and a minibatch with it. Rows do not look at each other, so they may go in any
order and in several passes: sorted, a pass has little padding. It costs the start of a pass, so that few and large
passes are made, and only on a CPU, where the cost of a pass is that of its tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["TEXT_INPUTS", "Pass", "by_length", "passes"]

#: Inputs of a network that reads texts, and gives one vector for each.
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "token_type_ids"})
#: Tokens that cost as much as the start of a pass, by a wide margin in networks of width 384.
PASS_TOKENS = 128
#: Numbers of passes that are tried.
COUNTS = (1, 2, 4, 8)


class Pass(NamedTuple):
    """Some rows of a batch (of each task's, in a block), and the longest of them.

    Attributes:
        rows: numbers of the rows ``[..., g]``.
        length: tokens up to the last that no mask hides, of the longest row.
    """

    rows: Tensor
    length: int


def passes(mask: Tensor) -> list[Pass]:
    r"""Choose the passes of a batch: as many as make tokens, padding included, and starts cost least together.

    .. math:: \min_G \sum_{g \le G} n_g\,\max_{i \in g} L_i + G\,c

    over groups of (nearly) equal numbers of rows in the order of their lengths.

    Args:
        mask: 1 where there is a token ``[..., b, L]``.
    """
    lengths = (mask.ne(0) * torch.arange(1, mask.shape[-1] + 1, device=mask.device)).amax(-1).clamp_min(1)
    order = lengths.argsort(dim=-1, stable=True)
    longest = lengths.gather(-1, order).flatten(0, -2).amax(0) if lengths.dim() > 1 else lengths[order]
    b, tasks = mask.shape[-2], mask[..., 0, 0].numel()
    ends = {count: [b * (g + 1) // count for g in range(count)] for count in COUNTS if count <= b}
    listed = longest.tolist()

    def cost(count: int) -> int:
        starts = [0, *ends[count][:-1]]
        tokens = sum((end - start) * listed[end - 1] for start, end in zip(starts, ends[count], strict=True))
        return int(tasks * tokens + PASS_TOKENS * count)

    best = ends[min(ends, key=cost)]
    parts = order.split([end - start for start, end in zip([0, *best[:-1]], best, strict=True)], -1)
    return [Pass(part, listed[end - 1]) for part, end in zip(parts, best, strict=True)]


def by_length(call: Callable[[dict[str, Tensor]], Tensor], named: Mapping[str, Tensor]) -> Tensor:
    """Run a batch of texts ``[..., b, L]`` in passes sorted by length; the output ``[..., b, E]`` is in its order.

    Args:
        call: from named inputs to one vector a row.
        named: of :data:`TEXT_INPUTS` only.
    """
    mask = named["attention_mask"]
    chosen = passes(mask)
    outputs = [call({name: _taken(x, part) for name, x in named.items()}) for part in chosen]
    back = torch.cat([part.rows for part in chosen], -1).argsort(-1)
    output = torch.cat(outputs, back.dim() - 1)
    return torch.take_along_dim(output, back.unsqueeze(-1), back.dim() - 1)


def _taken(x: Tensor, part: Pass) -> Tensor:
    return torch.take_along_dim(x[..., : part.length], part.rows.unsqueeze(-1), -2)
