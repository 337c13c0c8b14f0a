"""The noise of regressions: found where nobody gave it, and in what predictions say of their width."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
from torch import Tensor

from pyro_lift import LiFT, LiFTPrior, Task, TaskPosterior
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.lift import LiFTMethod
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.chance import targets_scale
from pyro_lift.models.task import Rows
from pyro_lift.tuning.noise import EXAGGERATED, LEAST, Noise, fitted_noise

NOISE = 0.2


class Line(NamedTuple):
    """A least-squares fit, whose variance is the noise's alone."""

    weights: Tensor
    scale: float
    left_out: None = None

    def predict(self, rows: Rows) -> Tensor:
        return rows.inputs[""] @ self.weights

    def predict_sd(self, rows: Rows, *, calibrated: bool) -> Tensor:
        assert not calibrated
        return torch.full((len(rows),), self.scale, dtype=torch.float64)


def lines(number: int, rows: int, noise: float, width: int = 4) -> list[Task]:
    generator = torch.Generator().manual_seed(2)
    made = []
    for k in range(number):
        x = torch.randn(rows + 50, width, generator=generator, dtype=torch.float64)
        weights = torch.randn(width, generator=generator, dtype=torch.float64)
        y = x @ weights + noise * torch.randn(len(x), generator=generator, dtype=torch.float64)
        made.append(Task(f"t{k}", (x[:rows], y[:rows]), "regression", test=(x[rows:], y[rows:])))
    return made


def least_squares(tasks: list[Task], scale: float) -> Iterator[tuple[Line, Task]]:
    for task in tasks:
        yield Line(torch.linalg.lstsq(task.train.inputs[""], task.train.target[:, None]).solution[:, 0], scale), task


def mean_squares(tasks: list[Task], part: str) -> float:
    """The mean square error of least squares on the tasks' own rows, or on those left out."""
    pairs = [(line, getattr(task, part)) for line, task in least_squares(tasks, 1.0)]
    return float(torch.stack([(line.predict(rows) - rows.target).square().mean() for line, rows in pairs]).mean())


def test_the_spread_of_targets_is_within_tasks_and_has_their_unit() -> None:
    far = [Task("a", (torch.zeros(2, 1), torch.tensor([99.0, 101.0])), "regression")]
    near = [Task("b", (torch.zeros(2, 1), torch.tensor([-7.0, 7.0])), "regression")]
    assert targets_scale(far) == pytest.approx(1.0)
    assert targets_scale([*far, *near]) == pytest.approx(5.0)  # root of the mean of 1 and 49
    classes = Task("c", (torch.zeros(2, 1), torch.tensor([0, 1])), num_classes=2)
    assert targets_scale([*near, classes]) == pytest.approx(7.0)
    alike = Task("d", (torch.zeros(2, 1), torch.ones(2)), "regression")
    assert targets_scale([alike]) == targets_scale([classes]) == 1.0


def test_the_noise_of_least_squares_is_found_though_their_own_rows_show_less_and_new_ones_more() -> None:
    tasks = lines(300, 20, NOISE)
    found = fitted_noise(targets_scale(tasks), lambda scale: least_squares(tasks, scale))
    assert found is not None
    own, new = mean_squares(tasks, "train"), mean_squares(tasks, "test")
    assert own**0.5 < 0.92 * NOISE < NOISE < new**0.5 / 1.08  # four of twenty coordinates are fitted
    # Of Gaussian inputs (1 - d/n)(1 + d/(n - d - 1)) = 1.013; the error of 300 tasks is below half a percent.
    assert found.scale == pytest.approx(1.013**0.25 * NOISE, rel=0.02)
    assert found.temperature == pytest.approx(max(new / found.scale**2 / EXAGGERATED, 1.0))


def test_where_there_is_no_noise_some_is_left_and_a_chain_that_diverges_ends_the_search() -> None:
    tasks = lines(5, 20, 0.0)
    exact = fitted_noise(2.0, lambda scale: least_squares(tasks, scale))
    assert exact is not None and exact.scale == pytest.approx(2.0 * LEAST)
    asked: list[float] = []

    def adapt(scale: float) -> Iterator[tuple[Line, Task]]:
        asked.append(scale)
        if len(asked) == 2:
            raise DivergedError("too far", 0)
        return least_squares(lines(5, 20, NOISE), scale)

    once = fitted_noise(2.0, adapt)
    assert isinstance(once, Noise) and len(asked) == 2 and once.scale == pytest.approx(asked[1])
    assert fitted_noise(2.0, lambda scale: []) is None


