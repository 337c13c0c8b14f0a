"""Spans: what a stopwatch reads of them, what torch's profiler shows, and that they cost next to nothing."""

from __future__ import annotations

import time

import pytest
import torch

from pyro_lift.support.spans import Stopwatch, span


def work(seconds: float) -> None:
    """Keep the processor busy."""
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_a_stopwatch_takes_inner_spans_out_of_outer_ones() -> None:
    @span("inner")
    def inner() -> None:
        work(0.05)

    with Stopwatch() as watch:
        for _ in range(2):
            with span("outer"):
                inner()
    assert watch.seconds["inner"] >= 0.1 > 0.04 > watch.seconds["outer"]
    inner()
    assert watch.seconds["inner"] < 0.14


def test_a_function_that_calls_itself_is_counted_once() -> None:
    @span("count")
    def count(n: int) -> None:
        work(0.01)
        if n:
            count(n - 1)

    with Stopwatch() as watch:
        count(4)
    assert 0.05 <= watch.seconds["count"] < 0.09


def test_a_span_that_fails_is_closed() -> None:
    watch = Stopwatch()
    with watch, pytest.raises(ZeroDivisionError), span("outer"), span("inner"):
        _ = 1 / 0
    assert set(watch.seconds) == {"outer", "inner"} and watch._open == []


def test_torchs_profiler_shows_the_spans() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile, span("pyro_lift.theta"):
        torch.ones(3).sum()
    assert "pyro_lift.theta" in {event.key for event in profile.key_averages()}
