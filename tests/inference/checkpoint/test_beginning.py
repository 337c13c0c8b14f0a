"""A run that is to be gone on with and was never saved: it begins, and a misspelt folder is warned of."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from programs import vectorised

from pyro_lift import MCMC, SGLDGibbs
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.beginning import check_folder
from pyro_lift.inference.checkpoint.session import Session


def saved(folder: Path) -> None:
    (folder / "step-000000010").mkdir(parents=True)


def said(folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[int, str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="pyro_lift"):
        Session(folder, resume=True)
    (record,) = caplog.records
    return record.levelno, record.getMessage()


def test_where_no_run_is_near_it_is_said_that_one_begins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    level, words = said(tmp_path / "runs" / "first", caplog)
    assert level == logging.INFO
    assert words == f"{tmp_path / 'runs' / 'first'}: no run is saved in it; one begins, and is saved there."


def test_a_misspelt_folder_is_warned_of_with_the_nearest(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "other")
    saved(tmp_path / "radon-gibbs")
    level, words = said(tmp_path / "radon_gibs", caplog)
    assert level == logging.WARNING
    assert f"Did you mean {tmp_path / 'radon-gibbs'}, which holds a run (2 runs are saved near it)?" in words


def test_so_is_one_whose_parent_is_misspelt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "out" / "checkpoints")
    level, words = said(tmp_path / "outt" / "checkpoints", caplog)
    assert level == logging.WARNING and f"Did you mean {tmp_path / 'out' / 'checkpoints'}, which" in words


def test_so_is_the_folder_of_a_prior_with_a_run_inside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    saved(tmp_path / "out" / "checkpoints")
    level, words = said(tmp_path / "out", caplog)
    assert level == logging.WARNING and f"Did you mean {tmp_path / 'out' / 'checkpoints'}, which" in words


def test_a_relative_folder_is_answered_by_a_relative_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "Did you mean run, which" in said(Path("rum"), caplog)[1]


def test_a_run_that_has_not_come_to_its_first_checkpoint_is_itself(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "run")
    (tmp_path / "new" / "joint").mkdir(parents=True)
    assert said(tmp_path / "new", caplog)[0] == logging.INFO


@pytest.mark.parametrize("resume", [True, False])
def test_a_checkpoint_and_a_file_are_no_folder_of_a_run(resume: bool, tmp_path: Path) -> None:
    MCMC(SGLDGibbs(vectorised(), seed=0), 3, 0, disable_progbar=True).run(checkpoint=tmp_path / "run")
    (one,) = (tmp_path / "run").iterdir()
    with pytest.raises(
        ValueError, match=f"is one checkpoint of a run. Give the folder that it stands in: {one.parent}"
    ):
        Session(one, resume=resume)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file, and a run is saved in a folder"):
        Session(tmp_path / "file", resume=resume)


def test_what_a_run_did_before_its_chain_is_no_misspelt_folder(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    saved(tmp_path / "near")
    WorkBefore(tmp_path / "new").data("joint", lambda: {"rate": 0.1})
    level, words = said(tmp_path / "new", caplog)
    assert level == logging.INFO and "had not come to its chain" in words and "no run is saved" not in words


def test_a_folder_below_a_file_or_a_link_to_nowhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"file: is a file, and .*file/x/y cannot lie below it: give another"):
        check_folder(tmp_path / "file" / "x" / "y")
    with pytest.raises(ValueError, match="link: is a link to nowhere"):
        check_folder(tmp_path / "link")
    check_folder(tmp_path / "new" / "run")
