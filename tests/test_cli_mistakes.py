"""Mistakes on the command line: each is answered in a line that names the thing, with no traceback and no file left."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from command_files import prepare
from safetensors.torch import load_file, save_file

from pyro_lift import cli, commands


class Mistake(NamedTuple):
    """What is done to the files, what is typed, and what the answer says."""

    harm: Callable[[Path], object]
    typed: str
    answer: str


def nothing(root: Path) -> None:
    del root


def edit(name: str, old: str, new: str) -> Callable[[Path], object]:
    def do(root: Path) -> None:
        text = (root / name).read_text()
        assert old in text
        (root / name).write_text(text.replace(old, new))

    return do


def write(name: str, text: str = "") -> Callable[[Path], object]:
    def do(root: Path) -> None:
        if (root / name).is_dir():
            shutil.rmtree(root / name)
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)

    return do


def remove(name: str) -> Callable[[Path], object]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def both(*harms: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda root: [harm(root) for harm in harms]


def labels(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    def do(root: Path) -> None:
        tensors = load_file(root / "new" / "train.safetensors")
        save_file({**tensors, "labels": change(tensors["labels"])}, root / "new" / "train.safetensors")

    return do


TRAIN, ADAPT, PREDICT = "train run.toml --overwrite", "adapt prior --task new --out fresh", "predict adapted"
MISTAKES: dict[str, Mistake] = {
    "no command of that name": Mistake(nothing, "trian run.toml", "No such command"),
    "no option of that name": Mistake(nothing, "train run.toml --resum", "No such option"),
    "no argument": Mistake(nothing, "train", "Missing argument"),
    "no task": Mistake(nothing, "adapt prior", "Missing option"),
    "a seed that is no number": Mistake(nothing, "adapt prior --task new --seed one", "Invalid value for '--seed'"),
    "a negative seed": Mistake(nothing, f"{ADAPT} --seed -1", "Invalid value for '--seed'"),
    "no file": Mistake(nothing, "train ran.toml", "ran.toml"),
    "a folder for a file": Mistake(nothing, "train prior", "prior"),
    "not TOML": Mistake(write("run.toml", "[backbone\n"), TRAIN, "run.toml: not TOML"),
    "not text": Mistake(lambda root: (root / "run.toml").write_bytes(b"\xff\xfe\x00"), TRAIN, "run.toml: not TOML"),
    "an empty file": Mistake(write("run.toml"), TRAIN, "'backbone' is missing"),
    "a key that is missing": Mistake(edit("run.toml", 'kind = "encoder"', ""), TRAIN, "'kind' is missing"),
    "a section misspelt": Mistake(edit("run.toml", "[sampler]", "[smapler]"), TRAIN, "did you mean 'sampler'"),
    "a key misspelt": Mistake(edit("run.toml", "rank", "rnak"), TRAIN, "did you mean 'rank'"),
    "a value of another type": Mistake(edit("run.toml", "rank = 2", 'rank = "2"'), TRAIN, "expected a whole number"),
    "a value out of range": Mistake(edit("run.toml", "rank = 2", "rank = 0"), TRAIN, "rank=0"),
    "a section that is no table": Mistake(write("run.toml", "backbone = 3"), TRAIN, "expected a table"),
    "a kind that is not known": Mistake(edit("run.toml", '"encoder"', '"encoderr"'), TRAIN, "did you mean 'encoder'"),
    "a device that is not there": Mistake(edit("run.toml", '"cpu"', '"cuda:77"'), TRAIN, "device='cuda:77'"),
    "a device of no kind": Mistake(nothing, f"{TRAIN} --device gpu", "device='gpu'"),
    "no backbone there": Mistake(remove("model"), TRAIN, "model"),
    "an empty backbone": Mistake(both(remove("model"), lambda root: (root / "model").mkdir()), TRAIN, "model"),
    "a backbone's file cut": Mistake(write("model/model.safetensors", "cut"), TRAIN, "model"),
    "no layers of that name": Mistake(edit("run.toml", "rank = 2", 'rank = 2\ntarget_modules = ["nil"]'), TRAIN, "nil"),
    "no tasks there": Mistake(remove("tasks"), TRAIN, "tasks"),
    "an empty folder of tasks": Mistake(both(remove("tasks"), lambda root: (root / "tasks").mkdir()), TRAIN, "no task"),
    "a file for the tasks": Mistake(write("tasks"), TRAIN, "tasks"),
    "a task's name misspelt": Mistake(edit("run.toml", "[tasks]", '[tasks]\nnames = ["aa"]'), TRAIN, "'aa'"),
    "a benchmark without its data": Mistake(edit("run.toml", '"folder"', '"crossfit"'), TRAIN, "tasks"),
    "no steps": Mistake(edit("run.toml", "samples = 6", "samples = 0"), TRAIN, "samples"),
    "more warm-up than is right": Mistake(edit("run.toml", "sgd_steps = 3", "sgd_steps = -3"), TRAIN, "sgd_steps"),
    "a prior that is there": Mistake(nothing, "train run.toml", "holds a finished prior"),
    "another run to resume": Mistake(
        edit("run.toml", "samples = 6", "samples = 7"), "train run.toml --resume", "holds a finished prior"
    ),
    "a file for the output": Mistake(write("prior", "mine"), TRAIN, "prior"),
    "a file above the output": Mistake(
        both(remove("prior"), edit("run.toml", "/prior", "/run.toml/x")), TRAIN, "run.toml"
    ),
    "no prior there": Mistake(nothing, "adapt priors --task new --out fresh", "priors: no run.toml here"),
    "a file for a prior": Mistake(nothing, "adapt run.toml --task new --out fresh", "no run.toml here"),
    "a prior without its run": Mistake(remove("prior/run.toml"), ADAPT, "no run.toml here"),
    "a prior without its weights": Mistake(remove("prior/prior.safetensors"), ADAPT, "no prior.safetensors here"),
    "a prior's file cut": Mistake(write("prior/prior.safetensors", "cut"), ADAPT, "prior.safetensors"),
    "a prior's description cut": Mistake(write("prior/config.json", "{"), ADAPT, "config.json"),
    "no task there": Mistake(nothing, "adapt prior --task newer --out fresh", "newer: no such folder"),
    "a file for a task": Mistake(nothing, "adapt prior --task run.toml --out fresh", "run.toml"),
    "an empty task": Mistake(both(remove("new"), lambda root: (root / "new").mkdir()), ADAPT, "new"),
    "a task's file cut": Mistake(write("new/train.safetensors", "cut"), ADAPT, "train.safetensors"),
    "labels past the head": Mistake(labels(lambda y: y + 70), ADAPT, "label"),
    "negative labels": Mistake(labels(lambda y: y - 5), ADAPT, "label"),
    "a file for the draws": Mistake(nothing, "adapt prior --task new --out run.toml", "run.toml"),
    "draws below a file": Mistake(nothing, "adapt prior --task new --out run.toml/x", "run.toml"),
    "nothing adapted there": Mistake(nothing, "predict adaptd", "adaptd: no adapt.json here"),
    "a prior for an adapted folder": Mistake(nothing, "predict prior", "prior: no adapt.json here"),
    "a record that is not JSON": Mistake(write("adapted/adapt.json", "{"), PREDICT, "adapt.json"),
    "a record that is a list": Mistake(write("adapted/adapt.json", "[]"), PREDICT, "adapt.json"),
    "a record without its prior": Mistake(
        edit("adapted/adapt.json", '"prior"', '"pior"'), PREDICT, "'prior' is missing"
    ),
    "a prior that was moved": Mistake(lambda root: (root / "prior").rename(root / "moved"), PREDICT, "adapted from"),
    "a task that was moved": Mistake(lambda root: (root / "new").rename(root / "moved"), PREDICT, "no such folder"),
    "draws that are gone": Mistake(remove("adapted/posterior.safetensors"), PREDICT, "posterior.safetensors"),
    "a folder for the predictions": Mistake(nothing, "predict adapted --out new", "new is a folder"),
    "predictions below a file": Mistake(nothing, "predict adapted --out run.toml/p.jsonl", "run.toml"),
    "a part of bench misspelt": Mistake(nothing, "bench speed --smoke --part stpes", "did you mean 'steps'"),
    "a method misspelt": Mistake(nothing, "bench methods --smoke --methods lfit", "did you mean 'lift'"),
    "a family misspelt": Mistake(nothing, "bench methods --smoke --family digit", "did you mean 'digits'"),
    "tasks misspelt": Mistake(nothing, "bench methods --smoke --tasks vtub", "did you mean 'vtab'"),
    "no families": Mistake(nothing, "demo --smoke --seeds 0", "Invalid value for '--seeds'"),
    "a store without tasks": Mistake(nothing, "bench store --smoke --tasks 0", "Invalid value for '--tasks'"),
    "no rounds": Mistake(nothing, "bench store --smoke --rounds 0", "Invalid value for '--rounds'"),
    "no processes": Mistake(nothing, "demo --smoke --workers 0", "Invalid value for '--workers'"),
    "no rank": Mistake(nothing, "bench speed --smoke --rank 0", "Invalid value for '--rank'"),
    "a device for a benchmark": Mistake(nothing, "bench sampler --smoke --device cuda:77", "device='cuda:77'"),
    "a file for a benchmark's folder": Mistake(nothing, "bench sampler --smoke --out run.toml", "run.toml"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, tasks, a prior and an adapted task."""
    root = tmp_path_factory.mktemp("finished")
    config = prepare("bert", root)
    here = os.getcwd()
    os.chdir(root)
    try:
        text = config.read_text().replace(f'"{root}/', '"')
        config.write_text(text.replace('folder = "prior"', 'folder = "./prior"'))
        commands.train(Path("run.toml"), progress=False)
        commands.adapt(Path("prior"), Path("new"), Path("adapted"), progress=False)
    finally:
        os.chdir(here)
    return root


