"""``pyro-lift demo``: what a prior over LoRA weights buys on a family of small tasks, with nothing to download.

Three methods meet the same unseen tasks from the same backbone, the same initial adapter, the same number of
meta-training gradients and the same adaptation budget:

No Meta Train
    fine-tunes each new task from the adapter's own start;
Union Train
    trains one adapter on all meta-training tasks together and fine-tunes from there;
LiFT
    learns a mixture over phi by SGLD-Gibbs and draws each new task's weights under it by SGLD (K = 1 and 3).

Both meta-learners begin where one joint training of the same tasks ends, and have the same number of gradients after
it: Union Train goes on with joint training, at a rate of its own; LiFT spends half on that and half on its chain.

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
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_lift.data.digits import DigitFamily, digit_backbone, digit_family
from pyro_lift.inference.baselines.protocol import Baseline, Budget, adapt_all
from pyro_lift.inference.baselines.union_train import UnionTrain, UnionTrainState, union_train
from pyro_lift.lift import LiFT
from pyro_lift.methods.lift import LiFTMethod, LiFTState
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.task import Judged
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import TIMM_ATTENTION, adapt_backbone
from pyro_lift.models.task import Task
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import LiFTSettings
from pyro_lift.support.options import check_number

__all__ = ["CHOSEN", "GRIDS", "Cell", "Choice", "DemoSettings", "demo_adapter", "run", "run_cell", "tune"]

Group = Literal["no-meta-train", "union-train", "lift"]
COMPONENTS = (1, 3)
#: Methods as the table and the records name them; the first is what the others are tested against.
LIFT, METHODS = "LiFT K=1", ("No Meta Train", "Union Train", "LiFT K=1", "LiFT K=3")
MEASURES = ("accuracy", "nll", "ece")
#: Families that settings were chosen on; the demo's own are 0, 1, 2, ...
TUNING_SEEDS = (1000, 1001)
#: Tasks that are adapted to in one pass.
BLOCK = 6
#: Settings that differ by less in mean NLL, in nats, are taken for equally good; then calibration decides.
TIE = 0.01


class Choice(NamedTuple):
    """The settings of a method that were tuned; a method ignores those it has no use for.

    Attributes:
        learning_rate: of adaptation, and of LiFT's chain.
        tail_rate: of the joint training that follows the one both meta-learners share.
        beta: standard deviation of a task's weights around phi.
        n_inflate: power on the likelihood.
    """

    learning_rate: float = 3e-3
    tail_rate: float = 2e-3
    beta: float = 0.03
    n_inflate: float = 1.0


#: Twelve settings each.
GRIDS: dict[Group, list[Choice]] = {
    "no-meta-train": [
        Choice(rate) for rate in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 4e-2, 8e-2)
    ],
    "union-train": [Choice(rate, tail) for rate, tail in product((1e-4, 2.5e-4, 5e-4, 1e-3), (1e-3, 5e-4, 2.5e-4))],
    "lift": [
        Choice(rate, beta=beta, n_inflate=power)
        for rate, beta, power in product((2e-3, 4e-3, 8e-3), (0.03, 0.05), (5.0, 10.0))
    ],
}
#: What ``pyro-lift demo --tune`` chose.
CHOSEN: dict[Group, Choice] = {
    "no-meta-train": Choice(1.6e-2),
    "union-train": Choice(5e-4, 2.5e-4),
    "lift": Choice(4e-3, beta=0.05, n_inflate=10.0),
}


@dataclass(frozen=True)
class DemoSettings:
    """Sizes of the experiment; what was tuned is in :data:`CHOSEN`."""

    seeds: int = field(default=5, metadata={"help": "families of tasks, each with its own chains"})
    warm_up: int = field(default=1_200, metadata={"help": "gradients of the joint training that is shared"})
    warm_up_rate: float = field(default=6e-3, metadata={"help": "of that, Adam"})
    visits: int = field(default=200, metadata={"help": "gradients of meta-training after it"})
    steps: int = field(default=100, metadata={"help": "adaptation steps on a new task"})
    draws: int = field(default=5, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=8, metadata={"help": "rows of a minibatch"})
    rank: int = field(default=4, metadata={"help": "of the adapter"})
    num_train: int = field(default=24, metadata={"help": "tasks to meta-train on"})
    train_rows: int = field(default=10, metadata={"help": "labelled images of a task to meta-train on"})
    adapt_rows: int = field(default=25, metadata={"help": "labelled images of a new task"})
    num_dev: int = field(default=6, metadata={"help": "tasks to tune on"})
    num_test: int = field(default=10, metadata={"help": "tasks to be judged by"})
    workers: int = field(default=2, metadata={"help": "processes"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})

    def __post_init__(self) -> None:
        for name in ("seeds", "warm_up", "visits", "steps", "draws", "batch_size", "rank", "workers"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @classmethod
    def smoke(cls, device: str = "cpu") -> DemoSettings:
        """Seconds instead of minutes; the numbers mean nothing."""
        return cls(2, 12, visits=24, steps=8, draws=2, num_train=3, num_test=2, workers=1, device=device)


class Cell(NamedTuple):
    """Methods on one family, which share its joint training: the unit that is run, in any order and process.

    Attributes:
        part: the tasks that are adapted to and judged, ``"dev"`` or ``"test"``.
        keep: where to write LiFT's chain and prior; None writes nothing.
    """

    seed: int
    choices: tuple[tuple[Group, Choice], ...]
    part: Literal["dev", "test"] = "test"
    keep: Path | None = None


# ------------------------------------------------------------------------------------------------ one cell


def demo_adapter(settings: DemoSettings, seed: int) -> RandomAdapter:
    """The shipped ViT with LoRA on its attention; the initial adapter is a function of the seed."""
    import peft

    torch.manual_seed(seed)
    adapter = adapt_backbone(digit_backbone(), peft.LoraConfig(r=settings.rank, target_modules=TIMM_ATTENTION))
    return adapter.to(settings.device)


def family_of(settings: DemoSettings, seed: int) -> DigitFamily:
    """The tasks of one seed."""
    sizes = {name: getattr(settings, name) for name in ("num_train", "num_dev", "num_test", "train_rows", "adapt_rows")}
    return digit_family(seed, **sizes)


def run_cell(settings: DemoSettings, cell: Cell, on_step: Callable[[int], None]) -> list[list[Judged]]:
    """Meta-train each method on one family and adapt it to each of the unseen tasks; a list for each choice."""
    family = family_of(settings, cell.seed)
    tasks = family.dev if cell.part == "dev" else family.test
    adapter = demo_adapter(settings, cell.seed)
    jointly = partial(
        union_train,
        adapter,
        family.train,
        batch_size=settings.batch_size,
        seed=cell.seed,
        on_step=partial(on_step, 1),
    )
    joint = jointly(steps=settings.warm_up, learning_rate=settings.warm_up_rate) if _meta_trains(cell) else None
    found: list[list[Judged]] = []
    for group, choice in cell.choices:
        method = method_of(settings, group, choice, cell.seed, adapter, joint)
        judged = []
        for name, state in _trained(method, family.train, cell, jointly, on_step):
            for task, posterior in zip(tasks, adapt_all(method, state, tasks, block_size=BLOCK), strict=True):
                assert task.test is not None
                probabilities = posterior.predict(task.test).cpu()
                judged.append(Judged(name, cell.seed, task.name, probabilities, task.test.target.cpu()))
                on_step(settings.steps)
        found.append(judged)
    return found


def _meta_trains(cell: Cell) -> bool:
    return any(group != "no-meta-train" for group, _ in cell.choices)


def method_of(
    settings: DemoSettings, group: Group, choice: Choice, seed: int, adapter: RandomAdapter, joint: Tensor | None
) -> Baseline:
    """A method from the registry of all, with the settings that were chosen for it, after the joint training."""
    lift = group == "lift"
    own = settings.visits // 2 if lift else 0
    budget = Budget(
        warm_up=own,
        visits=settings.visits - own,
        warm_start=joint,
        warm_up_learning_rate=choice.tail_rate,
        # LiFT's chain moves at the rate it adapts at.
        meta_learning_rate=choice.learning_rate if lift else choice.tail_rate,
        steps=settings.steps,
        learning_rate=choice.learning_rate,
        batch_size=settings.batch_size,
        draws=settings.draws,
        seed=seed,
    )
    if lift:
        return LiFTMethod(adapter, budget, LiFTSettings(beta=choice.beta, n_inflate=choice.n_inflate))
    return BASELINES[group](adapter, budget)


def _trained(
    method: Baseline,
    tasks: Sequence[Task],
    cell: Cell,
    jointly: Callable[..., Tensor],
    on_step: Callable[[int], None],
) -> Iterator[tuple[str, Any]]:
    """The method's state by name; LiFT's mixtures with one and with three components come from one chain."""
    budget = method.budget
    if isinstance(method, UnionTrain):
        theta = jointly(steps=budget.visits, learning_rate=budget.meta_learning_rate, start=budget.warm_start)
        yield "Union Train", UnionTrainState(theta, budget.visits)
        return
    if not isinstance(method, LiFTMethod):
        yield "No Meta Train", method.meta_train(tasks)
        return
    lift = LiFT(method.adapter, settings=method.chain_settings(), adapt=method.adapt_settings(), seed=cell.seed)
    components = COMPONENTS if cell.part == "test" else COMPONENTS[:1]
    priors = lift.meta_train_many(
        tasks, components, progress=False, start=budget.warm_start, on_step=partial(on_step, 1)
    )
    if cell.keep is not None:
        _keep(priors, cell.keep)
    for k, prior in zip(components, priors, strict=True):
        yield f"LiFT K={k}", LiFTState(prior, budget.warm_up + budget.visits)


def _keep(priors: Sequence[LiFTPrior], folder: Path) -> None:
    """The chain as ArviZ's netCDF, and the prior with the most components."""
    from pyro_lift.bench import report
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


