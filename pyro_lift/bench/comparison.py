"""A comparison of LiFT with three other methods on the unseen tasks of a benchmark, run by three of the examples.

The others are the linear probe (where tasks have classes), tuned LoRA, No Meta Train and Union Train.

All methods get the same backbone, initial adapter, number of meta-training minibatches, adaptation steps and number of
networks behind a prediction. Each chooses its rate of adaptation on the development tasks, from one grid, by mean NLL;
or, with ``--tune``, all of its settings by the one tuner (:mod:`pyro_lift.tuning.methods`), the same number of trials
for each. The unseen tasks are looked at once, with what was chosen.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_lift.bench import report
from pyro_lift.bench.records import Record, write_records
from pyro_lift.bench.text_to_text import WritingSettings, written_scores
from pyro_lift.config import AdapterConfig, BackboneConfig, OutputConfig, RunConfig, TasksConfig
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.text import TextRow, TextTask
from pyro_lift.inference.adaptation.early_stopping import EarlyStopping
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.inference.baselines.linear_probe import ProbePosterior, has_probe
from pyro_lift.inference.baselines.lora_tuned import TunedPosterior
from pyro_lift.inference.baselines.protocol import Baseline, Budget
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.task import scores
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows, Task
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.support.options import check_number
from pyro_lift.tuning.choosing import FAILED, tune
from pyro_lift.tuning.development import development_verdict
from pyro_lift.tuning.methods import tune_method
from pyro_lift.wiring import adapter_of, encode_tasks

__all__ = ["METHODS", "Benchmark", "ComparisonSettings", "benchmark_of", "hold_out", "run", "table_of"]

#: Methods as tables name them, and as the registry does; the last is what the others are tested against.
METHODS = {
    "Linear Probe": "linear-probe",
    "Tuned LoRA": "lora-tuned",
    "No Meta Train": "no-meta-train",
    "Union Train": "union-train",
    "LiFT": "lift",
}
LIFT, PROBE, TUNED = "LiFT", "Linear Probe", "Tuned LoRA"
#: They choose on each task's own rows, so that no rate is chosen for them.
CHOOSE = (PROBE, TUNED)


@dataclass(frozen=True)
class ComparisonSettings:
    """Sizes and rates of a comparison."""

    seeds: int = field(default=1, metadata={"help": "repetitions: initial adapters, minibatches, chains"})
    warm_up: int = field(default=400, metadata={"help": "meta-training gradients of joint training"})
    visits: int = field(default=100, metadata={"help": "meta-training gradients after it"})
    steps: int = field(default=40, metadata={"help": "adaptation steps on a new task"})
    draws: int = field(default=5, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=8, metadata={"help": "rows of a minibatch"})
    rank: int = field(default=4, metadata={"help": "of the adapter"})
    components: int = field(default=1, metadata={"help": "K of LiFT's mixture"})
    beta: float = field(default=0.03, metadata={"help": "LiFT: standard deviation of a task's weights around phi"})
    n_inflate: float = field(default=3.0, metadata={"help": "LiFT: power on the likelihood"})
    meta_rate: float = field(default=3e-3, metadata={"help": "learning rate of meta-training, for all"})
    rates: tuple[float, ...] = field(
        default=(1e-3, 3e-3, 1e-2), metadata={"help": "rates of adaptation that each method chooses from"}
    )
    tune: int = field(
        default=0,
        metadata={"help": "settings of each method that are tried on the development tasks; 0: rates alone"},
    )
    dev_tasks: int = field(default=3, metadata={"help": "tasks that the choice is made on, at most"})
    test_tasks: int = field(default=1000, metadata={"help": "tasks to be judged by, at most"})
    test_rows: int = field(default=250, metadata={"help": "rows that a task is judged by, at most"})
    max_length: int = field(default=64, metadata={"help": "longest text in tokens; longer ones are cut and counted"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    dev_every: int = field(
        default=0, metadata={"help": "steps between looks at a task's dev rows, the best being kept; 0: no looks"}
    )
    patience: int = field(default=3, metadata={"help": "looks without a better one that end an adaptation early"})

    def __post_init__(self) -> None:
        check_number("dev_every", self.dev_every, open_below=False, whole=True)
        for name in (
            "seeds",
            "visits",
            "steps",
            "draws",
            "batch_size",
            "rank",
            "dev_tasks",
            "test_tasks",
            "test_rows",
            "patience",
        ):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)
        check_number("tune", self.tune, open_below=False, whole=True)
        if not self.rates:
            raise ValueError("rates is empty: give at least one rate of adaptation.")
        for rate in self.rates:
            check_number("rate", rate)


class Benchmark(NamedTuple):
    """The tasks, the network and the measures of a comparison.

    Attributes:
        tasks: encoded for the backbone, with what is missing by name.
        adapter: the network with its initial adapter, by seed.
        measures: keys of the records that the table shows, and what they are called.
        heads: of every task, where they have any.
        texts: the tasks as strings, for the metrics that compare strings.
        writing: how answers are written, where methods are judged by that; None judges them by probabilities.
    """

    tasks: TaskCollection[Task]
    adapter: Callable[[int], RandomAdapter]
    measures: Mapping[str, str]
    heads: HeadPolicy = HeadPolicy()
    texts: TaskCollection[TextTask] | None = None
    writing: WritingSettings | None = None


def benchmark_of(
    tasks: TaskCollection[Any],
    backbone: str | Path,
    kind: Any,
    settings: ComparisonSettings,
    measures: Mapping[str, str],
    heads: HeadPolicy | None = None,
) -> Benchmark:
    """Wire loaded tasks and a backbone as ``pyro-lift train`` wires them.

    Args:
        tasks: what ``load_tasks`` returned.
        backbone: folder or name.
        kind: how it is loaded; see :func:`~pyro_lift.models.backbones.load_backbone`.
        settings: for the rank and the longest text.
        measures: see :class:`Benchmark`.
        heads: see :class:`Benchmark`.

    Raises:
        ValueError: no task to learn from, or none to be judged by; a tokenizer that does not fit the model.
    """
    config = RunConfig(
        backbone=BackboneConfig(name=str(backbone), kind=kind),
        adapter=AdapterConfig(rank=settings.rank),
        tasks=TasksConfig(max_length=settings.max_length),
    )
    if not tasks.train or not tasks.test:
        raise ValueError(f"{tasks.name}: nothing to {'learn from' if not tasks.train else 'be judged by'}.")

    def adapter(seed: int) -> RandomAdapter:
        return adapter_of(replace(config, output=OutputConfig(seed=seed))).to(settings.device)

    texts = tasks if isinstance(tasks.train[0], TextTask) else None
    return Benchmark(encode_tasks(tasks, config), adapter, measures, heads or HeadPolicy(), texts)


def _cut(benchmark: Benchmark, settings: ComparisonSettings) -> Benchmark:
    """Return the benchmark with no more development and unseen tasks than the settings say."""
    tasks = benchmark.tasks
    dev, test = (
        tuple(spread_evenly(tasks.dev, settings.dev_tasks)),
        tuple(spread_evenly(tasks.test, settings.test_tasks)),
    )
    return benchmark._replace(
        tasks=replace(tasks, dev=dev if len(settings.rates) > 1 or settings.tune else (), test=test)
    )


def hold_out(tasks: TaskCollection[Any], names: Sequence[str]) -> TaskCollection[Any]:
    """Move training tasks to the development tasks, for benchmarks that have none; unknown names are passed over.

    They are then not meta-trained on.
    """
    moved = tuple(task for task in tasks.train if task.name in names)
    kept = tuple(task for task in tasks.train if task.name not in names)
    note = f"held out of train to choose rates on: {', '.join(task.name for task in moved)}"
    return replace(tasks, train=kept, dev=(*tasks.dev, *moved), notes=(*tasks.notes, note) if moved else tasks.notes)


# ------------------------------------------------------------------------------------------------ the comparison


def run(benchmark: Benchmark, settings: ComparisonSettings, out: Path, *, progress: bool = True) -> list[Record]:
    """Compare the methods; writes ``results.json``, ``tasks.txt``, ``table.txt`` and ``scores.png`` in ``out``.

    Returns:
        One record a method, seed and task.
    """
    out.mkdir(parents=True, exist_ok=True)
    summary = benchmark.tasks.summary()
    benchmark = _cut(benchmark, settings)
    for part, tasks in (("rates chosen on", benchmark.tasks.dev), ("judged by", benchmark.tasks.test)):
        summary += f"\n  {part}: {', '.join(task.name for task in tasks) or 'nothing'}"
    (out / "tasks.txt").write_text(summary + "\n")
    print(summary, flush=True)
    records: list[Record] = []
    hidden = not progress or "CI" in os.environ
    with tqdm(total=_gradients(benchmark, settings), unit="step", disable=hidden, dynamic_ncols=True) as bar:
        for seed in range(settings.seeds):
            adapter = benchmark.adapter(seed)
            bar.write(f"seed {seed}: {adapter.dim} adapter weights")
            for name in methods_of(benchmark):
                records += _run_method(_Contender(benchmark, settings, adapter, name, seed, bar))
                write_records(records, out / "results.json")
    table = table_of(records, benchmark.measures)
    (out / "table.txt").write_text(table + "\n")
    report.plot_by_task(records, methods_of(benchmark), out / "scores.png", benchmark.measures)
    print(table)
    return records


def table_of(records: Sequence[Record], measures: Mapping[str, str]) -> str:
    """Format the methods over all unseen tasks, then the first measure by task."""
    told = {record["method"] for record in records}
    names, first = [name for name in METHODS if name in told], next(iter(measures))
    return f"{report.comparison(records, names, LIFT, measures)}\n\n{report.by_task(records, names, first)}"


def _gradients(benchmark: Benchmark, settings: ComparisonSettings) -> int:
    """Count the gradients of the whole comparison, for the bar."""
    trained = 2 * (settings.warm_up + settings.visits)
    tried = 0 if settings.tune else len(settings.rates) * len(benchmark.tasks.dev)  # trials count by themselves
    tasks = sum((name != PROBE) * len(benchmark.tasks.test) for name in methods_of(benchmark))
    tasks += sum(tried for name in methods_of(benchmark) if name not in CHOOSE)
    return settings.seeds * (trained + tasks * settings.steps)


def methods_of(benchmark: Benchmark) -> list[str]:
    """The methods by the names of the tables; no probe where some task has no classes that its rows share."""
    tasks = (*benchmark.tasks.train, *benchmark.tasks.dev, *benchmark.tasks.test)
    return [name for name in METHODS if name != PROBE or all(map(has_probe, tasks))]


class _Contender(NamedTuple):
    """One method of the comparison on one seed, and the bar that tells of it.

    Attributes:
        tuned: the method with what the tuner chose; None where nothing was tuned.
    """

    benchmark: Benchmark
    settings: ComparisonSettings
    adapter: RandomAdapter
    name: str
    seed: int
    bar: Any
    tuned: Baseline[Any] | None = None

    def method(self, rate: float) -> Baseline[Any]:
        """Set the method up with a rate of adaptation, or with all that was tuned."""
        if self.tuned is not None:
            return self.tuned
        s = self.settings
        budget = Budget(
            warm_up=s.warm_up,
            visits=s.visits,
            warm_up_learning_rate=s.meta_rate,
            meta_learning_rate=s.meta_rate,
            steps=s.steps,
            learning_rate=rate,
            batch_size=s.batch_size,
            draws=s.draws,
            heads=self.benchmark.heads,
            seed=self.seed,
            stopping=EarlyStopping(development_verdict, s.dev_every, s.patience) if s.dev_every else None,
        )
        options: dict[str, Any] = {}
        if self.name == LIFT:
            options["settings"] = LiFTSettings(components=s.components, beta=s.beta, n_inflate=s.n_inflate)
        if self.name == TUNED:
            options["rates"] = tuple(s.rates)
        return BASELINES[METHODS[self.name]](self.adapter, budget, **options)


def _run_method(contender: _Contender) -> list[Record]:
    benchmark, settings, _, name, seed, bar, _ = contender
    if settings.tune and name not in CHOOSE:
        contender = contender._replace(tuned=_tuned(contender))
    bar.set_description(f"{name}: meta-train")
    start = time.perf_counter()
    state = contender.method(settings.rates[0]).meta_train(benchmark.tasks.train, on_step=bar.update)
    meta_seconds = time.perf_counter() - start
    rate = settings.rates[0] if name in CHOOSE else _chosen_rate(contender, state)
    records = []
    for task in benchmark.tasks.test:
        bar.set_description(f"{name}: {task.name}")
        start = time.perf_counter()
        posterior = contender.method(rate).adapt(state, task, seed=seed)
        adapt_seconds = time.perf_counter() - start
        rows, texts = _judged_rows(benchmark, task, settings.test_rows)
        written: dict[str, float] = {}
        if benchmark.writing is not None and texts is not None:
            written = written_scores(posterior, task, rows, texts, benchmark.writing)
        records.append(
            {
                "method": name,
                "seed": seed,
                "task": task.name,
                "metric": task.metric,
                "rows": len(rows),
                **scores(_predicted(posterior, task, rows), rows, task, texts),
                **written,
                "rate": None if name in CHOOSE else rate,
                "meta_seconds": round(meta_seconds, 2),
                "adapt_seconds": round(adapt_seconds, 2),
            }
        )
        bar.update(0 if name == PROBE else settings.steps)
    return records


def _tuned(contender: _Contender) -> Baseline[Any]:
    """Choose all settings of a method by the tuner, on the development tasks or on training tasks held out in turn."""
    tasks, bar, name = contender.benchmark.tasks, contender.bar, contender.name
    bar.set_description(f"{name}: tune")
    method, tuning = tune_method(
        contender.method(contender.settings.rates[0]),
        tasks.train,
        held_out=tasks.dev,
        trials=contender.settings.tune,
        on_trial=lambda trial: bar.set_postfix_str(f"rung {trial.rung + 1}, {trial.loss:.3f}: {trial.settings}"),
    )
    bar.set_postfix_str("")
    tried = len({trial.settings for trial in tuning.trials})
    bar.write(f"{name}: {tuning.chosen}, chosen among {tried} by NLL on {', '.join(tuning.held_out)}")
    return method


def _chosen_rate(contender: _Contender, state: Any) -> float:
    """Choose the rate with the lowest mean NLL on the development tasks; the first where there are none."""
    if contender.tuned is not None:
        return contender.tuned.budget.learning_rate
    tasks, rates = contender.benchmark.tasks.dev, contender.settings.rates
    if not tasks:
        return rates[0]
    tuned = tune(rates, partial(_dev_scores, contender, state))
    shown = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in zip(rates, tuned.losses, strict=True))
    name = contender.name
    contender.bar.write(f"{name}: rate {tuned.best:g} chosen by NLL on {len(tasks)} development tasks ({shown})")
    return tuned.best


def _dev_scores(contender: _Contender, state: Any, rate: float) -> Iterator[Mapping[str, float]]:
    """Yield the scores of a rate on each development task."""
    benchmark, settings, bar = contender.benchmark, contender.settings, contender.bar
    for task in benchmark.tasks.dev:
        bar.set_description(f"{contender.name}: {task.name}, rate {rate:g}")
        rows, _ = _judged_rows(benchmark, task, settings.test_rows)
        try:
            yield scores(_predicted(contender.method(rate).adapt(state, task), task, rows), rows, task)
        except DivergedError:  # the others are adapted to all the same, so that the bar ends where it said
            yield FAILED
        bar.update(settings.steps)


def _predicted(posterior: Any, task: Task, rows: Rows) -> Tensor:
    """Average the probabilities over the draws, a draw and a few rows at a time.

    That is how a CPU likes it (3.5 times faster than four draws of MiniLM in one pass); it holds few token
    probabilities at once, and text is padded to the longest of its own pass.
    """
    size = min(len(rows), 32)
    if isinstance(posterior, TunedPosterior):
        posterior = posterior.posterior
    if isinstance(posterior, ProbePosterior):
        return posterior.predict(rows)
    return predict(posterior.adapter, posterior.thetas, rows, task.kind, heads=posterior.heads, batch_size=size)


def _judged_rows(benchmark: Benchmark, task: Task, most: int) -> tuple[Rows, Sequence[TextRow] | None]:
    """Return test rows of a task, chosen with a fixed seed where there are many, and the same rows as strings."""
    if task.test is None:
        raise ValueError(f"task {task.name!r} has no test rows to be judged by.")
    order = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))
    kept = order[:most].sort().values if most < len(task.test) else torch.arange(len(task.test))
    texts = None
    if benchmark.texts is not None:
        strings = benchmark.texts[task.name].test
        texts = [strings[k] for k in kept.tolist()]
    return task.test.take(kept), texts
