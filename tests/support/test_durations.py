"""Lengths of time as people write them."""

from __future__ import annotations

import pytest

from pyro_lift.support.durations import format_duration, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("10 min", 600), ("10min", 600), ("10 minutes", 600), ("1.5 h", 5400), ("1 h 30 min", 5400), ("90 s", 90),
     ("45", 45), (45, 45), (" 2 Hours ", 7200), ("1h30m", 5400), ("30 sec", 30)],
)  # fmt: skip
def test_common_forms_are_read(text: str | float, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "ten minutes", "10 parsecs", "-3 min", "0 s", "min", 0, -1.0])
def test_others_are_refused(text: str | float) -> None:
    with pytest.raises(ValueError, match="budget"):
        seconds_of(text)


@pytest.mark.parametrize("seconds", [1, 59, 61, 600, 3599, 3600, 5400])
def test_what_is_written_is_read_again(seconds: float) -> None:
    assert seconds_of(format_duration(seconds)) == pytest.approx(seconds, abs=30 if seconds > 3600 else 0.5)
