"""``pyro-lift demo``: what a prior over LoRA weights buys on a family of small tasks, with nothing to download.

Three methods meet the same unseen tasks from the same backbone, the same initial adapter, the same number of
meta-training gradients and the same adaptation budget:

No Meta Train
    fine-tunes each new task from the adapter's own start;
Union Train
    trains one adapter on all meta-training tasks together and fine-tunes from there;
LiFT
    learns a mixture over phi by SGLD-Gibbs and draws each new task's weights under it by SGLD (K = 1 and 3).

All predict by averaging the probabilities of five networks: late iterates for the first two, draws for LiFT. Each was
tuned on the development tasks of two other families, over twelve settings each, by mean NLL and, among equally good
ones, ECE (``--tune`` does it again).
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_lift import metrics
from pyro_lift.data.digits import DigitFamily, digit_backbone, digit_family
from pyro_lift.data.task import Task
from pyro_lift.inference.baselines import BASELINES, Baseline, Budget
from pyro_lift.inference.baselines.lift import LiFTMethod, LiFTState
from pyro_lift.inference.baselines.protocol import adapt_all
from pyro_lift.lift import LiFT, LiFTPrior, LiFTSettings
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import TIMM_ATTENTION, adapt_backbone
from pyro_lift.options import check_number

__all__ = ["CHOSEN", "GRIDS", "Cell", "Choice", "DemoSettings", "Judged", "demo_adapter", "run", "run_cell", "tune"]

Group = Literal["no-meta-train", "union-train", "lift"]
COMPONENTS = (1, 3)
#: Methods as the table and the records name them; the first is what the others are tested against.
LIFT, METHODS = "LiFT K=1", ("No Meta Train", "Union Train", "LiFT K=1", "LiFT K=3")
MEASURES = ("accuracy", "nll", "ece")
#: Families that settings were chosen on; the demo's own are 0, 1, 2, ...
TUNING_SEEDS = (1000, 1001)
#: Settings that differ by less in mean NLL, in nats, are taken for equally good; then calibration decides.
TIE = 0.01


class Choice(NamedTuple):
    """The settings of a method that were tuned; a method ignores those it has no use for.

    Attributes:
        learning_rate: of adaptation.
        meta_learning_rate: of joint training, for Union Train and for LiFT's warm-up.
        meta_share: of the meta-training budget that is used: early stopping.
        beta: standard deviation of a task's weights around phi.
        n_inflate: power on the likelihood.
    """

    learning_rate: float = 3e-3
    meta_learning_rate: float = 3e-3
    meta_share: float = 1.0
    beta: float = 0.03
    n_inflate: float = 1.0


#: Twelve settings each.
GRIDS: dict[Group, list[Choice]] = {
    "no-meta-train": [
        Choice(rate) for rate in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 4e-2, 8e-2)
    ],
    "union-train": [
        *(Choice(rate, meta) for rate, meta in product((1e-4, 2.5e-4, 5e-4), (6e-3, 1e-2, 1.5e-2))),
        *(Choice(2.5e-4, meta, meta_share=0.65) for meta in (6e-3, 1e-2, 1.5e-2)),
    ],
    "lift": [
        Choice(rate, 6e-3, beta=beta, n_inflate=power)
        for rate, beta, power in product((4e-3, 8e-3), (0.02, 0.03, 0.05), (3.0, 10.0))
    ],
}
#: What ``pyro-lift demo --tune`` chose.
CHOSEN: dict[Group, Choice] = {
    "no-meta-train": Choice(1.6e-2),
    "union-train": Choice(2.5e-4, 6e-3),
    "lift": Choice(8e-3, 6e-3, beta=0.03, n_inflate=3.0),
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the experiment; what was tuned is in :data:`CHOSEN`."""

    seeds: int = field(default=5, metadata={"help": "families of tasks, each with its own chains"})
    warm_up: int = field(default=1_300, metadata={"help": "meta-training gradients of joint training"})
    visits: int = field(default=100, metadata={"help": "meta-training gradients after it"})
    steps: int = field(default=100, metadata={"help": "adaptation steps on a new task"})
    draws: int = field(default=5, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=8, metadata={"help": "rows of a minibatch"})
    rank: int = field(default=4, metadata={"help": "of the adapter"})
    num_train: int = field(default=24, metadata={"help": "tasks to meta-train on"})
    num_test: int = field(default=12, metadata={"help": "tasks to be judged by"})
    workers: int = field(default=2, metadata={"help": "processes"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})

    def __post_init__(self) -> None:
        for name in ("seeds", "warm_up", "visits", "steps", "draws", "batch_size", "rank", "workers"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @classmethod
    def smoke(cls, device: str = "cpu") -> DemoSettings:
        """Seconds instead of minutes; the numbers mean nothing."""
        return cls(2, 12, 24, 8, 2, num_train=3, num_test=2, workers=1, device=device)


class Cell(NamedTuple):
    """One method on one family: the unit that is run, in any order and process.

    Attributes:
        part: the tasks that are adapted to and judged, ``"dev"`` or ``"test"``.
        keep: where to write the chain and the prior; None writes nothing.
    """

    group: Group
    seed: int
    choice: Choice
    part: Literal["dev", "test"] = "test"
    keep: Path | None = None


class Judged(NamedTuple):
    """One method's predictions for one task's test rows: ``[n, C]`` and ``[n]``."""

    method: str
    seed: int
    task: str
    probabilities: Tensor
    target: Tensor

    def record(self) -> dict[str, Any]:
        """Name, seed, task and the three numbers."""
        p, y = self.probabilities, self.target
        return {
            "method": self.method,
            "seed": self.seed,
            "task": self.task,
            "accuracy": metrics.accuracy(p, y),
            "nll": metrics.nll(p, y),
            "ece": metrics.expected_calibration_error(p, y),
        }


# ------------------------------------------------------------------------------------------------ one cell


def demo_adapter(settings: DemoSettings, seed: int) -> RandomAdapter:
    """The shipped ViT with LoRA on its attention; the initial adapter is a function of the seed."""
    import peft

    torch.manual_seed(seed)
    adapter = adapt_backbone(digit_backbone(), peft.LoraConfig(r=settings.rank, target_modules=TIMM_ATTENTION))
    return adapter.to(settings.device)


def family_of(settings: DemoSettings, seed: int) -> DigitFamily:
    """The tasks of one seed."""
    return digit_family(seed, num_train=settings.num_train, num_test=settings.num_test)


def run_cell(settings: DemoSettings, cell: Cell, on_step: Callable[[int], None]) -> list[Judged]:
    """Meta-train one method on one family and adapt it to each of the unseen tasks."""
    family = family_of(settings, cell.seed)
    tasks = family.dev if cell.part == "dev" else family.test
    adapter = demo_adapter(settings, cell.seed)
    method = method_of(settings, cell, adapter)
    judged = []
    for name, state in _trained(method, family.train, cell, on_step):
        for task, posterior in zip(tasks, adapt_all(method, state, tasks), strict=True):
            assert task.test is not None
            probabilities = posterior.predict(task.test).cpu()
            judged.append(Judged(name, cell.seed, task.name, probabilities, task.test.target.cpu()))
            on_step(settings.steps)
    return judged


def method_of(settings: DemoSettings, cell: Cell, adapter: RandomAdapter) -> Baseline:
    """The method of a cell, from the registry of all methods, with the settings that were chosen for it."""
    choice = cell.choice
    budget = Budget(
        warm_up=max(round(choice.meta_share * settings.warm_up), 1),
        visits=max(round(choice.meta_share * settings.visits), 1),
        warm_up_learning_rate=choice.meta_learning_rate,
        # LiFT's chain moves at the rate it adapts at; Union Train is joint training from the first step to the last.
        meta_learning_rate=choice.learning_rate if cell.group == "lift" else choice.meta_learning_rate,
        steps=settings.steps,
        learning_rate=choice.learning_rate,
        batch_size=settings.batch_size,
        draws=settings.draws,
        seed=cell.seed,
    )
    if cell.group == "lift":
        return LiFTMethod(adapter, budget, LiFTSettings(beta=choice.beta, n_inflate=choice.n_inflate))
    return BASELINES[cell.group](adapter, budget)


def _trained(
    method: Baseline, tasks: Sequence[Task], cell: Cell, on_step: Callable[[int], None]
) -> Iterator[tuple[str, Any]]:
    """The method's state by name; LiFT's mixtures with one and with three components come from one chain."""
    if not isinstance(method, LiFTMethod):
        name = {"no-meta-train": "No Meta Train", "union-train": "Union Train"}[cell.group]
        yield name, method.meta_train(tasks, on_step=lambda: on_step(1))
        return
    lift = LiFT(method.adapter, settings=method.chain_settings(), adapt=method.adapt_settings(), seed=cell.seed)
    components = COMPONENTS if cell.part == "test" else COMPONENTS[:1]
    priors = lift.meta_train_many(tasks, components, progress=False, on_step=lambda: on_step(1))
    if cell.keep is not None:
        _keep(priors, cell.keep)
    for k, prior in zip(components, priors, strict=True):
        yield f"LiFT K={k}", LiFTState(prior, method.budget.warm_up + method.budget.visits)


def _keep(priors: Sequence[LiFTPrior], folder: Path) -> None:
    """The chain as ArviZ's netCDF, and the prior with the most components."""
    from pyro_lift import report
    from pyro_lift.diagnostics import from_mcmc

    priors[-1].save_pretrained(folder / "prior")
    data = from_mcmc(priors[-1].mcmc)
    data.to_netcdf(str(folder / "chain.nc"), engine="h5netcdf")
    report.draw_traces(data, folder / "traces.png")
    report.draw_mixture(priors[-1].mixture.report(), folder / "mixture.png")


# ------------------------------------------------------------------------------------------------ all cells

_counter: Any = None


def _start_worker(counter: Any) -> None:
    global _counter
    _counter = counter
    torch.set_num_threads(1)


def _work(settings: DemoSettings, cell: Cell) -> list[Judged]:
    return run_cell(settings, cell, _count)


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def steps_of(settings: DemoSettings, cell: Cell) -> int:
    """Gradients that a cell takes, for the progress bar."""
    lift = cell.group == "lift"
    adapted = settings.num_test * (len(COMPONENTS) if lift else 1) if cell.part == "test" else 6
    trained = (
        0
        if cell.group == "no-meta-train"
        else round(cell.choice.meta_share * settings.warm_up) + round(cell.choice.meta_share * settings.visits)
    )
    return trained + adapted * settings.steps


def run_cells(
    settings: DemoSettings, cells: Sequence[Cell], *, description: str, progress: bool = True
) -> list[list[Judged]]:
    """The cells' results in the cells' order, from ``settings.workers`` processes, with one bar for all of them."""
    total = sum(steps_of(settings, cell) for cell in cells)
    hidden = not progress or "CI" in os.environ
    with tqdm(total=total, desc=description, unit="step", disable=hidden, dynamic_ncols=True) as bar:
        if settings.workers == 1:
            return [run_cell(settings, cell, bar.update) for cell in cells]
        context = multiprocessing.get_context("spawn")
        counter = context.Value("q", 0)
        with _pool(settings.workers, context, counter) as pool:
            futures = [pool.submit(_work, settings, cell) for cell in cells]
            _watch(futures, counter, bar)
            return [future.result() for future in futures]


@contextmanager
def _pool(workers: int, context: Any, counter: Any) -> Iterator[ProcessPoolExecutor]:
    """A pool that drops what has not begun when something goes wrong, Ctrl-C included."""
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker, initargs=(counter,))
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def _watch(futures: Sequence[Future[Any]], counter: Any, bar: Any) -> None:
    left = set(futures)
    while left:
        done, left = wait(left, timeout=0.25, return_when=FIRST_COMPLETED)
        for future in done:
            future.result()
        bar.update(counter.value - bar.n)


