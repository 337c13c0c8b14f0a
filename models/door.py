"""The door of every run: a task's rows held against what the network can read, before the first step."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.conventions import base_of, check_decoder_given, doubts_of_targets
from pyro_lift.models.doubts import Doubt, parts_of, refuse_doubtful
from pyro_lift.models.lookups import doubts_of_lookups
from pyro_lift.models.places import doubts_of_lengths
from pyro_lift.models.readouts import LabelMatching, readout_for
from pyro_lift.models.task import Rows, Task
from pyro_lift.models.vocabulary import doubts_of_inputs

__all__ = ["check_inputs", "check_rows"]


def check_rows(adapter: RandomAdapter, tasks: Sequence[Task]) -> None:
    """Refuse rows that the network cannot read, or would read as something else than they are.

    Training, development and test rows are looked at, each task's at one look.

    Args:
        adapter: the network as a function of theta.
        tasks: of any kind.

    Raises:
        ValueError: tokens that the network does not know; texts of more tokens than it has places for; a causal
            network's targets that are its inputs; an encoder-decoder whose decoder is given nothing; inputs of label
            matching that the encoder does not take. Names the task, its part, the row and the token.
    """
    _check_taken(adapter, tasks)
    check_decoder_given(adapter, tasks)
    for task in tasks:
        doubts: list[Doubt] = []
        for where, rows in parts_of(task):
            doubts += _doubts_of_rows(adapter, rows, where)
        refuse_doubtful([*doubts, *doubts_of_targets(adapter, task)])


def check_inputs(adapter: RandomAdapter, rows: Rows) -> None:
    """Refuse rows to predict that the network cannot read, with one look at them.

    Args:
        adapter: the network as a function of theta.
        rows: whose targets, if any, are not looked at.

    Raises:
        ValueError: tokens that the network does not know; texts of more tokens than it has places for. Names the row.
    """
    refuse_doubtful([*_doubts_of_rows(adapter, rows, "inputs")])


def _doubts_of_rows(adapter: RandomAdapter, rows: Rows, where: str) -> Iterator[Doubt]:
    """Ask whether the network can read the inputs of some rows, of a task or to predict."""
    matching = adapter.matches(rows.named)
    yield from doubts_of_inputs(adapter.backbone, rows, where)
    yield from doubts_of_lengths(adapter.backbone, rows, where, matching=matching)
    if not matching:  # where texts to match go through the network too, and not as they stand
        yield from doubts_of_lookups(adapter, rows, where)


def _check_taken(adapter: RandomAdapter, tasks: Sequence[Task]) -> None:
    """Refuse inputs of label matching that the encoder does not take; those of transformers pass over them."""
    for task in tasks:
        named = task.train.named
        readout = None if adapter.postprocess else readout_for(named, adapter.readout)
        if not isinstance(readout, LabelMatching):
            continue
        network = base_of(adapter.backbone)
        taken = inspect.signature(network.forward).parameters
        unknown = sorted(readout.names_read(named) - taken.keys()) if "input_ids" in taken else []
        if unknown:
            raise ValueError(
                f"task {task.name!r}: the encoder, {type(network).__name__}, takes no {unknown[0]!r}. Leave it out of "
                "the rows and label texts, or load an encoder that reads it."
            )
