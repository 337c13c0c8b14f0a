"""Early stopping: which draws are kept, when an adaptation ends, and that it does so for LiFT and fine-tuning alike."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from text_backbones import encoded, written
from text_tokenizers import tokenizer
from torch import Tensor

from pyro_lift import AdaptSettings, LiFT, Task, TaskPosterior
from pyro_lift.data.encode import NextToken
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.inference.adaptation.early_stopping import DrawWindows, EarlyStopping, Verdict
from pyro_lift.inference.baselines.finetune import finetune, finetune_each
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.methods.lift import LiFTMethod
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.tuning.development import development_verdict


def seen(windows: DrawWindows, most: int = 100) -> int:
    """Feed the numbers of the steps as weights, until the end; return the last."""
    for step in range(1, most + 1):
        if windows.see(step, {"theta": torch.tensor([float(step)])}):
            return step
    raise AssertionError("it did not end")


def steps_of(window: dict[str, Tensor]) -> list[float]:
    return window["theta"].flatten().tolist()


@pytest.mark.parametrize(
    ("steps", "draws", "every", "expected"),
    [
        (12, 2, 4, [[2, 4], [6, 8], [10, 12]]),
        (12, 2, 5, [[3, 5], [8, 10], [11, 12]]),
        (6, 4, 3, [[1, 2, 3], [4, 5, 6]]),
        (7, 1, 3, [[3], [6], [7]]),
        (5, 2, 8, [[3, 5]]),
    ],
)
def test_draws_are_spread_over_each_window(steps: int, draws: int, every: int, expected: list[list[int]]) -> None:
    windows: list[list[float]] = []

    def judge(window: dict[str, Tensor]) -> Verdict:
        windows.append(steps_of(window))
        return Verdict(len(windows), 0.0)

    assert seen(DrawWindows(steps, draws, every, 9, judge)) == steps
    assert windows == expected


def test_the_best_window_is_kept_and_windows_without_a_better_one_end_the_run() -> None:
    verdicts = iter([(0.1, -3.0), (0.5, -2.0), (0.5, -2.0), (math.nan, 0.0), (0.5, -1.9), (0.2, -1.0), (0.5, -1.9)])
    windows = DrawWindows(40, 2, 4, 2, lambda _: Verdict(*next(verdicts)))
    assert seen(windows) == 16  # two looks after the second have not been better: an equal one, and no number
    assert steps_of(windows.get_samples()) == [6.0, 8.0] and windows.best == windows.looks[1]
    assert windows.results == {
        "adaptation steps kept": 8,
        "adaptation steps taken": 16,
        "development score": 0.5,
        "development log likelihood": -2.0,
    }
    verdicts = iter([(0.5, -2.0), (0.5, -2.1), (0.5, -1.9), (0.1, 0.0)])
    windows = DrawWindows(16, 2, 4, 2, lambda _: Verdict(*next(verdicts)))
    assert seen(windows) == 16  # of equal scores the likelihood decides
    assert steps_of(windows.get_samples()) == [10.0, 12.0]


def test_a_first_score_that_is_no_number_is_kept_until_there_is_another() -> None:
    verdicts = iter([(math.nan, math.nan), (0.0, -9.0)])
    windows = DrawWindows(8, 2, 4, 2, lambda _: Verdict(*next(verdicts)))
    assert seen(windows) == 8 and steps_of(windows.get_samples()) == [6.0, 8.0]


def with_dev(answers: tuple[tuple[str, ...], ...] = (("one", "two"), ("three",))) -> tuple[RandomAdapter, Task]:
    """A tiny Llama's adapter, and a task with development rows of several accepted answers."""
    rows = tuple(TextRow(text, (WORD,)) for text, WORD in (("red cat", "one"), ("blue dog", "two"), ("a bird", "one")))
    dev = tuple(TextRow(text, accepted) for text, accepted in zip(("red dog", "green cat"), answers, strict=True))
    encoder = NextToken(tokenizer("causal"), 16)
    return written("llama").posterior.adapter, encoder(TextTask("new", rows, dev))


def test_what_is_written_for_development_rows_is_judged_by_every_accepted_answer() -> None:
    adapter, task = with_dev()
    thetas = adapter.initial + 0.5 * torch.randn(2, adapter.dim, generator=torch.Generator().manual_seed(0))
    texts = TaskPosterior(adapter, task, thetas).generate(["red dog", "green cat"], max_new_tokens=4)
    assert all(texts)
    for said, expected in (((texts[0], "x"), 0.5), (("x", texts[1]), 0.5), (tuple(texts), 1.0), (("x", "y"), 0.0)):
        answers = tuple(("cat", text) for text in said)
        judged = replace(task, dev_answers=answers)
        assert judged.dev_answers == answers and judged.to("cpu").dev_answers == answers
        assert development_verdict(adapter, judged, thetas).score == expected
    # Of tensors alone the learnt answer is known.
    one_of_them = replace(with_dev(((texts[0],), ("x",)))[1], metric="QA-F1")
    verdict = development_verdict(adapter, one_of_them, thetas)
    assert verdict.score > 0.0 and verdict.log_likelihood < 0.0
    assert development_verdict(adapter, replace(one_of_them, dev_answers=None), thetas) == verdict
    with pytest.raises(ValueError, match="dev_answers of 1 rows, and 2 rows of dev data"):
        replace(task, dev_answers=(("one",),))
    with pytest.raises(ValueError, match="no development rows"):
        development_verdict(adapter, replace(task, dev=None), thetas)


