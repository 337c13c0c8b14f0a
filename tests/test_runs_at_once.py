"""Two runs of one folder at the same time: the second is refused before it computes or writes anything."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_files import prepare, write_task
from resumed_runs import run
from tiny_backbones import FAMILIES
from tiny_methods import tiny_adapter, tiny_tasks

import pyro_lift
from pyro_lift import LiFT, commands
from pyro_lift.comparison import run as comparing
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.support.folder_lock import LOCK, FolderInUseError


def beside(again: Callable[[], object], monkeypatch: pytest.MonkeyPatch, place: Any, name: str) -> list[BaseException]:
    """Let a run begin a second one in the middle; what that one ends with is collected."""
    original, met = getattr(place, name), []

    def twice(*args: Any, **options: Any) -> Any:
        monkeypatch.setattr(place, name, original)
        try:
            again()
        except BaseException as error:
            met.append(error)
        return original(*args, **options)

    monkeypatch.setattr(place, name, twice)
    return met


def check(met: list[BaseException], folder: Path) -> None:
    (error,) = met
    assert isinstance(error, FolderInUseError)
    words = f"{folder}: another run works in this folder (process {os.getpid()} on "
    assert words in str(error) and "give another folder" in str(error)
    assert not list(folder.rglob(LOCK)), "a lock was left behind"


@pytest.mark.parametrize("resume", [False, True])
def test_train(resume: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare("bert", tmp_path)

    def train() -> object:
        return commands.train(path, progress=False, resume=resume)

    met = beside(train, monkeypatch, commands, "tasks_of")
    train()
    check(met, tmp_path / "prior")
    assert (tmp_path / "prior" / "prior.safetensors").is_file()


def test_tune_and_train(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = prepare("bert", tmp_path)
    write_task(FAMILIES["bert"].task("c"), tmp_path / "tasks/c")
    met = beside(lambda: commands.train(path, overwrite=True), monkeypatch, commands, "digest")
    commands.tune(path, "1 s", progress=False)
    check(met, tmp_path / "prior")
    assert (tmp_path / "prior" / "prior.safetensors").is_file()


def test_adapt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands.train(prepare("bert", tmp_path), progress=False)

    def adapt() -> object:
        return commands.adapt(tmp_path / "prior", tmp_path / "new", tmp_path / "adapted", progress=False)

    met = beside(adapt, monkeypatch, commands, "task_of")
    adapt()
    check(met, tmp_path / "adapted")


def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "comparison"

    def compare() -> object:
        options: dict[str, Any] = {"budget": "1 h", "folds": 2, "methods": ("linear-probe",), "progress": False}
        return pyro_lift.compare(tiny_tasks(3), tiny_adapter(), out=folder, **options)

    met = beside(compare, monkeypatch, comparing, "_agenda")
    compare()
    check(met, folder)


def test_meta_train(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    met: list[BaseException] = []

    def meta_train(**options: Any) -> object:
        lift = LiFT(tiny_adapter(), sgd_steps=2, burn_in=2, samples=4, seed=0)
        return lift.meta_train(tiny_tasks(3), progress=False, checkpoint_every=2, **options)

    def again() -> None:
        if not met:
            try:
                meta_train(resume=folder)
            except FolderInUseError as error:
                met.append(error)

    meta_train(checkpoint=folder, on_step=again)
    check(met, folder)
    meta_train(resume=folder)  # the same process may, once the first is done


@pytest.mark.parametrize("kind", ["streaming", "mcmc"])
def test_a_program(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    met = beside(lambda: run(kind, resume=tmp_path / "run"), monkeypatch, Session, "after_setup")
    run(kind, checkpoint=tmp_path / "run")
    check(met, tmp_path / "run")


def test_a_run_that_ends_between_the_look_and_the_lock_of_another_is_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    session = Session(folder, resume=True, resume_hint="resume")
    run("mcmc", checkpoint=folder)
    with pytest.raises(FolderInUseError, match=r"saved itself here in the meantime, as step-000000060\. Go on with"):
        run("mcmc", checkpoint=session)
    with pytest.raises(FolderInUseError, match="in the meantime"), session.alone():
        raise AssertionError


def test_a_run_that_was_killed_is_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    pid = os.fork()
    if pid == 0:
        with Session(folder).alone():
            time.sleep(100.0)
        os._exit(1)
    while not (folder / LOCK).exists() or not (folder / LOCK).read_text():
        time.sleep(0.01)
    with pytest.raises(FolderInUseError, match=f"process {pid} on"):
        run("mcmc", resume=folder)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    run("mcmc", resume=folder)
    assert not (folder / LOCK).exists()
