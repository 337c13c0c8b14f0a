"""A run says each line once, its trials included, and the next run says it again."""

from __future__ import annotations

import logging

import pytest
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import LiFT
from pyro_lift.support.said_once import said_once

log = logging.getLogger("pyro_lift")


def test_lines_are_said_once_in_the_outermost_context_and_again_after_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    for _ in range(2):
        with said_once():
            log.info("%s of %d", "a", 1)
            with said_once():
                log.info("a of 1")
                log.warning("a of 1")
            log.info("a of 1")
            log.info("a of 2")
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == 2 * [
        ("INFO", "a of 1"), ("WARNING", "a of 1"), ("INFO", "a of 2"),
    ]  # fmt: skip
    assert not log.filters


def test_an_error_leaves_no_filter_behind() -> None:
    with pytest.raises(KeyError), said_once():
        raise KeyError
    assert not log.filters


def test_trials_of_a_run_do_not_say_again_what_it_said(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    lift = LiFT(tiny_adapter(), sgd_steps=120, burn_in=2, samples=4, batch_size=6, seed=0)
    lift.meta_train(tiny_tasks(6), progress=False)
    lines = [record.getMessage() for record in caplog.records if record.name == "pyro_lift"]
    assert len(lines) == len(set(lines)) > 0
    assert not log.filters