def run(settings: DemoSettings, out: Path, *, progress: bool = True) -> list[dict[str, Any]]:
    """The demo: all methods on all seeds; records, table and pictures in ``out``.

    Returns:
        One record per method, seed and task.
    """
    from pyro_lift import report
    from pyro_lift.bench.records import write_records

    out.mkdir(parents=True, exist_ok=True)
    cells = [
        Cell(group, seed, CHOSEN[group], keep=out if (group, seed) == ("lift", 0) else None)
        for group in ("lift", "union-train", "no-meta-train")  # the longest first
        for seed in range(settings.seeds)
    ]
    found = [one for cell in run_cells(settings, cells, description="demo", progress=progress) for one in cell]
    found.sort(key=lambda one: (METHODS.index(one.method), one.seed, one.task))
    records = [one.record() for one in found]
    write_records(records, out / "results.json")
    report.draw_tasks(family_of(settings, 0), out / "tasks.png")
    report.draw_reliability(found, METHODS, out / "reliability.png")
    report.draw_scores(records, METHODS, out / "scores.png")
    print(report.comparison(records, METHODS, LIFT))
    return records


def tune(settings: DemoSettings, *, progress: bool = True) -> dict[Group, Choice]:
    """For each method the setting of its grid with the lowest mean NLL on the development tasks.

    Among those within :data:`TIE` of it, which so few tasks cannot tell apart, the one with the lowest ECE.
    """
    from pyro_lift.bench.records import format_table

    cells = [
        Cell(group, seed, choice, "dev") for group, grid in GRIDS.items() for choice in grid for seed in TUNING_SEEDS
    ]
    results = run_cells(replace(settings, num_test=1), cells, description="tune", progress=progress)
    scores: dict[tuple[Group, Choice], list[dict[str, Any]]] = {}
    for cell, judged in zip(cells, results, strict=True):
        scores.setdefault((cell.group, cell.choice), []).extend(one.record() for one in judged)

    def mean(key: tuple[Group, Choice], name: str) -> float:
        return sum(float(record[name]) for record in scores[key]) / len(scores[key])

    rows = [
        [group, *(f"{v:g}" for v in choice), *(f"{mean((group, choice), n):.4f}" for n in MEASURES)]
        for group, choice in sorted(scores, key=lambda key: (key[0], mean(key, "nll")))
    ]
    print(format_table(["method", *Choice._fields, *MEASURES], rows))
    chosen: dict[Group, Choice] = {}
    for group, grid in GRIDS.items():
        best = min(mean((group, choice), "nll") for choice in grid)
        close = [choice for choice in grid if mean((group, choice), "nll") <= best + TIE]
        chosen[group] = min(close, key=lambda choice, g=group: mean((g, choice), "ece"))  # type: ignore[misc]
    return chosen
