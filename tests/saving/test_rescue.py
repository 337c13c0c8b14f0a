"""A last write that fails: the message names folder and reason, and what a command computed is saved elsewhere."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_files import prepare, write_task
from saved_priors import trained
from tiny_backbones import FAMILIES
from tiny_methods import tiny_adapter, tiny_tasks

import pyro_lift
from pyro_lift import LiFT, LiFTPrior, cli, commands
from pyro_lift.comparison import command as comparing
from pyro_lift.comparison import run as running
from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.saving import folders
from pyro_lift.saving.rescue import write_or_rescue
from pyro_lift.support import archive


def full(monkeypatch: pytest.MonkeyPatch, *filled: Path) -> None:
    """Let the disk be full below some folders, and where what goes into them is made ready."""
    write = archive.write_file
    places = [str(path.absolute()) for folder in filled for path in (folder, archive.unfinished(folder))]

    def limited(path: Path, content: bytes) -> None:
        if any(str(path.absolute()).startswith(f"{place}{os.sep}") for place in places):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, content)

    for module in (archive, commands, running, folders):
        monkeypatch.setattr(module, "write_file", limited)


def test_a_prior_and_a_posterior_say_where_they_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, folder = trained("bert"), tmp_path / "p"
    one.prior.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as m:
        full(m, folder, tmp_path / "q")
        for thing, place in ((one.prior, folder), (one.posterior, tmp_path / "q")):
            with pytest.raises(OSError, match=rf"{place}: could not be written \(No space left on .*in memory still"):
                thing.save_pretrained(place)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert sorted(tmp_path.iterdir()) == [folder], "half of a folder was left"
    one.prior.save_pretrained(tmp_path / "q")


@pytest.mark.parametrize("how", ["prior", "posterior", "peft"])
def test_the_system_is_heard_through_other_libraries(how: str, tmp_path: Path) -> None:
    one = trained("bert")
    folder = tmp_path / "p"
    saves: dict[str, Callable[[Path], object]] = {
        "prior": one.prior.save_pretrained,
        "posterior": one.posterior.save_pretrained,
        "peft": one.prior.to_peft,
    }
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))  # safetensors writes the adapter by itself
        try:
            saves[how](folder)
        except OSError as error:
            os._exit(42 if f"{folder}: could not be written (File too large)" in str(error) else 43)
        except BaseException:
            os._exit(44)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 42
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------ the commands


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Run the command line; returns the exit code and what stands on stderr, in one line."""
    monkeypatch.setattr(sys, "argv", ["pyro-lift", *words])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"pyro-lift: (OS|FileExists)Error: ", last)
    return int(ended.value.code or 0), last


def place_in(words: str) -> Path:
    found = re.search(r"Nothing is lost: it is in (\S+)\. Move it", words)
    assert found is not None, words
    return Path(found[1])


def test_train_on_a_full_disk_puts_the_prior_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = prepare("bert", tmp_path), tmp_path / "prior"
    with monkeypatch.context() as m:
        full(m, folder)
        code, words = run(m, capsys, "train", str(path))
    assert code == 2 and f"{folder}: the prior could not be written (No space left on device)" in words
    rescued = place_in(words)
    assert rescued.parent == tmp_path and rescued.name.startswith("prior-rescued-")
    posterior = commands.adapt(rescued, tmp_path / "new", tmp_path / "adapted", progress=False)
    assert len(posterior.thetas) == 2


def test_where_the_folder_is_taken_away_it_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = prepare("bert", tmp_path), tmp_path / "prior"
    original = LiFT.meta_train_many

    def gone(self: LiFT, *args: Any, **options: Any) -> Any:
        priors = original(self, *args, **options)
        shutil.rmtree(folder)
        return priors

    monkeypatch.setattr(LiFT, "meta_train_many", gone)
    commands.train(path, progress=False)
    assert (folder / "run.toml").is_file() and (folder / "prior.safetensors").is_file()


