"""A watch over the loss of a chain: one that climbs back to chance is stopped, not averaged.

What it has seen is saved with the chain, so that one that was stopped on its way back to chance is told of as early,
and beside the same loss of before, as one that was not.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.models.chance import chance_loss
from pyro_lift.models.task import Task

__all__ = ["ChainLostError", "LossWatch"]

#: Of chance: a chain whose mean loss has been below the first and comes back to the second has lost what it knew.
LEARNED, LOST = 0.8, 0.97
#: Visits that a mean is taken over, at least; and looks at it, so that a device is not waited for at every visit.
WINDOW, EVERY = 100, 25


class ChainLostError(RuntimeError):
    """A chain that predicted better than chance, and no longer does: its noise has carried the weights away.

    Attributes:
        step: transitions made.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


class LossWatch:
    """Follows the mean loss of the visited tasks beside what a prediction has that ignores its input.

    Args:
        rows: training rows of each task.
        chance: of each task, nats a row (:func:`~pyro_lift.models.chance.chance_loss`).
        advice: what to do, the end of the error's message.
        first: what to do before anything else, of the data; in joint training too.
        visits: made before, by a run that goes on.
    """

    def __init__(
        self, rows: Sequence[int], chance: Sequence[float], advice: str = "", first: str = "", visits: int = 0
    ) -> None:
        self._rows, self._chance, self._advice, self._first = list(rows), list(chance), advice, first
        self._window: deque[tuple[float, float]] = deque(maxlen=max(WINDOW, len(self._rows)))
        self._waiting: list[tuple[Tensor, tuple[int, ...]]] = []
        self._visits, self._rate, self._lost_since = visits, 0.0, 0
        self.lowest = float("inf")

    @classmethod
    def of(
        cls, tasks: Sequence[Task], noise_scale: float, advice: str, first: str = "", *, visits: int = 0
    ) -> LossWatch:
        """Watch a run over some tasks; ``noise_scale`` is the sd of regression's noise."""
        rows = [len(task.train) for task in tasks]
        return cls(rows, [chance_loss(task, noise_scale) for task in tasks], advice, first, visits)

    def see(
        self, log_likelihood: Tensor, tasks: tuple[int, ...], phase: str = "sample", rate: float | None = None
    ) -> None:
        """Take a visit: the log likelihood summed over the tasks' rows, and the tasks; in ``"sgd"``, joint training.

        Where the rate of joint training has become smaller, it has gone back to where it was good
        (:mod:`~pyro_lift.inference.gibbs.steadiness`), and is looked at anew. It has as many visits as a mean is taken
        over to do so.

        Raises:
            ChainLostError: the mean loss was below 0.8 of chance and is now at 0.97 of it or above.
        """
        if rate is not None:
            if rate < 0.5 * self._rate:
                self._window.clear()
                self._waiting.clear()
                self._lost_since = 0
            self._rate = rate
        self._visits += 1
        self._waiting.append((log_likelihood.detach(), tasks))
        if self._visits % EVERY:
            return
        self._take_in()
        if len(self._window) < (self._window.maxlen or 0):
            return
        loss, chance = (sum(values) / len(self._window) for values in zip(*self._window, strict=True))
        if not chance > 0.0:  # densities, or tasks of one class: nothing to be lost
            return
        self.lowest = min(self.lowest, loss / chance)
        if not (self.lowest < LEARNED and loss > LOST * chance):
            self._lost_since = 0
            return
        if phase == "sgd":
            self._lost_since = self._lost_since or self._visits
            if self._visits - self._lost_since <= len(self._window):
                return
        why = f"the chain's noise has carried the weights to where the network says nothing. {self._advice}"
        if self._lost_since:
            why = "joint training has become unsteady. Give it fewer sgd_steps, or a smaller sgd_learning_rate."
        why = f"{self._first} {why[0].upper()}{why[1:]}" if self._first else why
        raise ChainLostError(
            f"after {self._visits} visits the mean loss of the tasks is {loss:.3f} a row, where a prediction that "
            f"ignores its input has {chance:.3f}, and it was {self.lowest * chance:.3f} before: {why}",
            self._visits,
        )

    def _take_in(self) -> None:
        """Move the visits that wait into the window."""
        if not self._waiting:
            return
        values = torch.stack([value for value, _ in self._waiting]).tolist()  # a device is asked once
        for value, (_, visited) in zip(values, self._waiting, strict=True):
            rows = sum(self._rows[k] for k in visited)
            self._window.append((-value / rows, sum(self._rows[k] * self._chance[k] for k in visited) / rows))
        self._waiting.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return what it has seen, as plain data."""
        self._take_in()
        return {
            "window": [list(seen) for seen in self._window],
            "lowest": self.lowest if self.lowest < float("inf") else None,
            "visits": self._visits,
            "rate": self._rate,
            "lost_since": self._lost_since,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what :meth:`state_dict` returned."""
        self._waiting.clear()
        self._window = deque(((loss, chance) for loss, chance in state["window"]), maxlen=self._window.maxlen)
        self.lowest = float("inf") if state["lowest"] is None else state["lowest"]
        self._visits, self._rate, self._lost_since = state["visits"], state["rate"], state["lost_since"]
