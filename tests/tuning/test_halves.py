"""Joint training on trial: it goes on where tasks share something, and leaves phi alone where they share nothing."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from resumed_runs import stops_at
from scipy.stats import ttest_rel
from torch import Tensor

from pyro_lift import LiFT, Task
from pyro_lift.defaults import widened
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.signals import RunStopped
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.weight_scales import by_weight
from pyro_lift.tuning import halves
from pyro_lift.tuning.halves import (
    PLAIN,
    Joint,
    Vectors,
    has_trial,
    is_above_zero,
    joint_on_trial,
    log_probs_at,
    steps_beside_trial,
    trial_steps,
)
from pyro_lift.tuning.joint_run import Standing
from pyro_lift.watching.steps import Step


def adapter() -> RandomAdapter:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def tasks(shared: bool, number: int = 8, rows: int = 24) -> list[Task]:
    """Labels by one map that all tasks have in common, or by one of each task's own."""
    generator = torch.Generator().manual_seed(1)
    common = torch.randn(6, 3, generator=generator)
    made = []
    for k in range(number):
        x = torch.randn(rows, 6, generator=generator)
        own = torch.randn(6, 3, generator=generator)
        made.append(Task(f"t{k}", (x, (x @ (common if shared else own)).argmax(-1)), num_classes=3))
    return made


OPTIONS: dict[str, Any] = {"sgd_steps": 200, "burn_in": 5, "samples": 10, "seed": 0, "head": "shared"}


def test_joint_training_goes_on_where_tasks_share_their_labels() -> None:
    prior = LiFT(adapter(), **OPTIONS).meta_train(tasks(shared=True), progress=False)  # type: ignore[arg-type]
    assert prior.results["gain of joint training, nats a row"] > 0.1
    assert prior.settings.sgd_steps == 200


def test_phi_stays_at_the_untouched_network_where_tasks_share_nothing(caplog: pytest.LogCaptureFixture) -> None:
    lift = LiFT(adapter(), **OPTIONS)  # type: ignore[arg-type]
    with caplog.at_level("INFO", "pyro_lift"):
        joint = lift._joint(tasks(shared=False), None, False, None)
    assert joint is not None and not joint.helps and joint.steps == 0
    assert "phi stays at the untouched network" in caplog.text
    assert lift._after(joint).settings.translation == "none"


def test_a_rate_that_is_given_is_not_put_on_trial() -> None:
    lift = LiFT(adapter(), sgd_learning_rate=0.01, **OPTIONS)  # type: ignore[arg-type]
    assert lift._joint(tasks(shared=False), None, False, None) is None


@pytest.mark.parametrize(
    ("steps", "number", "each"), [(600, 20, 50), (79, 20, 0), (80, 4, 20), (160, 4, 20), (600, 3, 0)]
)
def test_a_trial_needs_steps_and_tasks(steps: int, number: int, each: int) -> None:
    assert trial_steps(steps, number) == each


@pytest.mark.parametrize(
    ("gradients", "number", "steps"),
    [(900, 20, 600), (360, 4, 240), (359, 4, 239), (240, 4, 200), (120, 20, 80), (119, 20, 79)],
)
def test_a_trial_and_what_it_is_about_fit_into_given_gradients(gradients: int, number: int, steps: int) -> None:
    assert steps_beside_trial(gradients, number) == steps
    assert steps_beside_trial(gradients, 3) == gradients  # there is none


@pytest.mark.parametrize(("gain", "helps"), [(0.5, True), (-0.5, False)])
def test_a_short_training_is_tried_at_one_rate(gain: float, helps: bool) -> None:
    stand_in = Halves({0.1: gain})
    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 120, stand_in.begin, stand_in.score)
    assert joint.helps == helps and joint.steps == (120 if helps else 0)
    assert [steps for *_, steps in stand_in.trained] == [20, 20]