def type_in(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["pyro-lift", *line.split()])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_in_a_line(
    name: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    mistake, root = MISTAKES[name], tmp_path / "root"
    shutil.copytree(finished, root)
    record = json.loads((root / "adapted" / "adapt.json").read_text())
    text = json.dumps({**record, "prior": str(root / "prior"), "task_folder": str(root / "new")})
    (root / "adapted" / "adapt.json").write_text(text)
    mistake.harm(root)
    monkeypatch.chdir(root)
    monkeypatch.setenv("COLUMNS", "400")
    capfd.readouterr()
    assert type_in(monkeypatch, mistake.typed) == 2
    answer = capfd.readouterr().err
    assert mistake.answer in answer and "Traceback" not in answer
    assert not (root / "fresh" / "config.json").exists()
    assert not list(root.rglob("*.part")) and not list(root.rglob(".*.new"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("typed", [TRAIN, ADAPT, PREDICT])
def test_a_folder_without_permission_is_named_before_the_work(
    typed: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    for path in (root, root / "prior", root / "adapted"):
        path.chmod(0o500)
    try:
        assert type_in(monkeypatch, typed) == 2
    finally:
        for path in (root, root / "prior", root / "adapted"):
            path.chmod(0o700)
    assert "PermissionError" in capfd.readouterr().err


def test_the_version_is_printed(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    assert type_in(monkeypatch, "--version") == 0
    assert capfd.readouterr().out.strip()[0].isdigit()


def test_a_stop_by_the_user_is_no_traceback(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "task_of", stopped)
    monkeypatch.chdir(finished)
    assert type_in(monkeypatch, f"adapt prior --task new --out {tmp_path / 'out'}") in (1, 130)
    assert "Traceback" not in capfd.readouterr().err


def test_draws_are_saved_though_their_scores_fail(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: object) -> None:
        raise RuntimeError("gather(): no")

    monkeypatch.chdir(finished)
    monkeypatch.setattr(commands, "scores", fails)
    assert type_in(monkeypatch, f"adapt prior --task new --out {tmp_path / 'out'}") == 2
    assert "the draws are saved, but scoring them failed: gather(): no" in capfd.readouterr().err
    monkeypatch.undo()
    monkeypatch.chdir(finished)
    lines = commands.predict(tmp_path / "out").read_text().splitlines()
    assert len(lines) == 8


def test_a_finished_run_that_is_to_go_on_is_finished(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    text = "# a note\n" + (root / "run.toml").read_text() + "[log]\nevery = 3\n"
    (root / "run.toml").write_text(text)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (root / "prior").iterdir()}
    assert type_in(monkeypatch, "train run.toml --resume") == 0
    assert "finished already: prior holds the prior of run.toml" in capfd.readouterr().out
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in (root / "prior").iterdir()} == before
    assert type_in(monkeypatch, "tune run.toml --resume") == 2  # a prior of `train`, whose settings nobody chose
    about = root / "prior" / "config.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), "tuning": {}}))
    assert type_in(monkeypatch, "tune run.toml --resume") == 0
    assert type_in(monkeypatch, "train run.toml --resume") == 2


def test_a_finished_prior_is_replaced_when_that_is_said(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    shutil.copytree(finished, root)
    monkeypatch.chdir(root)
    before = (root / "prior" / "prior.safetensors").read_bytes()
    (root / "run.toml").write_text((root / "run.toml").read_text() + "seed = 4\n")
    with pytest.raises(ValueError, match="holds a finished prior"):
        commands.train(Path("run.toml"), progress=False)
    assert (root / "prior" / "prior.safetensors").read_bytes() == before
    commands.train(Path("run.toml"), progress=False, overwrite=True, device="cpu")
    assert (root / "prior" / "prior.safetensors").read_bytes() != before
    assert "seed = 4" in (root / "prior" / "run.toml").read_text()
