"""Joint training of one vector, which can be looked at on its way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.progress import chain_bar
from pyro_lift.models.task import Task
from pyro_lift.watching.watch import Watchers

__all__ = ["JointRun", "Standing", "few_passes", "moments_of", "passes", "watching"]

#: Passes over the tasks' rows from which on they may be known by heart.
PASSES = 5.0


class Standing(NamedTuple):
    """Where joint training stands.

    Attributes:
        vector: phi and all theta, ``[D]``.
        moments: the preconditioner there, by local family.
        tasks: that were trained on; none of the untouched network.
    """

    vector: Tensor
    moments: dict[str, Tensor]
    tasks: Sequence[Task] = ()


def moments_of(kernel: SGLDGibbs) -> dict[str, Tensor]:
    """Return the preconditioner that adaptation begins with."""
    return {name: x.reshape(-1) for name, x in kernel.state.second_moment.items() if name == "theta"}


class JointRun:
    """The first part of LiFT's chain, in which phi and all theta are one vector and take steps of Adam.

    Args:
        kernel: whose first ``most`` visits are joint training.
        most: steps that it can take in all.
        tasks: of it.
        title: before the bar, and of the run that callbacks are told of.
        progress: whether there is a bar.
        on_step: what watches each step.

    Attributes:
        kernel: as it stands, its preconditioner included.
        steps: taken so far.
    """

    def __init__(
        self,
        kernel: SGLDGibbs,
        most: int,
        tasks: Sequence[Task],
        title: str,
        *,
        progress: bool = False,
        on_step: Watchers | None = None,
    ) -> None:
        self.kernel, self.most, self.tasks, self.steps = kernel, most, tasks, 0
        self._bar = {"description": title, "show": progress, "on_step": watching(on_step, title, tasks)}

    def to(self, steps: int) -> Standing:
        """Go on to so many steps in all.

        Args:
            steps: no fewer than were taken already, no more than ``most``.
        """
        assert self.steps <= steps <= self.most, f"{self.steps} of {self.most} steps taken, {steps} asked"
        if self.steps == 0:
            self.kernel.setup(self.most)
        weights = dict(self.kernel.state.phi)
        with chain_bar(self.most, done=self.steps, **self._bar) as hook:  # type: ignore[arg-type]
            for step in range(self.steps, steps):
                weights = self.kernel.sample(weights)
                hook(self.kernel, weights, "Warmup", step)
        self.steps = steps
        moments = {name: x.clone() for name, x in moments_of(self.kernel).items()}
        return Standing(weights["phi"].detach().clone().reshape(-1), moments, self.tasks)


def watching(on_step: Watchers | None, title: str, tasks: Sequence[Task]) -> Watchers | None:
    """Return what watches a part of a run, under its own title and over its own tasks."""
    if on_step is None:
        return None
    return on_step.of(on_step.run.kind, title, [len(t.train) for t in tasks], [t.name for t in tasks])


def passes(steps: int, batch_size: int, tasks: Sequence[Task]) -> float:
    """Return how many times joint training sees the tasks' rows: steps times the mean of batch over rows, over tasks.

    Args:
        steps: visits of one task each.
        batch_size: rows of a visit; 0 for all.
        tasks: of meta-training.
    """
    shares = [min(batch_size or len(task.train), len(task.train)) / len(task.train) for task in tasks]
    return steps * sum(shares) / len(tasks) ** 2


def few_passes(steps: int, batch_size: int, tasks: Sequence[Task]) -> bool:
    """Whether joint training sees rows too seldom to know them by heart: fewer than :data:`PASSES` times."""
    return passes(steps, batch_size, tasks) < PASSES