class Halves:
    """Vectors that say which half they were trained on, at which rate."""

    def __init__(self, gains: dict[float, float]) -> None:
        self.gains, self.trained = gains, list[tuple[tuple[str, ...], float, int]]()

    def begin(self, half: Sequence[Task], rate: float, most: int) -> Any:
        def to(steps: int) -> Standing:
            assert steps <= most
            self.trained.append((tuple(task.name for task in half), rate, steps))
            return Standing(torch.tensor([self.gains[rate], float(half[0].name[1:]) + 1.0]), {})

        return SimpleNamespace(to=to)

    def score(self, vector: Tensor, half: Sequence[Task]) -> Tensor:
        if vector[1]:  # trained: on the other half, never on this one
            assert f"t{int(vector[1]) - 1}" not in [task.name for task in half]
        noise = torch.tensor([0.01 * (int(task.name[1:]) % 3 - 1) for task in half], dtype=torch.float64)
        return vector[0].double() * (1.0 + noise)


def test_each_task_is_judged_by_the_half_that_it_is_not_in_and_the_test_is_the_paired_one() -> None:
    stand_in, made = Halves({0.1: 0.5, 0.1 * 3.0: 0.4}), tasks(shared=True)
    joint = joint_on_trial(made, torch.zeros(2), 0.1, 300, stand_in.begin, stand_in.score)
    names = [f"t{k}" for k in range(8)]
    assert stand_in.trained[:2] == [(tuple(names[0::2]), 0.1, 25), (tuple(names[1::2]), 0.1, 25)]
    assert [(rate, steps) for _, rate, steps in stand_in.trained[2:]] == [(0.1 * 3.0, 50)] * 2
    after = torch.cat([stand_in.score(torch.tensor([0.5, 0.0]), made[k::2]) for k in range(2)])
    assert joint.gain == pytest.approx(float(after.mean()))
    assert joint.gain / joint.error == pytest.approx(ttest_rel(after, torch.zeros(8)).statistic)
    assert joint.helps and joint.steps == 300 and joint.rate == 0.1


def test_a_smaller_rate_is_tried_before_joint_training_is_given_up() -> None:
    stand_in = Halves({0.1: -0.5, 0.1 * 0.2: 0.2})
    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, stand_in.score)
    assert joint.helps and joint.rate == pytest.approx(0.02) and joint.steps == 320
    stand_in = Halves({0.1: 0.2, 0.1 * 3.0: 0.5})  # and a larger one where it helps
    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, stand_in.score)
    assert joint.helps and joint.rate == pytest.approx(0.3) and joint.gain == pytest.approx(0.5, rel=0.02)
    stand_in = Halves({0.1: 0.5, 0.1 * 3.0: 0.498})  # and where it gains as much as can be told
    spread = 0.1 * torch.tensor([1.0, -1.0] * 2, dtype=torch.float64)

    def unsteady(vector: Tensor, half: Sequence[Task]) -> Tensor:
        return stand_in.score(vector, half) + (spread if 0.49 < vector[0] < 0.499 else 0.0)

    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, unsteady)
    assert joint.helps and joint.rate == pytest.approx(0.3)
    stand_in = Halves({0.1: -0.5, 0.1 * 0.2: -0.2})
    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, stand_in.score)
    assert not joint.helps and joint.steps == 0


def test_a_larger_rate_that_gains_more_by_chance_alone_is_not_taken() -> None:
    stand_in = Halves({0.1: 0.2, 0.1 * 3.0: 0.5})

    def score(vector: Tensor, half: Sequence[Task]) -> Tensor:
        spread = 5.0 * torch.tensor([(-1.0) ** k for k in range(len(half))], dtype=torch.float64)
        return stand_in.score(vector, half) + (spread if vector[0] > 0.4 else 0.0)

    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, score)
    assert joint.helps and joint.rate == 0.1 and joint.steps == 320


def test_where_rows_are_seen_seldom_a_plain_gain_ends_the_trial_at_its_first_look() -> None:
    stand_in, made = Halves({0.1: 0.5}), tasks(shared=True)
    joint = joint_on_trial(made, torch.zeros(2), 0.1, 600, stand_in.begin, stand_in.score, of=Vectors(few=True))
    assert [steps for *_, steps in stand_in.trained] == [5, 5] and joint.spent == 10
    assert joint.helps and joint.rate == 0.1 and joint.steps == 600 and len(joint.tried) == 1


