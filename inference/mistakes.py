"""Mistakes in writing a program that can be told from one run of it, and what to write instead."""

from __future__ import annotations

import difflib
import inspect
import logging
import warnings
from collections.abc import Callable
from typing import Any

from pyro.infer.autoguide.guides import AutoGuide
from torch import Tensor

from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.supports import innermost

log = logging.getLogger("pyro_lift")

__all__ = [
    "MissingPlateError",
    "check_data",
    "check_program",
    "is_part",
    "missing_plate",
    "nested_hint",
    "outside_hint",
    "say_single_task",
]


def check_program(program: Program, run: Evaluation, *, says: bool = True) -> None:
    """Refuse a guide that is handed over as the model; warn of parameters, which no sampler moves, and of no data.

    Args:
        program: after its first run.
        run: that run.
        says: whether to warn: not of a program that is looked at once more.

    Raises:
        ValueError: a guide.
    """
    params = sorted(program.params)
    if isinstance(program.model, AutoGuide) or (params and not run.observed):
        named = f"it has parameters ({', '.join(params)}) and observes nothing" if params else "it is an AutoGuide"
        raise ValueError(
            f"model={_name(program.model)} looks like a guide of variational inference: {named}. A sampler needs no "
            "guide; pass the model, with pyro.sample(..., obs=data)."
        )
    if params and says:
        warnings.warn(
            f"the program's pyro.param sites ({', '.join(params)}) are not sampled: they stay at the values that they "
            "have in Pyro's parameter store. Give what is unknown a prior, pyro.sample(...); write what is known as a "
            "plain tensor.",
            UserWarning,
            stacklevel=2,
        )
    if not run.observed:
        _say_no_data(program, run, says=says)


def _say_no_data(program: Program, run: Evaluation, *, says: bool) -> None:
    """Warn of a program that observes nothing; refuse one that was not given its data, and would have to draw them.

    Raises:
        ValueError: a discrete site, which no gradient can move, and an argument that was left at None.
    """
    left = _left_at_none(program)
    call = f"mcmc.run({', '.join(f'{name}={name}' for name in left)})"
    for site in run.latents.values() if left else ():
        if site.discrete:
            raise ValueError(
                f"the program observes nothing: run was not given {' and '.join(map(repr, left))}, and so "
                f"{site.name!r} ({type(innermost(site.fn)).__name__}) is not observed and would have to be sampled. "
                f"Hand over the data: {call}."
            )
    if says:
        log.warning(
            "the program observes nothing, so its draws are the prior's: pass data as pyro.sample(..., obs=y).%s",
            f" run was not given {' and '.join(map(repr, left))}, which may be the data: {call}." if left else "",
        )


def _left_at_none(program: Program) -> list[str]:
    """The arguments of the model that are None because nothing was handed over for them."""
    try:
        signature = inspect.signature(program.model)
        bound = signature.bind(*program.args, **program.kwargs).arguments
    except (TypeError, ValueError):  # of a callable that has none to show
        return []
    return [name for name, p in signature.parameters.items() if p.default is None and bound.get(name) is None]


def say_single_task(plate: str, run: Evaluation) -> None:
    """Warn of a plate with one task, from which nothing is learned of what tasks share."""
    if run.plates[plate].size > 1:
        return
    shared = ", ".join(map(repr, run.globals)) or "what stands outside the plate"
    log.warning(
        "the plate %r holds one task, and one task tells nothing of what tasks share: the posterior of %s is about as "
        "wide as its prior allows, and a new task gains next to nothing. Give two tasks or more, better ten. To fit "
        "this one alone, sample it without an upper level (SGLD(model)), or train a plain adapter on it.",
        plate,
        shared,
    )


def _name(model: Callable[..., Any]) -> str:
    return getattr(model, "__name__", type(model).__name__)


class MissingPlateError(ValueError):
    """A program without the task plate; ``only`` is the one plate that holds latent sites, if it is one."""

    def __init__(self, message: str, only: str | None) -> None:
        super().__init__(message)
        self.only = only

    def __reduce__(self) -> tuple[type[MissingPlateError], tuple[str, str | None]]:
        return type(self), (str(self), self.only)


def missing_plate(plate: str, run: Evaluation) -> str:
    """Return the message about a plate that the program does not have, with the one that is meant, if there is one."""
    known = ", ".join(map(repr, run.plates)) or "none"
    say = f"the program has no plate named {plate!r} (its plates: {known}). "
    near = difflib.get_close_matches(plate, run.plates, n=1)
    if near or len(run.plates) == 1:
        other = near[0] if near else next(iter(run.plates))
        say += f"Did you mean {other!r}? Then write SGLDGibbs(model, plate={other!r}). Otherwise name "
    else:
        say += "Name "
    say += (
        'the task plate with SGLDGibbs(model, plate="..."), and write it as with pyro.plate("...", N): or, task by '
        'task, for i in pyro.plate("...", N): (range(N) tells nothing of tasks).'
    )
    if not run.plates:
        say += (
            " What every task has of its own stands inside it, theta and what is observed; what tasks share stands "
            "outside. A program without tasks is for SGLD(model)."
        )
    return say


def outside_hint(run: Evaluation, plate: str) -> str:
    """Return a sentence about a site outside the plate that has one value a task; empty where there is none."""
    size = run.plates[plate].size
    for name, site in run.globals.items():
        if size > 1 and size in site.value.shape:
            return (
                f" The site {name!r} stands outside the plate {plate!r} and has a dimension of its {size} tasks: if it "
                f"belongs to the tasks, sample it inside the plate, without that dimension."
            )
    return ""


def nested_hint(program: Program) -> str:
    """Return a sentence about a plate around the task plate; empty where there is none."""
    for name, plates in program.around.items():
        return (
            f" The plate {program.plate!r} stands inside {plates[0]!r} (at the site {name!r}), whose sites are shared "
            f"by its tasks: SGLDGibbs(model, plate={plates[0]!r}) takes that plate's elements as the tasks."
        )
    return ""


def check_data(run: Evaluation, plate: str, *, says: bool = True) -> None:
    """Refuse data of all tasks at a site that shows a block of them: they would be counted for every task.

    Data of one task that are stretched over all of them are warned of, if ``says``.

    Raises:
        ValueError: an observed site wider along the plate than the block.
    """
    size, taken = run.plates[plate]
    for site in run.observed:
        if not site.local or site.plate_dim is None:
            continue
        law, value = site.fn, site.value
        at = value.dim() - len(law.event_shape) + site.plate_dim
        if at >= 0 and value.shape[at] == 1 < taken and says and _is_data(value):
            warnings.warn(
                f"the site {site.name!r} observes the data of one element of the plate {plate!r} (shape "
                f"{list(value.shape)}), which are counted for each of its {taken}. If they have data of their own, "
                "take those: obs=y, or obs=y[index].",
                UserWarning,
                stacklevel=2,
            )
        if at >= 0 and value.shape[at] == size != taken:
            raise ValueError(
                f"the site {site.name!r} observes {size} tasks along the plate {plate!r}, and one run shows {taken}"
                f". Take the data of those: with pyro.plate({plate!r}, {size}, subsample_size={taken}) as index: "
                f"pyro.sample({site.name!r}, ..., obs=y[index])."
            )


def is_part(value: Tensor) -> bool:
    """Whether a value is a part of larger data."""
    return value.untyped_storage().nbytes() > value.numel() * value.element_size()


def _is_data(value: Tensor) -> bool:
    """Whether a value is a part of larger data, or numbers that are not all the same."""
    return is_part(value) or bool((value != value.reshape(-1)[:1]).any())
