"""Early stopping: a new task's development rows are looked at as it is adapted to, and the best draws are kept.

A chain or a fine-tuning is cut into windows of some steps. At the end of each its draws, evenly spaced over the window,
are judged on rows that they were not fitted to; the best window is what is left in the end, and some windows without a
better one end the run. No more is held than the draws of two windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number

__all__ = ["DrawWindows", "EarlyStopping", "Look", "Verdict"]


class Verdict(NamedTuple):
    """How good some draws are on development rows; of equal scores the higher log likelihood is better.

    Attributes:
        score: the task's metric, higher being better.
        log_likelihood: mean over rows, in nats; of what is written over tokens.
    """

    score: float
    log_likelihood: float

    def beats(self, other: Verdict | None) -> bool:
        """Tell whether these draws are better; a score that is not a number beats nothing."""
        return other is None or _ranked(self) > _ranked(other)


def _ranked(verdict: Verdict) -> tuple[float, ...]:
    return tuple(-math.inf if math.isnan(x) else x for x in verdict)


class Look(NamedTuple):
    """One look at the development rows, and the steps that had been taken."""

    step: int
    verdict: Verdict


#: Judges draws ``[S, D]``, and heads ``[S, C, E + 1]`` where a task has its own, on a task's development rows.
Judge = Callable[[RandomAdapter, Task, Tensor, Tensor | None], Verdict]


@dataclass(frozen=True)
class EarlyStopping:
    """When development rows are looked at, and when an adaptation ends.

    Attributes:
        judge: of the draws of a window.
        every: steps of a window.
        patience: windows in a row without a better one that end the adaptation.
    """

    judge: Judge
    every: int
    patience: int = 3

    def __post_init__(self) -> None:
        for name in ("every", "patience"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)


class DrawWindows:
    """The windows of one adaptation, as its weights arrive one step after another.

    Args:
        steps: of the adaptation, at most.
        draws: of a window, evenly spaced; all of a window that has no more steps.
        every: steps of a window; the last may be shorter.
        patience: windows without a better one that end the adaptation.
        judge: of a window's draws by name, ``[S, ...]``.
    """

    def __init__(
        self, steps: int, draws: int, every: int, patience: int, judge: Callable[[dict[str, Tensor]], Verdict]
    ) -> None:
        self.steps, self.draws, self.every, self.patience, self.judge = steps, draws, every, patience, judge
        #: All looks so far, and the best of them.
        self.looks: list[Look] = []
        self.best: Look | None = None
        #: Draws of the best window, by name.
        self.kept: dict[str, Tensor] = {}
        self._window: list[dict[str, Tensor]] = []

    def get_samples(self) -> dict[str, Tensor]:
        """Draws of the best window by name, as :class:`~pyro_lift.inference.mcmc.MCMC` gives its own."""
        return self.kept

    @property
    def results(self) -> dict[str, float]:
        """Measures of the best window, by name, to be saved with its draws."""
        if self.best is None:
            return {}
        step, (score, log_likelihood) = self.best
        looks = {"adaptation steps kept": step, "adaptation steps taken": self.looks[-1].step}
        return {**looks, "development score": score, "development log likelihood": log_likelihood}

    def see(self, step: int, weights: Mapping[str, Tensor]) -> bool:
        """Take the weights after a step, from 1 on; return whether the adaptation is to end."""
        end = min(-(-step // self.every) * self.every, self.steps)
        begun = (end - 1) // self.every * self.every
        spacing, left = max((end - begun) // self.draws, 1), end - step
        if left % spacing == 0 and left // spacing < self.draws:
            self._window.append({name: x.detach().clone() for name, x in weights.items()})
        if left:
            return False
        window = {name: torch.stack([each[name] for each in self._window]) for name in self._window[0]}
        self._window = []
        look = Look(step, self.judge(window))
        self.looks.append(look)
        if look.verdict.beats(None if self.best is None else self.best.verdict):
            self.best, self.kept = look, window
        assert self.best is not None
        return len(self.looks) - 1 - self.looks.index(self.best) >= self.patience or step == self.steps
