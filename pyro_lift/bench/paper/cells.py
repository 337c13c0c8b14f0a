"""A cell of the sweep: one group of contestants on one split with one seed, trained, adapted, judged, written as JSON.

A cell's result holds everything that was decided for it and everything that came out, so that no table needs more than
the files; run again on the same machine it has the same numbers (seconds and memory apart).
"""

from __future__ import annotations

import logging
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lift.bench.memory import high_water_mark, reset_high_water_mark
from pyro_lift.bench.paper.contestants import CONTESTANTS
from pyro_lift.bench.paper.families import family_of
from pyro_lift.bench.paper.problems import PaperProblem, problem_of
from pyro_lift.bench.paper.scoring import at_temperature, counted, intervals, judged_rows, predicted, scored
from pyro_lift.bench.paper.sizes import Scale
from pyro_lift.bench.paper.training import Trained, adaptations_of, trained
from pyro_lift.bench.sweep import Cell
from pyro_lift.bench.text_to_text import WritingSettings, written_scores
from pyro_lift.inference.adaptation.temperature import fit_temperature
from pyro_lift.inference.baselines.search_space import Changes
from pyro_lift.inference.lost import ChainLostError
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.methods.registry import CHOOSING
from pyro_lift.metrics.probabilities import nll

__all__ = ["PaperCell", "run_cell", "versions"]

log = logging.getLogger("pyro_lift")

PACKAGES = ("pyro-lift", "torch", "pyro-ppl", "transformers", "peft", "timm", "numpy", "scikit-learn")
#: Most classes of a prediction that is resampled for intervals.
FEW_CLASSES = 64
#: Nats (of regressions, squared error) that two or three tasks do not tell apart: for less no rate is raised.
TIE = 0.01


@dataclass(frozen=True)
class PaperCell:
    """What identifies a cell.

    Attributes:
        scale: ``"paper"`` or ``"small"``.
        family: of :data:`~pyro_lift.bench.paper.families.FAMILIES`, or ``"toy"`` and ``"cost"``.
        split: of the family.
        group: of :data:`~pyro_lift.bench.paper.contestants.GROUPS`.
        seed: of everything random.
        root: where the data lie.
        smoke: whether sizes are the smallest.
    """

    scale: Scale
    family: str
    split: str
    group: str
    seed: int
    root: str | None = None
    smoke: bool = False

    @property
    def cell(self) -> Cell:
        """The cell of a manifest."""
        parts = (self.scale, self.family, self.split, self.group, f"seed{self.seed}")
        name = ".".join(part.replace("/", "-").replace(" ", "-") for part in parts)
        return Cell(name + (".smoke" if self.smoke else ""), asdict(self))


def run_cell(**arguments: Any) -> dict[str, Any]:
    """Run a cell by the arguments of its manifest.

    Returns:
        ``cell``, ``versions``, ``commit``, ``machine``, ``seconds`` of the clock, ``cpu_seconds``, ``peak_bytes``,
        and ``contestants`` by name, each with its settings, the rate and the temperature chosen, and its scores by
        task; or ``reason`` why there is none.
    """
    cell = PaperCell(**arguments)
    start, begun = time.perf_counter(), time.process_time()
    reset_high_water_mark()
    told = {name: value for name, value in asdict(cell).items() if name != "root"}  # a folder of this machine
    result: dict[str, Any] = {"cell": told, "versions": versions(), "commit": commit(), "machine": machine()}
    try:
        result |= _contents(cell)
    except (ValueError, MemoryError, DivergedError, ChainLostError) as error:
        result["reason"] = f"{type(error).__name__}: {error}"
    result["seconds"] = round(time.perf_counter() - start, 3)
    result["cpu_seconds"] = round(time.process_time() - begun, 3)
    result["peak_bytes"] = high_water_mark("cpu")
    return result


def _contents(cell: PaperCell) -> dict[str, Any]:
    if cell.family == "toy":
        from pyro_lift.bench.paper.toys import run_toy

        return run_toy(cell.split, cell.seed, smoke=cell.smoke)
    if cell.family == "cost":
        from pyro_lift.bench.paper.costs import run_costs

        return run_costs(cell.scale, cell.split, cell.root, smoke=cell.smoke)
    root = None if cell.root is None else Path(cell.root)
    problem = _problem(cell.scale, cell.family, cell.split, cell.seed, root, cell.smoke)
    return judge(problem, cell.group, cell.seed, family_of(cell.family).orders if cell.group == "lift" else None)


@lru_cache(maxsize=1)
def _problem(scale: Scale, family: str, split: str, seed: int, root: Path | None, smoke: bool) -> PaperProblem:
    """Load a cell's problem; the next cell of the same split and seed has it, and its frozen layers' rows, already."""
    return problem_of(scale, family, split, seed, root, smoke=smoke)


def judge(problem: PaperProblem, group: str, seed: int, wanted: Sequence[str] | None = None) -> dict[str, Any]:
    """Meta-train a group, choose its rate and each contestant's temperature on the tasks to choose on, and judge them.

    The rate is chosen by the group's first contestant: the others differ in a number of components alone.
    """
    tasks = problem.tasks
    contents: dict[str, Any] = {
        "tasks": {part: [task.name for task in of] for part, of in tasks.parts.items()},
        "missing": {part: list(names) for part, names in tasks.missing.items()},
        "notes": list(tasks.notes),
        "sizes": {**asdict(problem.sizes), "lift": dict(problem.sizes.lift)},
        "backbone": _without_folders(problem.setting.backbone),
        "form": problem.setting.form,
        "measure": problem.setting.measure,
        "adapter_weights": problem.adapter.dim,
        "contestants": {},
    }
    start = time.perf_counter()
    adaptations: Sequence[Changes] = []
    for number, contestant in enumerate(trained(group, problem, seed, wanted)):
        adaptations = adaptations or adaptations_of(contestant.method, problem.sizes, problem.adapter)
        # The first pays for the meta-training that all of the group share.
        meta_seconds = time.perf_counter() - start if number == 0 else 0.0
        contents["contestants"][contestant.name] = {
            "meta_seconds": round(meta_seconds, 3),
            **_judged(problem, contestant, seed, adaptations),
        }
        adaptations = [contents["contestants"][contestant.name]["adaptation"]]
    return contents