class Shrunk(NamedTuple):
    """Least squares under a prior that holds the weights: a ridge, which a smaller noise sets free."""

    weights: Tensor
    scale: float
    left_out: None = None

    @classmethod
    def of(cls, task: Task, scale: float, width: float) -> Shrunk:
        x, y = task.train.inputs[""], task.train.target
        held = (scale / width) ** 2 * torch.eye(x.shape[-1], dtype=x.dtype)
        return cls(torch.linalg.solve(x.T @ x + held, x.T @ y), scale)

    def predict(self, rows: Rows) -> Tensor:
        return Line(*self).predict(rows)

    def predict_sd(self, rows: Rows, *, calibrated: bool) -> Tensor:
        return Line(*self).predict_sd(rows, calibrated=calibrated)


def test_a_larger_power_is_found_where_the_prior_holds_tasks_too_close_and_nowhere_else() -> None:
    tasks = lines(24, 20, NOISE)
    first = targets_scale(tasks)

    def found(width: float, *, stronger: bool = True) -> Noise:
        noise = fitted_noise(first, lambda scale: ((Shrunk.of(t, scale, width), t) for t in tasks), stronger=stronger)
        assert noise is not None
        return noise

    held, free = found(0.01), found(1.0)
    assert held.power > 100.0 and held.scale < 0.25 * first
    assert found(0.01, stronger=False).scale > 0.8 * first  # what it would be without
    assert free == found(1.0, stronger=False) and free.power == 1.0


def test_no_power_is_found_where_a_chain_diverges_under_it_or_it_gains_by_chance_alone() -> None:
    tasks = lines(24, 20, NOISE)
    first = targets_scale(tasks)

    def diverging(scale: float) -> Iterator[tuple[Shrunk, Task]]:
        if scale < 0.5 * first:
            raise DivergedError("too far", 0)
        return ((Shrunk.of(task, scale, 0.01), task) for task in tasks)

    found = fitted_noise(first, diverging, stronger=True)
    assert found is not None and found.power == 1.0
    few = tasks[:3]

    def one_of_three(scale: float) -> Iterator[tuple[Shrunk, Task]]:  # the others are as free as they can be
        return ((Shrunk.of(task, scale, 0.03 if k == 0 else 100.0), task) for k, task in enumerate(few))

    found = fitted_noise(first, one_of_three, stronger=True)
    assert found is not None and found.power == 1.0


def waves(number: int, rows: int = 15) -> list[Task]:
    generator = torch.Generator().manual_seed(3)
    made = []
    for k in range(number):
        height, shift = 0.5 + 2.0 * torch.rand(2, generator=generator)
        x = 10.0 * torch.rand(rows + 60, 1, generator=generator) - 5.0
        y = height * torch.sin(x[:, 0] - shift)
        made.append(Task(f"w{k}", (x[:rows], y[:rows]), "regression", test=(x[rows:], y[rows:])))
    return made


def test_tasks_that_the_network_knows_nothing_of_are_let_go_further_and_the_prior_keeps_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(1, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    made = waves(10)
    *tasks, new = (replace(task, test=None) if k < 9 else task for k, task in enumerate(made))
    settings: dict[str, Any] = {"head": "shared", "sgd_steps": 0, "burn_in": 2, "samples": 4, "seed": 0}
    lift = LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), **settings)
    prior = lift.meta_train(tasks, progress=False)
    found = prior.results["power in adaptation, over meta-training's"]
    assert found > 10.0 and prior.adapt_settings.n_inflate == pytest.approx(found * (prior.settings.n_inflate or 1.0))
    posterior = prior.adapt(new, seed=0)
    assert new.test is not None

    def missed(of: TaskPosterior) -> float:
        assert new.test is not None
        return float((of.predict(new.test) - new.test.target).square().mean())

    assert missed(posterior) < 0.8 * missed(prior.adapt(new, seed=0, n_inflate=1.0))
    prior.save_pretrained(tmp_path)
    again = LiFTPrior.from_pretrained(tmp_path, net).adapt(new, seed=0)
    assert torch.equal(again.predict(new.test), posterior.predict(new.test))


