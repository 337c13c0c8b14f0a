"""Regressions: scikit-learn's diabetes data cut into tasks by a group that is in the data.

442 patients, ten measurements, and the progress of the disease a year later. A task is the patients of one sex and one
range of age. Sex and age stay among the inputs: within a task they hardly vary. Nothing is downloaded. Inputs are
standardised by scikit-learn; the target is standardised here by all patients' mean and standard deviation, which says
nothing of any task. linnerud has 20 rows in all, too few to cut; the California houses do not come with scikit-learn.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from pyro_lift.data.collection import TaskCollection
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice, check_number

__all__ = ["REGRESSION_SPLITS", "load_regressions", "regression_network"]

REGRESSION_SPLITS = ("diabetes",)
FEATURES, HIDDEN = 10, 32
#: Training of the network on the tasks to learn from: steps and rate of Adam.
STEPS, RATE = 80, 5e-3


def load_regressions(
    split: str = "diabetes", root: str | Path | None = None, *, seed: int = 0, ages: int = 8, train_rows: int = 10
) -> TaskCollection[Task]:
    """Cut the patients into ``2 * ages`` tasks, shuffled by the seed: a quarter is judged, two tasks are chosen on.

    Args:
        split: ``"diabetes"``.
        root: not used; it comes with scikit-learn.
        seed: of the order of tasks and of each task's rows.
        ages: ranges of age, of as many patients each.
        train_rows: patients of a task to learn from; the rest are to be judged by.

    Raises:
        ValueError: an unknown split; so many ranges that a task has too few patients.
    """
    del root
    check_choice("split", split, REGRESSION_SPLITS)
    for name, value in (("ages", ages), ("train_rows", train_rows)):
        check_number(name, value, least=1, open_below=False, whole=True)
    from sklearn.datasets import load_diabetes

    data = load_diabetes()
    x, y = torch.tensor(data.data, dtype=torch.float32), torch.tensor(data.target, dtype=torch.float32)
    x, y = x / x.std(0), (y - y.mean()) / y.std()
    names = list(data.feature_names)
    age, sex = x[:, names.index("age")].contiguous(), x[:, names.index("sex")] > 0
    edges = torch.quantile(age, torch.linspace(0, 1, ages + 1)[1:-1])
    group = torch.bucketize(age, edges) + ages * sex.long()
    generator = torch.Generator().manual_seed(seed)
    tasks = []
    for k in torch.randperm(2 * ages, generator=generator).tolist():
        rows = (group == k).nonzero().flatten()
        if len(rows) <= train_rows:
            raise ValueError(f"{len(rows)} patients in a task, {train_rows} of them to learn from: give fewer ages.")
        rows = rows[torch.randperm(len(rows), generator=generator)]
        kept, left = rows[:train_rows], rows[train_rows:]
        name = f"sex{1 + (k >= ages)}-age{k % ages + 1}"  # the data do not say which sex is which
        tasks.append(Task(name, (x[kept], y[kept]), "regression", test=(x[left], y[left])))
    judged, dev = max(len(tasks) // 4, 1), min(2, len(tasks) - 2)
    return TaskCollection(
        f"regressions, {split}",
        tuple(tasks[judged + dev :]),
        tuple(tasks[judged : judged + dev]),
        tuple(tasks[:judged]),
    )


def regression_network(tasks: tuple[Task, ...], seed: int) -> nn.Module:
    """Train a small network on the rows of all tasks to learn from together, as the backbone of the family.

    Args:
        tasks: to learn from.
        seed: of its start; the caller's random streams are left alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1)
        )
    x = torch.cat([task.train.positional[0] for task in tasks])
    y = torch.cat([task.train.target for task in tasks])
    optimiser = torch.optim.Adam(network.parameters(), RATE, weight_decay=1e-2)
    with torch.enable_grad():
        for _ in range(STEPS):
            loss = (network(x).squeeze(-1) - y).square().mean()
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return network.eval()
