"""``pyro-lift bench paper``: the cells of a table or a figure, run through the one sweep."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pyro_lift.bench.paper.cells import PaperCell, run_cell
from pyro_lift.bench.paper.contestants import GROUPS
from pyro_lift.bench.paper.dry_run import dry_run
from pyro_lift.bench.paper.order import in_order
from pyro_lift.bench.paper.problems import DataAbsentError, check_data
from pyro_lift.bench.paper.sizes import SCALES, Scale
from pyro_lift.bench.paper.tables import FIGURES, OURS, TABLES, Table, cells_of, family_table
from pyro_lift.bench.sweep import MANIFEST, read_manifest, results, run_cells, write_manifest
from pyro_lift.support.options import check_choice, check_literal

__all__ = ["PaperOptions", "command", "tables_of"]


@dataclass(frozen=True)
class PaperOptions:
    """What is run, and how.

    Attributes:
        tables: numbers of tables.
        figures: numbers of figures.
        families: of ours.
        scale: ``"paper"`` or ``"small"``.
        root: where the data lie.
        smoke: sizes of seconds, one seed.
        seeds: the first so many; None takes the families'.
        methods: groups or contestants to keep; None keeps all.
        splits: to keep; None keeps all.
        jobs: processes.
        dry: whether to tell only what would be run.
        retry: whether to take cells that a process which is gone had claimed.
        cluster: a partition that submitit submits the jobs to; ``"local"`` for this machine.
    """

    tables: Sequence[int] = ()
    figures: Sequence[int] = ()
    families: Sequence[str] = ()
    scale: Scale = "small"
    root: Path | None = None
    smoke: bool = False
    seeds: int | None = None
    methods: Sequence[str] | None = None
    splits: Sequence[str] | None = None
    jobs: int = 1
    dry: bool = False
    retry: bool = False
    cluster: str | None = None

    def __post_init__(self) -> None:
        check_literal("scale", self.scale, Scale)


def tables_of(options: PaperOptions) -> list[Table]:
    """Return the tables that are asked for; all of a scale where nothing is named.

    Raises:
        ValueError: a number without a table, a family that is not ours.
    """
    for number in options.tables:
        check_choice("table", str(number), [str(k) for k in TABLES])
    for number in options.figures:
        check_choice("figure", str(number), [str(k) for k in FIGURES])
    found = [TABLES[n] for n in options.tables] + [FIGURES[n] for n in options.figures]
    found += [family_table(name) for name in options.families]
    if found:
        return found
    ours = [family_table(name) for name in OURS] if options.scale == SCALES[1] else []
    return [*TABLES.values(), *FIGURES.values(), *ours]


def command(options: PaperOptions, out: Path, log: Callable[[str], None] = print) -> list[str]:
    """Run the cells of some tables that are not done yet; the manifest in ``out`` grows by what is new.

    Cells whose data are not here are left out with a message, and can be run later into the same folder.

    Returns:
        Names of the cells that this call ran.
    """
    cells, absent = plan(options)
    for reason in absent:
        log(f"left out: {reason}")
    if options.dry:
        log(dry_run(cells))
        return []
    if not cells:
        log("nothing to run.")
        return []
    known = read_manifest(out) if (out / MANIFEST).exists() else []
    new = [cell.cell for cell in cells]
    merged = {cell.name: cell for cell in (*known, *new)}
    write_manifest(out, list(merged.values()))
    names = [cell.name for cell in new]
    found = results(out)
    for name in names:  # what lacked its data the last time may have them now
        if found.get(name, {}).get("reason", "").startswith(DataAbsentError.__name__):
            (out / f"{name}.json").unlink()
    done = set(results(out))
    log(f"{len(names)} cells, {len(done & set(names))} of them done; results in {out}")
    ran = _run(options, out, names)
    refused = {name: found["reason"] for name, found in results(out).items() if name in ran and "reason" in found}
    for name, reason in refused.items():
        log(f"{name}: {reason}")
    log(f"{len(ran)} cells run. pyro-lift report {out}")
    return ran


def plan(options: PaperOptions) -> tuple[list[PaperCell], list[str]]:
    """List the cells that are asked for and can be run, and why others cannot."""
    root = None if options.root is None else str(options.root)
    seeds = None if options.seeds is None else range(options.seeds)
    cells: dict[PaperCell, None] = {}
    shown: set[PaperCell] = set()
    absent: dict[str, None] = {}
    ruled: dict[tuple[str, str], str | None] = {}
    for table in tables_of(options):
        try:
            of_table = cells_of(table, options.scale, root, seeds=seeds, smoke=options.smoke)
        except ValueError as error:
            absent[f"{table.name}: {error}"] = None
            continue
        for cell in of_table:
            if not _wanted(cell, options):
                continue
            key = (cell.family, cell.split)
            if key not in ruled:
                ruled[key] = _absent(cell, options)
            if ruled[key] is None:
                cells[cell] = None
                if not table.ablation:
                    shown.add(cell)
            else:
                absent[f"{cell.family} {cell.split}: {ruled[key]}"] = None
    return in_order(cells, set(cells) - shown), list(absent)


def _wanted(cell: PaperCell, options: PaperOptions) -> bool:
    if options.splits is not None and cell.split not in options.splits:
        return False
    if options.methods is None or cell.group in ("toy", "cost"):
        return True
    return cell.group in options.methods or any(name in options.methods for name in GROUPS[cell.group])


def _absent(cell: PaperCell, options: PaperOptions) -> str | None:
    """Say what is missing for a cell; None where nothing is, and where nothing is run."""
    if options.dry or cell.family == "toy":
        return None
    family, split = ("crossfit", "CLS-45") if cell.family == "cost" else (cell.family, cell.split)
    try:
        check_data(cell.scale, family, split, options.root)
    except DataAbsentError as error:
        return str(error)
    return None


def _run(options: PaperOptions, out: Path, names: Sequence[str]) -> list[str]:
    """Run the named cells here, in a pool, or on a cluster."""
    if options.cluster is not None:
        return [name for job in _submitted(options, out, names) for name in job.result()]
    if options.jobs == 1:
        return run_cells(out, run_cell, retry=options.retry, names=names)
    if options.retry:  # by this process alone, before others claim anything
        for name in names:
            (out / f"{name}.claim").unlink(missing_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(options.jobs, context, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        jobs = [pool.submit(run_cells, out, run_cell, names=names) for _ in range(options.jobs)]
        return [name for job in jobs for name in job.result()]


def _submitted(options: PaperOptions, out: Path, names: Sequence[str]) -> list[Any]:
    try:
        import submitit
    except ImportError as error:
        raise ImportError("--cluster needs submitit: pip install 'pyro-lift[cluster]'") from error
    local = options.cluster == "local"
    executor = submitit.AutoExecutor(folder=out / "jobs", cluster="local" if local else None)
    executor.update_parameters(timeout_min=24 * 60, **({} if local else {"slurm_partition": options.cluster}))
    return [executor.submit(run_cells, out, run_cell, names=list(names)) for _ in range(options.jobs)]