def _work(settings: DemoSettings, cell: Cell) -> list[list[Judged]]:
    return run_cell(settings, cell, _count)


def _count(steps: int) -> None:
    with _counter.get_lock():
        _counter.value += steps


def steps_of(settings: DemoSettings, cell: Cell) -> int:
    """Gradients that a cell takes, for the progress bar."""
    tasks = settings.num_dev if cell.part == "dev" else settings.num_test
    total = settings.warm_up if _meta_trains(cell) else 0
    for group, _ in cell.choices:
        chains = len(COMPONENTS) if group == "lift" and cell.part == "test" else 1
        total += chains * tasks * settings.steps + (0 if group == "no-meta-train" else settings.visits)
    return total


def run_cells(
    settings: DemoSettings, cells: Sequence[Cell], *, description: str, progress: bool = True
) -> list[list[list[Judged]]]:
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
    from pyro_lift.bench import report
    from pyro_lift.bench.records import write_records

    out.mkdir(parents=True, exist_ok=True)
    meta: tuple[tuple[Group, Choice], ...] = tuple((group, CHOSEN[group]) for group in ("union-train", "lift"))
    # The longest first.
    cells = [Cell(seed, meta, keep=None if seed else out) for seed in range(settings.seeds)]
    cells += [Cell(seed, (("no-meta-train", CHOSEN["no-meta-train"]),)) for seed in range(settings.seeds)]
    results = run_cells(settings, cells, description="demo", progress=progress)
    found = [judged for cell in results for choice in cell for judged in choice]
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
        Cell(seed, tuple((group, choice) for choice in grid), "dev")
        for group, grid in GRIDS.items()
        for seed in TUNING_SEEDS
    ]
    results = run_cells(replace(settings, num_test=1), cells, description="tune", progress=progress)
    scores: dict[tuple[Group, Choice], list[dict[str, Any]]] = {}
    for cell, found in zip(cells, results, strict=True):
        for key, judged in zip(cell.choices, found, strict=True):
            scores.setdefault(key, []).extend(one.record() for one in judged)

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