def curves(number: int, unit: float) -> tuple[torch.nn.Module, list[Task]]:
    """Tasks that bend one curve each in its own way, and a network whose answers have their unit."""
    generator = torch.Generator().manual_seed(1)
    torch.manual_seed(0)
    last = torch.nn.Linear(12, 1)
    last.weight.data *= unit
    net = torch.nn.Sequential(torch.nn.Linear(2, 12), torch.nn.Tanh(), last)
    made = []
    for k in range(number):
        x = torch.randn(60, 2, generator=generator)
        y = (x @ torch.tensor([1.0, -1.0]) + 0.3 * torch.randn(1, generator=generator) * x[:, 0])[:, None]
        y = unit * (y + NOISE * torch.randn(60, 1, generator=generator))
        made.append(Task(f"t{k}", (x[:20], y[:20]), "regression", test=(x[20:], y[20:])))
    return net, made


@pytest.mark.parametrize("unit", [1.0, 50.0])
def test_nothing_set_the_noise_is_found_in_any_unit_and_predictions_say_how_wide_they_are(unit: float) -> None:
    net, tasks = curves(10, unit)
    lift = LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), sgd_steps=300, burn_in=20, samples=40, seed=0)
    prior = lift.meta_train(tasks[:8], progress=False)
    found = prior.settings.noise_scale
    assert found is not None and 0.5 * NOISE < found / unit < 3.0 * NOISE < 0.9 * targets_scale(tasks) / unit
    assert prior.results["noise of targets"] == found
    assert lift.settings.noise_scale is None
    for task in tasks[8:]:
        posterior = prior.adapt(task, seed=0)
        assert task.test is not None
        sd = posterior.predict_sd(task.test)
        z = (posterior.predict(task.test) - task.test.target) / sd
        assert sd.shape == task.test.target.shape
        assert float((z.abs() < 1.645).float().mean()) > 0.7


def test_predictions_are_wide_enough_where_the_network_knows_the_tasks_rows_by_heart(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Their own rows say that there is no noise; test rows say what there is."""
    _, tasks = curves(10, 1.0)
    torch.manual_seed(0)
    first, last = torch.nn.Linear(2, 400), torch.nn.Linear(400, 1, bias=False)
    net = torch.nn.Sequential(first, torch.nn.Tanh(), last)
    x, y = torch.cat([task.train.positional[0] for task in tasks[:6]]), torch.cat([t.train.target for t in tasks[:6]])
    with torch.no_grad():
        first.weight.mul_(6.0)
        last.weight.copy_(torch.linalg.lstsq(first(x).tanh(), y).solution.T)
        assert float((net(x) - y).square().mean()) < 0.1 * NOISE**2
    config = peft.LoraConfig(r=1, target_modules=["2"])
    wide = dict[bool, float]()
    for unseen in (True, False):
        made = tasks[:6] if unseen else [replace(task, test=None) for task in tasks[:6]]
        lift = LiFT(net, config, sgd_steps=40, burn_in=4, samples=8, seed=0)
        caplog.clear()
        with caplog.at_level("INFO", "pyro_lift"):
            prior = lift.meta_train(made, progress=False)
        assert ("give tasks test= or dev= rows" in caplog.text) == (not unseen)
        z = list[Tensor]()
        for posterior, task in zip(prior.adapt_many(tasks[6:], seed=0), tasks[6:], strict=True):
            assert task.test is not None
            z.append((posterior.predict(task.test) - task.test.target) / posterior.predict_sd(task.test))
        wide[unseen] = float(torch.cat(z).square().mean())
    assert wide[True] < 2.0 < wide[False]


def test_a_network_of_doubles_finds_it_too() -> None:
    net, tasks = curves(4, 1.0)
    wide = [
        Task(task.name, (task.train.inputs[""].double(), task.train.target.double()), "regression") for task in tasks
    ]
    lift = LiFT(net.double(), peft.LoraConfig(r=1, target_modules=["2"]), sgd_steps=60, burn_in=4, samples=8, seed=0)
    prior = lift.meta_train(wide, progress=False)
    assert prior.adapter.initial.dtype == torch.float64 and prior.results["noise of targets"] > 0.0


def test_a_noise_that_was_given_is_kept_and_without_looks_it_is_the_spread_of_targets() -> None:
    net, tasks = curves(6, 1.0)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    lengths = {"sgd_steps": 100, "burn_in": 4, "samples": 8, "seed": 0}
    adapter = adapt_backbone(net, config, seed=0)
    given = LiFT(adapter, noise_scale=0.37, **lengths).meta_train(tasks, progress=False)  # type: ignore[arg-type]
    assert given.settings.noise_scale == 0.37
    plain = LiFT(adapter, **lengths).meta_train(tasks, progress=False, calibrate=False)  # type: ignore[arg-type]
    assert plain.settings.noise_scale == pytest.approx(targets_scale(tasks))


def test_regressions_are_calibrated_on_rows_that_nothing_was_learned_from() -> None:
    """With its temperature a prior's squared errors are as large as its variances, on average over the tasks."""
    net, tasks = curves(6, 1.0)
    lift = LiFT(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), sgd_steps=40, burn_in=4, samples=8, seed=0)
    prior = lift.meta_train(tasks[:4], progress=False, calibrate=False)
    assert prior.prediction_temperature == 1.0
    found = prior.calibrate(tasks[4:], seed=3)
    assert found == prior.prediction_temperature != 1.0
    ratios = []
    for posterior, task in zip(prior.adapt_many(tasks[4:], seed=3), tasks[4:], strict=True):
        assert task.test is not None
        z = (posterior.predict(task.test) - task.test.target) / posterior.predict_sd(task.test)
        ratios.append(float(z.square().mean()))
    assert sum(ratios) / 2 == pytest.approx(1.0, rel=1e-4)


