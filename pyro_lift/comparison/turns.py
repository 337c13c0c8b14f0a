"""The turns of a comparison, planned one after the other: what the last one took says what the next can be.

A turn is a seed and a part of the tasks that is held out, the same sizes for all methods. The first is planned from
what was measured before it; each of the others from that and from how long the turns before it took, with the time that
is left. So a comparison that turns out to be quicker than was thought does more with its time, and one that turns out
to be slower ends in time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.comparison.plan import PLANNED, Costs, Plan, planned, solve, turn_seconds
from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.support.archive import read_json, write_json

__all__ = ["Agenda", "Entries", "Turn", "told_sizes"]

#: Fraction of the time left that turns after the first are planned for: what they cost is known by then.
LATER = 0.93


class Turn(NamedTuple):
    """A part of the tasks, held out from one seed's methods.

    Attributes:
        gradients: of meta-training.
        steps: of adaptation.
        seconds: that it took; None where it is not done.
    """

    seed: int
    fold: int
    gradients: int
    steps: int
    seconds: float | None = None


class Entries(NamedTuple):
    """Who takes part: methods that learn from other tasks, and others that take gradients."""

    meta: int
    alone: int


class Agenda:
    """The turns so far, and the next.

    Args:
        path: of the file that it is written to.
        mark: of the comparison.
        plan: with the sizes of the first turn.
        costs: measured before it.
        settings: sizes that are wanted.
        held_out: tasks that are judged or chosen on, of each fold.
        entries: who takes part.
        turns: of a comparison that is gone on with.
    """

    def __init__(
        self,
        path: Path,
        mark: str,
        plan: Plan,
        costs: Costs,
        settings: CompareSettings,
        held_out: Sequence[int],
        entries: Entries,
        turns: Sequence[Turn] = (),
    ) -> None:
        self.path, self.mark, self.plan, self.costs = path, mark, plan, costs
        self.settings, self.held_out, self.entries = settings, list(held_out), entries
        self.turns = list(turns)

    @classmethod
    def read(cls, path: Path, settings: CompareSettings, held_out: Sequence[int], entries: Entries) -> Agenda:
        """Read one that was written; of an earlier version too, whose turns all had one size."""
        stored = read_json(path)
        plan, costs = planned(stored["plan"]), Costs(**stored["costs"])
        turns = [Turn(**turn) for turn in stored.get("turns", [])]
        if "turns" not in stored:
            each = [(seed, fold) for seed in range(plan.seeds) for fold in range(plan.folds)]
            turns = [Turn(seed, fold, plan.gradients, plan.steps) for seed, fold in each]
        return cls(path, stored["mark"], plan, costs, settings, held_out, entries, turns)

    def write(self) -> None:
        """Write the plan, the costs and the turns."""
        turns = [turn._asdict() for turn in self.turns]
        stored = {"mark": self.mark, "plan": self.plan.to_dict(), "costs": asdict(self.costs), "turns": turns}
        write_json(self.path, stored)

    def next(self, left: float) -> Turn | None:
        """Plan the next turn and write it down; None where all are done, or none fits in the seconds left."""
        wanted = [(seed, fold) for seed in range(self.settings.seeds) for fold in range(len(self.held_out))]
        ahead = wanted[len(self.turns) :]
        if not ahead:
            return None
        if not self.turns:
            gradients, steps = self.plan.gradients, self.plan.steps
        else:
            plan = self._planned(ahead, left)
            if plan is None:
                return None
            gradients, steps = plan.gradients, plan.steps
        self.turns.append(Turn(*ahead[0], gradients, steps))
        self.write()
        return self.turns[-1]

    def done(self, seconds: float) -> None:
        """Note what the last turn took."""
        self.turns[-1] = self.turns[-1]._replace(seconds=seconds)
        self.write()

    def sizes(self, seed: int, fold: int) -> Plan:
        """Return the sizes of a turn."""
        turn = next(turn for turn in self.turns if (turn.seed, turn.fold) == (seed, fold))
        return replace(self.plan, gradients=turn.gradients, steps=turn.steps)

    def _planned(self, ahead: Sequence[tuple[int, int]], left: float) -> Plan | None:
        settings = replace(self.settings, seeds=1, rates=self.plan.rates)
        held_out = [self.held_out[fold] for _, fold in ahead]
        costs, available = self._corrected(), max(left, 0.0) * LATER / PLANNED
        plan = solve(costs, settings, held_out, *self.entries, available)
        return None if plan.seconds > PLANNED * available or len(plan.rates) < len(self.plan.rates) else plan

    def _corrected(self) -> Costs:
        """Return the costs, all times what the turns so far took over what they were thought to take."""
        known = [turn for turn in self.turns if turn.seconds is not None]
        if not known:
            return self.costs
        rates = len(self.plan.rates)
        thought = sum(
            turn_seconds(self.costs, self.held_out[t.fold], *self.entries, (rates, t.steps, t.gradients)) for t in known
        )
        factor = sum(turn.seconds or 0.0 for turn in known) / max(thought, 1e-9)
        return Costs(**{name: factor * value for name, value in asdict(self.costs).items()})


def told_sizes(
    turns: Sequence[Turn], plan: Plan, settings: CompareSettings, folds: int, meta: int
) -> Mapping[str, Any]:
    """Tell the sizes of the turns in words, and which of them are smaller than was wanted.

    Returns:
        ``gradients`` and ``steps`` as text, and ``cut``, a list.
    """
    shown = {name: _range([getattr(turn, name) for turn in turns]) for name in ("gradients", "steps")}
    cut = []
    if len(turns) < folds * settings.seeds:
        if len(turns) < folds:
            cut.append(f"{len(turns)} of {folds} parts of the tasks are judged")
        if settings.seeds > 1:
            cut.append(f"{len(turns) / folds:.2g} of {settings.seeds} seeds")
    if len(plan.rates) < len(settings.rates):
        cut.append(f"{len(plan.rates)} of {len(settings.rates)} rates of adaptation tried")
    if meta and min(turn.gradients for turn in turns) < settings.gradients:
        cut.append(f"{shown['gradients']} gradients of meta-training in place of {settings.gradients}")
    if min(turn.steps for turn in turns) < settings.steps:
        cut.append(f"{shown['steps']} steps of adaptation in place of {settings.steps}")
    return {**shown, "cut": cut}


def _range(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return str(least) if least == most else f"{least} to {most}"
