"""``pyro-lift tune`` stopped and gone on with: the choice is kept, and what follows it is what would have followed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_files import prepare, write_task
from tiny_backbones import FAMILIES

from pyro_lift import LiFT, SGLDGibbs, commands
from pyro_lift.support.archive import read_json, write_json


class StoppedError(Exception):
    """What stops a run in these tests."""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = prepare("bert", tmp_path)
    write_task(FAMILIES["bert"].task("c"), tmp_path / "tasks/c")
    return path


def tune(config: Path, **options: Any) -> Any:
    return commands.tune(config, "1 s", progress=False, **options)


def stop_in(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    def stopped(*args: Any, **kwargs: Any) -> Any:
        raise StoppedError

    monkeypatch.setattr(LiFT, method, stopped)


def choose_alone(config: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> dict[str, Any]:
    """Stop a run as soon as its choice is written; what is written is returned."""

    def write_and_stop(path: Path, content: Any) -> None:
        write_json(path, content)
        raise StoppedError

    with monkeypatch.context() as m:
        m.setattr(commands, "write_json", write_and_stop)
        with pytest.raises(StoppedError):
            tune(config, **options)
    kept: dict[str, Any] = read_json(config.parent / "prior" / "choice.json")
    return kept


def test_the_choice_outlives_a_run_that_is_stopped_after_it(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = config.parent / "prior"
    kept = choose_alone(config, monkeypatch)
    with pytest.raises(ValueError, match="--resume to go on with it, --overwrite"):
        tune(config)
    stop_in(monkeypatch, "tune")
    prior = tune(config, resume=True)
    assert prior.tuning == kept["tuning"]
    assert (folder / "prior.safetensors").is_file()
    assert not (folder / "choice.json").exists() and not (folder / "checkpoints").exists()


def test_meta_training_after_the_choice_goes_on_from_its_last_checkpoint(
    config: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.write_text(config.read_text() + "checkpoint_every = 4\n")
    folder, visits, stop_at = config.parent / "prior", [0], [-1]
    kept = choose_alone(config, monkeypatch)
    stop_in(monkeypatch, "tune")
    original = SGLDGibbs.sample

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        visits[0] += 1
        if visits[0] == stop_at[0]:
            raise StoppedError
        return original(self, *args, **kwargs)

    monkeypatch.setattr(SGLDGibbs, "sample", counted)
    whole = tune(config, resume=True)
    assert visits[0] >= 12
    write_json(folder / "choice.json", kept)
    visits[0], stop_at[0] = 0, visits[0] - 2
    with pytest.raises(StoppedError):
        tune(config, resume=True)
    visits[0], stop_at[0] = 0, -1
    resumed = tune(config, resume=True)
    assert 0 < visits[0] <= 6
    assert torch.equal(resumed.mixture.moments.mean, whole.mixture.moments.mean)


@pytest.mark.parametrize("change", ["file", "tasks", "tasks or the network"])
def test_a_choice_of_another_file_or_of_other_tasks_is_refused(
    config: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose_alone(config, monkeypatch)
    if change == "file":
        config.write_text(config.read_text().replace("samples = 6", "samples = 8"))
    elif change != "tasks":  # the weights stay as they are
        model = config.parent / "model" / "config.json"
        write_json(model, {**read_json(model), "num_attention_heads": 4})
    else:
        write_task(FAMILIES["bert"].task("another"), config.parent / "tasks/d")
    with pytest.raises(ValueError, match=f"before the {change}"):
        tune(config, resume=True)
    choose_alone(config, monkeypatch, overwrite=True)  # begins anew


def test_a_run_of_train_is_no_run_of_tune(config: Path) -> None:
    (config.parent / "prior" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="a run of `train`"):
        tune(config, resume=True)
