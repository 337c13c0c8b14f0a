"""Classes that share no head have one where rows are few, if that helps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, RandomAdapter, Task
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.class_head import are_alike
from pyro_lift.models.few_classes import FewClasses
from pyro_lift.models.heads import UsualPrior
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.whose_heads import RULES, run_config

CLASSES = 3


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 32), nn.Tanh(), nn.Linear(32, 16), nn.Tanh())
    return adapt_backbone(net, peft.LoraConfig(r=1, target_modules=["0"]), seed=0)


def tasks(number: int, rows: int, seed: int, common: float = 1.0, names: tuple[str, ...] = ()) -> list[Task]:
    """Tasks whose maps have a mean in common and differ as much; their test rows are others."""
    shared, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    inner = 0.6 * torch.randn(6, 8, generator=shared)
    mean, found = common * 3.0 * torch.randn(8, CLASSES, generator=shared), []
    for k in range(number):
        x = torch.randn(rows + 100, 6, generator=generator)
        logits = torch.tanh(x @ inner) @ (mean + 3.0 * torch.randn(8, CLASSES, generator=generator))
        y = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        options: dict[str, Any] = {"labels": list(names)} if names else {"num_classes": CLASSES}
        found.append(Task(f"t{k}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), **options))
    return found


SHORT: dict[str, Any] = {"sgd_steps": 0, "burn_in": 2, "samples": 4, "seed": 0}


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(adapter(), **SHORT).meta_train(tasks(24, 60, seed=1), progress=False)


def losses(prior: LiFTPrior, new: list[Task]) -> Tensor:
    posteriors = prior.adapt_many(new, seed=0, progress=False)
    pairs = zip(posteriors, new, strict=True)
    return torch.tensor([float(nll(one.predict(task.test), task.test.target)) for one, task in pairs])  # type: ignore[union-attr]


def without(prior: LiFTPrior) -> LiFTPrior:
    assert prior.head_mean is not None
    names = ("adapter", "mixture", "settings", "adapt_settings", "second_moment", "rows")
    parts = {name: getattr(prior, name) for name in names}
    return LiFTPrior(**parts, head_mean=prior.head_mean._replace(few_classes=None))


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_new_tasks_of_few_rows_are_predicted_better(prior: LiFTPrior, rows: int) -> None:
    assert prior.head_mean is not None and prior.head_mean.few_classes is not None
    assert len(prior.head_mean.head) == 0  # of sixty rows a head of all tasks is no help
    new = tasks(24, rows, seed=2)
    gain = losses(without(prior), new) - losses(prior, new)
    assert gain.mean() > 2.0 * gain.std() / len(gain) ** 0.5


def test_a_task_of_more_rows_is_as_it_was(prior: LiFTPrior) -> None:
    assert prior.head_mean is not None and prior.head_mean.few_classes is not None
    new = tasks(2, prior.head_mean.few_classes.most + 1, seed=3)
    assert torch.equal(losses(prior, new), losses(without(prior), new))


def test_unrelated_tasks_and_tasks_of_one_map_have_none() -> None:
    apart = LiFT(adapter(), **SHORT).meta_train(tasks(24, 60, seed=1, common=0.0), progress=False)
    assert apart.head_mean is not None and apart.head_mean.few_classes is None
    alike = LiFT(adapter(), **SHORT).meta_train(tasks(24, 60, seed=1, common=4.0), progress=False)
    assert alike.head_mean is not None and alike.head_mean.few_classes is None  # their head is for any number of rows
    assert len(alike.head_mean.head) == CLASSES


def test_a_task_that_is_unlike_the_others_goes_by_its_own_rows(prior: LiFTPrior) -> None:
    assert prior.head_mean is not None and prior.head_mean.few_classes is not None
    (task,) = tasks(1, prior.head_mean.few_classes.most, seed=4)
    near = prior.head_mean.few_classes.of(task)
    assert near is not None
    far = prior.head_mean._replace(few_classes=prior.head_mean.few_classes._replace(head=-50.0 * near))
    theta = prior.mixture.get().mean
    around = [
        SolvedHeads(prior.adapter, [task], theta, mean=one).choice(0).model.around for one in (prior.head_mean, far)
    ]
    assert around[0] is near and around[1] is None


def test_classes_go_by_their_names() -> None:
    head = torch.arange(6.0).reshape(3, 2)
    few = FewClasses(head, ("a", "b", "c"), ((1, UsualPrior(1.0, 1.0)), (4, UsualPrior(4.0, 1.0))))
    x = torch.zeros(2, 1)
    named = Task("named", (x, ["c", "a"]), labels=["c", "a"])
    found = few.of(named)
    assert found is not None and torch.equal(found, head[[2, 0]])
    assert few.of(Task("other", (x, ["d", "a"]), labels=["d", "a"])) is None
    assert few.of(Task("many", (x.repeat(3, 1), torch.arange(6) % 3), num_classes=3)) is None
    assert few.usual_of(2).width == pytest.approx(2.0) and few.most == 4


def test_a_head_that_is_another_is_told_apart(prior: LiFTPrior) -> None:
    mean = prior.head_mean
    assert mean is not None and mean.few_classes is not None
    few = mean.few_classes
    rounded = mean._replace(few_classes=few._replace(head=few.head + 1e-6))
    other = mean._replace(few_classes=few._replace(head=2.0 * few.head))
    assert are_alike(mean, rounded) and not are_alike(mean, other)


def test_it_is_saved(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    read, new = LiFTPrior.from_pretrained(tmp_path, adapter()), tasks(3, 2, seed=5)
    assert torch.equal(losses(read, new), losses(prior, new))
    assert are_alike(read.head_mean, prior.head_mean) and not are_alike(read.head_mean, without(prior).head_mean)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    broken: list[tuple[str, Any]] = [("classes", []), ("classes", 3), ("labels", ["a"]), ("labels", 3)]
    for key, value in broken:
        changed = {**config, f"head_few_{key}": value}
        (tmp_path / "config.json").write_text(json.dumps(sealed(changed)))
        with pytest.raises(DamagedError, match="head_few"):
            LiFTPrior.from_pretrained(tmp_path, adapter())


def test_a_run_of_before_goes_on_without(tmp_path: Path) -> None:
    lift, made = LiFT(adapter(), **SHORT), tasks(24, 60, seed=1)
    found = []
    for name, rules in (("then", {k: v for k, v in RULES.items() if k != "head of few rows"}), ("now", RULES)):
        config = run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        session = Session(tmp_path / name, config=config)
        (prior,) = lift.meta_train_many(made, (1,), session=session, progress=False)
        assert prior.head_mean is not None
        found.append(prior.head_mean.few_classes is not None)
    assert found == [False, True]


def test_names_in_an_order_of_each_task_s_own_share_it_too() -> None:
    names = ("one", "two", "three")
    lift = LiFT(adapter(), **SHORT)
    named = lift.meta_train(tasks(24, 60, seed=1, names=names), progress=False)
    assert named.head_mean is not None and named.head_mean.few_classes is not None
    (task,) = tasks(1, 2, seed=6, names=names)
    order = [2, 0, 1]
    turned = Task(
        "turned",
        (task.train.inputs[""], [names[int(y)] for y in task.train.target]),
        labels=[names[k] for k in order],
    )
    one, other = (named.adapt(each, seed=0).predict(task.test) for each in (task, turned))
    assert task.test is not None
    torch.testing.assert_close(one[:, order], other, rtol=0.0, atol=0.05)
