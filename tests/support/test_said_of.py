"""Words that say which of two ways a message of the log is of."""

from __future__ import annotations

import logging

import pytest

from pyro_lift.support.said_of import said_of

LOG = logging.getLogger("pyro_lift")


def test_words_stand_in_front_of_what_is_said_meanwhile(caplog: pytest.LogCaptureFixture) -> None:
    with said_of("on trial, one way"):
        LOG.warning("%d%% of it", 5)
    LOG.warning("after")
    with said_of(""):
        LOG.warning("nothing in front")
    said = [record.getMessage() for record in caplog.records]
    assert said == ["on trial, one way: 5% of it", "after", "nothing in front"]


def test_they_go_with_an_error_too() -> None:
    with pytest.raises(ValueError, match="stopped"), said_of("on trial"):
        raise ValueError("stopped")
    assert not LOG.filters
