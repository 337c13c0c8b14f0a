"""The prior of heads by the number of rows: the scores it is chosen by, which one a task has, what it is worth."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.head_problem import BIAS_SD, HeadModel, apply_head
from pyro_lift.models.heads import BIAS_SDS, LOGIT_WIDTHS, UsualPrior, choose_prior_sd, solve_head
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.support.archive import DamagedError, sealed
from pyro_lift.tuning.cross_fit import CrossFit, Judge, cross_fit
from pyro_lift.tuning.usual_priors import Asked, _left_out, few_rows, scores_of
from pyro_lift.tuning.whose_heads import RULES, run_config

WIDTH, CLASSES, ROWS = 16, 4, 20
SHORT: dict[str, Any] = {"sgd_steps": 0, "burn_in": 2, "samples": 6, "seed": 0}


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.ReLU(), torch.nn.Linear(32, WIDTH))
    return adapt_backbone(network, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def tasks(number: int, rows: int = ROWS, *, seed: int = 1, without: int | None = None) -> list[Task]:
    """Four clusters numbered in an order of the task's own, of which one may have no row to adapt to."""
    generator = torch.Generator().manual_seed(seed)
    centres = 1.5 * torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(0))
    made = []
    for k in range(number):
        kind = torch.randint(CLASSES, (rows + 300,), generator=generator)
        x = centres[kind] + torch.randn(len(kind), 6, generator=generator)
        y = torch.randperm(CLASSES, generator=generator)[kind]
        test, near = slice(rows + 100, None), torch.arange(rows + 100)
        near = near[y[: rows + 100] != (CLASSES if without is None else without)][:rows]
        made.append(Task(f"t{seed}-{k}", (x[near], y[near]), test=(x[test], y[test]), num_classes=CLASSES))
    return made


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(adapter(), **SHORT).meta_train(tasks(12), progress=False)


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("features", [5, 30])
def test_scores_are_those_of_heads_solved_one_by_one(around: bool, features: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(15, features, generator=generator) * torch.arange(1, features + 1) + 2.0
    y = torch.randint(3, (15,), generator=generator)
    head = torch.randn(3, features + 1, generator=generator).double() if around else None
    kept = torch.zeros(2, 15)
    kept[0, [0, 4, 5]], kept[1, [1, 2, 9, 14]] = 1.0, 1.0
    told = _left_out(x, y, 3, head, kept)
    for b, w in ((0, 0), (3, 6), (1, 4)):
        model, expected = HeadModel(3, bias_sd=BIAS_SDS[b], around=head), 0.0
        for rows in kept.bool():
            solved = solve_head(x[rows], y[rows], model, prior_sd=LOGIT_WIDTHS[w] / math.sqrt(features)).head
            log_p = apply_head(x[~rows].double(), solved.double()).log_softmax(-1)
            expected += float(log_p.gather(-1, y[~rows].unsqueeze(-1)).sum())
        assert float(told[b, w]) == pytest.approx(expected / float((1 - kept).sum()), abs=1e-4)


def test_left_out_rows_are_all_rows_once_and_do_not_follow_their_classes() -> None:
    x, y = torch.zeros(30, 2), (torch.arange(30) >= 24).long()  # features say nothing: only biases are chosen
    drawn, by_class = (scores_of(Asked(x, y, 2), drawn=drawn) for drawn in (True, False))
    assert drawn[-1].mean() < by_class[-1].mean()  # four left-out rows in five are of class 0 only in the mean


def test_no_row_says_nothing_and_one_row_says_what_the_head_of_all_says() -> None:
    alone = Asked(torch.randn(1, 3), torch.tensor([1]), 2)
    assert bool((scores_of(alone) == -math.log(2)).all())
    assert few_rows([alone] * 8) == ()
    few = few_rows([Asked(torch.randn(9, 3), torch.arange(9) % 2, 2)] * 4)
    assert [rows for rows, _ in few] == [1, 2, 4]
    assert few_rows([Asked(torch.randn(9, 3), torch.arange(9) % 2, 2)] * 3) == ()  # too few tasks to say it


@pytest.mark.parametrize(("rows", "width"), [(1, 0.1), (2, 0.4), (8, 1.6), (20, 2.0), (500, 2.0)])
def test_a_head_has_the_prior_of_its_rows_and_between_two_numbers_one_between(rows: int, width: float) -> None:
    few = ((1, UsualPrior(0.1, 0.3)), (2, UsualPrior(0.4, 0.3)), (8, UsualPrior(1.6, 1.0)))
    head = ClassHead(torch.zeros(0, 3), width=2.0, bias_sd=1.0, rows=20, few=few)
    found = head.usual_of(rows)
    assert found is not None
    assert found.width == pytest.approx(width)
    assert (found.bias_sd == BIAS_SD) == (rows == 500)  # which knows its own
    between = head.usual_of(4)
    assert between is not None
    assert between == pytest.approx((0.8, 0.3**0.5))
    assert head._replace(few=()).usual_of(rows) == UsualPrior(2.0, 1.0)


def test_a_task_is_solved_under_the_prior_of_its_rows(prior: LiFTPrior) -> None:
    assert prior.head_mean is not None
    known = dict(prior.head_mean.few)
    assert list(known) == [1, 2, 4, 8] and prior.head_mean.rows == ROWS
    assert known[1].width <= known[2].width <= known[8].width <= prior.head_mean.width
    new = [replace(task, train=task.train.take(slice(0, rows))) for rows, task in zip((2, 20), tasks(2), strict=True)]
    solved = SolvedHeads(prior.adapter, new, prior.adapter.initial, mean=prior.head_mean)
    assert solved.choice(0).sd * math.sqrt(WIDTH) == pytest.approx(known[2].width)
    assert solved.choice(0).model.bias_sd == known[2].bias_sd
    assert solved.choice(1).model.bias_sd == prior.head_mean.bias_sd


def test_a_task_of_some_rows_may_ask_for_freer_biases_than_the_others(prior: LiFTPrior) -> None:
    assert prior.head_mean is not None and prior.head_mean.bias_sd is not None
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(60, 6, generator=generator)
    even, uneven = torch.arange(60) % CLASSES, (torch.arange(60) % 20 == 0).long()
    new = [Task(str(k), (inputs, y), num_classes=CLASSES) for k, y in enumerate((even, uneven))]
    tight = prior.head_mean._replace(bias_sd=0.1)
    solved = SolvedHeads(prior.adapter, new, prior.adapter.initial, mean=tight)
    assert [solved.choice(k).model.bias_sd for k in (0, 1)] == [0.1, BIAS_SD]
    old = SolvedHeads(prior.adapter, new, prior.adapter.initial, mean=tight._replace(few=()))
    assert old.choice(1).model.bias_sd == 0.1  # as priors of before have it


def loss_a_task(prior: LiFTPrior, new: list[Task]) -> Tensor:
    told = []
    for task, posterior in zip(new, prior.adapt_many(new, seed=0, steps=20, progress=False), strict=True):
        assert task.test is not None
        told.append(float(nll(posterior.predict(task.test), task.test.target)))
    return torch.tensor(told)


@pytest.mark.parametrize(("rows", "without"), [(2, 0), (3, None)])
def test_new_tasks_of_few_rows_are_predicted_no_worse_than_by_even_classes(
    prior: LiFTPrior, rows: int, without: int | None
) -> None:
    new = tasks(60, rows, seed=2, without=without)
    one = LiFTPrior(**{**vars_of(prior), "head_mean": prior.head_mean._replace(few=())})  # type: ignore[union-attr]
    loss, before = loss_a_task(prior, new), loss_a_task(one, new)
    gain = before - loss
    assert gain.mean() > gain.std() / math.sqrt(len(gain))  # of heavy tails
    assert loss.mean() < math.log(CLASSES) + loss.std() / math.sqrt(len(loss))


def vars_of(prior: LiFTPrior) -> dict[str, Any]:
    names = ("adapter", "mixture", "settings", "adapt_settings", "second_moment", "head_mean", "rows")
    return {name: getattr(prior, name) for name in names}


def test_the_priors_are_saved(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    read = LiFTPrior.from_pretrained(tmp_path, adapter())
    assert read.head_mean is not None and prior.head_mean is not None
    assert (read.head_mean.rows, read.head_mean.few) == (prior.head_mean.rows, prior.head_mean.few)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    before = {name: value for name, value in config.items() if name not in ("head_few", "head_rows")}
    (tmp_path / "config.json").write_text(json.dumps(sealed(before)))
    then = LiFTPrior.from_pretrained(tmp_path, adapter()).head_mean
    assert then is not None and then.few == () and then.usual_of(2) == prior.head_mean.usual
    for wrong in (3, [[1, 2.0]], [[1, 0.0, 1.0]], [["a", 1.0, 1.0]], [[0, 1.0, 1.0]]):
        (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "head_few": wrong})))
        with pytest.raises(DamagedError, match="'head_few'"):
            LiFTPrior.from_pretrained(tmp_path, adapter())