@pytest.mark.parametrize(("few", "lengths", "spent"), [(True, [5, 20, 50, 100], 300), (False, [50, 100], 300)])
def test_a_gain_that_is_not_plain_is_looked_at_after_all_steps(few: bool, lengths: list[int], spent: int) -> None:
    stand_in = Halves({0.1: 0.5, 0.1 * 3.0: 0.2})
    spread = 0.4 * torch.tensor([1.0, -1.0] * 2, dtype=torch.float64)  # significant at 5 %, not at half of a per mille

    def unsteady(vector: Tensor, half: Sequence[Task]) -> Tensor:
        return stand_in.score(vector, half) + (spread if vector[1] else 0.0)

    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 600, stand_in.begin, unsteady, of=Vectors(few=few))
    assert joint.helps and not is_above_zero(0.5 + torch.cat([spread, spread]), PLAIN)
    assert [steps for *_, steps in stand_in.trained] == [x for x in lengths for _ in range(2)]
    assert joint.spent == spent


@pytest.mark.parametrize(
    ("gains", "steps", "rate"),
    [
        ({0.3: 0.5}, [20, 20], 0.3),  # plain at the first look: nothing else is tried
        ({0.3: -0.1, 0.1: 0.5}, [20, 20, 50, 50, 25, 25], 0.1),
        ({0.3: -0.1, 0.1: -0.1, 0.02: 0.2}, [20, 20, 50, 50, 25, 25, 25, 25], 0.02),
        ({0.3: -0.1, 0.1: -0.1, 0.02: -0.2}, [20, 20, 50, 50, 25, 25, 25, 25], None),
    ],
)
def test_where_steps_are_scarce_the_larger_rate_is_tried_first(
    gains: dict[float, float], steps: list[int], rate: float | None, caplog: pytest.LogCaptureFixture
) -> None:
    stand_in = Halves({0.1 * {0.3: 3.0, 0.1: 1.0, 0.02: 0.2}[rate]: gain for rate, gain in gains.items()})
    scarce: dict[str, Any] = {"of": Vectors(scarce=True)}
    with caplog.at_level("INFO", "pyro_lift"):
        joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 300, stand_in.begin, stand_in.score, **scarce)
    assert [each for *_, each in stand_in.trained] == steps
    assert joint.spent == sum(steps) - (40 if len(steps) > 2 else 0)  # a run that goes on from its look
    assert joint.helps == (rate is not None)
    if rate is None:
        assert (
            "tried at the rates 0.3 and 0.1 and 0.02, where unseen tasks gain no more than chance"
            in caplog.messages[-1]
        )
    else:
        assert joint.rate == pytest.approx(rate)
        assert f"joint training at {rate:g} helps (+{joint.gain:.3f} ± 0.00" in caplog.messages[-1]


@pytest.mark.parametrize("better", [True, False])
def test_where_steps_are_scarce_a_larger_rate_that_is_not_plain_is_held_beside_the_first(better: bool) -> None:
    stand_in = Halves({0.1 * 3.0: 0.5, 0.1: 0.45 if better else 1.2})
    spread = 0.4 * torch.tensor([1.0, -1.0] * 2, dtype=torch.float64)

    def unsteady(vector: Tensor, half: Sequence[Task]) -> Tensor:
        return stand_in.score(vector, half) + (spread if 0.49 < vector[0] < 0.51 else 0.0)

    scarce: dict[str, Any] = {"of": Vectors(scarce=True)}
    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 300, stand_in.begin, unsteady, **scarce)
    assert [each for *_, each in stand_in.trained] == [20, 20, 50, 50, 25, 25]
    assert joint.rate == pytest.approx(0.3 if better else 0.1)


@pytest.mark.parametrize(
    ("rows", "spent"),
    [(24, 2 * (1 + 2) * 20), (60, 2 * 20), (150, 10)],
    ids=["many passes", "some", "few"],
)
def test_the_trial_may_be_among_the_steps_of_joint_training(rows: int, spent: int) -> None:
    options = {**OPTIONS, "sgd_steps": 360, "sgd_includes_trial": True}
    lift, told = LiFT(adapter(), **options), list[Step]()  # type: ignore[arg-type]
    made = tasks(shared=True, rows=rows)
    joint = lift._joint(made, None, False, None)
    assert joint is not None and joint.helps and joint.spent == spent and joint.steps == 360 - spent
    lift.meta_train(made, progress=False, callbacks=told.append)
    trial, chain = ([step for step in told if step.run.kind == kind] for kind in ("joint-trial", "meta-train"))
    assert len(trial) == spent and len(chain) <= 360 - spent + 15


