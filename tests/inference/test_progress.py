"""The chain's bar: what it shows, and that it may be hidden."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
from tiny_methods import tiny_adapter, tiny_tasks

from pyro_lift import MCMC, LiFT, SGLDGibbs
from pyro_lift.inference.progress import chain_bar
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers


class Kernel:
    def logging(self) -> dict[str, str]:
        return {"loglik": "-2.5e+01", "step": "4.0e-03"}


def run(show: bool) -> None:
    with chain_bar(4, "chain", show) as hook:
        for i in range(4):
            hook(Kernel(), None, "sample", i)


def test_the_bar_shows_loss_step_size_and_time_left(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    run(show=True)
    shown = capsys.readouterr().err
    assert "chain: 100%" in shown and "loss=2.500e+01, step=4.0e-03" in shown
    assert "<00:00" in shown  # tqdm's time left


def test_a_hidden_bar_prints_nothing(capsys: Any) -> None:
    run(show=False)
    assert capsys.readouterr().err == ""


def test_in_place_of_a_bar_the_log_says_how_far_a_long_chain_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock = iter([0.0, 30.0, 61.0, 90.0, 400.0])
    monkeypatch.setattr("pyro_lift.inference.progress.time.monotonic", lambda: next(clock))
    with caplog.at_level("INFO", "pyro_lift"):
        run(show=False)
    # After two of four steps in 61 seconds; not before a minute has gone by, nor at the end.
    assert [record.getMessage() for record in caplog.records] == ["chain: step 2 of 4, loss 2.500e+01, 1 min 1 s left"]


def test_beside_a_bar_the_log_says_nothing(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr("pyro_lift.inference.progress.LOGGED_EVERY", 0.0)
    with caplog.at_level("INFO", "pyro_lift"):
        run(show=True)
    assert not caplog.records


class Visit(NamedTuple):
    tasks: tuple[int, ...]


class RareKernel(Kernel):
    """Reads its numbers at the first step alone, while visits go on to tasks of other sizes."""

    logged_at = 0
    last_visit = Visit((0,))


def test_a_loss_that_was_read_before_is_not_divided_by_the_rows_of_another_visit(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    kernel = RareKernel()
    watchers = Watchers((), Run("chain"), [10, 1000], ["a", "b"])
    with chain_bar(2, "chain", on_step=watchers) as hook:
        hook(kernel, None, "sample", 0)
        kernel.last_visit = Visit((1,))
        hook(kernel, None, "sample", 1)
    shown = capsys.readouterr().err
    assert "loss=2.500e+00" in shown and "2.500e-02" not in shown


def test_on_the_host_the_loss_is_that_of_the_last_visit() -> None:
    lift = LiFT(tiny_adapter(), sgd_steps=0, burn_in=4, samples=8, seed=0)
    seen: list[tuple[float, float]] = []

    def look(kernel: SGLDGibbs) -> None:
        seen.append((float(kernel.logging()["loglik"]), float(kernel.last_visit.log_likelihood)))  # type: ignore[union-attr]

    kernel = lift.kernel(lift.program(tiny_tasks(3)))
    MCMC(kernel, num_samples=6, disable_progbar=True, hook_fn=lambda kernel, *_: look(kernel)).run()
    assert len({shown for shown, _ in seen}) > 2
    assert all(shown == pytest.approx(true, rel=1e-3) for shown, true in seen)
