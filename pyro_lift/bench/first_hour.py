"""``pyro-lift bench cuda``: what is to be run and measured in the first hour with a GPU, part by part.

Each part stays below eight minutes, writes its records as it goes (``cuda-PART.json``, so that a part that is stopped
leaves what it had) and can be repeated alone; one table is made of whatever parts have been run. Weights are random, at
size; nothing comes from a network.
"""

from __future__ import annotations

import json
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyro_lift.bench import gpu_parts
from pyro_lift.bench.gpu_parts import Measured, Sizes
from pyro_lift.bench.records import Record, format_table, write_records
from pyro_lift.support.options import check_choice

__all__ = ["PARTS", "PART_SECONDS", "CudaSettings", "run", "table"]

PART_SECONDS = 480

#: In the order in which they are run: what shows faults first, what takes longest last.
PARTS: dict[str, Callable[[Sizes, Measured], None]] = {
    "tests": gpu_parts.tests,
    "laws": gpu_parts.laws,
    "resume": gpu_parts.resume,
    "nccl": gpu_parts.nccl,
    "memory": gpu_parts.memory,
    "demo": gpu_parts.demo,
    "steps-bart-4": gpu_parts.steps_of("bart-base", 4),
    "steps-bart-64": gpu_parts.steps_of("bart-base", 64),
    "steps-vit-4": gpu_parts.steps_of("vit-b16", 4),
    "steps-vit-64": gpu_parts.steps_of("vit-b16", 64),
    "blocks-bart": gpu_parts.blocks_of("bart-base"),
    "blocks-vit": gpu_parts.blocks_of("vit-b16"),
    "mixture": gpu_parts.mixture,
    "curves": gpu_parts.curves,
    "graphs": gpu_parts.graphs,
    "t5-xl": gpu_parts.large,
}


@dataclass(frozen=True)
class CudaSettings:
    """What is run, and where.

    Attributes:
        parts: of :data:`PARTS`; none are all.
        device: that is measured.
        smoke: tiny sizes, in this process: seconds a part, and numbers that mean nothing.
    """

    parts: tuple[str, ...] = field(default=())
    device: str = "cuda"
    smoke: bool = False

    def __post_init__(self) -> None:
        for part in self.parts:
            check_choice("part", part, list(PARTS))


def run(out: Path, settings: CudaSettings, *, log: Callable[[str], None] = print) -> list[Record]:
    """Run the parts one after the other, and write ``cuda-PART.json`` and ``cuda.txt``, the table, in ``out``.

    Args:
        out: folder.
        settings: what is run.
        log: told of each part, and of the table.

    Returns:
        The records of all parts that ``out`` holds.
    """
    sizes = Sizes.smoke(settings.device) if settings.smoke else Sizes(settings.device)
    for part in settings.parts or tuple(PARTS):
        log(f"{part} ...")
        begin = time.perf_counter()
        path = out / f"cuda-{part}.json"
        path.unlink(missing_ok=True)
        if settings.smoke:
            _measure(part, sizes, path)
        else:
            _in_a_process(part, sizes, path)
        log(f"{part}: {time.perf_counter() - begin:.0f} s, {path}")
    records = _read(out)
    text = table(records)
    (out / "cuda.txt").write_text(text + "\n", encoding="utf-8")
    log(f"\n{text}")
    return records


def _measure(part: str, sizes: Sizes, path: Path) -> None:
    """Run one part; an error of it is a record too, and does not keep the others from running."""
    begin = time.perf_counter()
    common = {"part": part, "device": gpu_parts.device_name(sizes.device), "torch": torch.__version__}
    measured = Measured(path, common, judged=not sizes.tiny)  # a tiny form's numbers mean nothing
    try:
        with _callers_state():
            PARTS[part](sizes, measured)
    except Exception as error:  # whatever a device finds to complain of belongs into the table
        measured.add({"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()})
    measured.add({"seconds": time.perf_counter() - begin})


@contextmanager
def _callers_state() -> Iterator[None]:
    """Leave the random streams and the default type as the caller had them."""
    dtype = torch.get_default_dtype()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _in_a_process(part: str, sizes: Sizes, path: Path) -> None:
    """Run one part in a process of its own, whose end gives the device's memory back; stop it after its time."""
    process = multiprocessing.get_context("spawn").Process(target=_measure, args=(part, sizes, path))
    process.start()
    process.join(PART_SECONDS)
    if process.is_alive():
        process.terminate()
        process.join()
        _append(path, part, f"stopped after {PART_SECONDS} s")
    elif process.exitcode:
        _append(path, part, f"its process ended with {process.exitcode}")


def _append(path: Path, part: str, reason: str) -> None:
    records = json.loads(path.read_text("utf-8")) if path.exists() else []
    write_records([*records, {"part": part, "failed": reason}], path)


def _read(out: Path) -> list[Record]:
    """Read the records of all parts that have been run, in the order of the parts."""
    paths = [out / f"cuda-{part}.json" for part in PARTS]
    return [record for path in paths if path.exists() for record in json.loads(path.read_text("utf-8"))]


def table(records: Sequence[Record]) -> str:
    """Format what was measured beside what is wanted, with the device's name above.

    Example:
        >>> print(table([{"part": "mixture", "device": "a card", "what": "share of copy", "value": 0.9, "least": 0.8}]))
        a card
        part              what  value  wanted
        -------------------------------------
        mixture  share of copy    0.9  >= 0.8
    """
    rows = [_row(record) for record in records if "what" in record or "failed" in record or "skipped" in record]
    devices = dict.fromkeys(str(record["device"]) for record in records if "device" in record)
    return f"{', '.join(devices) or 'nothing was run'}\n" + format_table(["part", "what", "value", "wanted"], rows)


def _row(record: Mapping[str, object]) -> list[str]:
    part = str(record["part"])
    for kind in ("failed", "skipped"):
        if kind in record:
            return [part, f"{record.get('what', '')} {kind}: {record[kind]}".strip()[:100], "", ""]
    value = record["value"]
    shown = f"{value:.4g}" if isinstance(value, float) else str(value)
    wanted, met = "", True
    if "most" in record:
        wanted, met = f"<= {record['most']}", float(value) <= float(record["most"])  # type: ignore[arg-type]
    elif "least" in record:
        wanted, met = f">= {record['least']}", float(value) >= float(record["least"])  # type: ignore[arg-type]
    return [part, str(record["what"]), shown, wanted if met else f"{wanted} MISSED"]
