"""``pyro-lift bench store``: what a visit costs, in time and memory, as the number of tasks grows; theta on the disk.

Adapters of a million weights on a small network; N = 10 ... 10,000 tasks, each with a row of its own in the store's
file (4 MB a task, 42 GB at the most). All N are alive at once and take turns, a few visits each, so that whatever else
the machine does falls on all of them. The rows are written before, as after a first sweep.
"""

from __future__ import annotations

import gc
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import nn

from pyro_lift.bench.memory import high_water_mark, reset_high_water_mark, resident_bytes
from pyro_lift.bench.records import Record, format_table
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.stores.disk import DiskStore
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.task import Rows, Task

__all__ = ["TASKS", "plot", "run", "table"]

TASKS = (10, 100, 1_000, 10_000)
#: Visits of one turn; the first is not timed, since the turn before read ahead for another chain.
TURN = 6


class _Chain(NamedTuple):
    """One number of tasks: its kernel, the times of its visits, and what it added to the process at its peak."""

    tasks: int
    kernel: SGLDGibbs
    seconds: list[float]
    peak_bytes: int


def run(
    *,
    tasks: Sequence[int] = TASKS,
    rounds: int = 20,
    smoke: bool = False,
    device: str = "cpu",
    folder: str | Path | None = None,
    log: Callable[[str], Any] = print,
) -> list[Record]:
    """Measure the visits of every number of tasks.

    Args:
        tasks: each N, the smallest first.
        rounds: turns of each N.
        smoke: small adapters, few tasks.
        device: ``"cpu"`` or ``"cuda"``.
        folder: of the stores' files; None takes the system's for temporary files.
        log: told what is done on the way.

    Returns:
        ``tasks``, ``seconds_per_step`` (median), ``peak_bytes`` (of the process while N is built and visited, above
        what it was before), ``ratio`` of the seconds to those of the smallest N, ``store_bytes``, ``dim``.

    Raises:
        ValueError: not enough room on the disk.
    """
    if smoke:
        tasks, rounds = (4, 12), 2
    adapter = _adapter(64 if smoke else 2048, 4 if smoke else 64).to(device)
    needed = sum(tasks) * adapter.dim * 4
    free = shutil.disk_usage(folder or tempfile.gettempdir()).free
    if needed > 0.95 * free:
        where = folder or tempfile.gettempdir()
        raise ValueError(
            f"the stores need {needed / 1e9:.1f} GB and {where} has {free / 1e9:.1f} GB free. "
            "Give a folder with room (--folder), or fewer tasks (--tasks)."
        )
    # What is allocated once, at the first use of anything; kept, so that the smallest N finds no room that it left.
    first_use = _built(adapter, min(tasks), folder)
    chains = []
    for N in sorted(tasks):
        start = time.perf_counter()
        chains.append(_built(adapter, N, folder))
        log(f"N = {N}: {N * adapter.dim * 4 / 1e9:.2f} GB written in {time.perf_counter() - start:.0f} s")
    del first_use
    for _ in range(rounds):
        for chain in chains:
            _turn(chain)
    first = statistics.median(chains[0].seconds)
    return [_record(chain, adapter, device, first) for chain in chains]


def _record(chain: _Chain, adapter: RandomAdapter, device: str, first: float) -> Record:
    median = statistics.median(chain.seconds)
    return {
        "tasks": chain.tasks,
        "seconds_per_step": median,
        "ratio": median / first,
        "peak_bytes": chain.peak_bytes,
        "store": "disk",
        "store_bytes": chain.tasks * adapter.dim * 4,
        "dim": adapter.dim,
        "steps": len(chain.seconds),
        "device": device,
    }


def _adapter(width: int, rank: int) -> RandomAdapter:
    """Make an adapter on four layers; D = 4 x 2 x width x rank weights, 1,048,576 at 2048 and 64."""
    from peft import LoraConfig

    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.Tanh())]
    network = nn.Sequential(*layers, nn.Linear(width, 3))
    return adapt_backbone(network, LoraConfig(r=rank, lora_alpha=rank, target_modules=["0", "2", "4", "6"]))


def _tasks(N: int, width: int) -> list[Task]:
    """Make N tasks that share eight sets of rows: only theta grows with N."""
    generator = torch.Generator().manual_seed(1)
    rows = [
        Rows({"": torch.randn(16, width, generator=generator)}, torch.randint(3, (16,), generator=generator))
        for _ in range(min(N, 8))
    ]
    return [Task(f"t{i}", rows[i % len(rows)], num_classes=3) for i in range(N)]


def _built(adapter: RandomAdapter, N: int, folder: str | Path | None) -> _Chain:
    """Build a chain that has visited every task once, as far as its store and its layouts go."""
    gc.collect()
    before = resident_bytes() or 0
    reset_high_water_mark()
    width = adapter.backbone.get_base_model()[0].in_features  # type: ignore[operator]
    device = adapter.initial.device
    program = AdapterHierarchy(adapter, _on(_tasks(N, width), device), beta=0.03, sigma=0.3)
    kernel = SGLDGibbs(
        program,
        step_size=1e-4,
        store=DiskStore(N, folder),
        init_strategy=init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean),
    )
    kernel.setup(0)
    kernel.sample(kernel.initial_params)
    assert kernel.structure is not None and kernel.store is not None
    start, layout = kernel.chain.cache.start["theta"], kernel.chain.cache.layouts[0]
    for task in range(1, N):
        kernel.store.write([task], [start])
        kernel.chain.cache.layouts[task] = layout
    chain = _Chain(N, kernel, [], 0)
    _turn(chain)
    chain.seconds.clear()
    return chain._replace(peak_bytes=max((high_water_mark("cpu") or 0) - before, 0))


def _on(tasks: list[Task], device: torch.device) -> list[Task]:
    return tasks if device.type == "cpu" else [task.to(device) for task in tasks]


def _turn(chain: _Chain) -> None:
    params = chain.kernel.initial_params
    for k in range(TURN):
        start = time.perf_counter()
        params = chain.kernel.sample(params)
        if params["phi"].is_cuda:
            torch.cuda.synchronize()
        if k > 0:
            chain.seconds.append(time.perf_counter() - start)


def table(records: Sequence[Record]) -> str:
    """Format one line for each N."""
    header = ["tasks", "store (GB)", "ms a step", "ratio", "peak (MB)"]
    rows = [
        [
            f"{r['tasks']:,}",
            f"{r['store_bytes'] / 1e9:.2f}",
            f"{1e3 * r['seconds_per_step']:.1f}",
            f"{r['ratio']:.3f}",
            f"{r['peak_bytes'] / 1e6:.0f}",
        ]
        for r in records
    ]
    return format_table(header, rows)


def plot(records: Sequence[Record], path: Path) -> None:
    """Plot the time of a step and the peak of memory against N."""
    from pyro_lift.bench.figures import COLOURS, new_figure, save_figure

    figure, axes = new_figure(1, 2, width=8.4, height=3.4)
    N = [r["tasks"] for r in records]
    for axis, values, label, colour in zip(
        axes,
        ([1e3 * r["seconds_per_step"] for r in records], [r["peak_bytes"] / 1e6 for r in records]),
        ("step (ms)", "peak of memory (MB)"),
        COLOURS,
        strict=False,
    ):
        axis.semilogx(N, values, marker="o", color=colour)
        axis.set(xlabel="tasks", ylabel=label, ylim=(0, 1.3 * max(values) or 1.0))
    figure.suptitle(f"θ on the disk, {records[0]['dim']:,} weights a task", fontsize=11)
    save_figure(figure, path)
