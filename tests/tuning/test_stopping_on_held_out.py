"""A chain that ends where held-out tasks no longer gain: when it ends, what it keeps, and a run that goes on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.streaming import CountMeanStats, StatsOfDict
from tiny_methods import tiny_adapter, tiny_tasks
from torch import Tensor

import pyro_lift.lift as lifting
from pyro_lift import SGLD, AdaptSettings, LiFT, LiFTSettings, StreamingMCMC
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.tuning.early_stopping import HeldOutLooks, Look, with_held_out

SMALL = LiFTSettings(sgd_steps=4, burn_in=4, samples=40, batch_size=6, stop_every=4, stop_patience=2)
ADAPT = AdaptSettings(steps=8, draws=2)


class Draws:
    """A summary that counts."""

    def __init__(self, count: int = 0) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "tensor": torch.tensor([self.count])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = int(state["tensor"][0])


class Chain:
    """A made-up chain whose losses at its looks are known."""

    def __init__(self, losses: Sequence[float], folder: Path | None = None, patience: int = 2, name: str = "a") -> None:
        self.summary, self.losses, self.asked = Draws(), list(losses), 0
        session = None if folder is None else Session(folder, config={"name": name})
        self.looks = HeldOutLooks(self._seen, self._loss, every=5, patience=patience, session=session)

    def _seen(self) -> tuple[Draws, dict[str, Tensor]]:
        return self.summary, {"theta": torch.tensor([float(self.summary.count)])}

    def _loss(self, summary: Draws, moments: dict[str, Tensor]) -> float:
        self.asked += 1
        assert summary is not self.summary and summary.count == self.summary.count
        return self.losses[self.summary.count // 5 - 1]

    def run(self, first: int = 0, last: int = 40) -> int:
        """Return after how many draws it ended."""
        for draws in range(first + 1, last + 1):
            self.summary.count = draws
            if self.looks.ends(draws):
                return draws
        return last


def test_it_ends_after_so_many_looks_without_a_better_one_and_keeps_the_best() -> None:
    chain = Chain([0.9, 0.5, 0.6, 0.5, 0.1, 0.0, 0.0, 0.0])
    assert chain.run() == 20  # at 15 and 20 nothing was better than at 10; an equal one is none
    kept = chain.looks.kept()
    assert kept is not None and kept[0].count == 10 and float(kept[1]["theta"]) == 10.0
    assert chain.looks.best_look == Look(10, 0.5)


def test_a_chain_that_gains_goes_on_to_its_end() -> None:
    chain = Chain([0.9 - 0.1 * k for k in range(8)])
    assert chain.run() == 40 and chain.asked == 8
    kept = chain.looks.kept()
    assert kept is not None and kept[0].count == 40


def test_a_run_that_goes_on_looks_at_nothing_twice_and_ends_where_it_would_have(tmp_path: Path) -> None:
    losses = [0.9, 0.5, 0.6, 0.7, 0.1, 0.0, 0.0, 0.0]
    first = Chain(losses, tmp_path)
    assert first.run(last=17) == 17
    again = Chain(losses, tmp_path)  # from a checkpoint at 12, before the last look
    assert again.run(first=12) == 20 and again.asked == 1
    kept = again.looks.kept()
    assert kept is not None and kept[0].count == 10 and float(kept[1]["theta"]) == 10.0
    finished = Chain(losses, tmp_path)
    assert finished.run(first=19) == 20 and finished.asked == 0
    other = Chain(losses, tmp_path, name="another run")
    assert other.looks.looks == [] and other.run() == 20 and other.asked == 4


def test_damaged_looks_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Chain([0.9, 0.5, 0.6], tmp_path).run(last=12)
    path = tmp_path / "looks" / "looks.json"
    path.write_text(path.read_text().replace("0.5", "0.4"))
    assert Chain([0.9, 0.5, 0.6], tmp_path).looks.looks == []
    assert "looked at anew" in caplog.text


def test_a_fifth_is_held_out_and_judged_by_rows_it_does_not_learn_from() -> None:
    learned, held_out = with_held_out(tiny_tasks(6))
    assert [task.name for task in held_out] == ["t0", "t5"]
    assert [task.name for task in learned] == ["t1", "t2", "t3", "t4"]
    assert all(task.test is not None for task in held_out)
    with pytest.raises(ValueError, match="takes three or more"):
        with_held_out(tiny_tasks(2))


# ------------------------------------------------------------------------------------------------ a running chain


def normal() -> None:
    pyro.sample("x", dist.Normal(torch.zeros(2), 1.0).to_event(1))


def streaming(samples: int = 30) -> StreamingMCMC:
    statistics = StatsOfDict(default=CountMeanStats)
    kernel = SGLD(normal, step_size=0.1, seed=0)
    return StreamingMCMC(kernel, samples, 5, statistics=statistics, disable_progbar=True)


def test_a_chain_is_told_to_end_and_its_draws_and_diagnostics_are_those_of_a_shorter_one() -> None:
    told: list[int] = []

    def until(draws: int) -> bool:
        told.append(draws)
        return draws == 12

    ended, shorter = streaming(), streaming(12)
    ended.run(until=until)
    shorter.run()
    assert told == list(range(1, 13)) and ended.num_samples == 12
    first, second = (mcmc.get_statistics(group_by_chain=False)["x"] for mcmc in (ended, shorter))
    assert first["count"] == second["count"] == 12
    assert torch.equal(first["mean"], second["mean"])
    assert ended.diagnostics().keys() == shorter.diagnostics().keys()


def test_a_saved_chain_that_ended_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    streaming().run(checkpoint=tmp_path, checkpoint_every=5, until=lambda draws: draws == 12)
    again = streaming()
    told: list[int] = []
    again.run(resume=tmp_path, until=lambda draws: bool(told.append(draws)) or draws == 12)
    assert told == [11, 12]  # saved after ten draws: the twelfth's turn to be saved never came
    assert again.get_statistics(group_by_chain=False)["x"]["count"] == 12


# ------------------------------------------------------------------------------------------------ LiFT


def losses_of(monkeypatch: pytest.MonkeyPatch, losses: Sequence[float]) -> Callable[[], int]:
    """Have held-out tasks lose what is given, look by look; return the number of looks made."""
    made: list[float] = []

    def loss(posteriors: Sequence[Any], tasks: Sequence[Any]) -> float:
        assert len(posteriors) == len(tasks) == 1 and tasks[0].name == "t0"
        made.append(losses[len(made)])
        return made[-1]

    monkeypatch.setattr(lifting, "mean_loss", loss)
    return lambda: len(made)


def test_meta_training_stops_where_held_out_tasks_no_longer_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    looks = losses_of(monkeypatch, [0.9, 0.5, 0.7, 0.8])
    lift = LiFT(tiny_adapter(), settings=SMALL, adapt=ADAPT, seed=0)
    prior = lift.meta_train(tiny_tasks(4), progress=False)
    assert looks() == 4 and prior.mcmc.num_samples == 16
    assert prior.tasks == ("t1", "t2", "t3")
    assert prior.results["draws"] == 8 and prior.results["held-out loss"] == 0.5
    whole = LiFT(tiny_adapter(), settings=SMALL, adapt=ADAPT, seed=0)
    monkeypatch.undo()
    losses_of(monkeypatch, [0.5, 0.6, 0.7])
    other = whole.meta_train(tiny_tasks(4), progress=False)
    assert other.results["draws"] == 4
    assert not torch.equal(other.mixture.get().mean, prior.mixture.get().mean)


def test_a_run_that_was_killed_stops_where_it_would_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def prior_of(losses: Sequence[float], **where: Any) -> Any:
        losses_of(monkeypatch, losses)
        return LiFT(tiny_adapter(), settings=SMALL, adapt=ADAPT, seed=0).meta_train(
            tiny_tasks(4), progress=False, **where
        )

    whole = prior_of([0.9, 0.5, 0.7, 0.8])

    class KilledError(Exception):
        pass

    made = 0

    def kill() -> None:
        nonlocal made
        made += 1
        if made == 4 + 4 + 11:
            raise KilledError

    with pytest.raises(KilledError):
        prior_of([0.9, 0.5], checkpoint=tmp_path, checkpoint_every=6, on_step=kill)
    again = prior_of([0.7, 0.8], resume=tmp_path)
    assert torch.equal(again.mixture.get().mean, whole.mixture.get().mean)
    assert again.results == whole.results


def test_the_score_is_that_of_rows_and_tasks_that_were_not_seen() -> None:
    prior = LiFT(tiny_adapter(), settings=SMALL, adapt=ADAPT, seed=0).meta_train(tiny_tasks(5), progress=False)
    held_out = [task for task in tiny_tasks(5) if task.name not in prior.tasks]
    assert [task.name for task in held_out] == ["t0"]
    posterior = prior.adapt(held_out[0], seed=0)
    assert held_out[0].test is not None
    p = posterior.predict(held_out[0].test)
    loss = -float(p.gather(1, held_out[0].test.target.unsqueeze(1)).log().mean())
    assert math.isclose(loss, prior.results["held-out loss"], rel_tol=1e-6)


def test_processes_that_share_a_visit_cannot_stop_early() -> None:
    with pytest.raises(ValueError, match="ranks_block_size"):
        LiFTSettings(stop_every=10, ranks_block_size=2)
