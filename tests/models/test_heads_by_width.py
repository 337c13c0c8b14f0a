"""A network whose output is wider than all tasks' classes is not their classifier: each task has a head of its own."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, Task
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.observation import own_head_scale
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.tuning.whose_heads import run_config, with_heads_settled

WIDTH = 8
SHORT = LiFTSettings(sgd_steps=3, burn_in=2, samples=4)
ADAPT = AdaptSettings(steps=4, draws=2)
SAID = "Every task has a linear head of its own on that output"


def eight_wide(extra: nn.Module | None = None) -> RandomAdapter:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, WIDTH), *([] if extra is None else [extra]))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0)


def of_classes(classes: int, name: str = "t") -> Task:
    generator = torch.Generator().manual_seed(classes)
    return Task(name, (torch.randn(16, 4, generator=generator), torch.arange(16) % classes), num_classes=classes)


def numbers(width: int) -> Task:
    return Task("numbers", (torch.randn(4, 4), torch.randn(4, width)), "regression")


def lift(adapter: RandomAdapter, **settings: Any) -> LiFT:
    return LiFT(adapter, settings=SHORT, adapt=ADAPT, seed=0, **settings)


@pytest.mark.parametrize(
    ("tasks", "scale"),
    [
        ([of_classes(3), of_classes(3)], 1.0),
        ([of_classes(3), of_classes(5)], 1.0),
        ([of_classes(8), of_classes(8)], None),
        ([of_classes(3), of_classes(8)], None),
        ([of_classes(3), numbers(WIDTH)], None),
    ],
)
def test_only_an_output_wider_than_every_task_calls_for_heads(tasks: list[Task], scale: float | None) -> None:
    adapter = eight_wide()
    assert own_head_scale(adapter, tasks, None, solve=True) == scale
    assert own_head_scale(adapter, tasks, 0.3, solve=True) == 0.3
    assert own_head_scale(adapter, tasks, None, solve=False) is None
    assert own_head_scale(adapter, tasks, None, solve=True, by_width=False) is None


def test_only_an_output_wider_than_a_regressions_values_calls_for_heads() -> None:
    adapter = eight_wide()
    for given, scale in ((None, 1.0), (0.3, 0.3)):
        assert own_head_scale(adapter, [numbers(3)], given, solve=True) == scale
        assert (
            own_head_scale(adapter, [numbers(3)], given, solve=True, by_width=False) == scale
        )  # they mean nothing else
        assert own_head_scale(adapter, [numbers(WIDTH)], given, solve=True) is None  # the output is the values
    assert own_head_scale(adapter, [numbers(3)], None, solve=False) is None


def test_an_output_that_is_no_matrix_is_left_to_the_check_of_its_shape() -> None:
    adapter = eight_wide(nn.Unflatten(1, (2, 4)))
    assert own_head_scale(adapter, [of_classes(3)], None, solve=True) is None
    with pytest.raises(ValueError, match="t"):
        lift(adapter).meta_train([of_classes(3)] * 2, progress=False)


def test_narrower_tasks_get_solved_heads_and_one_line_says_so(caplog: pytest.LogCaptureFixture) -> None:
    tasks = [of_classes(3, f"t{k}") for k in range(5)]
    with caplog.at_level(logging.INFO, "pyro_lift"):
        prior = lift(eight_wide()).meta_train(tasks[:3], progress=False)  # too few to ask about what is before it
    said = [line for line in caplog.messages if SAID in line]
    assert len(said) == 1 and 'head="shared"' in said[0] and f"num_classes={WIDTH}" in said[0]
    assert prior.settings.head_scale == 1.0 and prior.settings.head == "solve"
    posterior = prior.adapt(tasks[4])
    assert posterior.heads is not None and posterior.heads.shape == (2, 3, WIDTH + 1)
    assert posterior.predict(tasks[4].train).shape == (16, 3)


@pytest.mark.parametrize(
    ("settings", "classes"), [({"head": "shared"}, 3), ({"head": "langevin"}, 3), ({}, WIDTH)], ids=str
)
def test_who_says_that_the_classes_are_shared_keeps_them(
    settings: dict[str, Any], classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = [of_classes(classes, f"t{k}") for k in range(3)]
    with caplog.at_level(logging.INFO, "pyro_lift"):
        posterior = lift(eight_wide(), **settings).meta_train(tasks[:2], progress=False).adapt(tasks[2])
    assert posterior.heads is None and posterior.predict(tasks[2].train).shape == (16, WIDTH)
    assert SAID not in caplog.text


def test_a_narrow_task_shares_the_head_that_meta_training_shared() -> None:
    adapter = eight_wide()
    prior = lift(adapter).meta_train([of_classes(8, "wide"), of_classes(3, "a"), of_classes(3, "b")], progress=False)
    assert prior.settings.head_scale is None and prior.settings.head == "shared"
    for posterior in (prior.adapt(of_classes(3, "new")), *prior.adapt_many([of_classes(3, "x"), of_classes(5, "y")])):
        assert posterior.heads is None


def test_a_prior_of_before_that_says_nothing_shares_the_head() -> None:
    adapter = eight_wide()
    saved = lift(adapter, head="shared").meta_train([of_classes(3, "a"), of_classes(3, "b")], progress=False)
    saved.rows = None  # nor was an adaptation brought to a task's rows then
    before = LiFTPrior(adapter, saved.mixture, SHORT, saved.adapt_settings, saved.second_moment, seed=0)
    assert before.settings.head == "solve"
    posterior = before.adapt(of_classes(3, "new"))
    assert posterior.heads is None and torch.equal(posterior.thetas, saved.adapt(of_classes(3, "new")).thetas)


def test_a_run_that_was_begun_with_shared_heads_goes_on_with_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, tasks = eight_wide(), [of_classes(3, "a"), of_classes(3, "b")]
    with monkeypatch.context() as earlier:
        # Its folder says nothing of how wide an output counts.
        earlier.setattr("pyro_lift.lift.run_config", lambda *run, rules: run_config(*run, rules={}))
        first = lift(adapter).meta_train(tasks, progress=False, checkpoint=tmp_path / "before")
    again = lift(adapter).meta_train(tasks, progress=False, resume=tmp_path / "before")
    assert first.settings == again.settings and again.settings.head == "shared"
    assert torch.equal(first.mixture.get().component_distribution.mean, again.mixture.get().component_distribution.mean)  # type: ignore[attr-defined]
    of_today = lift(adapter)
    assert of_today.meta_train(tasks, progress=False, checkpoint=tmp_path / "now").settings.head_scale == 1.0
    assert of_today.meta_train(tasks, progress=False, resume=tmp_path / "now").settings.head_scale == 1.0


def test_settings_and_policies_settled_on_all_tasks_say_the_same_of_a_part() -> None:
    adapter, narrow, wide = eight_wide(), of_classes(3, "narrow"), of_classes(8, "wide")
    settled = with_heads_settled(SHORT, adapter, [narrow, wide])
    assert settled.head == "shared" and with_heads_settled(settled, adapter, [narrow]) == settled
    assert with_heads_settled(SHORT, adapter, [narrow]).head_scale == 1.0
    assert with_heads_settled(SHORT, adapter, [wide, wide]) == SHORT
    policy = HeadPolicy().fitted(adapter, [narrow, wide])
    assert policy.update == "shared" and policy.fitted(adapter, [narrow]) == policy
    assert HeadPolicy().fitted(adapter, [wide, wide]) == HeadPolicy()
    own = HeadPolicy().fitted(adapter, [narrow])
    assert own.scale == 1.0 and own.fitted(adapter, [wide]) == own


@pytest.mark.parametrize("name", ["no-meta-train", "union-train", "reptile", "lora-tuned", "linear-probe", "lift"])
@pytest.mark.parametrize(("heads", "width"), [(HeadPolicy(), 3), (HeadPolicy(update="shared"), WIDTH)], ids=str)
def test_every_method_follows(name: str, heads: HeadPolicy, width: int) -> None:
    tasks = [of_classes(3, f"t{k}") for k in range(2)]
    budget = Budget(warm_up=2, visits=4, steps=4, draws=2, batch_size=6, heads=heads)
    method = BASELINES[name](eight_wide(), budget)
    predicted: Tensor = method.adapt(method.meta_train(tasks), tasks[0]).predict(tasks[0].train)
    if name in ("lora-tuned", "linear-probe"):  # a probe has the task's classes, whoever has the head
        assert predicted.shape[-1] in {3, width}
    else:
        assert predicted.shape == (16, width)
    assert torch.allclose(predicted.sum(-1), torch.ones(16), atol=1e-4)


def test_a_head_is_shared_or_the_tasks_own() -> None:
    with pytest.raises(ValueError, match="shared or the task's own"):
        LiFTSettings(head="shared", head_scale=1.0)
    with pytest.raises(ValueError, match="shared or the task's own"):
        HeadPolicy(scale=1.0, update="shared")
