"""Two threads of a process cannot run at once; calls within a run, and loading, go on."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable

import pytest

from pyro_lift.inference.top_level import at_top_level


def in_a_thread(call: Callable[[], None]) -> list[BaseException]:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return raised


@at_top_level()
def run() -> None:
    """Stand for a run."""


@at_top_level(runs=False)
def load() -> None:
    """Stand for loading."""


def test_a_second_thread_is_refused_while_one_runs() -> None:
    with at_top_level():
        run()  # in the same thread
        (error,) = in_a_thread(run)
        assert isinstance(error, RuntimeError) and "Give each run a process of its own" in str(error)
        assert in_a_thread(load) == []
    assert in_a_thread(run) == []


def test_a_run_that_fails_opens_the_door_again() -> None:
    with pytest.raises(KeyError), at_top_level():
        raise KeyError
    assert in_a_thread(run) == []


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork")
def test_a_process_forked_by_another_thread_runs() -> None:
    process = multiprocessing.get_context("fork").Process(target=run)
    with at_top_level():
        assert in_a_thread(process.start) == []
        process.join(30)
    assert process.exitcode == 0
