"""``pyro-lift demo``: what a prior over LoRA weights buys on a family of small tasks, with nothing to download.

Five methods meet the same unseen tasks from the same backbone, the same initial adapter, the same number of
meta-training gradients and the same adaptation budget:

Linear Probe
    is a logistic regression on the untouched network's features, its strength chosen by cross-validation;
Tuned LoRA
    begins at the probe and fine-tunes, rate and number of steps chosen on a fifth of the new task's own rows, the
    probe among the candidates;
No Meta Train
    fine-tunes each new task from the adapter's own start;
Union Train
    trains one adapter on all meta-training tasks together and fine-tunes from there;
LiFT
    learns a mixture over phi by SGLD-Gibbs and draws each new task's weights under it by SGLD (K = 1 and 3).

Both meta-learners begin where one joint training of the same tasks ends, and have the same number of gradients after
it: Union Train goes on with joint training, at a rate of its own; LiFT spends half on that and half on its chain.

The last three predict by averaging the probabilities of five networks: late iterates for two, draws for LiFT. Each
of these was tuned on the development tasks of two other families, over twelve settings each, by mean NLL and, among
equally good ones, ECE (``--tune`` does it again).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from pyro_lift.bench import report
from pyro_lift.bench.grids import Choice
from pyro_lift.bench.records import Record, format_table, write_records
from pyro_lift.bench.sweep import Cell, map_cells
from pyro_lift.data.digits import DigitFamily, digit_backbone, digit_family
from pyro_lift.diagnostics import from_mcmc
from pyro_lift.inference.baselines.linear_probe import LinearProbe
from pyro_lift.inference.baselines.lora_tuned import LoRATuned
from pyro_lift.inference.baselines.protocol import Baseline, Budget, Posterior, adapt_all
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
from pyro_lift.tuning.search import Candidate, search, trial_bar

__all__ = ["CHOSEN", "GRIDS", "DemoSettings", "FamilyRun", "demo_adapter", "run", "run_family", "tune"]

Group = Literal["linear-probe", "lora-tuned", "no-meta-train", "union-train", "lift"]
#: They learn nothing from other tasks.
ALONE: tuple[Group, ...] = ("linear-probe", "lora-tuned", "no-meta-train")
COMPONENTS = (1, 3)
#: Methods as the table and the records name them; the first is what the others are tested against.
LIFT = "LiFT K=1"
METHODS = ("Linear Probe", "Tuned LoRA", "No Meta Train", "Union Train", "LiFT K=1", "LiFT K=3")
MEASURES = ("accuracy", "nll", "ece")
#: Families that settings were chosen on; the demo's own are 0, 1, 2, ...
TUNING_SEEDS = (1000, 1001)
#: Tasks that are adapted to in one pass.
BLOCK = 6
#: Settings that differ by less in mean NLL, in nats, are taken for equally good; then calibration decides.
TIE = 0.01


def _lift_choice(rate: float, beta: float, power: float) -> Choice:
    return Choice(rate, LIFT_TAIL_RATE, lift={"beta": beta, "n_inflate": power})


#: Rate of the joint training that LiFT goes on with before its chain; that of Union Train is tuned.
LIFT_TAIL_RATE = 2e-3
#: Twelve settings each: the rate of adaptation, then that of the joint training after the one that is shared; LiFT's
#: rate is that of its chain too.
GRIDS: dict[Group, list[Choice]] = {
    "no-meta-train": [
        Choice(rate) for rate in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 8e-3, 1.2e-2, 1.6e-2, 2.4e-2, 4e-2, 8e-2)
    ],
    "union-train": [Choice(rate, tail) for rate, tail in product((1e-4, 2.5e-4, 5e-4, 1e-3), (1e-3, 5e-4, 2.5e-4))],
    "lift": [
        _lift_choice(rate, beta, power) for rate, beta, power in product((2e-3, 4e-3, 8e-3), (0.03, 0.05), (5.0, 10.0))
    ],
}
#: What ``pyro-lift demo --tune`` chose; the first two choose on each task's own rows.
CHOSEN: dict[Group, Choice] = {
    "linear-probe": Choice(),
    "lora-tuned": Choice(),
    "no-meta-train": Choice(1.6e-2),
    "union-train": Choice(5e-4, 2.5e-4),
    "lift": _lift_choice(4e-3, 0.05, 10.0),
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
        """Return sizes that take seconds instead of minutes; the numbers mean nothing."""
        return cls(2, 12, visits=24, steps=8, draws=2, num_train=3, num_test=2, workers=1, device=device)


class FamilyRun(NamedTuple):
    """Methods on one family, which share its joint training: the unit that is run, in any order and process.

    Attributes:
        part: the tasks that are adapted to and judged, ``"dev"`` or ``"test"``.
        keep: where to write LiFT's chain and prior; None writes nothing.
    """

    seed: int
    choices: tuple[tuple[Group, Choice], ...]
    part: Literal["dev", "test"] = "test"
    keep: Path | None = None


# ------------------------------------------------------------------------------------------------ one family


def demo_adapter(settings: DemoSettings, seed: int) -> RandomAdapter:
    """Make the shipped ViT with LoRA on its attention; the initial adapter is a function of the seed."""
    import peft

    torch.manual_seed(seed)
    adapter = adapt_backbone(digit_backbone(), peft.LoraConfig(r=settings.rank, target_modules=TIMM_ATTENTION))
    return adapter.to(settings.device)


def family_of(settings: DemoSettings, seed: int) -> DigitFamily:
    """Make the tasks of one seed."""
    sizes = {name: getattr(settings, name) for name in ("num_train", "num_dev", "num_test", "train_rows", "adapt_rows")}
    return digit_family(seed, **sizes)


def run_family(settings: DemoSettings, run: FamilyRun, on_step: Callable[[int], Any]) -> list[list[Judged]]:
    """Meta-train each method on one family and adapt it to each of the unseen tasks; a list for each choice."""
    family = family_of(settings, run.seed)
    tasks = family.dev if run.part == "dev" else family.test
    adapter = demo_adapter(settings, run.seed)
    jointly = partial(
        union_train,
        adapter,
        family.train,
        Budget(batch_size=settings.batch_size, seed=run.seed),
        on_step=partial(on_step, 1),
    )
    joint = jointly(steps=settings.warm_up, learning_rate=settings.warm_up_rate) if _meta_trains(run) else None
    results: list[list[Judged]] = []
    for group, choice in run.choices:
        method = method_of(settings, group, choice, run.seed, adapter, joint)
        judged = []
        for name, state in _trained(method, family.train, run, jointly, on_step):
            for task, posterior in zip(tasks, adapt_all(method, state, tasks, block_size=BLOCK), strict=True):
                assert task.test is not None
                probabilities = posterior.predict(task.test).cpu()
                judged.append(Judged(name, run.seed, task.name, probabilities, task.test.target.cpu()))
                on_step(_steps(settings, group))
        results.append(judged)
    return results


def _meta_trains(run: FamilyRun) -> bool:
    return any(group not in ALONE for group, _ in run.choices)


def _steps(settings: DemoSettings, group: Group) -> int:
    """Count the steps of adaptation on one task."""
    return 0 if group == "linear-probe" else settings.steps


def method_of(
    settings: DemoSettings, group: Group, choice: Choice, seed: int, adapter: RandomAdapter, joint: Tensor | None
) -> Baseline[Any]:
    """Set up a method of the registry with the settings that were chosen for it, after the joint training."""
    lift = group == "lift"
    warm_up = settings.visits // 2 if lift else 0
    budget = Budget(
        warm_up=warm_up,
        visits=settings.visits - warm_up,
        warm_start=joint,
        warm_up_learning_rate=choice.meta_learning_rate,
        # LiFT's chain moves at the rate it adapts at.
        meta_learning_rate=choice.learning_rate if lift else choice.meta_learning_rate,
        steps=settings.steps,
        learning_rate=choice.learning_rate,
        batch_size=settings.batch_size,
        draws=settings.draws,
        seed=seed,
    )
    if lift:
        return LiFTMethod(adapter, budget, LiFTSettings(**choice.lift))
    return BASELINES[group](adapter, budget)


def _trained(
    method: Baseline[Any],
    tasks: Sequence[Task],
    run: FamilyRun,
    jointly: Callable[..., Tensor],
    on_step: Callable[[int], Any],
) -> Iterator[tuple[str, Any]]:
    """Yield the method's state by name; LiFT's mixtures with one and with three components come from one chain."""
    budget = method.budget
    if isinstance(method, UnionTrain):
        theta = jointly(steps=budget.visits, learning_rate=budget.meta_learning_rate, start=budget.warm_start)
        yield "Union Train", UnionTrainState(theta, budget.visits)
        return
    if not isinstance(method, LiFTMethod):
        names = {LinearProbe: "Linear Probe", LoRATuned: "Tuned LoRA"}
        yield names.get(type(method), "No Meta Train"), method.meta_train(tasks)
        return
    lift = LiFT(method.adapter, settings=method.chain_settings(), adapt=method.adapt_settings(), seed=run.seed)
    components = COMPONENTS if run.part == "test" else COMPONENTS[:1]
    priors = lift.meta_train_many(
        tasks, components, progress=False, start=budget.warm_start, on_step=partial(on_step, 1)
    )
    if run.keep is not None:
        _keep(priors, run.keep)
    for k, prior in zip(components, priors, strict=True):
        yield f"LiFT K={k}", LiFTState(prior, budget.warm_up + budget.visits)


def _keep(priors: Sequence[LiFTPrior], folder: Path) -> None:
    """Write the chain as ArviZ's netCDF, and the prior with the most components."""
    priors[-1].save_pretrained(folder / "prior")
    data = from_mcmc(priors[-1].mcmc)
    data.to_netcdf(str(folder / "chain.nc"), engine="h5netcdf")
    report.plot_traces(data, folder / "traces.png")
    report.plot_mixture(priors[-1].mixture.report(), folder / "mixture.png")


