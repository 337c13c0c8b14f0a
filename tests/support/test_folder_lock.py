"""One run a folder: a second is refused, a killed one leaves nothing in the way, and no locks are no obstacle."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pyro_lift.support import distributed
from pyro_lift.support.folder_lock import LOCK, FolderInUseError, only_run_in

HOLD = """
import sys, time
from pathlib import Path
from pyro_lift.support.folder_lock import only_run_in
with only_run_in(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def holding(folder: Path) -> subprocess.Popen[str]:
    """A process that holds a folder until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_until_the_first_ends_or_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "out" / "run"
    for kill in (False, True):
        first = holding(folder)
        refused = rf"{folder}: another run works in this folder \(process {first.pid} on .*give another folder"
        with pytest.raises(FolderInUseError, match=refused), only_run_in(folder):
            raise AssertionError
        if kill:
            os.kill(first.pid, signal.SIGKILL)
            first.communicate()
            assert first.returncode == -signal.SIGKILL and (folder / LOCK).exists()
        else:
            first.communicate("")
            assert not (tmp_path / "out").exists(), "folders in which nothing was written stay behind"
        with only_run_in(folder):
            (folder / "result").write_text("")
        assert [path.name for path in folder.iterdir()] == ["result"]
        (folder / "result").unlink()
        folder.rmdir()
        folder.parent.rmdir()


def test_so_is_a_second_run_of_the_same_process_but_not_one_beside_or_after_it(tmp_path: Path) -> None:
    with (
        only_run_in(tmp_path / "a"),
        only_run_in(tmp_path / "b"),
        only_run_in(tmp_path / "a" / "checkpoints"),
        pytest.raises(FolderInUseError, match="another run works in this folder"),
        only_run_in(tmp_path / "a"),
    ):
        raise AssertionError
    with pytest.raises(RuntimeError, match="mine"), only_run_in(tmp_path / "a"):
        raise RuntimeError("mine")
    with only_run_in(tmp_path / "a"):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_that_another_run_has_made_anew_is_left_to_it(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with only_run_in(folder):
        (folder / LOCK).rename(tmp_path / "gone")  # as of a folder that was taken away
        with only_run_in(folder):
            theirs = (folder / LOCK).stat().st_ino
            (folder / LOCK).rename(tmp_path / "kept")
        (tmp_path / "kept").rename(folder / LOCK)
    assert (folder / LOCK).stat().st_ino == theirs


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(38, "Function not implemented")])
def test_where_there_are_no_locks_a_run_goes_on_with_a_warning(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import filelock

    def none(self: Any, *args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with caplog.at_level(logging.WARNING, logger="pyro_lift"), only_run_in(tmp_path):
        pass
    (record,) = caplog.records
    assert f"{tmp_path}: cannot be locked" in record.getMessage() and "no second run" in record.getMessage()


def test_of_processes_that_share_a_run_the_first_holds_the_folder_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str | None] = []
    monkeypatch.setattr(distributed, "join", lambda: None)
    monkeypatch.setattr(distributed, "is_first", lambda: True)
    monkeypatch.setattr(distributed, "from_first", lambda value: told.append(value) or value)
    with only_run_in(tmp_path, shared=True):
        assert told == [None]
        monkeypatch.setattr(distributed, "is_first", lambda: False)
        monkeypatch.setattr(distributed, "from_first", lambda value: None)
        with only_run_in(tmp_path, shared=True):  # another process of the same run
            pass
        monkeypatch.setattr(distributed, "from_first", lambda value: "another run works in it")
        with pytest.raises(FolderInUseError, match="another run"), only_run_in(tmp_path, shared=True):
            raise AssertionError
        monkeypatch.setattr(distributed, "is_first", lambda: True)
        monkeypatch.setattr(distributed, "from_first", lambda value: told.append(value) or value)
        with pytest.raises(FolderInUseError, match="another run"), only_run_in(tmp_path, shared=True):
            raise AssertionError
    assert "another run works in this folder" in str(told[-1])