def test_where_a_file_has_taken_its_place_the_prior_stands_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, folder = prepare("bert", tmp_path), tmp_path / "prior"
    original = LiFT.meta_train_many

    def replaced(self: LiFT, *args: Any, **options: Any) -> Any:
        priors = original(self, *args, **options)
        shutil.rmtree(folder)
        folder.write_text("mine")
        return priors

    monkeypatch.setattr(LiFT, "meta_train_many", replaced)
    words = run(monkeypatch, capsys, "train", str(path))[1]
    assert (place_in(words) / "prior.safetensors").is_file() and folder.read_text() == "mine"


def test_tune_keeps_its_prior_and_goes_on_without_a_kept_choice(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    path, folder = prepare("bert", tmp_path), tmp_path / "prior"
    write_task(FAMILIES["bert"].task("c"), tmp_path / "tasks/c")
    full(monkeypatch, folder)
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        words = run(monkeypatch, capsys, "tune", str(path), "--budget", "1 s")[1]
    rescued = place_in(words)
    assert json.loads((rescued / "config.json").read_text())["tuning"] is not None
    assert any("choice.json: the choice could not be kept (No space left" in r.getMessage() for r in caplog.records)
    assert not (folder / "choice.json").exists()


def test_adapt_and_predict_put_theirs_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands.train(prepare("bert", tmp_path), progress=False)
    out = tmp_path / "adapted"
    typed = ("adapt", str(tmp_path / "prior"), "--task", str(tmp_path / "new"), "--out", str(out))
    with monkeypatch.context() as m:
        full(m, out)
        words = run(m, capsys, *typed)[1]
    rescued = place_in(words)
    assert f"{out}: the posterior could not be written (No space left" in words
    with monkeypatch.context() as m:
        full(m, tmp_path / "answers")
        words = run(m, capsys, "predict", str(rescued), "--out", str(tmp_path / "answers" / "p.jsonl"))[1]
    assert "the predictions could not be written" in words and len((place_in(words) / "p.jsonl").read_text()) > 10


def test_a_comparison_that_cannot_be_written_is_printed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = tmp_path / "comparison"

    def refused(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(running, "write_file", refused)
    options: dict[str, Any] = {"budget": "1 h", "folds": 2, "methods": ("linear-probe",), "progress": False}
    found = pyro_lift.compare(tiny_tasks(3), tiny_adapter(), out=out, **options)
    assert found.folder is None and found.table
    assert any(f"{out}: the comparison could not be written (No space" in r.getMessage() for r in caplog.records)
    monkeypatch.setattr(comparing, "run", lambda *args, **options: found)
    path = prepare("bert", tmp_path)
    with pytest.raises(OSError, match=r"could not be written\. The table stands above"):
        comparing.command(path, out, CompareSettings())
    assert found.table in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- the places


def failing_in(*folders: Path) -> Callable[[Path], None]:
    def write(place: Path) -> None:
        if any(folder in (place, place.parent) for folder in folders):
            (place / "half").parent.mkdir(exist_ok=True)
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        (place / "whole").write_text("")

    return write


def test_the_next_place_is_tried_and_half_written_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, here, temporary = (tmp_path / name for name in ("beside", "here", "temporary"))
    for folder in (beside, here, temporary):
        folder.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    meant = beside / "run"
    for bad, good in (((), None), ((meant,), beside), ((beside,), here), ((beside, here), temporary)):
        if good is None:
            meant.mkdir()
            write_or_rescue(failing_in(), meant, "it")
            continue
        with pytest.raises(
            OSError, match=rf"{meant}: it could not be written \(Read-only file .*it is in {good}/run-r"
        ):
            write_or_rescue(failing_in(meant, *bad), meant, "it")
        (rescued,) = good.glob("run-rescued-*")
        assert (rescued / "whole").exists()
        shutil.rmtree(rescued)
    with pytest.raises(OSError, match="nor in the temporary folder; it is lost") as raised:
        write_or_rescue(failing_in(meant, beside, here, temporary), meant, "it")
    assert raised.value.errno == errno.EROFS
    assert not list(tmp_path.rglob("run-rescued-*"))


def test_a_prior_that_was_rescued_is_the_prior(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = trained("bert")
    full(monkeypatch, tmp_path / "p")
    with pytest.raises(OSError) as raised:
        write_or_rescue(one.prior.save_pretrained, tmp_path / "p", "the prior")
    assert LiFTPrior.from_pretrained(place_in(str(raised.value)), one.prior.adapter).tasks == one.prior.tasks
