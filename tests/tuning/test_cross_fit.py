"""Length of joint training and temperature of predictions, from tasks that joint training has not seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from calibrated_gains import calibrated_gains
from common_map import adapter, tasks
from torch import Tensor

from pyro_lift import LiFT, Task
from pyro_lift.inference.adaptation.temperature import HIGHEST, Predicted, fit_temperature
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.rows import Rows
from pyro_lift.tuning.cross_fit import HALVED, CrossFit, Judge, cross_fit, helpful_temperature, rows_apart
from pyro_lift.tuning.halves import Joint
from pyro_lift.tuning.joint_run import JointRun, Standing, few_passes, passes
from pyro_lift.tuning.whose_heads import RULES, run_config

JOINT = Joint(0.1, 800, 0.5, 0.1, True)


class Curve:
    """Joint training whose vectors say how far they were trained, and on which half."""

    def __init__(self, gains: dict[int, float], spread: float = 0.0) -> None:
        self.gains, self.spread, self.reached = gains, spread, list[int]()

    def begin(self, half: Sequence[Task], rate: float, most: int) -> JointRun:
        assert rate == JOINT.rate and most == JOINT.steps // 2
        return Trained(self, half)  # type: ignore[return-value]

    def score(self, vector: Tensor, half: Sequence[Task]) -> Tensor:
        assert f"t{int(vector[1])}" not in [task.name for task in half]  # never trained on what it is judged by
        signs = torch.tensor([(-1.0) ** (int(task.name[1:]) // 2) for task in half], dtype=torch.float64)
        spread = {200: self.spread, 400: -self.spread}.get(int(vector[0]), 0.0)
        return self.gains[int(vector[0])] + (spread or 0.001) * signs


class Trained:
    def __init__(self, curve: Curve, half: Sequence[Task]) -> None:
        self.curve, self.half = curve, half

    def to(self, steps: int) -> Standing:
        self.curve.reached.append(steps)
        return Standing(torch.tensor([float(steps), float(self.half[0].name[1:])]), {})


@pytest.mark.parametrize(
    ("gains", "spread", "steps"),
    [
        ([0.0, 0.2, 0.3, 0.4], 0.0, 800),  # ever better
        ([0.0, 0.3, 0.2, 0.4], 0.0, 200),  # worse than a shorter one: nothing longer is tried
        ([0.0, 0.1, 0.3, 0.2], 0.0, 400),
        ([0.0, 0.1, 0.3, 0.29], 1.0, 800),  # the next length is not worse as far as can be told
        ([0.3, 0.2, 0.1, 0.0], 0.0, 100),
        ([0.0, 0.3, 0.27, 0.28], 1.0, 800),  # nor one further on, which is better than the next
        ([0.0, 0.3, 0.28, 0.27], 1.0, 400),
        ([0.0, 0.3, 0.299, 0.298], 0.0005, 200),
    ],
)
def test_joint_training_gets_the_best_length_or_the_best_of_those_above_it_that_are_not_worse(
    gains: list[float], spread: float, steps: int
) -> None:
    curve = Curve(dict(zip([50, 100, 200, 400], gains, strict=True)), spread)
    fit = cross_fit(tasks(), torch.zeros(2), JOINT, curve.begin, Judge(curve.score))
    assert fit.steps == steps and fit.temperature == 1.0
    assert fit.looks[0] == (100, 0.0, 0.0)
    assert fit.looks[1][0] == 200 and fit.looks[1][1] == pytest.approx(gains[1] - gains[0])


def test_halves_end_where_a_length_is_worse() -> None:
    curve = Curve({50: 0.0, 100: 0.3, 200: 0.2, 400: 0.9})
    cross_fit(tasks(), torch.zeros(2), JOINT, curve.begin, Judge(curve.score))
    assert max(curve.reached) == 200


def test_what_was_found_is_kept_for_a_run_that_goes_on(tmp_path: Path) -> None:
    curve, kept = Curve({50: 0.0, 100: 0.3, 200: 0.2, 400: 0.0}), WorkBefore(tmp_path, {"seed": 0})
    first = cross_fit(tasks(), torch.zeros(2), JOINT, curve.begin, Judge(curve.score), kept)
    curve.reached.clear()
    again = cross_fit(tasks(), torch.zeros(2), JOINT, curve.begin, Judge(curve.score), kept)
    assert again == first and curve.reached == []


def test_passes_count_how_often_a_row_is_seen() -> None:
    made = [replace(task, train=task.train.take(slice(0, n))) for task, n in zip(tasks(3), (4, 8, 12), strict=True)]
    # Each task has a third of 300 visits: of 4, 8 and 8 rows.
    assert passes(300, 8, made) == pytest.approx((100 * 1 + 100 * 1 + 100 * 8 / 12) / 3)
    assert passes(300, 0, made) == pytest.approx(100)
    assert few_passes(14, 0, made) and not few_passes(15, 0, made)


@pytest.mark.parametrize(("number", "most", "units"), [(3, 20, 12), (3, 7, 7), (8, 5, 5)])
def test_each_part_of_the_rows_is_predicted_from_the_others(number: int, most: int, units: int) -> None:
    made = tasks(number)
    split = rows_apart(made, most)
    assert len(split) == units
    for task in split:
        assert task.test is not None and task.dev is None
        rows = torch.cat([task.train.positional[0], task.test.positional[0]])
        whole = next(other for other in made if other.name == task.name).train.positional[0]
        assert torch.equal(rows.sort(0).values, whole.sort(0).values)
    if units == 12:  # every row of every task, once
        predicted = torch.cat([task.test.target for task in split if task.test is not None])
        assert len(predicted) == 3 * 12


def test_rows_that_nothing_was_trained_on_are_predicted_where_some_tasks_have_them() -> None:
    with_test, with_dev, with_none, small = tasks(4)
    unseen = with_none.train.take(slice(0, 5))
    with_test, with_dev = replace(with_test, test=unseen), replace(with_dev, dev=unseen)
    small = replace(small, train=small.train.take(slice(0, 2)), test=unseen)  # too few rows to split
    apart = rows_apart([with_test, with_dev, with_none, small], 12)
    assert [task.name for task in apart] == [with_test.name, with_dev.name, small.name]
    for task, whole in zip(apart, (with_test, with_dev, small), strict=True):
        assert task.test is not None and torch.equal(task.test.target.sort().values, unseen.target.sort().values)
        assert torch.equal(task.train.target, whole.train.target)
    assert len(rows_apart([with_test, with_dev], 1)) == 1


def sharpened(factor: float) -> list[Predicted]:
    """Predictions of twelve tasks whose logits are so many times the right ones."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for _ in range(12):
        logits = torch.randn(30, 3, generator=generator)
        y = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(-1)
        made.append(Predicted((factor * logits).softmax(-1), y))
    return made


