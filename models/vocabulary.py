"""Token numbers held against a network's vocabulary, before the first step.

PyTorch says "index out of range in self" of an input that has no embedding, and "Target 77 is out of bounds" of a token
that has no logit, without the task or the row; on an accelerator both end the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from pyro_lift.models.doubts import Doubt, parts_of, refuse_doubtful
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task

__all__ = ["check_targets_known", "doubt_of_tokens", "doubts_of_inputs", "words_of"]

#: Ends of the names of inputs that a transformer looks up in its word embeddings.
TOKENS = "input_ids"


def doubts_of_inputs(backbone: nn.Module, rows: Rows, where: str) -> Iterator[Doubt]:
    """Ask whether input tokens have an embedding.

    Networks that do not say which their word embeddings are (as those of transformers do) are not asked.

    Args:
        backbone: may have ``get_input_embeddings()``.
        rows: that it is to read.
        where: begins the messages, which name the input, the row and the token.
    """
    words = words_of(backbone)
    if words is None:
        return
    for name, x in {**rows.inputs, **rows.shared}.items():
        if name.endswith(TOKENS) and not x.is_floating_point():
            yield doubt_of_tokens(x, words, f"{where}, {name!r}")


def doubt_of_tokens(x: Tensor, words: int, where: str) -> Doubt:
    """Ask whether tokens of any shape are among the words that a network has embeddings for."""
    return _doubt((x < 0) | (x >= words), x, where, f"the network has {words} word embeddings, from 0")


def check_targets_known(task: Task, logits: int) -> None:
    """Refuse tokens to predict that the network has no logit for.

    Args:
        task: of tokens.
        logits: that the network gives for a token.

    Raises:
        ValueError: names the task, its part, the row and the token.
    """
    limit = f"the network has logits for {logits} tokens, from 0"
    targets = [(f"{where}, targets", rows.target) for where, rows in parts_of(task)]
    refuse_doubtful([_doubt((x >= logits) & (x != IGNORED), x, where, limit) for where, x in targets])


def words_of(backbone: nn.Module) -> int | None:
    """Return how many word embeddings a network has; None where it does not say."""
    find = getattr(backbone, "get_input_embeddings", None)
    if find is None:
        return None
    try:
        embeddings = find()
    except (NotImplementedError, AttributeError):  # networks of pictures and sounds have none
        return None
    words = getattr(embeddings, "num_embeddings", None)
    return words if isinstance(words, int) else None


def _doubt(wrong: Tensor, x: Tensor, where: str, limit: str) -> Doubt:
    return Doubt(wrong.any(), partial(_unknown, wrong, x, where, limit))


def _unknown(wrong: Tensor, x: Tensor, where: str, limit: str) -> str:
    place = torch.nonzero(wrong)[0].tolist()
    return (
        f"{where}: token {int(x[tuple(place)])} in row {place[0]}; {limit}. Is the tokenizer this network's own? Rows "
        f"are padded with a token of its own, and targets that do not count are {IGNORED}."
    )
