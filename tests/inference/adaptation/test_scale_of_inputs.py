"""Rows to predict that are in another scale than the task's own are warned of, by a saved posterior too."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.saving.names import CONFIG
from pyro_lift.support.archive import sealed, write_json

RAW = torch.randint(256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0))
NORMALISED = (RAW / 255.0 - 0.5) / 0.3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3))


def posterior(x: Tensor) -> TaskPosterior:
    adapter = adapt_backbone(network(), peft.LoraConfig(r=1, target_modules=["1", "3"]), seed=0)
    return TaskPosterior(adapter, Task("digits", (x, torch.arange(12) % 3)), adapter.initial[None])


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "another scale" in r.getMessage()]


@pytest.mark.parametrize(
    ("trained", "new", "differ"),
    [
        (NORMALISED, RAW, True),
        (NORMALISED, RAW.to(torch.uint8), True),
        (NORMALISED, RAW[:1].float(), True),
        (RAW / 255.0, RAW.float(), True),
        (RAW.float(), NORMALISED, True),
        (RAW.float(), NORMALISED[:1], True),
        (NORMALISED, NORMALISED[:1], False),
        (NORMALISED, torch.zeros(1, 1, 8, 8), False),
        (NORMALISED, 5.0 * NORMALISED, False),
        (RAW.float(), 0.1 * RAW, False),
    ],
)
def test_pictures_of_another_scale_are_warned_of(
    trained: Tensor, new: Tensor, differ: bool, caplog: pytest.LogCaptureFixture
) -> None:
    posterior(trained).predict(new)
    assert len(said(caplog)) == differ
    if differ:
        assert "as large as the rows of task 'digits'" in said(caplog)[0] and "Prepare them as" in said(caplog)[0]


def test_a_single_row_of_a_table_that_happens_to_be_small_is_none(caplog: pytest.LogCaptureFixture) -> None:
    adapter = adapt_backbone(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(r=1, target_modules=["0"]), seed=0)
    x = torch.randn(12, 4) * torch.tensor([1.0, 1.0, 1.0, 1e3])
    table = TaskPosterior(adapter, Task("table", (x, torch.arange(12) % 3)), adapter.initial[None])
    table.predict(torch.tensor([[1.0, 1.0, 1.0, 2.0]]))
    assert not said(caplog)


def test_a_loaded_posterior_knows_the_scale_and_one_saved_before_predicts_without(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made = posterior(NORMALISED)
    expected = made.predict(NORMALISED)
    made.save_pretrained(tmp_path / "new")
    loaded = TaskPosterior.from_pretrained(tmp_path / "new", network())
    assert loaded.input_sizes == made.input_sizes and torch.equal(loaded.predict(NORMALISED), expected)
    loaded.predict(RAW.float())
    assert len(said(caplog)) == 1
    loaded.save_pretrained(tmp_path / "again")
    again = TaskPosterior.from_pretrained(tmp_path / "again", network())
    assert again.input_sizes == made.input_sizes
    config = json.loads((tmp_path / "new" / CONFIG).read_text("utf-8"))
    assert config["input_sizes"][""][1] == pytest.approx(float(NORMALISED.abs().max()))
    caplog.clear()
    before = TaskPosterior(made.adapter, loaded.task, made.thetas, input_sizes={})
    assert before.input_sizes == {} and torch.equal(before.predict(RAW.float()), made.predict(RAW.float()))


def test_standard_deviations_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    adapter = adapt_backbone(network(), peft.LoraConfig(r=1, target_modules=["1", "3"]), seed=0)
    task = Task("angles", (NORMALISED, torch.randn(12, 3)), "regression")
    TaskPosterior(adapter, task, adapter.initial.expand(4, -1)).predict_sd(RAW)
    assert len(said(caplog)) == 1


def test_new_tasks_in_another_scale_than_the_priors_are_warned_of_and_a_loaded_prior_knows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    learned = [Task(f"t{k}", (NORMALISED[k : k + 8], torch.arange(8) % 3)) for k in range(4)]
    options = {"sgd_steps": 0, "burn_in": 1, "samples": 2, "seed": 0}
    lift = LiFT(network(), peft.LoraConfig(r=1, target_modules=["1", "3"]), **options)  # type: ignore[arg-type]
    prior = lift.meta_train(learned, progress=False)
    prior.save_pretrained(tmp_path / "prior")
    config = json.loads((tmp_path / "prior" / CONFIG).read_text())
    loaded = LiFTPrior.from_pretrained(tmp_path / "prior", network())
    for each in (prior, loaded):
        caplog.clear()
        each.adapt(Task("like", (NORMALISED[4:], torch.arange(8) % 3)), seed=0)
        assert not said(caplog)
        each.adapt(Task("raw", (RAW.float(), torch.arange(12) % 3)), seed=0)
        assert len(said(caplog)) == 1 and said(caplog)[0].startswith("task 'raw': inputs")
    caplog.clear()
    del config["input_sizes"]
    write_json(tmp_path / "prior" / CONFIG, sealed(config))
    LiFTPrior.from_pretrained(tmp_path / "prior", network()).adapt(Task("raw", (RAW.float(), torch.arange(12) % 3)))
    assert not said(caplog)
    write_json(tmp_path / "prior" / CONFIG, sealed({**config, "input_sizes": {"": [1.0]}}))
    with pytest.raises(ValueError, match=r"config\.json: key 'input_sizes' is"):
        LiFTPrior.from_pretrained(tmp_path / "prior", network())