@pytest.mark.parametrize(
    ("kept", "rows", "wanted"), [(0, 500, 1.0), (1, 2, 1.0), (1, 3, 0.0), (19, 24, 1.0), (19, 72, 1.0), (19, 144, 0.5)]
)
def test_what_tasks_say_weighs_less_of_many_more_rows(kept: int, rows: int, wanted: float) -> None:
    head = ClassHead(torch.zeros(0, 3), bias_sd=1.0, rows=2 if kept == 1 else 24, kept=kept)
    assert head.sureness_of(rows) == pytest.approx(wanted)


def test_a_width_that_weighs_nothing_is_chosen_by_the_task_s_rows_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 4, generator=generator)
    y, model = (x[:, 0] > 0.0).long(), HeadModel(2)
    alone = choose_prior_sd(x, y, model)
    for sureness, sd in ((0.0, alone.sd), (100.0, alone.tried[0])):
        assert choose_prior_sd(x, y, model, usual=alone.tried[0], sureness=sureness).sd == sd
    same = choose_prior_sd(x[:2], y[:2] * 0, model)  # two rows of one class: the widest would be sure of it
    assert choose_prior_sd(x[:2], y[:2] * 0, model, usual=same.tried[0], sureness=0.0).sd == same.sd < same.tried[-1]


