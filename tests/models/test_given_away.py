"""Answers that are given away: test rows among training rows, and tasks that stand twice, are told; chance is not."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch

from pyro_lift import LiFT, Task
from pyro_lift.models.given_away import are_in_both, warn_of_what_is_given_away
from pyro_lift.models.rows import Rows


def task(name: str, rows: int = 30, *, seed: int = 0) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2 * rows, 3, generator=generator)
    y = (x[:, 0] > 0).long()
    return Task(name, (x[:rows], y[:rows]), num_classes=2, test=(x[rows:], y[rows:]))


def rows_of(x: torch.Tensor) -> Rows:
    return Rows({"": x}, torch.zeros(len(x), dtype=torch.long))


def test_training_rows_among_the_test_rows_are_told_by_task_and_part(caplog: pytest.LogCaptureFixture) -> None:
    apart, same, whole = task("apart"), task("same", seed=1), task("whole", seed=2)
    assert whole.test is not None
    both = Rows(
        {"": torch.cat([whole.train.positional[0], whole.test.positional[0]])},
        torch.cat([whole.train.target, whole.test.target]),
    )
    warn_of_what_is_given_away([apart, replace(same, test=same.train), replace(whole, dev=both)])
    test, dev = caplog.messages
    assert test.startswith("test rows of 'same' are training rows too") and "test=" in test
    assert dev.startswith("dev rows of 'whole' are training rows too") and "dev=" in dev


def test_other_targets_or_a_few_rows_that_meet_are_not_told(caplog: pytest.LogCaptureFixture) -> None:
    other = task("other")
    turned = replace(other.train, target=1 - other.train.target)
    assert not are_in_both(other.train, turned) and not are_in_both(other.train, None)
    assert other.test is not None
    two = Rows({"": torch.cat([other.train.positional[0][:2], other.test.positional[0]])},
               torch.cat([other.train.target[:2], other.test.target]))  # fmt: skip
    assert not are_in_both(other.train, two)
    warn_of_what_is_given_away([other, task("another", seed=1)])
    assert not caplog.messages


WORLDS = [(2, 20, 100), (32, 10, 100), (64, 20, 100), (81, 15, 100), (128, 40, 100), (30, 200, 200), (64, 10, 10)]


@pytest.mark.parametrize(("values", "train", "test"), [*WORLDS, (3000, 200, 200)])
def test_rows_of_a_small_world_meet_by_themselves(values: int, train: int, test: int) -> None:
    generator = torch.Generator().manual_seed(values)
    draws = 200
    told = sum(
        are_in_both(*(rows_of(torch.randint(values, (n, 1), generator=generator).float()) for n in (train, test)))
        for _ in range(draws)
    )
    assert told <= 0.05 * draws


def test_two_measured_rows_that_are_both_training_rows_are_told_and_two_counted_ones_not() -> None:
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(1))
    assert are_in_both(rows_of(x), rows_of(x[:2])) and not are_in_both(rows_of(x), rows_of(x[:1]))
    assert not are_in_both(rows_of(x.round()), rows_of(x[:2].round()))


def test_large_inputs_are_compared_by_some_of_their_numbers() -> None:
    x = torch.randn(8, 3, 64, 64)
    assert are_in_both(rows_of(x), rows_of(x.flip(0)))
    assert not are_in_both(rows_of(x), rows_of(torch.randn(8, 3, 64, 64)))


def test_a_task_that_stands_twice_is_told_in_whatever_order_and_a_row_short(caplog: pytest.LogCaptureFixture) -> None:
    one, two = task("one"), task("two", seed=1)
    turned = replace(one, name="turned", train=one.train.take(torch.arange(len(one.train)).flip(0)))
    short = replace(two, name="short", train=two.train.take(slice(0, len(two.train) - 1)))
    double = replace(one, name="double", train=Rows({"": one.train.positional[0].double()}, one.train.target.int()))
    warn_of_what_is_given_away([one, two, turned, short, double])
    (message,) = caplog.messages
    assert message.startswith("training rows of 'turned (as one)', 'short (as two)', 'double (as one)' stand twice")


def test_the_same_inputs_under_other_questions_are_other_tasks(caplog: pytest.LogCaptureFixture) -> None:
    one = task("one")
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(2, (len(one.train),), generator=generator)
    other = replace(one, name="other", train=replace(one.train, target=labels))
    small = [
        Task(f"s{k}", (torch.randint(4, (30, 1), generator=generator).float(), torch.arange(30) % 2), num_classes=2)
        for k in range(4)
    ]
    warn_of_what_is_given_away([one, other, *small])
    assert not caplog.messages


def test_rows_that_stand_more_than_once_are_told_where_they_do_not_meet_by_themselves(
    caplog: pytest.LogCaptureFixture,
) -> None:
    once = task("once", 8)
    copied = replace(once, name="copied", train=once.train.take(torch.arange(8).repeat(2)))
    labels_differ = replace(copied, name="by hand", train=replace_target(copied.train))
    one_of_nine = replace(once, name="one", train=once.train.take(torch.tensor([*range(8), 0])))
    warn_of_what_is_given_away([once])
    warn_of_what_is_given_away([labels_differ])
    assert not caplog.messages
    warn_of_what_is_given_away([copied])
    (said,) = caplog.messages
    assert said.startswith("training rows of 'copied' stand more than once") and "Keep each row once" in said
    caplog.clear()
    counted = Rows({"": torch.tensor([[0.0, 1.0], [1.0, 0.0]]).repeat(8, 1)}, torch.zeros(16, dtype=torch.long))
    warn_of_what_is_given_away([Task("counted", counted, num_classes=2)])
    assert not caplog.messages  # such rows meet by themselves
    warn_of_what_is_given_away([one_of_nine])
    assert len(caplog.messages) == 1


def replace_target(rows: Rows) -> Rows:
    """The second half of the rows has the other label: the same inputs, judged by two people."""
    half = len(rows) // 2
    return Rows(rows.inputs, torch.cat([rows.target[:half], 1 - rows.target[half:]]))


@pytest.mark.parametrize(("length", "told"), [(20, True), (6, False)])
def test_long_texts_that_stand_twice_are_told_and_short_ones_are_not(
    length: int, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    ids = torch.randint(5, 50, (6, length), generator=torch.Generator().manual_seed(0)).repeat(2, 1)
    rows = Rows({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, torch.tensor([0, 1]).repeat(6))
    warn_of_what_is_given_away([Task("texts", rows, num_classes=2)])
    assert bool(caplog.messages) is told


def test_meta_training_and_calibration_say_it(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [task(f"t{k}", 8, seed=k) for k in range(3)]
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
    lift = LiFT(network, peft.LoraConfig(r=1, target_modules=["0", "2"]), sgd_steps=2, burn_in=2, samples=4, seed=0)
    prior = lift.meta_train(tasks, progress=False)
    assert "training rows too" not in caplog.text
    seen = [replace(tasks[0], test=tasks[0].train), *tasks[1:]]
    lift.meta_train(seen, progress=False)
    assert "test rows of 't0' are training rows too" in caplog.text
    caplog.clear()
    new = replace(seen[0], name="new")
    prior.calibrate([new], steps=4, draws=2)
    assert "test rows of 'new' are training rows too" in caplog.text
    caplog.clear()
    prior.adapt(replace(new, test=None, train=new.train.take(torch.arange(8).repeat(2))), steps=4, draws=2)
    assert "training rows of 'new' stand more than once" in caplog.text