# ------------------------------------------------------------------------------------------------ all families


def steps_of(settings: DemoSettings, run: FamilyRun) -> int:
    """Count the gradients that a run takes, for the progress bar."""
    tasks = settings.num_dev if run.part == "dev" else settings.num_test
    total = settings.warm_up if _meta_trains(run) else 0
    for group, _ in run.choices:
        chains = len(COMPONENTS) if group == "lift" and run.part == "test" else 1
        total += chains * tasks * _steps(settings, group) + (0 if group in ALONE else settings.visits)
    return total


def run_families(
    settings: DemoSettings, runs: Sequence[FamilyRun], *, description: str, progress: bool = True
) -> list[list[list[Judged]]]:
    """Do the runs in ``settings.workers`` processes, with one bar for all; results are in the runs' order."""
    total = sum(steps_of(settings, run) for run in runs)
    hidden = not progress or "CI" in os.environ
    cells = [Cell(f"run-{number}", {"settings": settings, "run": run}) for number, run in enumerate(runs)]
    with tqdm(total=total, desc=description, unit="step", disable=hidden, dynamic_ncols=True) as bar:
        return list(map_cells(run_family, cells, workers=settings.workers, on_step=bar.update))


def run(settings: DemoSettings, out: Path, *, progress: bool = True) -> list[Record]:
    """Run the demo: all methods on all seeds; writes records, table and pictures in ``out``.

    Returns:
        One record per method, seed and task.
    """
    out.mkdir(parents=True, exist_ok=True)
    meta: tuple[tuple[Group, Choice], ...] = tuple((group, CHOSEN[group]) for group in ("union-train", "lift"))
    # The longest first.
    runs = [FamilyRun(seed, meta, keep=None if seed else out) for seed in range(settings.seeds)]
    runs += [FamilyRun(seed, tuple((group, CHOSEN[group]) for group in ALONE)) for seed in range(settings.seeds)]
    results = run_families(settings, runs, description="demo", progress=progress)
    predictions = [judged for of_run in results for of_choice in of_run for judged in of_choice]
    predictions.sort(key=lambda judged: (METHODS.index(judged.method), judged.seed, judged.task))
    records = [judged.record() for judged in predictions]
    write_records(records, out / "results.json")
    report.plot_tasks(family_of(settings, 0), out / "tasks.png")
    report.plot_reliability(predictions, METHODS, out / "reliability.png")
    report.plot_scores(records, METHODS, out / "scores.png")
    print(report.comparison(records, METHODS, LIFT))
    return records


