"""Class names at shared outputs: one name, one output, in meta-training and of a new task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.models.class_names import class_numbers_by_name

NAMES = ("no", "yes", "maybe")
LENGTHS: dict[str, Any] = {"sgd_steps": 4, "burn_in": 2, "samples": 4, "seed": 0}


def network(outputs: int = 3) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, outputs))


def task(name: str, labels: tuple[str, ...] | None) -> Task:
    classes = 3 if labels is None else len(labels)
    generator = torch.Generator().manual_seed(len(name))
    return Task(name, (torch.randn(9, 4, generator=generator), torch.arange(9) % classes), labels=labels)


def lift(net: torch.nn.Module, **options: Any) -> LiFT:
    return LiFT(net, peft.LoraConfig(r=1, target_modules=["0", "2"]), **{**LENGTHS, **options})


def test_names_are_collected_over_tasks_that_name_some_or_none() -> None:
    assert class_numbers_by_name([task("a", NAMES), task("bb", NAMES[:2]), task("ccc", None)]) == {
        "no": 0,
        "yes": 1,
        "maybe": 2,
    }


def test_tasks_that_number_a_class_differently_are_not_learned_from() -> None:
    tasks = [task("a", NAMES), task("bb", NAMES), task("turned", ("yes", "maybe", "no"))]
    with pytest.raises(ValueError, match=r"'yes' is number 0 in task 'turned' .* 1 in task 'a' .*head_scale=1.0"):
        lift(network()).meta_train(tasks, progress=False)
    # A head of each task's own knows its own order.
    prior = lift(network(), head_scale=1.0).meta_train(tasks, progress=False)
    assert prior.classes == {} and prior.adapt(tasks[2], steps=4, draws=2).thetas.isfinite().all()


@pytest.mark.parametrize("labels", [("yes", "maybe", "no"), ("no", "maybe")])
def test_a_new_task_that_numbers_a_class_differently_is_refused_by_a_saved_prior_too(
    labels: tuple[str, ...], tmp_path: Path
) -> None:
    prior = lift(network()).meta_train([task("a", NAMES), task("bb", NAMES[:2])], progress=False)
    again = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), network())
    assert again.classes == prior.classes == prior.merge(prior).classes == dict(zip(NAMES, range(3), strict=True))
    for each in (prior, again):
        with pytest.raises(ValueError, match=r"task 'new' .*labels=\['no', 'yes', 'maybe'\]"):
            each.adapt(task("new", labels))
        with pytest.raises(ValueError, match="task 'new'"):
            each.adapt_many([task("fine", NAMES), task("new", labels)])
    assert (
        len(again.adapt_many([task("fine", NAMES), task("other", ("left", "right", "ahead"))], steps=4, draws=2)) == 2
    )


def test_the_way_out_names_one_class_an_output() -> None:
    several = [task("a", NAMES), task("bb", ("red", "green", "blue"))]
    prior = lift(network()).meta_train(several, progress=False)
    with pytest.raises(ValueError, match=r"labels=\['no', 'yes', 'maybe'\], and targets"):
        prior.adapt(task("new", ("maybe", "no", "yes")))
    with pytest.raises(ValueError, match=r"labels=\['red', 'green', 'blue'\], and targets"):
        prior.adapt(task("new", ("blue", "red", "green")))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([("x", "y")], r"task is a tuple; expected a Task"),
        ([task("a", None), {"inputs": 1}], r"tasks\[1\] is a dict; expected a Task"),
        (task("alone", None), r"the one task 'alone'; expected a list"),
        ([[task("a", None)]], r"a list of tasks; expected one Task"),
    ],
)
def test_what_is_no_list_of_tasks_is_named(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        lift(network()).meta_train(given, progress=False)
    prior = lift(network()).meta_train([task("a", None), task("bb", None)], progress=False)
    with pytest.raises(TypeError, match=message):
        prior.adapt_many(given)


@pytest.mark.parametrize("seed", ["7", 1.5, True])
def test_a_seed_that_is_no_whole_number_is_refused(seed: Any) -> None:
    with pytest.raises(TypeError, match="expected a whole number"):
        lift(network(), seed=seed)


def test_an_output_of_two_names_is_warned_of_and_new_tasks_of_other_classes_are_too(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prior = lift(network()).meta_train([task("a", NAMES), task("bb", NAMES[:2])], progress=False)
    prior.adapt(task("like", (*NAMES[:2], "perhaps")), steps=4, draws=2)
    assert not any("classes" in words and "outputs" in words for words in caplog.messages)
    prior.adapt(task("others", ("red", "blue")), steps=4, draws=2)
    assert any("task 'others': its classes (red, blue) are none of those" in words for words in caplog.messages)
    class_numbers_by_name([task("a", NAMES), task("bb", ("red", "blue"))])
    assert "output 0 is class 'no' in task 'a' and 'red' in task 'bb'" in caplog.messages[-1]
