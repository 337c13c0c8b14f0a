"""``pyro-lift compare``: a run's file in, a table, a figure and one sentence of advice out."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from pyro_lift.bench.sweep import results
from pyro_lift.comparison.problem import Problem
from pyro_lift.comparison.run import CELLS, Comparison, run
from pyro_lift.comparison.settings import CompareSettings
from pyro_lift.config import read_config
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.wiring import adapter_of, device_of, tasks_of

__all__ = ["command"]

#: What is kept of a comparison that was stopped before its first run was done.
NOTHING = "no run was finished, and none is kept: the same command begins anew"


def command(
    path: Path, out: Path, settings: CompareSettings, *, overwrite: bool = False, device: str | None = None
) -> Comparison:
    """Compare the methods on the tasks of a TOML file, and print what was found.

    Args:
        path: the file that ``pyro-lift train`` takes.
        out: folder for records, table and figure; a comparison that was stopped goes on from there.
        settings: sizes and budget.
        overwrite: drop another comparison that is in the folder.
        device: in place of the file's.

    Raises:
        ValueError: anything wrong with the file or the tasks; before any training.
        OSError: the folder could not be written at the end, after the table was printed.
        KeyboardInterrupt: Ctrl-C, after saying how to go on.
    """
    started = time.monotonic()
    config = read_config(path)
    tasks = tasks_of(config)
    place = device_of(device or config.output.device)
    print(tasks.summary(), flush=True)

    def adapter(seed: int) -> RandomAdapter:
        return adapter_of(replace(config, output=replace(config.output, seed=config.output.seed + seed))).to(place)

    problem = Problem(tasks.train, tasks.test, tasks.dev, adapter, config.sampler, config.adapt, tasks.name)
    try:
        comparison = run(problem, settings, out, overwrite=overwrite, started=started)
    except KeyboardInterrupt:
        done = len(results(out / CELLS)) if (out / CELLS / "manifest.json").is_file() else 0
        kept = f"{done} runs are kept in {out}: the same command goes on from there" if done else NOTHING
        print(f"\nstopped; {kept}.", flush=True)
        raise
    print(f"\n{comparison}", flush=True)
    if comparison.folder is None:
        raise OSError(f"{out}: table, records and figure could not be written. The table stands above")
    print(f"\nwritten: {out}")
    return comparison