class _OnFamilies(NamedTuple):
    """A method with a choice on several families, for the tuner: each meta-trains on its own, tasks tell theirs."""

    settings: DemoSettings
    group: Group
    choice: Choice

    def meta_train(self, tasks: Sequence[Task]) -> dict[int, tuple[RandomAdapter, Any]]:
        states: dict[int, tuple[RandomAdapter, Any]] = {}
        for seed in TUNING_SEEDS:
            of_seed = [task for task in tasks if _seed_of(task) == seed]
            adapter = demo_adapter(self.settings, seed)
            budget = Budget(batch_size=self.settings.batch_size, seed=seed)
            jointly = partial(union_train, adapter, of_seed, budget)
            run = FamilyRun(seed, ((self.group, self.choice),), "dev")
            joint = None
            if _meta_trains(run):
                joint = jointly(steps=self.settings.warm_up, learning_rate=self.settings.warm_up_rate)
            method = method_of(self.settings, self.group, self.choice, seed, adapter, joint)
            _, state = next(_trained(method, of_seed, run, jointly, lambda _: None))
            states[seed] = adapter, state
        return states

    def adapt(self, state: dict[int, tuple[RandomAdapter, Any]], tasks: Sequence[Task]) -> list[Posterior]:
        posteriors: dict[str, Posterior] = {}
        for seed, (adapter, learned) in state.items():
            of_seed = [task for task in tasks if _seed_of(task) == seed]
            method = method_of(self.settings, self.group, self.choice, seed, adapter, None)
            found = adapt_all(method, learned, of_seed, block_size=BLOCK)
            posteriors |= {task.name: posterior for task, posterior in zip(of_seed, found, strict=True)}
        return [posteriors[task.name] for task in tasks]