def test_a_temperature_above_one_is_taken_and_one_below_with_rows_of_the_predictions_own() -> None:
    sure, unsure = sharpened(3.0), sharpened(0.3)
    assert helpful_temperature(sure) == pytest.approx(fit_temperature(sure) / HALVED)
    assert helpful_temperature(sure, 1.0) == pytest.approx(fit_temperature(sure))
    assert 0.9 < helpful_temperature(sharpened(1.0)) <= 1.0
    assert fit_temperature(unsure) < helpful_temperature(unsure) < 0.5
    few = [Predicted(p[:2], y[:2]) for p, y, _ in unsure[:2]]
    assert fit_temperature(few) < 0.6 and 0.7 < helpful_temperature(few) < 1.0  # four rows say little


def test_in_runs_of_before_one_below_is_taken_where_it_lowers_the_loss_by_more_than_chance() -> None:
    unsure = sharpened(0.3)
    assert helpful_temperature(sharpened(1.0), careful=False) == 1.0
    assert helpful_temperature(unsure, careful=False) == pytest.approx(fit_temperature(unsure))
    assert fit_temperature(unsure) < 0.5
    few = [Predicted(p[:2], y[:2]) for p, y, _ in unsure[:2]]
    assert fit_temperature(few) < 1.0 and helpful_temperature(few, careful=False) == 1.0


def test_a_run_of_before_has_one_temperature_for_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    then = {name: rule for name, rule in RULES.items() if name != "sharper predictions"}
    lift, made, care = LiFT(adapter(), sgd_steps=80, burn_in=5, samples=10, seed=0), tasks(8), []

    def seen(predictions: Any, exaggerated: float, *, careful: bool) -> float:
        care.append(careful)
        return 0.5

    monkeypatch.setattr("pyro_lift.tuning.cross_fit.helpful_temperature", seen)
    rows = []
    for rules in (then, RULES):
        config = run_config(lift.settings, lift.seed, lift.adapter, made, rules=rules)
        session = Session(tmp_path / str(len(rules)), config=config)
        (prior,) = lift.meta_train_many(made, (1,), session=session, crossed=True, progress=False)
        rows.append(prior.tempered_rows)
        again = lift.before_chain(made, Session(session.folder, config=config, resume=True), crossed=True).halves
        assert again is not None and again.rows == prior.tempered_rows  # as it was kept
    assert care == [False, True] and rows[0] is None
    assert rows[1] is not None and 0.0 < rows[1].rows < len(made[0].train)  # a part of them was predicted


