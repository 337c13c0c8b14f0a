"""The comparison on unseen tasks: scores of one task, rates chosen on development tasks, tasks held out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from pyro_lift import Task
from pyro_lift.bench.comparison import METHODS, Benchmark, ComparisonSettings, hold_out, run
from pyro_lift.bench.example_arguments import parser, settings_of
from pyro_lift.bench.report import by_task, comparison
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.text import TextRow
from pyro_lift.metrics.task import scores
from pyro_lift.metrics.text import score
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows

SMALL = ComparisonSettings(warm_up=6, visits=9, steps=6, draws=2, batch_size=4, rates=(1e-4, 1e-2), dev_tasks=2)


def blobs(name: str) -> Task:
    def rows() -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.arange(12) % 3
        return torch.nn.functional.one_hot(y, 4).float() + 0.3 * torch.randn(12, 4), y

    return Task(name, rows(), num_classes=3, test=rows(), metric="Classification-F1", labels=("a", "b", "c"))


def adapter(seed: int) -> RandomAdapter:
    torch.manual_seed(seed)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    return adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"]))


def test_methods_with_a_rate_of_their_own_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = TaskCollection(
        "blobs",
        tuple(blobs(f"train-{i}") for i in range(3)),
        (blobs("dev"),),
        (blobs("new-1"), blobs("new-2")),
        missing={"test": ("gone",)},
    )
    benchmark = Benchmark(tasks, adapter, {"score": "macro F1", "nll": "NLL"})
    records = run(benchmark, SMALL, tmp_path, progress=False)
    assert json.loads((tmp_path / "results.json").read_text()) == records
    assert [(r["method"], r["task"]) for r in records] == [(m, t) for m in METHODS for t in ("new-1", "new-2")]
    assert all(math.isfinite(r["nll"]) and 0.0 <= r["score"] <= 1.0 for r in records)
    assert all((r["rate"] in SMALL.rates) == (r["method"] not in ("Linear Probe", "Tuned LoRA")) for r in records)
    assert len({r["rate"] for r in records if r["method"] == "LiFT"}) == 1
    out = capsys.readouterr().out
    assert "missing: gone" in out and "rate 0.01 chosen by NLL on 1 development tasks" in out
    again = run(benchmark, SMALL, tmp_path / "again", progress=False)
    timeless = [{k: v for k, v in r.items() if not k.endswith("_seconds")} for r in records]
    assert timeless == [{k: v for k, v in r.items() if not k.endswith("_seconds")} for r in again]


def test_tuned_methods_try_equally_many_settings_on_the_development_tasks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = tuple(blobs(f"train-{i}") for i in range(2))
    tasks = TaskCollection("blobs", train, (blobs("dev"),), (blobs("new"),))
    settings = replace(SMALL, tune=4, rates=(1e-2,))
    records = run(Benchmark(tasks, adapter, {"nll": "NLL"}), settings, tmp_path, progress=False)
    assert [r["method"] for r in records] == list(METHODS)
    out = capsys.readouterr().out
    for method in ("No Meta Train", "Union Train", "LiFT"):
        assert f"{method}: " in out
    assert out.count("chosen among 4 by NLL on dev") == 3
    rates = {r["method"]: r["rate"] for r in records}
    assert rates["Linear Probe"] is None and rates["LiFT"] in (0.25e-2, 1e-2, 4e-2)


def test_the_tasks_own_metric_is_that_of_its_strings() -> None:
    task = blobs("t")
    p = torch.softmax(torch.randn(12, 3), -1)
    assert task.test is not None
    guess, truth = [task.labels[k] for k in p.argmax(-1)], [[task.labels[k]] for k in task.test.target]  # type: ignore[index]
    found = scores(p, task.test, task)
    assert found["score"] == pytest.approx(score("Classification-F1", guess, truth))
    assert found["chance"] == pytest.approx(1 / 3)
    # The options of a classification may stand in another order than its labels: the labels count.
    texts = [TextRow("q", (one[0],), ("c", "b", "a")) for one in truth]
    assert scores(p, task.test, task, texts)["score"] == found["score"]
    # Options by row: the strings are the row's own, and a further accepted answer counts.
    texts = [TextRow("q", ("x", "z"), ("x", "y")), TextRow("q", ("v",), ("u", "v"))]
    options = torch.zeros(2, 2, 1, dtype=torch.long)
    inputs = {"input_ids": options[:, 0], "option_input_ids": options, "option_attention_mask": options + 1}
    choice = Task("c", Rows(inputs, torch.tensor([0, 1])), "matching", metric="ACC")
    found = scores(torch.tensor([[0.9, 0.1], [0.8, 0.2]]), choice.train, choice, texts)
    assert found["score"] == found["accuracy"] == 0.5


def test_perplexity_is_over_all_tokens_that_count() -> None:
    target = torch.tensor([[0, 1, IGNORED], [1, IGNORED, IGNORED]])
    rows = Rows({"x": torch.zeros(2, 3)}, target)
    task = Task("t", rows, "tokens", metric="Perplexity")
    p = torch.full((2, 3, 2), 0.5)
    p[0, 0] = torch.tensor([0.25, 0.75])
    found = scores(p, rows, task)
    assert found["perplexity"] == pytest.approx((4 * 2 * 2) ** (1 / 3))
    assert found["nll"] == pytest.approx(math.log(16) / 3)


def test_held_out_tasks_are_no_longer_trained_on() -> None:
    found = TaskCollection("c", (blobs("a"), blobs("b")), (), (blobs("z"),))
    held = hold_out(found, ["b", "nowhere"])
    assert [t.name for t in held.train] == ["a"] and [t.name for t in held.dev] == ["b"]
    assert "b" in held.notes[0] and "nowhere" not in held.notes[0]
    assert hold_out(found, []) == found


def test_flags_overrule_the_settings_and_smoke_is_small() -> None:
    options = parser("x", ComparisonSettings(steps=99), "out")
    plain = settings_of(options.parse_args(["--rates", "0.1", "0.2", "--rank", "2"]), ComparisonSettings(steps=99))
    assert (plain.rates, plain.rank, plain.steps) == ((0.1, 0.2), 2, 99)
    assert plain.tune == 0
    tuned = settings_of(options.parse_args(["--tune"]), SMALL), settings_of(options.parse_args(["--tune", "6"]), SMALL)
    assert [s.tune for s in tuned] == [24, 6]
    smoke = settings_of(options.parse_args(["--smoke", "--visits", "7"]), ComparisonSettings(steps=99))
    assert smoke.steps < 10 and smoke.visits == 7
    with pytest.raises(ValueError, match="rate=-1"):
        ComparisonSettings(rates=(-1.0,))


def test_tables_pair_tasks_and_say_how_many() -> None:
    records = [
        {"method": m, "seed": 0, "task": t, "nll": x}
        for m, values in (("A", (1.0, 3.0, 2.0)), ("B", (0.5, 2.0, 1.5)))
        for t, x in zip("xyz", values, strict=True)
    ]
    table = comparison(records, ["A", "B"], "B", {"nll": "NLL"})
    assert "1 seed x 3 unseen tasks" in table and "2.000" in table and "1.333" in table
    rows = by_task(records, ["A", "B"], "nll", 1).splitlines()
    assert rows[0].split() == ["nll", "A", "B"] and rows[3].split() == ["y", "3.0", "2.0"]