def test_the_tuner_and_the_comparison_find_it_as_well() -> None:
    """Both judge what is trained by default, whose noise is not the spread of targets."""
    net, tasks = curves(8, 1.0)
    config = peft.LoraConfig(r=2, target_modules=["0", "2"])
    lift = LiFT(net, config, sgd_steps=200, burn_in=10, samples=20, seed=0)
    tuning = lift.tune(tasks, budget=1.0, progress=False)
    found = tuning.meta["noise_scale"]
    assert found < 0.9 * targets_scale(tasks) and tuning.temperature not in (None, 1.0)
    prior = lift.meta_train(tasks, progress=False)
    assert prior.settings.noise_scale == found and prior.prediction_temperature == tuning.temperature
    budget = Budget(warm_up=200, visits=30, noise_scale=targets_scale(tasks), seed=0)
    adapter = adapt_backbone(net, config, seed=0)
    chosen = LiFTMethod(adapter, budget, on_trial=True).meta_train(tasks).prior.settings.noise_scale
    given = LiFTMethod(adapter, budget).meta_train(tasks).prior.settings.noise_scale
    assert chosen is not None and chosen < 0.9 * targets_scale(tasks) and given == targets_scale(tasks)


def test_the_width_of_predictions_is_noise_and_disagreement_and_is_saved(tmp_path: Path) -> None:
    net, tasks = curves(1, 1.0)
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)
    thetas = adapter.initial + 0.1 * torch.randn(5, adapter.dim, generator=torch.Generator().manual_seed(3))
    posterior = TaskPosterior(adapter, tasks[0], thetas, noise_scale=0.3, prediction_temperature=1.5)
    x = tasks[0].train.inputs[""]
    means = torch.stack([adapter(x, theta=theta) for theta in thetas])
    expected = (0.3**2 + means.var(0, correction=0)).sqrt()
    torch.testing.assert_close(posterior.predict_sd(x, calibrated=False), expected)
    torch.testing.assert_close(posterior.predict_sd(x), 1.5**0.5 * expected)
    again = TaskPosterior.from_pretrained(posterior.save_pretrained(tmp_path / "p"), net)
    torch.testing.assert_close(again.predict_sd(x), posterior.predict_sd(x))
    classes = TaskPosterior(adapter, Task("c", (x, torch.zeros(len(x), dtype=torch.long)), num_classes=2), thetas)
    with pytest.raises(TypeError, match="no regression"):
        classes.predict_sd(x)