def test_the_highest_temperature_is_said_to_be_that() -> None:
    assert "4.17, the highest there is" in CrossFit(0, HIGHEST / HALVED, ()).sentence()
    assert "highest" not in CrossFit(0, 3.0, ()).sentence()


def test_a_run_that_is_gone_on_with_is_the_run_that_went_through() -> None:
    lift = LiFT(adapter(), seed=0)
    apart = lift._joint_run(tasks(), 0.01, 40, "half")
    apart.to(15)
    whole = lift._joint_run(tasks(), 0.01, 40, "half").to(40)
    ended = apart.to(40)
    assert torch.equal(ended.vector, whole.vector)
    assert all(torch.equal(ended.moments[name], x) for name, x in whole.moments.items())


def test_predictions_that_are_too_sure_are_brought_to_what_they_are_worth() -> None:
    made = tasks(28, rows=64, noise=0.5)
    made = [replace(t, train=t.train.take(slice(0, 16)), test=t.train.take(slice(16, 64))) for t in made]
    lift = LiFT(adapter(32, sureness=8.0), sgd_steps=160, burn_in=10, samples=20, head="shared", seed=0)
    prior = lift.meta_train(made[:12], progress=False)
    assert prior.prediction_temperature > 1.0
    gain = calibrated_gains(prior, made[12:])
    assert gain.mean() > 3.0 * gain.std() / len(gain) ** 0.5


@pytest.mark.parametrize(("given", "calibrate"), [({"sgd_learning_rate": 0.01}, None), ({}, False)])
def test_where_the_rate_is_given_or_it_is_switched_off_nothing_is_looked_for(
    given: dict[str, float], calibrate: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyro_lift.before_chain.cross_fit", None)
    lift = LiFT(adapter(), sgd_steps=80, burn_in=5, samples=10, seed=0, **given)  # type: ignore[arg-type]
    assert lift.meta_train(tasks(), progress=False, calibrate=calibrate).prediction_temperature == 1.0


def test_where_joint_training_does_not_help_the_untouched_network_is_what_tasks_begin_at() -> None:
    at = []

    def adapt(standing: Standing, unseen: Sequence[Task], noise: float | None, power: float) -> list[Sure]:
        assert noise is None and power == 1.0
        at.append(standing)
        return [Sure() for _ in unseen]

    curve = Curve({})
    fit = cross_fit(
        tasks(noise=0.9),
        torch.ones(2),
        JOINT._replace(steps=0, helps=False),
        curve.begin,
        Judge(curve.score, None, adapt),
    )
    assert fit.steps == 0 and fit.looks == () and fit.temperature > 1.0
    assert [standing.vector.tolist() for standing in at] == [[1.0, 1.0]] * 2


class Sure:
    def predicted(self, rows: Rows) -> Predicted:
        return Predicted(torch.tensor([0.98, 0.01, 0.01]).expand(len(rows), 3), rows.target)


def test_nothing_is_said_of_a_temperature_that_nobody_looked_for(caplog: pytest.LogCaptureFixture) -> None:
    curve = Curve({50: 0.0, 100: 0.3, 200: 0.2, 400: 0.9})
    with caplog.at_level("INFO", "pyro_lift"):
        cross_fit(tasks(), torch.zeros(2), JOINT, curve.begin, Judge(curve.score))
    assert "joint training gets" in caplog.text and "temperature" not in caplog.text
    assert CrossFit(0, 1.0, ()).sentence(tempered=False) == ""
    assert CrossFit(0, 1.0, ()).sentence().startswith("predictions stay as they are")


def test_widths_that_were_far_off_are_doubted_and_others_are_not() -> None:
    assert "off by 333 of their own" in CrossFit(None, 110_889.0, noise=0.1).doubt()
    assert CrossFit(None, 4.0, noise=0.1).doubt() == "" == CrossFit(None, 0.0, noise=0.1).doubt()
    assert CrossFit(100, 4.0).doubt() == ""  # of classes it is a temperature, which has limits of its own
