"""The benchmark of methods: its wiring, its costs, and every method on real tasks of text and of pictures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from pyro_lift.bench import methods
from pyro_lift.bench.experiments import DIGITS, MethodsSettings, on_tasks
from pyro_lift.bench.grids import CHOOSING, CHOSEN, GROUPS, choice_of, group_of
from pyro_lift.bench.memory import peak_bytes
from pyro_lift.inference.baselines.imaml import ImplicitMAML
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.union_train import UnionTrain
from pyro_lift.methods.registry import BASELINES

CPU = torch.device("cpu")


def test_every_method_has_chosen_settings_and_is_tuned_itself_or_by_another_of_its_family() -> None:
    assert {group_of(name) for name in BASELINES} == {*GROUPS, *CHOOSING}
    assert set(CHOSEN) <= set(GROUPS) <= set(BASELINES)
    for name in BASELINES:
        assert choice_of(name).learning_rate > 0


def test_settings_are_chosen_written_and_taken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(MethodsSettings.smoke(), trials=2)
    methods.command(tmp_path, DIGITS, settings, ["no-meta-train"], choose=True)
    assert set(json.loads((tmp_path / "tuned.json").read_text())) == {"no-meta-train"}
    assert "rung" in capsys.readouterr().out
    problem = DIGITS.problem(settings, 0)
    changes = {"maml": {"inner_learning_rate": 0.25, "learning_rate": 0.5}}
    setup = methods.Setup(problem, settings, 0, tuned=changes)
    bmaml = methods.method_of(setup, "bmaml", choice_of("bmaml"))
    assert (bmaml.inner_learning_rate, bmaml.budget.learning_rate) == (0.25, 0.5)  # type: ignore[attr-defined]
    given: list[object] = []
    monkeypatch.setattr(methods, "run_seed", lambda tuned, **rest: given.append(tuned) or [])
    assert list(methods._each_seed(DIGITS, settings, ["maml"], changes)) == [[]] and given == [changes]


def test_peak_memory_of_a_call_is_what_was_alive_at_once() -> None:
    x = torch.zeros(1000, requires_grad=True)

    def call() -> None:
        y = x * 2.0  # 4 kB each: y, its exponential, and the gradient between them
        torch.autograd.grad(y.exp().sum(), x)

    assert peak_bytes(call, CPU) == pytest.approx(12_000, abs=100)
    assert peak_bytes(lambda: [torch.zeros(1000).sum() for _ in range(5)], CPU) == pytest.approx(4_000, abs=100)


def test_memory_reckoned_before_a_run_is_what_it_takes() -> None:
    problem = DIGITS.problem(MethodsSettings.smoke(), 0)
    budget = Budget(warm_up=0, visits=1, batch_size=8)
    tasks = problem.train[:2]
    for method in (
        MAML(problem.adapter, budget, tasks_per_step=1),
        MAML(problem.adapter, budget, inner_steps=3, tasks_per_step=1),
        MAML(problem.adapter, budget, first_order=True, tasks_per_step=1),
        ImplicitMAML(problem.adapter, budget, tasks_per_step=1),
    ):
        taken = peak_bytes(lambda method=method: method.meta_train(tasks), CPU)  # type: ignore[misc]
        assert 0.6 < method.needed_bytes(tasks) / taken < 1.6
    plain = peak_bytes(lambda: UnionTrain(problem.adapter, budget).meta_train(tasks), CPU)
    assert plain < taken


def test_records_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["no-meta-train", "union-train", "maml", "lift", "retriever-fusion-k5"]
    methods.command(tmp_path, DIGITS, MethodsSettings.smoke(), names)
    records = json.loads((tmp_path / "methods.json").read_text())
    assert {r["method"] for r in records} == set(names)
    for r in records:
        assert {"seed", "task", "accuracy", "nll", "ece", "meta_seconds", "adapt_seconds"} <= set(r)
        assert (r["seconds_per_visit_rel"] is None) == (r["method"] == "no-meta-train")
    maml = next(r for r in records if r["method"] == "maml")
    assert maml["peak_bytes_rel"] > 2.0
    assert (tmp_path / "methods.png").stat().st_size > 10_000
    shown = capsys.readouterr().out
    assert "commonest class" in shown
    assert "retriever-fusion-k5" in shown


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'reptile'"):
        methods.run(DIGITS, MethodsSettings.smoke(), ["reptil"])
    with pytest.raises(ValueError, match="did you mean 'crossfit'"):
        on_tasks("crosfit")


def test_without_a_backbone_the_message_says_how_to_give_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="give --backbone"):
        on_tasks("vtab")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "split", "refused"),
    [
        ("crossfit", "CLS-45", set()),
        ("vtab", "structured", set()),
        ("shakespeare", None, {"protonet", "protonet-lite"}),
    ],
)
def test_every_method_runs_on_real_tasks(
    name: str, split: str | None, refused: set[str], data_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    root = data_root / "vision" if name == "vtab" else data_root
    experiment = on_tasks(name, split, str(root))
    settings = replace(MethodsSettings.smoke(), warm_up=2, visits=9, num_train=2)
    records = methods.run_seed(experiment, settings, list(BASELINES), 0)
    assert {r["method"]: r["reason"] for r in records if "reason" in r}.keys() == refused
    for r in records:
        assert "reason" in r or (0.0 <= r["accuracy"] <= 1.0 and r["nll"] > 0.0)
