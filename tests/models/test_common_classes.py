"""Tasks whose rows lack some classes by chance have those of the others; what is declared stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from short_runs import SHORT
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task, compare
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.common_classes import classes_in_common, with_classes_of_prior, with_common_classes
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.whose_heads import RULES, run_config

CLASSES = 4
CONFIG = peft.LoraConfig(r=2, target_modules=["0", "2"])


def counted(name: str, *labels: int, num_classes: int | None = None) -> Task:
    return Task(name, (torch.zeros(len(labels), 2), torch.tensor(labels)), num_classes=num_classes)


FULL = [counted(name, 0, 1, 2, 2) for name in "abc"]


def classes(tasks: list[Task]) -> list[int | None]:
    return [task.num_classes for task in with_common_classes(tasks)]


def test_a_count_that_falls_short_by_chance_is_that_of_the_others(caplog: pytest.LogCaptureFixture) -> None:
    assert classes([*FULL, counted("d", 0, 1, 1, 0), counted("e", 0, 0)]) == [3] * 5
    said = caplog.messages[-1]
    assert said.startswith("'d', 'e': no row of the last of the 3 classes") and "num_classes=" in said
    caplog.clear()
    assert classes(FULL) == [3] * 3 and not caplog.messages


@pytest.mark.parametrize(
    "other",
    [
        lambda: counted("d", *[0, 1] * 20),  # (1/2)^40: these are its classes
        lambda: counted("d", 0, 1, num_classes=2),
        lambda: Task("d", (torch.zeros(2, 2), torch.tensor([0, 1])), labels=["yes", "no"]),
    ],
)
def test_classes_of_a_task_s_own_stay(other: Callable[[], Task]) -> None:
    assert classes([*FULL, other(), counted("e", 0, 0)]) == [3, 3, 3, 2, 1]


def test_where_few_tasks_have_the_most_all_stay() -> None:
    assert classes([FULL[0], *(counted(name, 0, 1, 0) for name in "defg")]) == [3, 2, 2, 2, 2]
    assert with_common_classes([]) == []
    value = Task("v", (torch.zeros(3, 2), torch.zeros(3)), "regression")
    assert with_common_classes([value, value]) == [value, value]


def test_new_tasks_have_the_classes_of_the_head_that_the_prior_s_share(caplog: pytest.LogCaptureFixture) -> None:
    new = [counted("few", 0, 1, 0), counted("one", *[0] * 50), counted("own", *[0, 1] * 30), counted("all", 0, 2)]
    assert [task.num_classes for task in with_classes_of_prior(new, 3, shared=True)] == [3, 3, 2, 3]
    taken, own = caplog.messages[-2:]
    assert taken.startswith("'few', 'one': no row of the last of the 3")
    assert own.startswith("'own': rows of fewer classes than the 3") and "say num_classes=3" in own
    assert "the head that these share is not used" in own
    with_classes_of_prior(new, 3, shared=False)
    assert "the others have no probability" in caplog.messages[-1]
    caplog.clear()
    said = [counted("said", 0, num_classes=2), Task("v", (torch.zeros(3, 2), torch.zeros(3)), "regression")]
    for some, count in ((said, 3), (new, 0)):
        assert with_classes_of_prior(some, count, shared=True) == some
    assert not caplog.messages


def test_classes_in_common_are_told_by_numbers_alone() -> None:
    value = Task("v", (torch.zeros(3, 2), torch.zeros(3)), "regression")
    named = Task("n", (torch.zeros(2, 2), torch.tensor([0, 2])), labels=["a", "b", "c"])
    assert classes_in_common(FULL) == 3
    assert classes_in_common([*FULL, counted("d", 0, 0)]) == 0
    for other in (value, named):
        assert classes_in_common([*FULL, other]) == 0


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(5, 12), torch.nn.Tanh(), torch.nn.Linear(12, 10), torch.nn.Tanh())


def rows(seed: int, n: int, most: int = CLASSES) -> tuple[Tensor, Tensor]:
    x = torch.randn(50 * n, 5, generator=torch.Generator().manual_seed(seed))
    y = 2 * (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    return x[y < most][:n], y[y < most][:n]


def tasks(num_classes: int | None = None) -> list[Task]:
    return [Task(f"t{k}", rows(k, 16, CLASSES - (k == 2)), num_classes=num_classes) for k in range(8)]


def test_learning_and_adapting_are_as_with_declared_classes() -> None:
    said = LiFT(network(), CONFIG, **SHORT).meta_train(tasks(CLASSES), progress=False)
    left = LiFT(network(), CONFIG, **SHORT).meta_train(tasks(), progress=False)
    assert left.head_mean is not None and left.head_mean.head.shape == (CLASSES, 11)
    torch.testing.assert_close(left.mixture.get().mean, said.mixture.get().mean, rtol=0.0, atol=0.0)
    x, y = rows(20, 3, 2)
    new, declared = Task("new", (x, y)), Task("new", (x, y), num_classes=CLASSES)
    assert new.num_classes == 2
    found = [each.predict(rows(21, 30)[0]) for each in (left.adapt(new, seed=0), *left.adapt_many([new], seed=0))]
    wanted = [
        each.predict(rows(21, 30)[0]) for each in (said.adapt(declared, seed=0), *said.adapt_many([declared], seed=0))
    ]
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == (30, CLASSES)
        torch.testing.assert_close(one, other, rtol=0.0, atol=0.0)


def own(k: int) -> Task:
    """Make a task whose classes are its own: their numbers say nothing."""
    x, y = rows(k, 24)
    return Task(f"t{k}", (x, torch.randperm(CLASSES, generator=torch.Generator().manual_seed(k))[y]))


def test_a_count_is_kept_where_heads_are_each_task_s_own(tmp_path: Path) -> None:
    prior = LiFT(network(), CONFIG, **SHORT).meta_train([own(k) for k in range(8)], progress=False)
    assert prior.head_mean is not None and len(prior.head_mean.head) == 0
    assert prior.common_classes == CLASSES
    folder = prior.save_pretrained(tmp_path / "prior")
    x, _ = rows(20, 3)
    new = [Task("ones", (x, torch.tensor([0, 0, 0]))), Task("few", (x, torch.tensor([0, 1, 0])))]
    for one in (prior, LiFTPrior.from_pretrained(folder, network())):
        assert [each.predict(x).shape[-1] for each in one.adapt_many(new, seed=0)] == [CLASSES, CLASSES]


def test_a_prior_saved_before_has_the_classes_of_its_head(tmp_path: Path) -> None:
    folder = LiFT(network(), CONFIG, **SHORT).meta_train(tasks(CLASSES), progress=False).save_pretrained(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    assert config.pop("common_classes") == CLASSES
    path.write_text(json.dumps(sealed(config)))
    before = LiFTPrior.from_pretrained(folder, network())
    x, y = rows(20, 3, 2)
    assert before.common_classes is None and before.adapt(Task("new", (x, y))).predict(x).shape == (3, CLASSES)
    path.write_text(json.dumps(sealed({**config, "common_classes": -1})))
    with pytest.raises(DamagedError, match="key 'common_classes' is -1"):
        LiFTPrior.from_pretrained(folder, network())


def test_a_run_of_before_goes_on_with_the_classes_that_it_counted(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "counted classes"}
    shared = []
    for rules in (then, RULES):
        lift = LiFT(network(), CONFIG, **SHORT)
        config = run_config(lift.settings, lift.seed, lift.adapter, tasks(), rules=rules)
        session = Session(tmp_path / str(len(rules)), config=config)
        (prior,) = lift.meta_train_many(tasks(), [1], progress=False, session=session)
        assert prior.head_mean is not None
        shared.append(len(prior.head_mean.head))
    assert shared == [0, CLASSES]


def test_all_methods_are_compared_on_the_same_classes(caplog: pytest.LogCaptureFixture) -> None:
    given = [replace(task, test=task.train) for task in tasks()]
    found = compare(given, network(), CONFIG, budget="5 min", methods=["linear-probe", "pooled-probe"])
    assert {record["task"] for record in found.records} == {task.name for task in given}
    assert any("'t2': no row of the last of the 4 classes" in message for message in caplog.messages)
