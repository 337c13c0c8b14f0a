"""LiFT tunes itself: candidates around what is given, a choice that later runs have, saved with the prior."""

from __future__ import annotations

from pathlib import Path

import pytest
from command_files import prepare, write_task
from tiny_backbones import FAMILIES
from tiny_methods import tiny_adapter, tiny_tasks
from typer.testing import CliRunner

from pyro_lift import AdaptSettings, LiFT, LiFTPrior, LiFTSettings
from pyro_lift.cli import app
from pyro_lift.defaults import resolved
from pyro_lift.tuning.candidates import lift_candidates, shortened

SMALL = LiFTSettings(sgd_steps=4, burn_in=4, samples=8, batch_size=6)


def test_the_given_settings_are_the_first_candidate_and_no_two_have_one_name() -> None:
    known = resolved(LiFTSettings(), tiny_adapter())
    made = lift_candidates(known, AdaptSettings(), trainings=8, heads=True)
    assert len(made) == 24 and made[0].name == "as given" and made[0].meta == {}
    assert len({c.name for c in made}) == 24
    for candidate in made:
        settings = LiFTSettings(**candidate.meta)
        again = resolved(settings, tiny_adapter())
        if "beta" in candidate.name:  # widths that are given bring their temperature along
            assert again.temperature == pytest.approx(candidate.meta["temperature"])
        total = settings.sgd_steps + settings.burn_in + settings.samples
        assert total == pytest.approx(650 if "length" in candidate.name else 1300, abs=3)
        AdaptSettings(**candidate.adapt)


def test_the_fewer_steps_a_task_gets_the_longer_they_are_tried() -> None:
    known = resolved(LiFTSettings(), tiny_adapter())
    for steps, times, power in ((16, 4.0, 100.0), (49, 4.0, 100.0), (50, 2.0, 10.0), (100, 2.0, 10.0)):
        adapt = [c.adapt for c in lift_candidates(known, AdaptSettings(steps=steps, draws=5), trainings=1)]
        assert [a["learning_rate"] / known.learning_rate for a in adapt] == [1.0, 0.25, times]
        assert [a.get("n_inflate", 1.0) for a in adapt] == [1.0, 1.0, power]


def test_a_shorter_chain_has_its_parts_in_proportion_and_never_none() -> None:
    short = shortened(LiFTSettings(), 0.1)
    assert (short.sgd_steps, short.burn_in, short.samples) == (100, 10, 20)
    least = shortened(LiFTSettings(components=3), 1e-3)
    assert (least.sgd_steps, least.burn_in, least.samples) == (1, 1, 24)
    assert shortened(LiFTSettings(sgd_steps=0), 0.5).sgd_steps == 0


def test_what_is_chosen_is_what_meta_training_has_and_goes_with_the_prior(tmp_path: Path) -> None:
    lift = LiFT(tiny_adapter(), settings=SMALL, adapt=AdaptSettings(steps=8, draws=2), seed=0)
    tuning = lift.tune(tiny_tasks(5), "1 h", trainings=2, progress=False)
    assert lift.tuning is tuning
    for name, value in tuning.meta.items():
        assert getattr(lift.settings, name) == value
    for name, value in tuning.adapt.items():
        assert getattr(lift.adapt_settings, name) == value
    prior = lift.meta_train(tiny_tasks(5), progress=False)
    assert prior.prediction_temperature == tuning.temperature
    prior.save_pretrained(tmp_path)
    assert (tmp_path / "tuning.png").stat().st_size > 3_000
    card = (tmp_path / "README.md").read_text()
    assert tuning.chosen in card and "Chosen on held-out tasks" in card
    read = LiFTPrior.from_pretrained(tmp_path, tiny_adapter())
    assert read.tuning == prior.tuning == tuning.to_dict()


def test_the_command_tunes_trains_and_saves(tmp_path: Path) -> None:
    config = prepare("bert", tmp_path)
    write_task(FAMILIES["bert"].task("c"), tmp_path / "tasks/c")
    result = CliRunner().invoke(app, ["tune", str(config), "--budget", "1 s"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert "chosen: " in result.output
    assert (tmp_path / "prior" / "tuning.png").is_file() and (tmp_path / "prior" / "run.toml").is_file()
