"""The pooled probe: scikit-learn on the rows of all tasks, where they share their classes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.preprocessing import StandardScaler
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor

from pyro_lift.inference.baselines import pooled_probe
from pyro_lift.inference.baselines.linear_probe import reader_of
from pyro_lift.inference.baselines.pooled_probe import PooledProbe, why_not_pooled
from pyro_lift.models.features import all_features
from pyro_lift.models.heads import HeadModel, solve_head, standard_widths
from pyro_lift.models.task import Task


def features_of(task: Task) -> Tensor:
    adapter = tiny_adapter()
    heads = SMALL.heads.fitted(adapter, [task])
    return all_features(adapter, task.train, adapter.initial, reader_of(task, heads))


def test_it_is_the_solved_head_of_all_rows_the_new_tasks_among_them() -> None:
    *tasks, new = tiny_tasks(6)
    method = PooledProbe(tiny_adapter(), SMALL)
    state = method.meta_train(tasks)
    x = torch.cat([features_of(task) for task in (*tasks, new)])
    y = torch.cat([task.train.target for task in (*tasks, new)])
    expected = solve_head(x, y, HeadModel(3), prior_sd=state.prior_sd).head
    assert new.test is not None
    found = method.adapt(state, new)
    inputs = all_features(tiny_adapter(), new.test, state.theta, found.reader)
    logits = inputs @ expected[:, :-1].T + expected[:, -1]
    torch.testing.assert_close(found.predict(new.test), logits.softmax(-1), rtol=0, atol=1e-4)


def test_its_strength_is_the_one_that_predicts_tasks_left_out_best(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = tiny_tasks(7)
    sd = PooledProbe(tiny_adapter(), SMALL).meta_train(tasks).prior_sd
    tried = standard_widths(features_of(tasks[0]).shape[-1])
    losses = []
    for width in tried:
        loss = 0.0
        for k in range(pooled_probe.FOLDS):
            kept = [task for place, task in enumerate(tasks) if place % pooled_probe.FOLDS != k]
            x, y = torch.cat([features_of(task) for task in kept]), torch.cat([task.train.target for task in kept])
            head = solve_head(x, y, HeadModel(3), prior_sd=width).head
            for task in tasks[k :: pooled_probe.FOLDS]:
                logits = features_of(task) @ head[:, :-1].T + head[:, -1]
                loss -= float(logits.log_softmax(-1).gather(-1, task.train.target[:, None]).sum())
        losses.append(loss)
    assert sd == tried[losses.index(min(losses))]


def test_regression_is_ridge_over_all_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(4, generator=generator, dtype=torch.float64)
    tasks = []
    for k in range(5):
        x = torch.randn(9, 4, generator=generator, dtype=torch.float64)
        tasks.append(Task(f"r{k}", (x, x @ slope + 0.1 * k), "regression"))
    method = PooledProbe(tiny_adapter(1), SMALL)
    state = method.meta_train(tasks[:4])
    posterior = method.adapt(state, tasks[4])
    read = [all_features(tiny_adapter(1), task.train, state.theta, posterior.reader) for task in tasks]
    scaler = StandardScaler().fit(torch.cat(read).numpy())
    known = torch.cat([task.train.target for task in tasks]).numpy()
    model = Ridge(alpha=state.prior_sd**-2).fit(scaler.transform(torch.cat(read).numpy()), known)
    expected = torch.from_numpy(model.predict(scaler.transform(read[4].numpy())))
    torch.testing.assert_close(posterior.predict(tasks[4].train), expected, rtol=0, atol=1e-8)


def test_tasks_that_do_not_share_their_classes_are_refused_by_name() -> None:
    tasks = tiny_tasks(3)
    assert why_not_pooled(tasks) is None
    named = replace(tasks[1], labels=("a", "b", "c"))
    assert why_not_pooled([tasks[0], named]) == "tasks 't0' and 't1' have not the same classes"
    method = PooledProbe(tiny_adapter(), SMALL)
    with pytest.raises(ValueError, match=r"have not the same classes: one regression .* Leave pooled-probe out\."):
        method.meta_train([tasks[0], named])
    state = method.meta_train(tasks)
    with pytest.raises(ValueError, match="'t0' and 't1' have not"):
        method.adapt(state, named)
    with pytest.raises(ValueError, match="tasks is empty"):
        method.meta_train([])


def test_of_many_rows_each_task_keeps_as_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooled_probe, "MOST_ROWS", 30)
    monkeypatch.setattr(pooled_probe, "CHOICE_ROWS", 10)
    state = PooledProbe(tiny_adapter(), SMALL).meta_train(tiny_tasks(5))
    assert len(state.features) == len(state.target) == 30
