"""Token numbers held against a network's vocabulary, before the first step.

PyTorch says "index out of range in self" of an input that has no embedding, and "Target 77 is out of bounds" of a token
that has no logit, without the task or the row; on an accelerator both end the process.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task

__all__ = ["check_targets_known", "check_tokens_known"]

#: Ends of the names of inputs that a transformer looks up in its word embeddings.
TOKENS = "input_ids"


def check_tokens_known(backbone: nn.Module, tasks: Sequence[Task]) -> None:
    """Refuse input tokens that the network has no embedding for.

    Networks that do not say which their word embeddings are (as those of transformers do) are not looked at.

    Args:
        backbone: may have ``get_input_embeddings()``.
        tasks: all of their parts are looked at.

    Raises:
        ValueError: names the task, its part, the row and the token.
    """
    words = _words(backbone)
    if words is None:
        return
    for task in tasks:
        for part, rows in _parts(task):
            for name, x in {**rows.inputs, **rows.shared}.items():
                if name.endswith(TOKENS) and not x.is_floating_point():
                    where = f"task {task.name!r}, {part} data, {name!r}"
                    _refuse((x < 0) | (x >= words), x, where, f"the network has {words} word embeddings, from 0")


def check_targets_known(task: Task, logits: int) -> None:
    """Refuse tokens to predict that the network has no logit for.

    Args:
        task: of tokens.
        logits: that the network gives for a token.

    Raises:
        ValueError: names the task, its part, the row and the token.
    """
    for part, rows in _parts(task):
        x, where = rows.target, f"task {task.name!r}, {part} data, targets"
        _refuse((x >= logits) & (x != IGNORED), x, where, f"the network has logits for {logits} tokens, from 0")


def _words(backbone: nn.Module) -> int | None:
    find = getattr(backbone, "get_input_embeddings", None)
    if find is None:
        return None
    try:
        embeddings = find()
    except (NotImplementedError, AttributeError):  # networks of pictures and sounds have none
        return None
    words = getattr(embeddings, "num_embeddings", None)
    return words if isinstance(words, int) else None


def _parts(task: Task) -> list[tuple[str, Rows]]:
    parts = (("train", task.train), ("dev", task.dev), ("test", task.test))
    return [(part, rows) for part, rows in parts if rows is not None]


def _refuse(wrong: Tensor, x: Tensor, where: str, limit: str) -> None:
    if not bool(wrong.any()):
        return
    place = torch.nonzero(wrong)[0].tolist()
    raise ValueError(
        f"{where}: token {int(x[tuple(place)])} in row {place[0]}; {limit}. Is the tokenizer this network's own? Rows "
        f"are padded with a token of its own, and targets that do not count are {IGNORED}."
    )
