"""The tuner on made-up methods with known losses: it finds the best, in time, and never one that diverges."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pyro_lift import DivergedError, Task
from pyro_lift.tuning.early_stopping import with_held_out
from pyro_lift.tuning.held_out import dealt, has_unseen_rows
from pyro_lift.tuning.search import Candidate, Trial, Tuning, _Split, scored, search, trial_bar


class Guess(NamedTuple):
    """A posterior that gives the right class a fixed probability; every row's class is in its input."""

    p: float

    def predict(self, inputs: Any) -> Tensor:
        right = torch.nn.functional.one_hot(inputs.inputs[""].long().squeeze(-1), 2)
        return torch.where(right == 1, self.p, 1.0 - self.p)


class MadeUp:
    """A method whose probability of the right class grows with the length, towards what its settings allow."""

    made: list[tuple[str, float, int]] = []  # noqa: RUF012

    def __init__(self, candidate: Candidate, share: float, seconds: float = 0.0) -> None:
        self.candidate, self.share, self.seconds = candidate, share, seconds

    def meta_train(self, tasks: Sequence[Task]) -> float:
        time.sleep(self.seconds)
        MadeUp.made.append((self.candidate.name, self.share, len(tasks)))
        if self.candidate.meta.get("diverges"):
            raise DivergedError("the loss is nan", 0)
        return 0.5 + 0.4 * self.share

    def adapt(self, state: float, tasks: Sequence[Task]) -> list[Guess]:
        return [Guess(state * self.candidate.adapt["quality"]) for _ in tasks]


def tasks(number: int = 10) -> list[Task]:
    y = torch.arange(6) % 2
    return [Task(f"t{k}", (y.float().unsqueeze(-1), y), num_classes=2) for k in range(number)]


def candidates(*qualities: float) -> list[Candidate]:
    return [Candidate(f"q{q:g}", {"q": q}, {"quality": q}) for q in qualities]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    MadeUp.made = []


def test_the_best_is_found_and_each_rung_halves_the_candidates() -> None:
    told: list[Trial] = []
    qualities = (0.6, 0.7, 1.0, 0.5, 0.8, 0.9, 0.4, 0.3)
    tuning = search(candidates(*qualities), MadeUp, tasks(), seconds=60, on_trial=told.append)
    assert tuning.chosen == "q1" and tuning.adapt == {"quality": 1.0}
    assert [sum(t.rung == rung for t in told) for rung in range(3)] == [8, 4, 2]
    assert tuple(told) == tuning.trials
    shares = [next(t.share for t in told if t.rung == rung) for rung in range(3)]
    assert shares == sorted(shares) and shares[-1] <= 1.0
    assert tuning.measure == "nll" and tuning.temperature is not None and tuning.temperature < 1.0
    assert f"*{tuning.chosen}" in tuning.table()


def test_a_fifth_is_held_out_another_one_in_every_rung_and_never_learned_from() -> None:
    tuning = search(candidates(0.6, 0.7, 0.8, 0.9), MadeUp, tasks(10), seconds=60)
    assert {count for _, _, count in MadeUp.made} == {8}
    assert tuning.held_out == ("t1", "t6")  # the second rung's
    assert dealt(range(7), 3) == [[0, 3, 6], [1, 4], [2, 5]]


def test_a_candidate_that_diverges_is_never_chosen() -> None:
    bad = Candidate("bad", {"diverges": True}, {"quality": 1.0})
    tuning = search([bad, *candidates(0.5)], MadeUp, tasks(), seconds=60)
    assert tuning.chosen == "q0.5"
    assert any(math.isinf(trial.loss) for trial in tuning.trials if trial.settings == "bad")
    assert all(math.isfinite(trial["loss"]) for trial in tuning.to_dict()["trials"])


def test_among_equals_the_first_is_chosen() -> None:
    same = [Candidate(f"c{k}", {"k": k}, {"quality": 0.8}) for k in range(4)]
    assert search(same, MadeUp, tasks(), seconds=60).chosen == "c0"


def test_candidates_that_differ_in_adaptation_alone_share_a_meta_training() -> None:
    shared = [Candidate(f"a{q}", {"m": 1}, {"quality": q}) for q in (0.5, 0.9)]
    tuning = search(shared, MadeUp, tasks(), seconds=60)
    assert tuning.chosen == "a0.9"
    assert len(MadeUp.made) == 2  # one to time it, one in the only rung


def test_it_ends_in_time_and_says_what_there_was_no_time_for() -> None:
    def slow(candidate: Candidate, share: float) -> MadeUp:
        return MadeUp(candidate, share, seconds=0.05)

    start = time.monotonic()
    tuning = search(candidates(*[0.3 + 0.01 * k for k in range(64)]), slow, tasks(), seconds=0.6)
    assert time.monotonic() - start < 5.0
    assert tuning.notes and len(tuning.trials) < 64
    assert search(candidates(0.9, 0.8), slow, tasks(), seconds=1e-3).chosen == "q0.9"


