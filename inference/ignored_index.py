"""Subsampled plates whose index a program takes no notice of: the same rows are then observed for every task.

``with pyro.plate("tasks", N, subsample_size=B): pyro.sample("y", ..., obs=y[:B])`` runs without a complaint and is
wrong without a word: each visit's theta are told the data of the first B tasks. It shows when the program is run for
another block, at the same theta: what is observed is the same. The runs have generators of their own, and no gradients.

What is observed may rightly be the same for all tasks, as labels in one order are that belong to inputs of each task's
own. The density then differs, and a word is said only of one piece of larger data that is shown for all. A factor may
know no data, and is not looked at. A program
whose attribute ``uses_index`` is true, as of ours that hold tasks, is taken at its word.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from pyro import poutine, validation_enabled
from pyro.distributions import Unit
from pyro.infer.autoguide.initialization import init_to_sample
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor

from pyro_lift.inference.mistakes import is_part
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.support.random_streams import own_global_stream

__all__ = ["check_index_used"]

#: Further blocks that are looked at where two have shown the same values.
OTHER_BLOCKS = 8
#: Below which chance equal whole numbers in all those blocks are no chance.
BY_CHANCE = 1e-4

Verdict = Literal["certain", "likely"]


class _Seen(NamedTuple):
    """What one site observes in one run, and its log density.

    Attributes:
        looped: whether the plate is iterated over.
        varies: whether the values differ along the plate.
        single: whether they are of one element of it.
    """

    name: str
    value: Tensor
    density: Tensor
    looped: bool
    varies: bool
    single: bool


class _Recorder(Messenger):
    """Notes the indices of each plate, and what is observed inside it, in the order of the program."""

    def __init__(self) -> None:
        super().__init__()
        self.by_plate: dict[str, list[_Seen]] = {}
        self.indices: dict[str, Tensor] = {}

    def _pyro_post_sample(self, msg: dict[str, Any]) -> None:
        law = msg["fn"]
        if type(law) is _Subsample:
            self.indices[msg["name"]] = msg["value"]
            return
        if not msg["is_observed"] or msg["infer"].get("_deterministic", False):
            return
        value = msg["value"]
        if isinstance(law, Unit) or not isinstance(value, Tensor) or not value.numel():
            return
        density = law.log_prob(value)
        for frame in msg["cond_indep_stack"]:
            at = value.dim() - len(law.event_shape) + frame.dim if frame.vectorized else -1
            varies = at >= 0 and bool((value != value.narrow(at, 0, 1)).any())
            single = not frame.vectorized or frame.size == 1
            seen = _Seen(msg["name"], value.detach(), density.detach(), not frame.vectorized, varies, single)
            self.by_plate.setdefault(frame.name, []).append(seen)


def check_index_used(program: Program, run: Evaluation, *, says: bool = True) -> None:
    """Refuse a subsampled plate whose index the program does not use, where that is certain; warn where it is likely.

    Certain is: a site observes one piece of memory whichever indices are shown, and its values differ along the plate,
    or are a part of larger data and have the same density. Likely is: one element of larger data, always the same; or
    equal values of one density in up to nine blocks, whole numbers only if that is no chance.

    Args:
        program: after a first look.
        run: of its first block, from which plates, tasks and values of the global sites are taken.
        says: whether to warn.

    Raises:
        ValueError: a plate whose index is not used, with what to write.
    """
    short = [name for name, (size, taken) in run.plates.items() if taken < size]
    if not short or getattr(program.model, "uses_index", False):
        return
    look, first = _looking(program, run)
    for plate in short:
        if plate not in first.by_plate:
            continue
        others = _others(look, run, plate, first.indices[plate], moves=plate == program.plate)
        repeated = _repeated(first.by_plate[plate], others)
        if repeated is None:
            continue
        seen, verdict = repeated
        say = _message(plate, run, seen)
        if verdict == "certain":
            raise ValueError(say)
        if says:
            warnings.warn(f"{say} If the data do repeat themselves, nothing is wrong.", UserWarning, stacklevel=2)


def _message(plate: str, run: Evaluation, seen: _Seen) -> str:
    size, taken = run.plates[plate]
    made = f"pyro.plate({plate!r}, {size}, subsample_size={taken})"
    write = f"with {made} as index: pyro.sample({seen.name!r}, ..., obs=y[index])"
    if seen.looped:
        write = f"for i in {made}: pyro.sample(..., obs=y[i])"
    return (
        f"the plate {plate!r} shows {taken} of {size} at a run, and the site {seen.name!r} observes the same values "
        "whichever they are: the program does not use the plate's index, and all would be given the data of the "
        f"first. Take the data of those that are shown: {write}."
    )


Look = Callable[[int, int], _Recorder]


def _looking(program: Program, run: Evaluation) -> tuple[Look, _Recorder]:
    """Return what runs the program for a block of tasks and a choice of rows, and what the first of them observe.

    Local sites are drawn from their prior, the same each time: where the chain starts, adapters may be at zero and
    see no input.
    """
    # Labels of families are given in the order in which tasks come: those of the chain are not to know of these runs.
    twin = Program(program.model, program.plate, program.args, program.kwargs, init_to_sample)
    values = {name: site.leaf.detach() for name, site in run.globals.items()}

    def look(block: int, rows: int) -> _Recorder:
        recorder, index = _Recorder(), None
        if program.plate is not None:
            size, taken = run.plates[program.plate]
            index = (torch.tensor(run.tasks) + block * taken) % size
        generator = torch.Generator().manual_seed(rows)
        with own_global_stream(0), validation_enabled(False), poutine.block(), recorder:
            twin.run(values, {}, index, generator, want_grad=False)
        return recorder

    try:
        return look, look(0, 0)
    except (RuntimeError, ValueError):  # a draw of the prior at which the program fails
        twin.initial = program.initial
        return look, look(0, 0)


def _others(look: Look, run: Evaluation, plate: str, first: Tensor, *, moves: bool) -> Iterator[list[_Seen]]:
    """Yield what is observed inside a plate when it shows others of its indices."""
    size, taken = run.plates[plate]
    for k in range(1, min(OTHER_BLOCKS, -(-size // taken) - 1) + 1):
        other = look(*((k, 0) if moves else (0, k)))
        if not torch.equal(other.indices[plate], first):
            yield other.by_plate.get(plate, [])


def _repeated(first: Sequence[_Seen], others: Iterator[list[_Seen]]) -> tuple[_Seen, Verdict] | None:
    """Return a site that observes the same in every block, and how sure that is; None where no site does."""
    suspects, blocks = {k: True for k, seen in enumerate(first)}, 0  # whether it is one piece of memory
    alike = set(suspects)  # of the same density
    for other in others:
        blocks += 1
        if len(other) != len(first):
            return None
        suspects = {
            k: memory and _one_memory(first[k].value, other[k].value)
            for k, memory in suspects.items()
            if _equal(first[k].value, other[k].value)
        }
        alike = {k for k in suspects if k in alike and torch.equal(first[k].density, other[k].density)}
        for k, memory in suspects.items():
            if memory and (first[k].varies or (k in alike and is_part(first[k].value))):
                return first[k], "certain"
        if not alike:
            parts = [k for k, memory in suspects.items() if memory and is_part(first[k].value) and first[k].single]
            return (first[parts[0]], "likely") if parts else None
    likely = [k for k in sorted(alike) if blocks and _chance(first[k].value, blocks) < BY_CHANCE]
    return (first[likely[0]], "likely") if likely else None


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and (_one_memory(a, b) or torch.equal(a, b))


def _one_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() != 0 and a.stride() == b.stride() and a.shape == b.shape


def _chance(value: Tensor, blocks: int) -> float:
    """The chance that so many blocks more hold the same values: of whole numbers, from how often pairs are equal."""
    if value.is_floating_point() and not bool((value == value.round()).all()):
        return 0.0
    counts = value.reshape(-1).unique(return_counts=True)[1].double()
    alike = float((counts / counts.sum()).square().sum())
    return alike ** (value.numel() * blocks)