def test_tasks_of_two_rows_do_not_silence_those_of_ten() -> None:
    """Heads of one row have the narrowest prior, under which ten rows would say nothing."""
    prior = LiFT(adapter(), sgd_steps=0, burn_in=2, samples=4).meta_train(tasks(14, 2, seed=4), progress=False)
    assert prior.head_mean is not None and prior.head_mean.kept == 1
    new = tasks(24, 10, seed=5)
    one = LiFTPrior(**{**vars_of(prior), "head_mean": prior.head_mean._replace(kept=0)})
    gain = loss_a_task(one, new) - loss_a_task(prior, new)
    assert gain.mean() > 3.0 * gain.std() / math.sqrt(len(gain))


def test_a_prior_of_before_weighs_the_same_for_all_rows(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path / "prior")
    path = tmp_path / "prior" / "config.json"
    config = json.loads(path.read_text())
    assert prior.head_mean is not None and config.pop("head_kept") == prior.head_mean.kept > 0
    path.write_text(json.dumps(sealed(config)))
    then = LiFTPrior.from_pretrained(tmp_path / "prior", adapter()).head_mean
    assert then is not None and then.kept == 0
    found = []
    for name, rules in (("then", {k: v for k, v in RULES.items() if k != "many rows"}), ("today", RULES)):
        lift = LiFT(adapter(), sgd_steps=0, burn_in=2, samples=4)
        given = tasks(8)
        session = Session(
            tmp_path / name, config=run_config(lift.settings, lift.seed, lift.adapter, given, rules=rules)
        )
        mean = lift.before_chain(given, session).run.head_mean
        assert mean is not None
        found.append({head.kept for head in (mean.head, *(head for _, head in mean.halves))})
    assert found[0] == {0} and found[1] == {prior.head_mean.kept}


def test_a_run_of_before_goes_on_with_one_prior_for_all(tmp_path: Path) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "few rows"}
    lift, made = LiFT(adapter(), **SHORT), tasks(8)
    seen = []
    for rules in (then, RULES):
        config = run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        found = lift.before_chain(made, Session(tmp_path / str(len(rules)), config=config)).run.head_mean
        assert found is not None
        seen.append(found.head.few)
    assert seen[0] == () and len(seen[1]) > 0


def test_after_joint_training_tasks_are_asked_again_and_the_answer_is_kept(tmp_path: Path) -> None:
    answers = [((1, UsualPrior(0.1, 0.3)), (2, UsualPrior(0.5, 1.0)))]
    probabilities = torch.full((50, CLASSES), 1.0 / CLASSES)

    class Adapted:
        def predicted(self, rows: Any) -> Any:
            return Predicted(probabilities[: len(rows)], rows.target)

    def adapt(standing: Any, some: Any, noise: float | None, power: float) -> list[Any]:
        return [Adapted() for _ in some]

    judge = Judge(lambda *_: torch.zeros(1), adapt=adapt, few_rows=answers.pop)
    made = tasks(4, 4)
    options: Any = (made, torch.zeros(2), None, lambda *_: None, judge, WorkBefore(tmp_path / "kept"))
    found = cross_fit(*options)
    again = cross_fit(*options)  # of the folder: nobody is asked, or the list would be empty
    assert isinstance(found, CrossFit) and found.few_rows == again.few_rows and found.few_rows[1][1].width == 0.5