def _judged(problem: PaperProblem, contestant: Trained, seed: int, adaptations: Sequence[Changes]) -> dict[str, Any]:
    chosen = _chosen(problem, contestant, seed, adaptations)
    method = contestant.at(chosen["adaptation"])
    by_task: dict[str, Any] = {}
    for task in problem.tasks.test:
        start = time.perf_counter()
        try:
            posterior = method.adapt(contestant.state, task, seed=seed)
        except DivergedError as error:
            by_task[task.name] = {"reason": str(error)}
            continue
        seconds = time.perf_counter() - start
        strings = None if problem.texts is None else problem.texts[task.name].test
        rows, texts = judged_rows(task, strings, problem.sizes.test_rows)
        p = predicted(posterior, task, rows)
        record: dict[str, Any] = {"rows": len(rows), "adapt_seconds": round(seconds, 3), "metric": task.metric}
        record |= scored(p, rows, task, texts)
        if problem.setting.form == "text-to-text":
            assert texts is not None
            writing = WritingSettings(beams=problem.sizes.beams, max_new_tokens=problem.sizes.max_new_tokens)
            record |= written_scores(posterior, task, rows, texts, writing)
        if task.kind != "regression":
            q, y = counted(p, rows.target)
            if chosen["temperature"] is not None:
                record |= at_temperature(q, y, chosen["temperature"])
            if q.shape[-1] <= FEW_CLASSES:
                record["intervals"] = intervals(q, y)
        by_task[task.name] = record
    return {**chosen, "settings": _settings(contestant), "tasks": by_task}


def _chosen(problem: PaperProblem, contestant: Trained, seed: int, adaptations: Sequence[Changes]) -> dict[str, Any]:
    """Choose the rate of adaptation by mean loss on the tasks to choose on, then the temperature at that rate.

    Of those that are as good as the best, within :data:`TIE`, the first is taken: the given one, then the smaller.
    """
    dev = problem.tasks.dev
    if contestant.name in CHOOSING or not dev:
        adaptations = adaptations[:1]
    tried: list[tuple[float, Changes, list[tuple[Tensor, Tensor]]]] = []
    for changes in adaptations:
        losses, kept = [], []
        for task in dev:
            strings = None if problem.texts is None else problem.texts[task.name].test
            rows, _ = judged_rows(task, strings, problem.sizes.test_rows)
            try:
                p = predicted(contestant.at(changes).adapt(contestant.state, task, seed=seed), task, rows)
            except DivergedError:
                losses.append(float("inf"))
                continue
            if task.kind == "regression":
                losses.append(float((p.reshape(rows.target.shape) - rows.target.cpu()).square().mean()))
            else:
                q, y = counted(p, rows.target)
                losses.append(nll(q, y))
                kept.append((q, y))
        tried.append((sum(losses) / max(len(losses), 1), changes, kept))
    least = min(loss for loss, _, _ in tried)
    loss, changes, kept = next(entry for entry in tried if entry[0] <= least + TIE)
    finite = loss != float("inf")
    return {
        "rate": changes["learning_rate"],
        "adaptation": dict(changes),
        "rates": {_said(of): round(value, 5) if value != float("inf") else None for value, of, _ in tried},
        "dev_loss": loss if dev and finite else None,
        "temperature": fit_temperature(kept) if kept else None,
    }


def _said(changes: Changes) -> str:
    """Say a rate, and the power that goes with it where it is another one."""
    power = changes.get("power", 1.0)
    return f"{changes['learning_rate']:.3g}" + ("" if power == 1.0 else f" at {power:g} times the power")


def _settings(contestant: Trained) -> dict[str, Any]:
    """Return what a reader needs to know of a contestant's settings; LiFT's as they were filled in from the network."""
    prior = getattr(contestant.state, "prior", None)
    shown: dict[str, Any] = {"method": CONTESTANTS[contestant.name].method}
    if prior is not None:
        settings = asdict(prior.settings)
        for name in ("beta", "sigma"):  # one number an adapter tensor: their range says enough
            if isinstance(settings[name], (list, tuple)):
                settings[name] = [min(settings[name]), max(settings[name])]
        shown["lift"] = settings
        shown["mixture"] = {key: value for key, value in prior.mixture.report().items() if _is_json(value)}
    return shown


def _without_folders(backbone: str) -> str:
    """Name a network that lies in a folder of this machine by the last two parts of its path."""
    path = Path(backbone)
    return "/".join(path.parts[-2:]) if path.is_absolute() else backbone


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, float, str, list, tuple, Mapping)) or value is None


@cache
def versions() -> dict[str, str]:
    """Return the versions of what the numbers depend on."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@cache
def commit() -> str | None:
    """Return the commit of the checkout that this code is part of, with ``+`` where files were changed since.

    Documents do not count: the records themselves may lie among them.
    """
    here = Path(__file__).resolve().parent
    try:
        git = ["git", "-C", str(here)]
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run(
            [*git, "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.stdout.strip() + ("+" if changed.stdout.strip() else "")


def machine() -> dict[str, Any]:
    """Describe what the cell ran on, without its name."""
    return {"processor": platform.machine(), "threads": torch.get_num_threads(), "system": platform.system()}