@pytest.mark.parametrize(("budget", "tried"), [(25.0, 2), (60.0, 4), (90.0, 4), (500.0, 16), (1_500.0, 24)])
def test_a_budget_that_is_too_short_for_all_is_used_up_by_as_many_as_it_has_room_for(
    budget: float, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: a meta-training of the whole length takes 100 s, and nothing else takes any time."""
    now = [0.0]

    class Timed(MadeUp):
        def meta_train(self, tasks: Sequence[Task]) -> float:
            now[0] += 100.0 * self.share
            return super().meta_train(tasks)

    monkeypatch.setattr("pyro_lift.tuning.search.time.monotonic", lambda: now[0])
    tuning = search(candidates(*(0.5 + 0.01 * k for k in range(24))), Timed, tasks(), seconds=budget)
    assert sum(trial.rung == 0 for trial in tuning.trials) == tried
    assert 0.6 * budget <= now[0] <= 1.2 * budget


def test_without_a_time_the_ladder_is_climbed_to_the_whole_length_and_the_choice_is_no_matter_of_speed() -> None:
    tuning = search(candidates(0.6, 0.7, 1.0, 0.5, 0.8), MadeUp, tasks(), seconds=None)
    assert tuning.chosen == "q1" and tuning.notes == ()
    assert [(t.rung, t.share) for t in tuning.trials] == [(0, 0.25)] * 5 + [(1, 0.5)] * 3 + [(2, 1.0)] * 2
    assert len(MadeUp.made) == 10  # none to time it


def test_tasks_that_are_given_judge_every_rung_and_all_others_are_learned_from() -> None:
    given = [replace(task, name=f"dev-{task.name}") for task in tasks(2)]
    tuning = search(candidates(0.6, 0.7, 0.8), MadeUp, tasks(2), seconds=None, held_out=given)
    assert tuning.chosen == "q0.8" and tuning.held_out == ("dev-t0", "dev-t1")
    assert {count for _, _, count in MadeUp.made} == {2}


@pytest.mark.parametrize(("tie", "chosen"), [(0.0, "q0.7"), (0.3, "q0.555556")])
def test_among_candidates_within_the_tie_the_better_calibrated_is_chosen(tie: float, chosen: str) -> None:
    # At the whole length 0.9 times these: one half for each class, right half of the time, and 0.63, always right.
    tuning = search(candidates(0.7, 0.5 / 0.9), MadeUp, tasks(), seconds=None, tie=tie)
    assert tuning.chosen == chosen


def test_too_few_tasks_and_no_candidate_are_refused() -> None:
    with pytest.raises(ValueError, match="Give three or more"):
        search(candidates(0.5), MadeUp, tasks(2), seconds=1)
    with pytest.raises(ValueError, match="candidates is empty"):
        search([], MadeUp, tasks(), seconds=1)


def test_rows_of_other_parts_than_train_are_unseen() -> None:
    rows = (torch.zeros(2, 1), torch.zeros(2).long())
    assert not has_unseen_rows(Task("t", rows, num_classes=2))
    assert has_unseen_rows(Task("t", rows, num_classes=2, dev=rows))


def test_a_trial_that_failed_is_told_with_its_reason() -> None:
    trials = (Trial("good", 0, 0.5, 0.25, 1.0), Trial("bad", 0, 0.5, float("inf"), 1.0))
    lines = Tuning("good", {}, {}, trials, ("t",)).table().splitlines()
    assert lines[2].split() == ["0", "0.50", "failed", "bad"] and "inf" not in lines[2]
    assert lines[3].startswith("note: failed: the loss stopped being finite") and lines[3].endswith("(1 of 2)")
    assert len(Tuning("good", {}, {}, trials[:1], ("t",)).table().splitlines()) == 2


def test_no_bar_is_begun_over_tasks_that_are_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CI", "PYTEST_XDIST_WORKER"):  # which hide every bar
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match="refused"), trial_bar():
        raise ValueError("refused")
    assert "tune" not in capsys.readouterr().err


def test_tasks_of_one_row_are_learned_from_and_never_held_out(caplog: pytest.LogCaptureFixture) -> None:
    short = Task("short", (torch.ones(1, 4), torch.zeros(1).long()), num_classes=3)
    tasks = [Task(f"t{k}", (torch.ones(3, 4), torch.arange(3)), num_classes=3) for k in range(4)]
    split = _Split([tasks[0], short, *tasks[1:]])
    assert "task 'short' has one row" in caplog.text and "learned from, and not held out" in caplog.text
    held_out = [task.name for rung in range(5) for task in split.of(rung)[1]]
    assert "short" not in held_out and {"t0", "t1", "t2", "t3"} == set(held_out)
    assert all("short" in [task.name for task in split.of(rung)[0]] for rung in range(5))
    learned, looked = with_held_out([short, *tasks])
    assert "short" in [t.name for t in learned] and looked and all(t.test is not None for t in looked)
    with pytest.raises(ValueError, match="3 tasks, none with two rows"):
        _Split([replace_name(short, f"s{k}") for k in range(3)])


def replace_name(task: Task, name: str) -> Task:
    return Task(name, task.train, num_classes=task.num_classes)


class Counted(NamedTuple):
    """A posterior of LiFT's, that is: it knows how many rows of each class its task has."""

    class_counts: Tensor

    def predict(self, inputs: Any) -> Tensor:
        return torch.tensor([0.6, 0.4, 0.0]).expand(len(inputs), 3)


def test_a_temperature_is_fitted_with_the_rates_that_predictions_have() -> None:
    x, y = torch.zeros(30, 1), torch.tensor([0] * 28 + [1] * 2)
    task = Task("uneven", (x, y), num_classes=2, test=(x[:4], y[:4]))
    _, (found,) = scored(Counted(torch.tensor([28, 2])), task)  # type: ignore[arg-type]
    assert found.rates is not None and found.probabilities.shape == (4, 2)
    torch.testing.assert_close(found.rates, torch.tensor([29.0, 3.0]).double() / 32.0)
    _, (plain,) = scored(Guess(0.7), replace(task, test=Task("t", (y.float()[:, None], y)).train))
    assert plain.rates is None