def _seed_of(task: Task) -> int:
    return int(task.name.partition("/")[0])


def tune(settings: DemoSettings, *, progress: bool = True) -> dict[Group, Choice]:
    """Choose each method's setting among its twelve by the one tuner, on the development tasks of other families.

    Among those within :data:`TIE` of the lowest mean NLL the one with the lowest ECE is taken.
    """
    families = {seed: family_of(settings, seed) for seed in TUNING_SEEDS}
    named = partial(_named_by_family, families)
    train, dev = named("train"), named("dev")
    chosen: dict[Group, Choice] = {}
    rows: list[list[str]] = []
    for group, grid in GRIDS.items():
        by_name = {", ".join(_shown(choice)): choice for choice in grid}

        def make(candidate: Candidate, share: float, group: Group = group, of: Any = by_name) -> _OnFamilies:
            warm_up, visits = (max(round(share * n), 8) for n in (settings.warm_up, settings.visits))
            few = replace(settings, warm_up=min(warm_up, settings.warm_up), visits=min(visits, settings.visits))
            return _OnFamilies(few, group, of[candidate.name])

        candidates = [Candidate(name, _meta_of(group, choice)) for name, choice in by_name.items()]
        with trial_bar(progress) as on_trial:
            tuning = search(candidates, make, train, seconds=None, held_out=dev, tie=TIE, on_trial=on_trial)
        chosen[group] = by_name[tuning.chosen]
        for trial in sorted(tuning.trials, key=lambda trial: (-trial.rung, trial.loss)):
            rows.append([group, str(trial.rung), *_shown(by_name[trial.settings]), f"{trial.loss:.4f}"])
    print(format_table(["method", "rung", "learning_rate", "meta_learning_rate", "beta", "n_inflate", "nll"], rows))
    return chosen


def _named_by_family(families: Mapping[int, DigitFamily], part: str) -> list[Task]:
    """Return a part's tasks of all families, their names telling which is theirs."""
    found = ((seed, task) for seed, family in families.items() for task in getattr(family, part))
    return [replace(task, name=f"{seed}/{task.name}") for seed, task in found]


def _meta_of(group: Group, choice: Choice) -> dict[str, Any]:
    """Return what of a choice needs a meta-training of its own."""
    if group in ALONE:
        return {}
    lift = {"learning_rate": choice.learning_rate, **choice.lift} if group == "lift" else {}
    return {"meta_learning_rate": choice.meta_learning_rate, **lift}


def _shown(choice: Choice) -> tuple[str, ...]:
    """Format the four numbers that are tuned here; a dash where a method has none."""
    lift = (f"{choice.lift[name]:g}" if name in choice.lift else "-" for name in ("beta", "n_inflate"))
    return (f"{choice.learning_rate:g}", f"{choice.meta_learning_rate:g}", *lift)
