"""The unit of a regression's targets beside that of the network's outputs."""

from __future__ import annotations

import re
from typing import Any

import peft
import pytest
import torch

from pyro_lift import LiFT, Task
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.target_units import units_of, warn_of_new_units, warn_of_units
from pyro_lift.settings import AdaptSettings

#: The noise is found by adaptations; what is warned of does not depend on how long they are.
FEW = AdaptSettings(steps=4, draws=2)
X = torch.randn(6, 40, 3, generator=torch.Generator().manual_seed(0))


def network(outputs: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


def tasks(offset: float, unit: float) -> list[Task]:
    y = X.sum(-1, keepdim=True) / 3**0.5
    return [
        Task(f"t{i}", (x, offset + unit * each), "regression") for i, (x, each) in enumerate(zip(X, y, strict=True))
    ]


def lift(net: torch.nn.Module, **options: Any) -> LiFT:
    config = peft.LoraConfig(r=1, target_modules=["0", "2"])
    return LiFT(net, config, adapt=FEW, sgd_steps=4, burn_in=2, samples=4, seed=0, **options)


def as_it_stands(values: int = 1) -> LiFT:
    """A network whose output stays the tasks' value, with its unit; heads before it would have any."""
    return lift(network(values), head="shared")


def test_units_are_read_off_targets_and_outputs() -> None:
    adapter = adapt_backbone(network(), peft.LoraConfig(r=1, target_modules=["0", "2"]), seed=0)
    found = units_of(adapter, tasks(50.0, 2.0))
    y = torch.stack([task.train.target for task in tasks(50.0, 2.0)]).double()
    assert found.target == pytest.approx(float(y[:, torch.arange(16) * 40 // 16].mean()))
    assert found.spread == pytest.approx(float((y - y.mean(1, keepdim=True)).square().mean().sqrt()))
    with torch.no_grad():
        f = network()(X[:, torch.arange(16) * 40 // 16]).double()
    assert found.output == pytest.approx(float(f.mean()), rel=1e-4)
    assert found.varies == pytest.approx(float(f.std(correction=0)), rel=1e-4)


def test_of_several_outputs_the_furthest_is_told() -> None:
    adapter = adapt_backbone(network(2), peft.LoraConfig(r=1, target_modules=["0", "2"]), seed=0)
    two = [
        Task(
            task.name,
            (task.train.inputs[""], torch.cat([task.train.target, task.train.target + 300.0], 1)),
            "regression",
        )
        for task in tasks(0.0, 1.0)
    ]
    assert units_of(adapter, two).target > 200.0


@pytest.mark.parametrize(
    ("offset", "unit", "differ"),
    [
        (0.0, 1.0, False),
        (4.0, 1.0, False),
        (0.0, 10.0, False),
        (0.0, 100.0, True),
        (0.0, 1e-3, True),
        (50.0, 1.0, True),
        (2.5e5, 5e4, True),
    ],
)
def test_targets_of_another_unit_are_warned_of(
    offset: float, unit: float, differ: bool, caplog: pytest.LogCaptureFixture
) -> None:
    as_it_stands().meta_train(tasks(offset, unit), progress=False)
    said = [record.getMessage() for record in caplog.records if "the targets lie around" in record.getMessage()]
    assert len(said) == differ
    if differ:
        assert "undo that in predictions" in said[0] and re.search(r"\(target [-+] [0-9]", said[0])
    # Looks at halves of them adapt to tasks of its own, which are no new ones in another unit than theirs.
    assert not any("prior was learned with" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("offset", "unit", "differ"),
    [(0.0, 1.0, False), (1.0, 2.0, False), (0.0, 1e3, True), (0.0, 1e-6, True), (100.0, 1.0, True)],
)
def test_a_new_task_in_another_unit_is_warned_of(
    offset: float, unit: float, differ: bool, caplog: pytest.LogCaptureFixture
) -> None:
    learned = as_it_stands().meta_train(tasks(0.0, 1.0), progress=False)
    caplog.clear()
    learned.adapt(tasks(offset, unit)[0], steps=4, draws=2)
    said = [record.getMessage() for record in caplog.records if "another unit than" in record.getMessage()]
    assert len(said) == differ and all("task 't0': its targets lie around" in each for each in said)


def test_columns_of_different_units_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for factor, differ in ((1.0, False), (2.0, False), (5.0, True), (1e3, True)):
        caplog.clear()
        two = [
            Task(task.name, (task.train.inputs[""], task.train.target * torch.tensor([1.0, factor])), "regression")
            for task in tasks(0.0, 1.0)
        ]
        as_it_stands(2).meta_train(two, progress=False)
        assert any("share one noise" in record.getMessage() for record in caplog.records) == differ


def test_a_column_that_is_too_wide_is_seen_beside_one_that_is_far() -> None:
    adapter = adapt_backbone(network(2), peft.LoraConfig(r=1, target_modules=["0", "2"]), seed=0)
    unit, offset = torch.tensor([1.0, 1e3]), torch.tensor([4.0, 0.0])
    two = [
        Task(task.name, (task.train.inputs[""], task.train.target * unit + offset), "regression")
        for task in tasks(0.0, 1.0)
    ]
    found = units_of(adapter, two)
    assert found.differ and found.spread > 100.0


def features() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 5))


def test_with_heads_of_their_own_only_the_noise_has_a_unit(caplog: pytest.LogCaptureFixture) -> None:
    def warned(of: str) -> list[str]:
        return [record.getMessage() for record in caplog.records if of in record.getMessage()]

    given = tasks(2.5e5, 5e4)  # wherever they lie
    prior = lift(features()).meta_train(given, progress=False)
    elsewhere = [Task(task.name, (task.train.inputs[""], task.train.target + 1e7), "regression") for task in given[:2]]
    lift(features()).meta_train([*elsewhere, *given[2:]], progress=False, calibrate=False)
    prior.adapt(tasks(0.0, 5e4)[0])
    assert not warned("the targets") and not warned("another unit")
    prior.adapt(tasks(0.0, 1.0)[0])
    assert len(warned("another unit than the tasks of meta-training")) == 1
    wider = Task("wide", (given[0].train.inputs[""], 1e4 * given[0].train.target), "regression")
    lift(features()).meta_train([wider, *given[1:]], progress=False, calibrate=False)
    assert len(warned("the targets of task 'wide' are in another unit than those of most tasks")) == 1


def regression(name: str, values: int) -> Task:
    generator = torch.Generator().manual_seed(values)
    return Task(
        name, (torch.randn(8, 3, generator=generator), torch.randn(8, values, generator=generator)), "regression"
    )


def test_tasks_of_several_numbers_of_values_are_refused_by_name_or_have_heads_of_their_own() -> None:
    mixed = [regression("one", 1), regression("other", 1), regression("two", 2)]
    with pytest.raises(ValueError, match=r"task 'two': regression: the network's output has shape \[1, 1\]"):
        lift(network()).meta_train(mixed, progress=False)
    warn_of_units(adapt_backbone(features(), peft.LoraConfig(r=1, target_modules=["0"])), mixed, own_heads=True)


@pytest.mark.parametrize(("sd", "told"), [(0.5, False), (1.2, True)])
def test_tasks_that_vary_unevenly_are_told_though_none_is_far_from_most(
    sd: float, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    units = torch.distributions.Normal(0.0, sd).icdf(torch.linspace(0.05, 0.95, 12)).exp()
    given = [
        Task(f"t{k}", (x, unit * x.sum(-1, keepdim=True)), "regression")
        for k, (unit, x) in enumerate(zip(units, X.repeat(2, 1, 1), strict=True))
    ]
    warn_of_units(adapt_backbone(features(), peft.LoraConfig(r=1, target_modules=["0"])), given, own_heads=True)
    assert [("share one noise" in message) for message in caplog.messages] == [True] * told


def new_task(*targets: float) -> Task:
    y = torch.tensor(targets).unsqueeze(-1)
    return Task("new", (torch.linspace(-1.0, 1.0, len(y)).unsqueeze(-1).expand(-1, 3), y), "regression")


@pytest.mark.parametrize("own_heads", [True, False])
def test_two_rows_with_nearly_one_target_are_in_no_other_unit(
    own_heads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    adapter = adapt_backbone(features() if own_heads else network(), peft.LoraConfig(r=1, target_modules=["0"]), seed=0)

    def told(*targets: float) -> bool:
        caplog.clear()
        warn_of_new_units(adapter, [new_task(*targets)], adapter.initial, 0.5, own_heads=own_heads)
        return any("another unit" in message for message in caplog.messages)

    assert not told(6.0, 6.01) and not told(0.0, 0.02, 0.04)
    assert told(*(1e-3 * torch.linspace(-1.0, 1.0, 6)).tolist()) and told(-1e5, 1e5)
    if not own_heads:  # where a head of its own does not go to where they lie
        assert told(400.0, 400.01) and told(*(6.0 + 0.01 * torch.linspace(-1.0, 1.0, 6)).tolist())
