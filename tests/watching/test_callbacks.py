"""Callbacks: what they are told, that they change nothing, and that one which fails costs nothing."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from resumed_runs import gibbs
from tiny_methods import SMALL, tiny_adapter, tiny_tasks

from pyro_lift import MCMC, SGLD, LiFT, StreamingMCMC
from pyro_lift.inference.baselines.reptile import Reptile
from pyro_lift.inference.baselines.union_train import UnionTrain, union_train
from pyro_lift.watching import Callback, JsonLines, Run, Step, watch

TASKS = tiny_tasks(3)
SETTINGS: dict[str, Any] = {
    "sgd_steps": 3, "sgd_learning_rate": 1e-3, "burn_in": 3, "samples": 6, "batch_size": 4, "head_scale": None,
}  # fmt: skip


class Kept(Callback):
    """Everything that it is told."""

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.begun: list[Run] = []
        self.steps: list[Step] = []
        self.ended: list[tuple[Run, BaseException | None]] = []
        self.closed = 0

    def begin(self, run: Run) -> None:
        self.begun.append(run)

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def end(self, run: Run, error: BaseException | None) -> None:
        self.ended.append((run, error))

    def close(self) -> None:
        self.closed += 1


class Greedy(Callback):
    """One that draws from every global stream."""

    def step(self, step: Step) -> None:
        torch.randn(3), random.random(), np.random.rand()  # noqa: NPY002


class Failing(Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def step(self, step: Step) -> None:
        if step.step == self.at:
            raise ValueError("the disk of the tracker is full")


def lift(seed: int | None = 0) -> LiFT:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()
    return LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=seed, **SETTINGS)


def test_meta_training_tells_every_visit_its_phase_its_loss_and_its_task() -> None:
    kept = Kept()
    prior = lift().meta_train(TASKS, progress=False, callbacks=[kept])
    (run,) = kept.begun
    assert (run.kind, run.total, run.done) == ("meta-train", 12, 0) and run.settings["samples"] == 6
    assert [step.step for step in kept.steps] == list(range(1, 13))
    assert [step.phase for step in kept.steps] == ["sgd"] * 3 + ["burn-in"] * 3 + ["sample"] * 6
    rows = {task.name: len(task.train) for task in TASKS}
    for step in kept.steps:
        assert sum(rows[name] for name in step.tasks) * step.loss == pytest.approx(-step.log_likelihood)
        assert step.loss > 0.0 and step.step_size > 0.0 and step.grad_norm > 0.0
        assert not step.clipped or step.phase != "sgd"  # Adam needs no limit
        assert np.isnan(step.acceptance) and "acceptance" not in step.measures()
    assert {name for step in kept.steps for name in step.tasks} == set(rows)
    seconds = [step.seconds for step in kept.steps]
    assert seconds == sorted(seconds) and seconds[0] >= 0.0
    assert kept.ended == [(run, None)] and kept.closed == 0

    prior.adapt(TASKS[0], steps=4, draws=2, callbacks=kept)
    prior.adapt_many(TASKS, steps=4, draws=2, callbacks=[kept])
    adapted = [step for step in kept.steps if step.run.kind == "adapt"]
    assert [run.title for run in kept.begun[1:]] == ["adapt/t0", "adapt/t0 .. t2"]
    assert all(step.loss == pytest.approx(-step.log_likelihood / 12) for step in adapted if step.run.name == "t0")
    assert len(kept.ended) == len(kept.begun) == 3


def test_watching_changes_no_draw_and_no_stream(tmp_path: Path) -> None:
    results = []
    for callbacks in ([], [Greedy(), Kept(), JsonLines(tmp_path / "run.jsonl")]):
        torch.manual_seed(4)  # without a seed the chains begin at the global stream
        random.seed(4)
        np.random.seed(4)  # noqa: NPY002
        prior = lift(seed=None).meta_train(TASKS, progress=False, callbacks=callbacks)
        posterior = prior.adapt(TASKS[1], steps=6, draws=2, callbacks=callbacks)
        numbers = (torch.rand(()), torch.tensor(random.random()), torch.tensor(np.random.rand()))  # noqa: NPY002
        results.append((prior.mixture.moments.mean, posterior.thetas, *numbers))
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


def test_a_callback_that_fails_is_left_out_and_the_run_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    kept, beside = Kept(), Kept()
    with caplog.at_level(logging.WARNING, "pyro_lift"):
        watched = lift().meta_train(TASKS, progress=False, callbacks=[beside, Failing(5), kept])
    (record,) = [record for record in caplog.records if "callback" in record.message]
    assert "failed at step 5 of meta-train and is left out from now on; the run goes on" in record.message
    assert "ValueError: the disk of the tracker is full" in record.message
    assert len(kept.steps) == len(beside.steps) == 12
    plain = lift().meta_train(TASKS, progress=False)
    assert torch.equal(plain.mixture.moments.mean, watched.mixture.moments.mean)


def test_an_interrupt_goes_through_and_the_others_are_told_of_it() -> None:
    kept = Kept()

    def stop(step: Step) -> None:
        if step.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lift().meta_train(TASKS, progress=False, callbacks=[kept, stop])
    assert len(kept.steps) == 7 and isinstance(kept.ended[0][1], KeyboardInterrupt)


def test_on_step_works_as_before_and_what_it_raises_goes_through() -> None:
    calls: list[int] = []
    lift().meta_train(TASKS, progress=False, on_step=lambda: calls.append(1))
    assert len(calls) == 12

    def stop() -> None:
        raise TimeoutError("out of time")

    kept = Kept()
    with pytest.raises(TimeoutError, match="out of time"):
        lift().meta_train(TASKS, progress=False, on_step=stop, callbacks=[kept])
    assert isinstance(kept.ended[0][1], TimeoutError)
    with pytest.raises(TypeError, match="no argument 'on_steps'"):
        lift().meta_train(TASKS, on_steps=stop)
    with pytest.raises(TypeError, match=r"callbacks: 3 is neither .* nor a function of a step"):
        lift().meta_train(TASKS, callbacks=[3])


def test_a_callback_is_told_of_every_so_many_steps_and_of_the_last() -> None:
    kept = Kept(every=5)
    lift().meta_train(TASKS, progress=False, callbacks=[kept])
    assert [step.step for step in kept.steps] == [5, 10, 12]


def test_json_lines_are_appended_to_by_a_run_that_goes_on(tmp_path: Path) -> None:
    file, folder = tmp_path / "logs" / "run.jsonl", tmp_path / "saved"

    def stop(step: Step) -> None:
        if step.step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lift().meta_train(
            TASKS, progress=False, checkpoint=folder, checkpoint_every=5, callbacks=[JsonLines(file), stop]
        )
    resumed = lift().meta_train(TASKS, progress=False, resume=folder, checkpoint_every=5, callbacks=[JsonLines(file)])
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    events = [(line["event"], line.get("done"), line.get("error")) for line in lines if "event" in line]
    assert events == [("begin", 0, None), ("end", None, "KeyboardInterrupt: "), ("begin", 5, None), ("end", None, None)]
    steps = [line["step"] for line in lines if "step" in line]
    assert steps == [*range(1, 9), *range(6, 13)]
    by_step = {line["step"]: line for line in lines if "step" in line}  # the later line is the run's
    plain, whole = Kept(), lift().meta_train
    assert torch.equal(
        whole(TASKS, progress=False, callbacks=[plain]).mixture.moments.mean, resumed.mixture.moments.mean
    )
    for step in plain.steps:
        line = by_step[step.step]
        assert line["loss"] == step.loss and line["tasks"] == list(step.tasks) and line["phase"] == step.phase
        assert line["acceptance"] is None and line["run"] == "meta-train"


def test_a_file_that_cannot_be_written_is_refused_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="expected a file of JSON lines"):
        JsonLines(tmp_path)
    (tmp_path / "a").write_text("")
    with pytest.raises(OSError):
        JsonLines(tmp_path / "a" / "run.jsonl")


def test_a_tuner_tells_its_trials_and_a_meta_training_its_trial_of_joint_training() -> None:
    kept = Kept()
    few: dict[str, Any] = {**SETTINGS, "sgd_steps": 2, "burn_in": 2, "samples": 4}
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    tasks = tiny_tasks(4)
    single = LiFT(net.double(), peft.LoraConfig(r=1, target_modules=["0"]), seed=0, **few)
    single.tune(tasks, budget=0.5, trainings=1, progress=False, callbacks=[kept])
    assert kept.begun[0].kind == "tune" and len(kept.steps) >= 1
    assert kept.steps[0].phase.startswith("rung 1: ") and kept.steps[0].loss > 0.0


def test_baselines_tell_of_their_steps() -> None:
    adapter, tasks, kept = tiny_adapter(), tiny_tasks(3), Kept()
    with watch(kept, "union-train", total=7, rate=1e-3) as on_step:
        watched = union_train(adapter, tasks, SMALL, steps=7, on_step=on_step)
    assert torch.equal(watched, union_train(adapter, tasks, SMALL, steps=7))
    assert [step.tasks for step in kept.steps] == [(f"t{k % 3}",) for k in range(7)]
    assert all(step.loss > 0.0 and step.step_size == 3e-3 and step.phase == "joint" for step in kept.steps)
    assert kept.begun[0].settings == {"rate": 1e-3} and kept.begun[0].total == 7
    for method in (UnionTrain(adapter, SMALL), Reptile(adapter, SMALL)):
        calls: list[int] = []
        method.meta_train(tasks, on_step=lambda calls=calls: calls.append(1))  # type: ignore[misc]
        kept.steps.clear()
        with watch(kept, type(method).__name__) as on_step:
            method.meta_train(tasks, on_step=on_step)
        assert len(kept.steps) == len(calls) > 0


@pytest.mark.parametrize("streaming", [False, True])
def test_chains_of_any_kernel_are_watched_beside_the_callers_hook(streaming: bool, tmp_path: Path) -> None:
    kept, hooked = Kept(), []
    cls: Any = StreamingMCMC if streaming else MCMC
    options: dict[str, Any] = {"num_samples": 5, "warmup_steps": 8, "disable_progbar": True}
    plain = cls(gibbs(seed=1), **options)
    plain.run()
    mcmc = cls(gibbs(seed=1), hook_fn=lambda *where: hooked.append(where), **options)
    mcmc.run(callbacks=[kept], checkpoint=tmp_path)
    assert len(hooked) == len(kept.steps) == 13 and kept.begun[0].settings == {"kernel": "SGLDGibbs"}
    assert {step.phase for step in kept.steps} == {"sgd", "burn-in", "sample"}
    assert all(step.log_likelihood != 0.0 and np.isnan(step.loss) for step in kept.steps)
    if not streaming:
        assert torch.equal(plain.get_samples()["phi"], mcmc.get_samples()["phi"])
    again = cls(gibbs(seed=1), **options)
    again.run(callbacks=[kept], resume=tmp_path)
    assert len(kept.steps) == 13 and kept.begun[1].done == 13


def test_plain_kernels_and_chains_elsewhere() -> None:
    import pyro.distributions as dist
    from pyro import sample
    from pyro.infer import NUTS

    def model() -> None:
        sample("x", dist.Normal(0.0, 1.0))

    for kernel in (SGLD(model, step_size=0.1, seed=0), NUTS(model)):
        kept = Kept()
        MCMC(kernel, num_samples=3, warmup_steps=2, disable_progbar=True).run(callbacks=kept)
        assert [step.phase for step in kept.steps] == ["burn-in"] * 2 + ["sample"] * 3
    apart: dict[str, Any] = {"num_samples": 3, "warmup_steps": 2, "num_chains": 2, "disable_progbar": True}
    with pytest.raises(ValueError, match="processes of their own"):
        StreamingMCMC(SGLD(model, step_size=0.1, seed=0), mp_context="spawn", **apart).run(callbacks=[Kept()])
    kept = Kept()
    StreamingMCMC(SGLD(model, step_size=0.1, seed=0), **apart).run(callbacks=kept)  # one after another
    assert [step.step for step in kept.steps] == list(range(1, 11)) and kept.begun[0].total == 10