def classification() -> tuple[RandomAdapter, Task]:
    """Two classes by the sign of a coordinate; the development rows say the contrary: learning makes them worse."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 2))
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0"]), seed=0)
    x = torch.randn(24, 4)
    y = (x[:, 0] > 0).long()
    return adapter, Task("signs", (x, y), num_classes=2, dev=(x, 1 - y), test=(x, y))


def test_a_fine_tuning_that_makes_development_rows_worse_ends_early_with_its_first_window() -> None:
    adapter, task = classification()
    looks: list[float] = []

    def judge(adapter: RandomAdapter, task: Task, thetas: Tensor, heads: Tensor | None) -> Verdict:
        verdict = development_verdict(adapter, task, thetas, heads)
        looks.append(verdict.log_likelihood)
        return verdict

    budget = Budget(steps=60, draws=2, batch_size=8, learning_rate=0.05)
    stopped = finetune(adapter, task, adapter.initial, replace(budget, stopping=EarlyStopping(judge, 4, 2)))
    assert len(looks) == 3 and looks == sorted(looks, reverse=True)
    # The window is the beginning of the run that does not stop: iterates after 2 and 4 steps.
    for kept, steps in zip(stopped.thetas, (2, 4), strict=True):
        assert torch.equal(
            kept, finetune(adapter, task, adapter.initial, replace(budget, steps=steps, draws=1)).thetas[-1]
        )
    whole = finetune(adapter, task, adapter.initial, budget)
    assert not torch.equal(whole.thetas[-1], stopped.thetas[-1])
    several = finetune_each(
        adapter, [task, task], adapter.initial, replace(budget, stopping=EarlyStopping(judge, 4, 2))
    )
    assert all(torch.equal(each.thetas, stopped.thetas) for each in several)
    plain = replace(task, dev=None)
    assert torch.equal(
        finetune(adapter, plain, adapter.initial, replace(budget, stopping=EarlyStopping(judge, 4, 2))).thetas,
        whole.thetas,
    )


def test_lift_keeps_its_best_window_and_says_which() -> None:
    adapter, task = classification()
    options: dict[str, Any] = {"sgd_steps": 5, "burn_in": 5, "samples": 20}
    prior = LiFT(adapter, seed=0, **options).meta_train([task, replace(task, name="again")], progress=False)
    how: dict[str, Any] = {"steps": 60, "draws": 2, "dev_every": 4, "patience": 2, "learning_rate": 0.05, "seed": 3}
    posterior = prior.adapt(task, **how)
    kept, taken = (int(posterior.results[f"adaptation steps {which}"]) for which in ("kept", "taken"))
    assert taken == min(kept + 8, 60) and len(posterior.thetas) == 2 and posterior.mcmc is None
    verdict = development_verdict(adapter, task, posterior.thetas)
    assert posterior.results["development log likelihood"] == pytest.approx(verdict.log_likelihood)
    again = prior.adapt(task, **how)
    assert torch.equal(again.thetas, posterior.thetas)
    first, second = prior.adapt_many([task, task], **how)
    assert torch.equal(first.thetas, posterior.thetas) and not torch.equal(second.thetas, first.thetas)
    learnable = replace(task, dev=task.train)
    assert prior.adapt(learnable, **how).results["adaptation steps kept"] > kept
    without = prior.adapt(replace(task, dev=None), **how)
    assert without.results == {} and without.mcmc is not None


def test_the_method_of_the_tables_stops_as_its_budget_says() -> None:
    adapter, task = classification()
    budget = Budget(warm_up=5, visits=15, steps=40, draws=2, batch_size=8, learning_rate=0.05)
    stopping = EarlyStopping(development_verdict, 4, 2)
    method = LiFTMethod(adapter, replace(budget, stopping=stopping))
    assert method.adapt_settings().dev_every == 4 and method.adapt_settings().patience == 2
    state = method.meta_train([task, replace(task, name="again")])
    posterior: Any = method.adapt(state, task)
    assert posterior.results["adaptation steps taken"] <= 40
    assert LiFTMethod(adapter, budget).adapt_settings().dev_every == 0


@pytest.mark.parametrize("options", [{"dev_every": -1}, {"patience": 0}, {"patience": -2}])
def test_settings_without_a_meaning_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        AdaptSettings(**options)
    if "patience" in options:
        with pytest.raises(ValueError, match="patience"):
            EarlyStopping(development_verdict, 4, 0)


def test_a_written_task_is_adapted_to_until_its_development_rows_are_not_better() -> None:
    adapter, task = with_dev()
    options: dict[str, Any] = {"sgd_steps": 3, "burn_in": 2, "samples": 6, "batch_size": 2}
    prior = LiFT(adapter, seed=0, **options).meta_train([encoded("llama", name) for name in ("a", "b")], progress=False)
    posterior = prior.adapt(task, steps=12, draws=2, dev_every=4, patience=1)
    assert 0.0 <= posterior.results["development score"] <= 1.0
    assert posterior.results["adaptation steps taken"] in (8, 12)