@pytest.mark.parametrize("gradients", [80, 100, 119])
def test_gradients_that_leave_no_room_for_a_trial_are_all_of_joint_training(gradients: int) -> None:
    options = {**OPTIONS, "sgd_steps": gradients, "sgd_includes_trial": True}
    lift, told = LiFT(adapter(), **options), list[Step]()  # type: ignore[arg-type]
    assert lift._joint(tasks(shared=True), None, False, None) is None
    lift.meta_train(tasks(shared=True), progress=False, callbacks=told.append)
    assert sum(step.phase == "sgd" for step in told) == gradients


def one_is_odd(stand_in: Halves, gains: Sequence[float] = (0.0,) * 8) -> Callable[[Tensor, Sequence[Task]], Tensor]:
    """Scores of a trial by which ``t5`` loses thirty nats, the others what the stand-in says and their own."""

    def score(vector: Tensor, half: Sequence[Task]) -> Tensor:
        own = [-30.0 if task.name == "t5" else gains[int(task.name[1:])] for task in half]
        return stand_in.score(vector, half) + (torch.tensor(own).double() if vector[1] else 0.0)

    return score


def test_the_one_task_that_decides_against_joint_training_is_named(caplog: pytest.LogCaptureFixture) -> None:
    stand_in = Halves({0.1: 0.5, 0.1 * 0.2: 0.5})
    varied = one_is_odd(stand_in, [-0.4, 0.0, 0.3, -0.3, 0.0, 0.0, 0.4, 0.2])  # without it 5 % is reached, not 0.05 %
    for score, of in ((varied, Vectors()), (one_is_odd(stand_in), Vectors(one_may_lose=False))):
        caplog.clear()
        with caplog.at_level("INFO", "pyro_lift"):
            joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, score, of=of)
        assert not joint.helps and joint.against == "t5"
        assert "without 't5' it would help" in caplog.text


def test_a_task_that_loses_most_is_called_odd_by_chance_once_in_a_hundred_times() -> None:
    gains = torch.randn(2000, 14, generator=torch.Generator().manual_seed(0), dtype=torch.float64).sort().values
    odd = sum(halves._is_odd(float(each[0]), each[1:]) for each in gains) / len(gains)
    # one side of a test at 1 % over fourteen tasks; Bonferroni's bound is all but exact for the least of them
    assert abs(odd - halves.ODD) < 4.0 * (halves.ODD / len(gains)) ** 0.5
    assert halves._is_odd(-8.0, gains[0, 1:]) and not halves._is_odd(-2.0, gains[0, 1:])


def test_one_odd_task_does_not_keep_the_others_from_joint_training(caplog: pytest.LogCaptureFixture) -> None:
    stand_in = Halves({0.1: 0.5, 0.1 * 3.0: 0.4})
    with caplog.at_level("INFO", "pyro_lift"):
        joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, one_is_odd(stand_in))
    assert joint.helps and joint.against == "t5" and joint.rate == 0.1 and joint.gain < 0.0
    assert "which 't5' takes away: all others gain" in caplog.text and "It begins, over all tasks." in caplog.text


def test_a_task_that_cannot_be_judged_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    stand_in = Halves({0.1: 0.5, 0.1 * 3.0: 0.2})

    def untold(vector: Tensor, half: Sequence[Task]) -> Tensor:
        values = stand_in.score(vector, half)
        return torch.where(torch.tensor([task.name == "t2" for task in half]), math.nan, values)

    joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, 320, stand_in.begin, untold)
    assert joint.helps and joint.rate == 0.1 and math.isfinite(joint.gain)


