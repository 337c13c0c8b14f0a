"""Adaptations that fail: the task is named, the advice can be followed, and what others finished is kept."""

from __future__ import annotations

import math
import pickle
from typing import Any

import peft
import pytest
import torch

from pyro_lift import DivergedError, LiFT, LiFTPrior, Task
from pyro_lift.inference.adaptation.failures import LostTasksError, named_adaptation
from pyro_lift.inference.sgld import diverged
from pyro_lift.inference.stability import UnstableStepError
from pyro_lift.inference.watch import Failure


def task(name: str, seed: int, scale: float = 1.0, rows: int = 12) -> Task:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 4, generator=generator)
    return Task(
        name, (scale * x, (x[:, :3] + 0.3 * torch.randn(rows, 3, generator=generator)).argmax(1)), num_classes=3
    )


def lift(**options: Any) -> LiFT:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    sizes = {"sgd_steps": 20, "burn_in": 5, "samples": 10, "seed": 0}
    return LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), **{**sizes, **options})


TASKS = [task(f"t{k}", k) for k in range(4)]
FAR = task("far", 9, scale=1e3)


@pytest.fixture(scope="module")
def plain() -> LiFTPrior:
    return lift(preconditioner="none", head="shared").meta_train(TASKS, progress=False)


def test_a_rate_past_its_limit_is_refused_by_the_names_of_adapt_and_its_advice_works(plain: LiFTPrior) -> None:
    with pytest.raises(UnstableStepError, match=r"task 'far': learning_rate=0\.002 is past .*Give adapt") as caught:
        plain.adapt(FAR, batch_size=0)
    assert "step_size" not in str(caught.value) and "check_stability" not in str(caught.value)
    assert caught.value.tasks == ("far",) and isinstance(caught.value, ValueError)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.tasks, again.limit) == (str(caught.value), ("far",), caught.value.limit)
    rate = float(str(caught.value).split("Give adapt learning_rate=")[1].split(",")[0])
    assert torch.isfinite(plain.adapt(FAR, batch_size=0, learning_rate=rate).thetas).all()


def test_a_chain_that_diverges_names_its_task_and_says_what_adapt_takes(plain: LiFTPrior) -> None:
    failure = Failure(12, (), math.nan, math.nan, ())
    with (
        pytest.raises(
            DivergedError, match=r"task 'far', adaptation: step 12: .*smaller learning_rate than 0\.01"
        ) as caught,
        named_adaptation([FAR], 0.01, 1.0),
    ):
        raise diverged(failure)
    assert caught.value.tasks == ("far",) and "step_size" not in str(caught.value)
    with (
        pytest.raises(DivergedError, match=r"No step was taken before\. Look at the data"),
        named_adaptation([FAR], 0.01, 1.0),
    ):
        raise diverged(failure._replace(step=0))
    with pytest.raises(DivergedError, match="a lower n_inflate than 1e"):
        plain.adapt(TASKS[0], n_inflate=1e30, batch_size=0)


@pytest.mark.parametrize("block_size", [1, 2, 8])
def test_a_task_that_is_lost_takes_no_other_with_it(plain: LiFTPrior, block_size: int) -> None:
    given = [TASKS[0], FAR, TASKS[1], TASKS[2]]
    with pytest.raises(LostTasksError, match=r"1 of 4 tasks .*\('far'\).*posteriors.*learning_rate") as caught:
        plain.adapt_many(given, block_size=block_size, batch_size=0, steps=20, draws=4)
    error = caught.value
    assert error.tasks == ("far",) and isinstance(error, DivergedError)
    assert [None if kept is None else kept.task.name for kept in error.posteriors] == ["t0", None, "t1", "t2"]
    for kept in error.posteriors:
        assert kept is None or torch.isfinite(kept.predict(TASKS[0].train.inputs)).all()


def test_calibration_leaves_a_lost_task_out_and_says_so(plain: LiFTPrior, caplog: pytest.LogCaptureFixture) -> None:
    options = {"batch_size": 0, "steps": 20, "draws": 4}
    found = plain.calibrate([*TASKS, FAR], **options)
    assert "the temperature of predictions: 1 of 5 tasks are left out" in caplog.text and "'far'" in caplog.text
    assert found == plain.prediction_temperature > 0.0
    with pytest.raises(LostTasksError, match="1 of 1 tasks"):
        plain.calibrate([FAR], **options)


def test_a_prior_is_returned_where_no_task_could_be_calibrated_on(caplog: pytest.LogCaptureFixture) -> None:
    trained = lift(sgd_steps=0, burn_in=1, samples=2, learning_rate=1e-9, beta=0.1)
    prior = trained.meta_train(TASKS, progress=False, calibrate=False)
    assert prior.prediction_temperature == 1.0
    caplog.clear()
    unseen = [Task(t.name, (t.train.inputs[""], t.train.target), num_classes=3, test=t.train) for t in TASKS]

    def diverging(*args: Any, **options: Any) -> float:
        raise DivergedError("the loss is nan", 0)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(LiFTPrior, "calibrate", diverging)
        again = trained.meta_train(unseen, progress=False, calibrate=True)
    assert torch.equal(again.mixture.get().mean, prior.mixture.get().mean)
    assert "the temperature of predictions was not fitted" in caplog.text


def test_meta_training_says_what_its_settings_are_called_and_names_the_task() -> None:
    with pytest.raises(UnstableStepError, match=r"^learning_rate=1 is past .*Give learning_rate=") as refused:
        lift(preconditioner="none", learning_rate=1.0, beta=1.0, batch_size=0, sgd_steps=0).meta_train(
            [FAR, *TASKS], progress=False
        )
    assert "step_size" not in str(refused.value) and "check_stability" not in str(refused.value)
    far = task("far", 9, scale=1e30)
    for steps, said in ((20, "sgd_learning_rate"), (0, "learning_rate")):
        options: dict[str, Any] = {"sgd_steps": steps, "learning_rate": 0.01, "sgd_learning_rate": 0.01}
        with pytest.raises(DivergedError, match=rf"task 4: .*data of task 'far'.*smaller {said} than 0.01") as caught:
            lift(**options).meta_train([*TASKS, far], progress=False)
        assert caught.value.tasks == (4,)
