"""The chain's bar: what it shows, and that it may be hidden."""

from __future__ import annotations

from typing import Any

import pytest

from pyro_lift.inference.progress import chain_bar


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