def test_the_log_says_which_rates_were_tried_and_why_one_was_taken(caplog: pytest.LogCaptureFixture) -> None:
    gains = {
        "not seen). It begins": {0.1: 0.5},
        "it is the larger, and does not gain less than 0.1 (+0.200 ± 0.001) by more than chance": {
            0.1: 0.2,
            0.1 * 3.0: 0.5,
        },
        "the larger rate, 0.3, gains less by more than chance": {0.1: 0.5, 0.1 * 3.0: 0.2},
        "the larger rate, 0.3, does not help by more than chance": {0.1: 0.5, 0.1 * 3.0: -0.2},
        "0.02 helps (+0.200 ± 0.001 nats a row on tasks that it has not seen); the larger rate, 0.1, does not help": {
            0.1: -0.5,
            0.1 * 0.2: 0.2,
        },
        "at the rates 0.1 and 0.02, where unseen tasks gain no more than chance by it (-0.499 ± 0.001 and -0.200": {
            0.1: -0.5,
            0.1 * 0.2: -0.2,
        },
        "at the rate 0.1, where unseen tasks gain no more than chance by it (-0.499": {0.1: -0.5},
    }
    for words, by_rate in gains.items():
        caplog.clear()
        stand_in, steps = Halves(by_rate), 120 if len(by_rate) == 1 else 320
        with caplog.at_level("INFO", "pyro_lift"):
            joint = joint_on_trial(tasks(shared=True), torch.zeros(2), 0.1, steps, stand_in.begin, stand_in.score)
        assert words in caplog.messages[-1], words
        assert joint.helps == ("It begins" in caplog.messages[-1])
        assert joint.helps != ("sgd_learning_rate=" in caplog.messages[-1])


