"""Heads of classes stand around a share of one head of all tasks, which four fifths of them are asked about."""

from __future__ import annotations

from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from pyro_lift import LiFT, RandomAdapter, Task
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.tuning.head_mean import asked_of_parts, head_mean, pooled_head, read_tasks
from pyro_lift.tuning.head_share import SHARES, best_share, with_share
from pyro_lift.tuning.usual_priors import Asked
from pyro_lift.tuning.whose_heads import RULES, run_config

CLASSES, WIDTH = 4, 12


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, WIDTH), nn.Tanh())
    return adapt_backbone(net, peft.LoraConfig(r=1, target_modules=["0"]), seed=0)


def tasks(number: int, rows: int, seed: int, own: float, common: float = 1.0) -> list[Task]:
    """Tasks whose maps of the inputs have a mean in common, and differ by ``own``."""
    shared, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    mean, found = common * torch.randn(6, CLASSES, generator=shared), []
    for k in range(number):
        x = torch.randn(rows, 6, generator=generator)
        logits = x @ (mean + own * torch.randn(6, CLASSES, generator=generator))
        y = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        found.append(Task(f"t{seed}-{k}", (x, y), num_classes=CLASSES))
    return found


def asked(scale: float) -> list[Asked]:
    """Tasks of one map, and a head that is so many times as sure as is right."""
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(CLASSES, WIDTH + 1, generator=generator)
    found = []
    for _ in range(6):
        x = torch.randn(200, WIDTH, generator=generator)
        y = torch.multinomial((x @ head[:, :-1].T + head[:, -1]).softmax(-1), 1, generator=generator).squeeze(-1)
        found.append(Asked(x, y, CLASSES, scale * head))
    return found


@pytest.mark.parametrize(("scale", "share"), [(1.0, 1.0), (2.0, 0.5), (4.0, 0.25)])
def test_a_head_that_is_too_sure_is_taken_by_as_much(scale: float, share: float) -> None:
    found, told = best_share(asked(scale))
    assert found == share and share in SHARES
    right, plain = best_share(asked(1.0))
    assert right == 1.0
    torch.testing.assert_close(told, plain)


def test_a_task_without_a_head_stays_so() -> None:
    (task,) = asked(1.0)[:1]
    assert with_share(task._replace(around=None), 0.5).around is None
    half = with_share(task, 0.5).around
    assert half is not None and task.around is not None and torch.equal(2.0 * half, task.around)


def test_tasks_that_differ_much_share_what_half_of_them_cannot_tell() -> None:
    made = tasks(16, 24, seed=1, own=1.6)
    then, now = head_mean(adapter(), made, share=False), head_mean(adapter(), made)
    assert then is not None and len(then.head.head) == 0
    assert now is not None and now.head.head.shape == (CLASSES, WIDTH + 1) and now.gain > 2.0 * now.error
    with torch.no_grad():
        of_parts = asked_of_parts(read_tasks(adapter(), made, adapter().initial), CLASSES)
        share, _ = best_share(of_parts.asked)
        whole = pooled_head(of_parts.reads, CLASSES).head
    assert share < 1.0 and torch.equal(now.head.head, share * whole)
    assert {len(names) for names, _ in now.halves} == {8}
    # Tasks of no common map have none.
    for seed in range(2, 5):
        apart = head_mean(adapter(), tasks(16, 24, seed=seed, own=1.6, common=0.0))
        assert apart is None or len(apart.head.head) == 0


def test_a_run_of_before_goes_on_around_all_of_it(tmp_path: Path) -> None:
    lift = LiFT(adapter(), sgd_steps=0, burn_in=2, samples=4, seed=0)
    made, found = tasks(16, 24, seed=1, own=1.6), []
    for name, rules in (("then", {k: v for k, v in RULES.items() if k != "share of the head"}), ("now", RULES)):
        session = Session(tmp_path / name, config=run_config(lift.settings, 0, lift.adapter, made, rules=rules))
        (prior,) = lift.meta_train_many(made, (1,), session=session, progress=False)
        assert prior.head_mean is not None
        found.append(len(prior.head_mean.head))
    assert found == [0, CLASSES]
