r"""Pooled probe: one logistic or ridge regression on the frozen features of all tasks' rows, the new task's among them.

.. math:: \hat w = \arg\max_w \sum_{i, n} \log p\big(y_{in} \mid w\,\tfrac{f(x_{in}) - m}{d}\big)
                   - \tfrac{1}{2 s^2} \lVert w \rVert^2

The dullest thing that learns from other tasks, and the bar for methods that do, where tasks have the same classes: no
adapter, and no weights of a task's own. Cost: one forward pass of all rows; a regression over all of them for each
fold and width, and one for each new task.

Our choices: features are those of :mod:`~pyro_lift.inference.baselines.linear_probe`; each is standardised by the rows
of all tasks. s is chosen by leaving whole tasks out, since a new task is what comes next: five folds of them, and at
most :data:`CHOICE_ROWS` rows. A new task's rows then count as any others. Of more than :data:`MOST_ROWS` rows each task
keeps its first, as many for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.linear_probe import (
    CHOICE_TOLERANCE,
    ProbePosterior,
    has_probe,
    reader_of,
    ridge_head,
    softmax_heads,
)
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.door import check_rows
from pyro_lift.models.features import all_features
from pyro_lift.models.heads import scaling_of, standard_widths
from pyro_lift.models.task import Task
from pyro_lift.models.value_head import columns_of

__all__ = ["CHOICE_ROWS", "MOST_ROWS", "PooledProbe", "PooledProbeState", "why_not_pooled"]

#: Folds of tasks in the choice of the strength, at most.
FOLDS = 5
#: Rows of the tasks of meta-training, at most.
MOST_ROWS = 10_000
#: Rows that the strength is chosen on, at most.
CHOICE_ROWS = 3_000
#: Largest mean gradient of a row at which scikit-learn stops.
TOLERANCE = 1e-6


class PooledProbeState(NamedTuple):
    """The rows of the tasks of meta-training, and the strength that was chosen.

    Attributes:
        theta: weights ``[D]`` whose features are used.
        features: ``[n, E]``, as they come.
        target: class numbers ``[n]``, or values ``[n, M]``.
        prior_sd: s, of a weight on a standardised feature.
        like: a task of theirs; a new one has to have its classes.
        heads: where the features are read.
    """

    theta: Tensor
    features: Tensor
    target: Tensor
    prior_sd: float
    like: Task
    heads: HeadPolicy
    meta_steps: int = 0


@dataclass(frozen=True)
class PooledProbe:
    """One regression on the frozen features of all tasks' rows, the new task's among them.

    Raises:
        ValueError: tasks that do not all have the same classes, or as many values.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)

    @property
    def space(self) -> SearchSpace:
        """Nothing: its strength is chosen by leaving tasks out."""
        return SearchSpace()

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> PooledProbeState:
        """Read the features of all tasks, and choose the strength."""
        del on_step
        if not tasks:
            raise ValueError("tasks is empty: there is nothing to learn from.")
        _check_pooled(tasks)
        check_rows(self.adapter, tasks)
        theta = self.adapter.initial.clone()
        heads = self.budget.heads.fitted(self.adapter, tasks)
        most = max(MOST_ROWS // len(tasks), 1)
        read = [self._read(task, theta, heads, most) for task in tasks]
        whose = torch.cat([torch.full((len(x),), place % FOLDS) for place, (x, _) in enumerate(read)])
        features, target = torch.cat([x for x, _ in read]), torch.cat([y for _, y in read])
        some = slice(None, None, -(-len(target) // CHOICE_ROWS))
        sd = _chosen_sd(features[some], target[some], whose[some], tasks[0])
        return PooledProbeState(theta, features, target, sd, tasks[0], heads)

    def adapt(self, state: PooledProbeState, task: Task, *, seed: int | None = None) -> ProbePosterior:
        """Fit the regression to all rows; nothing is random."""
        del seed
        _check_pooled([state.like, task])
        check_rows(self.adapter, [task])
        x, y = self._read(task, state.theta, state.heads, len(task.train))
        features, target = torch.cat([state.features, x]), torch.cat([state.target, y])
        scaling = scaling_of(features)
        (head,) = _fits(scaling.apply(features), target, task, (state.prior_sd,), TOLERANCE)
        head = scaling.folded(head).to(state.theta)
        task = task.to(state.theta.device)
        return ProbePosterior(self.adapter, task, state.theta, head, state.prior_sd, reader_of(task, state.heads))

    def _read(self, task: Task, theta: Tensor, heads: HeadPolicy, most: int) -> tuple[Tensor, Tensor]:
        """Return the features ``[n, E]`` and the targets of a task's first rows."""
        rows = task.train.take(slice(0, most)).to(theta.device)
        x = all_features(self.adapter, rows, theta, reader_of(task, heads)).double().cpu()
        y = rows.target.cpu()
        return x, columns_of(y) if task.kind == "regression" else y


def why_not_pooled(tasks: Sequence[Task]) -> str | None:
    """Say why one regression cannot be over all of some tasks; None where it can.

    Tasks of as many classes, of which nothing says what they are, are taken to have the same.
    """
    without = next((task for task in tasks if not has_probe(task)), None)
    if without is not None:
        return f"task {without.name!r} has no classes that all its rows share, and no numbers to predict"
    first = tasks[0]
    for task in tasks:
        if _answers_of(task) != _answers_of(first):
            return f"tasks {first.name!r} and {task.name!r} have not the same classes"
    return None


def _answers_of(task: Task) -> tuple[object, ...]:
    """What two tasks have alike whose answers mean the same."""
    texts = [(name, x.tolist()) for name, x in sorted((task.label_texts or {}).items())]
    shape = tuple(task.train.target.shape[1:]) if task.kind == "regression" else ()
    return task.kind, task.num_classes, task.labels, texts, shape


def _check_pooled(tasks: Sequence[Task]) -> None:
    reason = why_not_pooled(tasks)
    if reason is not None:
        raise ValueError(f"{reason}: one regression cannot be over all their rows. Leave pooled-probe out.")


def _chosen_sd(features: Tensor, target: Tensor, fold: Tensor, like: Task) -> float:
    """Choose the prior's width by the mean loss of the rows of tasks that were left out; of one task, the middle."""
    tried = standard_widths(features.shape[-1])
    losses = torch.zeros(len(tried), dtype=torch.float64)
    numbers = fold.unique().tolist()
    if len(numbers) < 2:
        return tried[len(tried) // 2]
    for k in numbers:
        kept, left = fold != k, fold == k
        scaling = scaling_of(features[kept])
        fits = _fits(scaling.apply(features[kept]), target[kept], like, tried, CHOICE_TOLERANCE)
        for place, head in enumerate(fits):
            output = scaling.apply(features[left]) @ head[:, :-1].T + head[:, -1]
            if like.kind == "regression":
                losses[place] += (output - target[left]).square().sum()
            else:
                losses[place] -= output.log_softmax(-1).gather(-1, target[left].unsqueeze(-1)).sum()
    return tried[int(losses.argmin())]


def _fits(z: Tensor, target: Tensor, like: Task, widths: Sequence[float], tolerance: float) -> list[Tensor]:
    """Fit a head ``[C, E + 1]`` on standardised features for each width."""
    if like.kind != "regression":
        assert like.num_classes is not None
        return list(softmax_heads(z.numpy(), target.numpy(), like.num_classes, widths, tolerance))
    from sklearn.linear_model import Ridge

    return [ridge_head(Ridge(alpha=sd**-2).fit(z.numpy(), target.numpy())) for sd in widths]