def test_a_run_that_goes_on_has_the_verdict_and_the_vectors_of_before(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    made, config = tasks(shared=True), {"seed": 0}
    first = Halves({0.1: 0.5, 0.1 * 3.0: 0.7})
    begun = joint_on_trial(made, torch.zeros(2), 0.1, 300, first.begin, first.score, WorkBefore(tmp_path, config))
    (tmp_path / "joint" / "work.json").unlink()  # killed before the verdict: the vectors are there
    again = Halves({})
    gone_on = joint_on_trial(made, torch.zeros(2), 0.1, 300, again.begin, again.score, WorkBefore(tmp_path, config))
    assert again.trained == [] and gone_on == begun
    assert "done anew" not in caplog.text
    other = Halves({0.1: 0.5, 0.1 * 3.0: 0.7})  # another run in the same folder computes anew
    joint_on_trial(made, torch.zeros(2), 0.1, 300, other.begin, other.score, WorkBefore(tmp_path, {"seed": 1}))
    assert len(other.trained) == 4
    assert caplog.text.count(f"{tmp_path / 'joint'} is of other settings, tasks or data than this run has") == 1


@pytest.mark.parametrize(
    ("visits", "rows"),
    [(20, 24), (140, 24), (250, 24), (400, 24), (3, 150), (8, 150)],
    ids=["trial", "cross-fit", "before a checkpoint", "after one", "first look, first half", "first look, second half"],
)
def test_a_resumed_run_ends_where_the_whole_one_ends(tmp_path: Path, visits: int, rows: int) -> None:
    made = tasks(shared=True, rows=rows)
    whole = LiFT(adapter(), **OPTIONS).meta_train(made, progress=False)  # type: ignore[arg-type]

    options = {"checkpoint_every": 100, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        LiFT(adapter(), **OPTIONS).meta_train(made, checkpoint=tmp_path, on_step=stops_at(visits), **options)  # type: ignore[arg-type]
    resumed = LiFT(adapter(), **OPTIONS).meta_train(made, resume=tmp_path, **options)  # type: ignore[arg-type]
    assert torch.equal(
        whole.mixture.get().component_distribution.mean, resumed.mixture.get().component_distribution.mean
    )
    assert whole.results == resumed.results


def test_log_probs_are_means_over_rows_of_what_the_network_says() -> None:
    made, network = tasks(shared=True, number=2), adapter()
    theta = network.initial + 0.1 * torch.randn(network.dim, generator=torch.Generator().manual_seed(3))
    values = log_probs_at(network, theta, made, head_scale=None)
    for task, value in zip(made, values, strict=True):
        with torch.no_grad():
            logits = network(*task.train.positional, theta=theta)
        mean = -torch.nn.functional.cross_entropy(logits, task.train.target)
        assert math.isclose(float(value), float(mean), rel_tol=1e-5)


def test_a_signal_before_any_trial_says_how_to_go_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("pyro_lift.lift.heads_settled", lambda *args, **by: os.kill(os.getpid(), signal.SIGINT))
    with pytest.raises(RunStopped, match=r"SIGINT before the chain began; nothing .*meta_train\(tasks, resume='"):
        LiFT(adapter(), **OPTIONS).meta_train(tasks(shared=True), progress=False, checkpoint=tmp_path / "run")  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_after_a_checkpoint_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.lift.warn_of_few", lambda *args, **told: os.kill(os.getpid(), signal.SIGTERM))
    folder = tmp_path / "run"
    with pytest.raises(RunStopped, match=r"stopped by SIGTERM; what was finished is kept in .*resume='"):
        LiFT(adapter(), **OPTIONS).meta_train(
            tasks(shared=True), progress=False, checkpoint=folder, checkpoint_every=20, calibrate=False
        )  # type: ignore[arg-type]
    assert any(folder.glob("step-*"))


@pytest.mark.parametrize("stopped_at", [3, 30])
def test_a_signal_in_the_trial_ends_the_run_at_once_and_says_how_to_go_on(stopped_at: int, tmp_path: Path) -> None:
    made, told = tasks(shared=True), list[Step]()
    plain = LiFT(adapter(), **OPTIONS).meta_train(made, progress=False)  # type: ignore[arg-type]
    before = signal.getsignal(signal.SIGTERM)

    def stop(step: Step) -> None:
        told.append(step)
        if len(told) == stopped_at:
            os.kill(os.getpid(), signal.SIGTERM)

    folder = tmp_path / "run"
    with pytest.raises(
        RunStopped, match=r"stopped by SIGTERM before the chain began; .*meta_train\(tasks, resume='"
    ) as end:
        LiFT(adapter(), **OPTIONS).meta_train(made, progress=False, checkpoint=folder, callbacks=stop)  # type: ignore[arg-type]
    assert ("nothing is kept. Begin anew" in str(end.value)) == (not folder.exists())
    assert (f"is kept in {folder}. Go on" in str(end.value)) == any(folder.glob("*/work.json"))
    assert signal.getsignal(signal.SIGTERM) is before
    gone_on = LiFT(adapter(), **OPTIONS).meta_train(made, progress=False, resume=folder)  # type: ignore[arg-type]
    torch.testing.assert_close(gone_on.mixture.get().mean, plain.mixture.get().mean, rtol=0, atol=0)


def test_steps_of_the_trial_have_their_loss_a_row_and_their_task() -> None:
    told = list[Step]()
    made = tasks(shared=True)
    LiFT(adapter(), **OPTIONS).meta_train(made, progress=False, callbacks=told.append)  # type: ignore[arg-type]
    trial = [step for step in told if step.run.kind == "joint-trial"]
    halves = [{task.name for task in made[k::2]} for k in range(2)]
    assert {step.tasks[0] for step in trial} == {name for half in halves for name in half}
    assert all(step.loss is not None and 0.0 < step.loss < 3.0 for step in trial)
    assert all("half of the tasks at" in step.run.name for step in trial)


def test_a_run_without_a_trial_says_so(caplog: pytest.LogCaptureFixture) -> None:
    short = {**OPTIONS, "sgd_steps": 40}
    with caplog.at_level("INFO", "pyro_lift"):
        LiFT(adapter(), **short).meta_train(tasks(shared=True), progress=False)  # type: ignore[arg-type]
    assert "takes 80 steps and 4 tasks (there are 40 and 8): it begins" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "pyro_lift"):
        LiFT(adapter(), sgd_learning_rate=0.01, **short).meta_train(tasks(shared=True), progress=False)  # type: ignore[arg-type]
    assert "not tried" not in caplog.text


def test_a_run_over_tasks_of_two_sizes_goes_on_from_the_middle_of_joint_training(tmp_path: Path) -> None:
    made, told = [*tasks(shared=True, number=4), *tasks(shared=True, rows=10)[4:]], list[Step]()
    options = {**OPTIONS, "sgd_learning_rate": 0.01}
    plain = LiFT(adapter(), **options).meta_train(made, progress=False)  # type: ignore[arg-type]

    def stop(step: Step) -> None:
        told.append(step)
        if len(told) == 60:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(RunStopped, match="after 60 transitions"):
        LiFT(adapter(), **options).meta_train(made, progress=False, checkpoint=tmp_path, callbacks=stop)  # type: ignore[arg-type]
    gone_on = LiFT(adapter(), **options).meta_train(made, progress=False, resume=tmp_path)  # type: ignore[arg-type]
    torch.testing.assert_close(gone_on.mixture.get().mean, plain.mixture.get().mean, rtol=0, atol=0)
    by_rows = LiFT(adapter(), sgd_weights="rows", **options).meta_train(made, progress=False)  # type: ignore[arg-type]
    assert not torch.equal(by_rows.mixture.get().mean, plain.mixture.get().mean)


def test_what_the_halves_moved_by_is_kept_by_tensor_and_grows_with_the_root_of_the_steps(tmp_path: Path) -> None:
    stand_in, made = Halves({0.1: 0.5, 0.1 * 3.0: 0.4}), tasks(shared=True)
    kept = WorkBefore(tmp_path, {})
    at: dict[str, Any] = {"of": Vectors(parts=[1, 1]), "kept": kept}
    joint = joint_on_trial(made, torch.tensor([0.1, 0.0]), 0.1, 300, stand_in.begin, stand_in.score, **at)
    assert joint.looked == 25 and joint.rate == 0.1
    assert joint.vectors == pytest.approx((0.4, math.sqrt((1.0 + 4.0) / 2)))  # the halves begin with t0 and t1
    assert joint.widths(400) == pytest.approx(tuple(4.0 * x for x in joint.vectors))
    assert joint.widths(5) == joint.vectors
    assert joint_on_trial(made, torch.zeros(2), 0.1, 300, stand_in.begin, stand_in.score, **at) == joint
    assert joint._replace(helps=False).widths(400) == () == Joint(0.1, 300, 0.5, 0.1, True).widths(400)


def test_the_prior_of_phi_has_room_for_what_joint_training_moves_unless_its_widths_were_given() -> None:
    found = LiFT(adapter(), **OPTIONS).before_chain(tasks(shared=True), crossed=False)  # type: ignore[arg-type]
    assert found.joint is not None and found.joint.helps
    widths = found.joint.widths(found.settings.sgd_steps)
    assert isinstance(found.settings.sigma, list)
    assert all(wide >= width for wide, width in zip(found.settings.sigma, widths, strict=True))
    torch.testing.assert_close(found.program.sigma, by_weight(found.program.adapter, found.settings.sigma))
    for given in ({"sigma": 0.01}, {"beta": 0.01}):
        kept = LiFT(adapter(), **OPTIONS, **given).before_chain(tasks(shared=True), crossed=False)  # type: ignore[arg-type]
        assert kept.joint is not None and kept.joint.helps
        assert kept.settings.sigma == pytest.approx(0.01 if "sigma" in given else 0.02)
    apart = LiFT(adapter(), **OPTIONS).before_chain(tasks(shared=False), crossed=False)  # type: ignore[arg-type]
    assert apart.joint is not None and not apart.joint.helps and apart.joint.widths(200) == ()


def test_no_width_of_phi_is_made_narrower() -> None:
    assert widened([0.1, 0.5], (0.3, 0.2)) == [0.3, 0.5]
    assert widened(0.1, (0.3, 0.05)) == [0.3, 0.1]
    assert widened(0.1, ()) == 0.1 and widened([0.5, 0.5], (0.1, 0.1)) == [0.5, 0.5]


def test_too_few_tasks_for_a_trial_are_warned_of_and_too_few_steps_are_noted(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "pyro_lift"):
        assert not has_trial(1000, 3) and not has_trial(20, 8) and has_trial(1000, 8)
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert all("begins, whether it helps or not" in words for words in caplog.messages)
