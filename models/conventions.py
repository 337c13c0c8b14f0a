"""What targets of tokens stand for, held against what the network does with its inputs, before the first step.

Here a target stands at the place that predicts it, and a decoder reads what it is given. In transformers' training
loops it is otherwise: ``labels`` of a causal network are its own inputs, shifted inside, and an encoder-decoder makes
its decoder's inputs of them. A task in that form would run: a causal network learns to repeat the token it reads, and
BART's decoder, given nothing, reads the question. Neither is mended on the way: targets would no longer be those that
the caller holds predictions against.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.doubts import Doubt, parts_of
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.wording import some_tasks

__all__ = ["DECODER", "are_labels", "base_of", "check_decoder_given", "doubts_of_targets", "writes_answers"]

log = logging.getLogger("pyro_lift")

#: Networks that write one token after the other, and whose training has targets at the place of their inputs.
AT_THEIR_PLACE = ("flaubert", "xlm", "xlnet")
#: What a decoder reads.
DECODER = {"decoder_input_ids", "decoder_inputs_embeds"}


def doubts_of_targets(adapter: RandomAdapter, task: Task) -> Iterator[Doubt]:
    """Ask whether a task of tokens has transformers' labels for targets, where the network is a causal one.

    Args:
        adapter: a network that is read in another way (a readout or a postprocess of its own) is not asked.
        task: of any kind.
    """
    network = base_of(adapter.backbone)
    read_otherwise = adapter.readout is not None or adapter.postprocess is not None
    if task.kind != "tokens" or read_otherwise or not _is_causal(network):
        return
    for where, rows in parts_of(task):
        wrong = are_labels(rows)
        if wrong is not None:
            yield Doubt(wrong, partial(_repeats, network, rows, where))


def check_decoder_given(adapter: RandomAdapter, tasks: Sequence[Task]) -> None:
    """Refuse tasks of tokens that leave out what an encoder-decoder's decoder reads.

    BART makes it of the question, and others refuse without the task's name. Where a decoder is given another token to
    begin with than the network's own, the log says so: what is written and scored later begins with that one.

    Args:
        adapter: one with a readout of its own, which may give the decoder something, is not asked.
        tasks: of any kind.

    Raises:
        ValueError: names the task, its inputs, and what makes the missing one.
    """
    network = base_of(adapter.backbone)
    if adapter.readout is not None or not writes_answers(network):
        return
    for task in tasks:
        if task.kind == "tokens" and not DECODER & task.train.inputs.keys():
            start = getattr(network.config, "decoder_start_token_id", None)
            given = ", ".join(sorted(name or "one by position" for name in task.train.inputs))
            raise ValueError(
                f"task {task.name!r}: no 'decoder_input_ids' among the inputs ({given}), so the decoder of "
                f"{type(network).__name__} would read no answer, or the question in its place. Make them of the "
                f"targets by shift_right(targets, {'start' if start is None else start}) of "
                "pyro_lift.models.likelihoods, whose second argument is the token that answers begin with "
                "(decoder_start_token_id)."
            )
    _warn_of_starts(network, [task for task in tasks if "decoder_input_ids" in task.train.inputs])


def _warn_of_starts(network: Any, tasks: Sequence[Task]) -> None:
    """Say in the log which tasks' answers begin with another token than those that the network writes.

    Tasks on an accelerator are not looked at, which would wait for it; those of one start are said in one line.
    """
    configs = [getattr(network, name, None) for name in ("generation_config", "config")]
    starts = [getattr(config, "decoder_start_token_id", None) for config in configs]
    own = next((start for start in starts if start is not None), None)
    if own is None:
        return
    others: dict[int, list[str]] = {}
    for task in tasks:
        given = task.train.inputs["decoder_input_ids"]
        if task.kind == "tokens" and given.device.type == "cpu" and given.dim() == 2 and given.numel():
            first = given[:, 0]
            if bool((first == first[0]).all()) and int(first[0]) != own:
                others.setdefault(int(first[0]), []).append(task.name)
    for start, names in others.items():
        log.warning(
            "%s: answers begin with the token %d, and those that %s writes and scores with %d, its "
            "decoder_start_token_id: it learns what it is not asked later. Encode with TextToText(tokenizer, "
            "start_token=%d), or shift_right(targets, %d); or set the network's decoder_start_token_id to %d.",
            some_tasks(names), start, type(network).__name__, own, own, own, start,
        )  # fmt: skip


def are_labels(rows: Rows) -> Tensor | None:
    """Tell whether targets of tokens are the inputs themselves and not what follows them: one truth value.

    They are equal wherever a target counts, in every row, as with -100 over prompts and padding too. Where the next
    token is the same again a target is right both ways; a row of one token over and over says nothing.

    Args:
        rows: of a causal network.

    Returns:
        None where there are no tokens to compare with.
    """
    x, target = rows.inputs.get("input_ids", rows.inputs.get("")), rows.target
    if x is None or x.is_floating_point() or x.shape != target.shape or target.dim() != 2:
        return None
    counts = target != IGNORED
    mask = rows.inputs.get("attention_mask")
    real = torch.ones_like(counts) if mask is None or mask.shape != x.shape else mask.ne(0)
    changes = x[:, 1:] != x[:, :-1]
    # A target is not the next token where that is another; at a row's end, not the last one over again.
    inside = counts[:, :-1] & changes & real[:, 1:]
    is_last = torch.cat([~real[:, 1:], torch.ones_like(real[:, :1])], 1)
    at_end = (counts & is_last)[:, 1:] & changes
    return ((target == x) | ~counts).all() & (inside.any() | at_end.any())


def base_of(backbone: Any) -> Any:
    """Return the network inside a PEFT model; any other as it is."""
    return backbone.get_base_model() if hasattr(backbone, "get_base_model") else backbone


def writes_answers(network: Any) -> bool:
    """Tell whether a network is an encoder-decoder of transformers that writes text."""
    return _writes(network) and bool(getattr(network.config, "is_encoder_decoder", False))


def _is_causal(network: Any) -> bool:
    """Whether a network of transformers goes on with what it reads."""
    config = getattr(network, "config", None)
    at_their_place = getattr(config, "model_type", None) in AT_THEIR_PLACE
    return _writes(network) and not getattr(config, "is_encoder_decoder", False) and not at_their_place


def _writes(network: Any) -> bool:
    can = getattr(network, "can_generate", None)
    return getattr(network, "config", None) is not None and callable(can) and bool(can())


def _repeats(network: Any, rows: Rows, where: str) -> str:
    row, place = torch.nonzero(rows.target != IGNORED)[0].tolist()
    return (
        f"{where}: every target that counts is the input token of its own place (row {row}, place {place}: token "
        f"{int(rows.target[row, place])}), so {type(network).__name__}, a causal network, would learn to repeat what "
        "it reads. transformers shifts such labels inside its networks; here a target stands at the place that "
        "predicts it. Give next_tokens(input_ids, attention_mask) as targets, or shift_left(labels) of labels that "
        f"are {IGNORED} over prompts: both in pyro_lift.models.likelihoods."
    )
