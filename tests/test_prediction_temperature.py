"""The temperature of a prior's predictions: fitted on rows that adaptation did not see, kept, saved and applied."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.adaptation.temperature import careful_temperature, tempered
from pyro_lift.support.archive import DamagedError, sealed

OPTIONS: dict[str, Any] = {"steps": 8, "draws": 2}


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return LiFT(tiny_adapter(), sgd_steps=4, burn_in=4, samples=8, seed=0).meta_train(tiny_tasks(3), progress=False)


def test_it_is_fitted_on_the_rows_that_adaptation_did_not_see_and_posteriors_predict_with_it(prior: LiFTPrior) -> None:
    tasks = tiny_tasks(5)[3:]
    assert prior.prediction_temperature == 1.0
    plain = [(p.predict(t.test, calibrated=False), t.test.target)
             for t, p in zip(tasks, prior.adapt_many(tasks, **OPTIONS), strict=True) if t.test]  # fmt: skip
    temperature = prior.calibrate(tasks, **OPTIONS)
    assert temperature == prior.prediction_temperature == pytest.approx(careful_temperature(plain), rel=1e-6)
    posterior = prior.adapt(tasks[0], **OPTIONS)
    x = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(posterior.predict(x), tempered(posterior.predict(x, calibrated=False), temperature))
    assert prior.adapt_many(tasks, **OPTIONS)[1].prediction_temperature == temperature


def test_calibrating_twice_gives_the_same(prior: LiFTPrior) -> None:
    tasks = tiny_tasks(5)[3:]
    assert prior.calibrate(tasks, seed=1, **OPTIONS) == prior.calibrate(tasks, seed=1, **OPTIONS)


def test_it_is_saved_with_the_prior_and_with_the_posterior_and_stands_in_the_card(
    prior: LiFTPrior, tmp_path: Path
) -> None:
    prior.prediction_temperature = 1.7
    prior.save_pretrained(tmp_path / "prior")
    read = LiFTPrior.from_pretrained(tmp_path / "prior", tiny_adapter())
    assert read.prediction_temperature == 1.7
    assert "temperature 1.7" in (tmp_path / "prior" / "README.md").read_text()
    posterior = read.adapt(tiny_tasks(1)[0], **OPTIONS)
    posterior.save_pretrained(tmp_path / "posterior")
    again = TaskPosterior.from_pretrained(tmp_path / "posterior", tiny_adapter())
    x = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(again.predict(x), posterior.predict(x))
    assert again.prediction_temperature == 1.7


@pytest.mark.parametrize("value", ["warm", 0.0, -1.0, True, None])
def test_a_folder_with_another_value_is_refused_and_one_from_before_has_none(
    prior: LiFTPrior, tmp_path: Path, value: object
) -> None:
    prior.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "prediction_temperature": value})))
    with pytest.raises(DamagedError, match="'prediction_temperature'"):
        LiFTPrior.from_pretrained(tmp_path, tiny_adapter())
    before = {k: v for k, v in config.items() if k not in ("prediction_temperature", "tuning")}
    (tmp_path / "config.json").write_text(json.dumps(sealed(before)))
    read = LiFTPrior.from_pretrained(tmp_path, tiny_adapter())
    assert read.prediction_temperature == 1.0 and read.tuning is None


def uneven(task: Task) -> Task:
    """The task with its first row many times, so that its classes are plainly uneven."""
    places = torch.cat([torch.zeros(40, dtype=torch.long), torch.arange(len(task.train))])
    return replace(task, name=f"{task.name} uneven", train=task.train.take(places))


def test_a_task_of_uneven_classes_is_tempered_around_their_rates(prior: LiFTPrior) -> None:
    prior.prediction_temperature, prior.tempered_rows = 3.0, None  # for any number of rows
    task = uneven(tiny_tasks(5)[4])
    x = torch.randn(4, 4, dtype=torch.float64)
    counts = torch.bincount(task.train.target, minlength=task.num_classes or 0)
    rates = (counts + 1.0) / (counts.sum() + len(counts))
    for posterior in (prior.adapt(task, **OPTIONS), prior.adapt_many([task, tiny_tasks(5)[3]], **OPTIONS)[0]):
        plain = posterior.predict(x, calibrated=False)
        odds = (plain / rates) ** (1 / 3.0) * rates
        torch.testing.assert_close(posterior.predict(x), (odds / odds.sum(-1, keepdim=True)).double())
        assert (posterior.predict(x).amax(-1) > tempered(plain, 3.0).amax(-1)).all()


def test_what_a_temperature_is_fitted_to_has_the_rates_that_predictions_have(prior: LiFTPrior) -> None:
    task = tiny_tasks(5)[4]
    two = Task("two", (task.train.positional[0][:9], torch.tensor([0] * 4 + [1] * 5)), num_classes=2)
    assert task.num_classes == 3  # of which this one has two
    posterior = prior.adapt(two, **OPTIONS)
    fitted = posterior.predicted(two.train)
    assert fitted.rates is None and fitted.probabilities.shape == (9, 2)
    full = posterior.predict(two.train, calibrated=False)
    torch.testing.assert_close(fitted.probabilities, full[:, :2])
    assert not full[:, 2:].any()


def test_a_temperature_at_a_bound_is_warned_of(prior: LiFTPrior, caplog: pytest.LogCaptureFixture) -> None:
    prior.calibrate(tiny_tasks(5)[3:], **OPTIONS)
    assert "the bound of what is looked for" not in caplog.text
    task = tiny_tasks(5)[4]
    right = torch.zeros(30, dtype=torch.long)
    x = task.train.positional[0][:1].expand(30, -1)
    prior.calibrate([Task("sure", (x, right), num_classes=3, test=(x, right))], **OPTIONS)
    assert "the temperature is 5, the bound of what is looked for" in caplog.text  # the rate of its one class


def test_rates_are_saved_and_folders_from_before_are_tempered_around_even_ones(
    prior: LiFTPrior, tmp_path: Path
) -> None:
    prior.prediction_temperature = 3.0
    task, x = uneven(tiny_tasks(5)[4]), torch.randn(4, 4, dtype=torch.float64)
    prior.save_pretrained(tmp_path / "prior")
    posterior = LiFTPrior.from_pretrained(tmp_path / "prior", tiny_adapter()).adapt(task, **OPTIONS)
    posterior.save_pretrained(tmp_path / "posterior")
    again = TaskPosterior.from_pretrained(tmp_path / "posterior", tiny_adapter())
    assert again.class_counts is not None and posterior.class_counts is not None
    assert again.class_counts.tolist() == posterior.class_counts.tolist()
    torch.testing.assert_close(again.predict(x), posterior.predict(x))
    for name, key in (("prior", "around_rates"), ("posterior", "class_counts")):
        config = json.loads((tmp_path / name / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(
            json.dumps(sealed({k: v for k, v in config.items() if k not in (key, "sha256")}))
        )
    before = TaskPosterior.from_pretrained(tmp_path / "posterior", tiny_adapter())
    of_before = LiFTPrior.from_pretrained(tmp_path / "prior", tiny_adapter()).adapt(task, **OPTIONS)
    for old in (before, of_before):
        torch.testing.assert_close(old.predict(x), tempered(old.predict(x, calibrated=False), 3.0))


@pytest.mark.parametrize("value", ["many", [1.5, 2], [-1, 3], [True, 2]])
def test_rows_of_classes_that_are_no_numbers_are_refused(prior: LiFTPrior, tmp_path: Path, value: object) -> None:
    prior.adapt(tiny_tasks(1)[0], **OPTIONS).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["sha256"]
    (tmp_path / "config.json").write_text(json.dumps(sealed({**config, "class_counts": value})))
    with pytest.raises(DamagedError, match="'class_counts'"):
        TaskPosterior.from_pretrained(tmp_path, tiny_adapter())


def test_meta_training_calibrates_where_tasks_have_rows_for_it_and_refuses_where_none_has() -> None:
    lift = LiFT(tiny_adapter(), sgd_steps=4, burn_in=4, samples=8, seed=0)
    tasks = tiny_tasks(3)
    assert lift.meta_train(tasks, progress=False, calibrate=True).prediction_temperature != 1.0
    bare = [replace(task, test=None) for task in tasks]
    with pytest.raises(ValueError, match="no task has test or dev rows"):
        lift.meta_train(bare, progress=False, calibrate=True)


def test_tasks_all_rows_of_which_the_prior_has_seen_are_warned_of(
    prior: LiFTPrior, caplog: pytest.LogCaptureFixture
) -> None:
    seen = replace(tiny_tasks(1)[0], test=None)
    prior.calibrate([*tiny_tasks(5)[1:], replace(seen, name="new")], **OPTIONS)
    assert "has seen all their rows" not in caplog.text
    prior.calibrate([seen, *tiny_tasks(5)[3:]], **OPTIONS)
    assert "the prior was learned from 't0', and has seen all their rows" in caplog.text


def test_regressions_beside_classes_and_no_task_at_all_are_refused(prior: LiFTPrior) -> None:
    task = Task("r", (torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 3, dtype=torch.float64)), "regression")
    with pytest.raises(ValueError, match="'r' is a regression and 't0' is not"):
        prior.calibrate([task, *tiny_tasks(1)])
    with pytest.raises(ValueError, match="empty"):
        prior.calibrate([])


def test_a_merged_prior_has_the_geometric_mean_of_its_chains(prior: LiFTPrior) -> None:
    other = LiFT(prior.adapter, sgd_steps=4, burn_in=4, samples=8, seed=1).meta_train(tiny_tasks(3), progress=False)
    other = LiFTPrior(
        other.adapter, other.mixture, prior.settings, second_moment=other.second_moment, tasks=prior.tasks,
        prediction_temperature=4.0,
    )  # fmt: skip
    prior.prediction_temperature = 1.0
    assert prior.merge(other).prediction_temperature == pytest.approx(2.0)
