"""The cost of a step of LiFT beside a plain PEFT step on the same backbone and batch, and the cost of its parts."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from pyro_lift.bench import speed_report
from pyro_lift.bench.affordable import adapt_records, prefix_records
from pyro_lift.bench.memory import high_water_mark, reset_high_water_mark
from pyro_lift.bench.records import Record, write_records
from pyro_lift.bench.shapes import BACKBONES, ROWS
from pyro_lift.bench.steps import K, TimedLiFT, block_step, maml, mixture_step, plain, sampler_alone
from pyro_lift.bench.timing import Times, copy_seconds, interleaved, quartiles
from pyro_lift.inference.mixture.compiled import compiles
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.support.options import check_choice, check_number

__all__ = ["SpeedSettings", "run"]


Part = Literal["steps", "em", "blocks", "curves", "large", "prefix", "adapt"]


@dataclass(frozen=True)
class SpeedSettings:
    """Sizes of the benchmark, and the parts of it that are measured."""

    backbones: tuple[str, ...] = field(
        default=("bart-base", "vit-b16", "bart-small", "vit-small"), metadata={"help": "of BACKBONES, for steps"}
    )
    ranks: tuple[int, ...] = field(default=(4, 64), metadata={"help": "of the adapters"})
    repeats: int = field(default=7, metadata={"help": "rounds; each method once a round"})
    #: steps: methods on a backbone; em: the mixture against the memory's bandwidth; blocks: visits a second against B,
    #: on small backbones; curves: step time against D, N and K, without a backbone; large: a few steps of a large T5,
    #: in bfloat16 on a GPU; prefix: a visit with the adapter on the last two layers, those below computed once a row;
    #: adapt: new tasks by plain PEFT one by one, and by adapt_many, on one CPU core.
    parts: tuple[Part, ...] = field(default=get_args(Part), metadata={"help": "that are measured"})
    largest: str | None = field(default=None, metadata={"help": "of large; none: t5-xl on a GPU, t5-large on a CPU"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})
    block_backbones: tuple[str, ...] = field(default=("bart-small", "vit-small"), metadata={"help": "for blocks"})
    block_sizes: tuple[int, ...] = field(default=(1, 4, 16, 64), metadata={"help": "tasks of a pass"})
    mixture_size: int = field(default=10_000_000, metadata={"help": "D of the mixture alone"})
    prefix_backbones: tuple[str, ...] = field(default=("minilm", "vit-b16"), metadata={"help": "for prefix"})
    adapt_backbone: str = field(default="minilm", metadata={"help": "for adapt"})
    adapt_tasks: int = field(default=16, metadata={"help": "new tasks, of 50 rows"})
    adapt_steps: int = field(default=60, metadata={"help": "on each of them"})
    short: bool = field(default=False, metadata={"help": "short curves, nothing compiled"})

    def __post_init__(self) -> None:
        for name in (*self.backbones, *self.block_backbones):
            check_choice("backbone", name, BACKBONES)
        for part in self.parts:
            check_choice("part", part, get_args(Part))
        if self.largest is not None:
            check_choice("largest", self.largest, BACKBONES)
        check_number("repeats", self.repeats, least=1, open_below=False, whole=True)

    @classmethod
    def smoke(cls, device: str = "cpu") -> SpeedSettings:
        """Return sizes that take seconds: the tiny backbones at rank 4, two repeats, short vectors."""
        tiny = ("bart-tiny", "vit-tiny")
        small = cls(tiny, (4,), 2, get_args(Part), "t5-tiny", device, tiny, (1, 2), 200_000, short=True)
        return replace(
            small,
            prefix_backbones=("minilm-tiny", "vit-tiny"),
            adapt_backbone="minilm-tiny",
            adapt_tasks=2,
            adapt_steps=4,
        )


def run(out: Path, settings: SpeedSettings | None = None, *, log: Callable[[str], None] = print) -> list[Record]:
    """Measure, and write ``speed.json`` and ``speed.png`` in ``out``; of some parts, ``speed-PARTS.json`` and figure.

    Args:
        out: folder.
        settings: sizes and parts.
        log: told of the tables on the way.
    """
    s = settings or SpeedSettings()
    measure = {
        "steps": _steps,
        "em": _mixtures,
        "blocks": _blocks,
        "curves": _curves,
        "large": _largest,
        "prefix": _prefixes,
        "adapt": _adaptations,
    }
    common = {"device": _device_name(s.device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    records: list[Record] = []
    for part in get_args(Part):
        if part in s.parts:
            records += measure[part](s, log)
    records = [common | record for record in records]
    stem = "speed" if set(s.parts) == set(get_args(Part)) else f"speed-{'-'.join(s.parts)}"
    write_records(records, out / f"{stem}.json")
    speed_report.plot(records, out / f"{stem}.png")
    return records


def _steps(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    records: list[Record] = []
    for backbone in s.backbones:
        for rank in s.ranks:
            records += steps(backbone, rank, s.repeats, s.device)
            log(speed_report.steps_table(records[-6:], f"{backbone}, rank {rank}"))
            gc.collect()
    return records


def _mixtures(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    records = bandwidth(s.mixture_size, s.repeats, s.device, compiled=not s.short)
    log(speed_report.em_table(records))
    return records


def _blocks(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    records = [r for name in s.block_backbones for r in blocks(name, s.block_sizes, s.repeats, s.device)]
    log(speed_report.blocks_table(records))
    return records


def _curves(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    records = curves(s.short, s.repeats, s.device)
    log(speed_report.curves_table(records))
    return records


def _largest(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    on_gpu = s.device.startswith("cuda")
    name = s.largest or ("t5-xl" if on_gpu else "t5-large")
    # Without instructions for it a CPU's products in bfloat16 are 5 to 95 times slower than in float32.
    dtype = torch.bfloat16 if s.short or on_gpu else torch.float32
    records = large(name, min(s.repeats, 3), s.device, dtype)
    log(speed_report.large_table(records, name))
    return records


def _prefixes(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    records = prefix_records(s.prefix_backbones, s.repeats, s.device)
    log(speed_report.prefix_table(records))
    return records


def _adaptations(s: SpeedSettings, log: Callable[[str], None]) -> list[Record]:
    draws = min(5, s.adapt_steps // 2)
    records = adapt_records(s.adapt_backbone, s.adapt_tasks, s.adapt_steps, draws, s.repeats)
    log(speed_report.adapt_table(records))
    return records


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


# ------------------------------------------------------------------------------------------------ one step


def steps(backbone: str, rank: int, repeats: int, device: str) -> list[Record]:
    """Time plain SGD, Adam, LiFT and MAML in turn, on one backbone and the same batches."""
    torch.manual_seed(0)
    shape = BACKBONES[backbone]
    net = shape.make()
    adapter = adapt_backbone(net, recipe(net, rank=rank)).to(device)
    tasks = [shape.task(i).to(device) for i in range(3)]
    about = {"backbone": backbone, "rank": rank, "dim": adapter.dim, "components": K, "block_size": 1, "rows": ROWS}
    lift = TimedLiFT(adapter, tasks)
    methods = {
        "SGD": plain(adapter, tasks, torch.optim.SGD),
        "Adam": plain(adapter, tasks, torch.optim.Adam),
        "LiFT": lift.step,
        "LiFT, RMS": TimedLiFT(adapter, tasks, preconditioner="rms").step,
        "MAML": maml(adapter, tasks),
    }
    gc.collect()
    peaks = {name: _peak(step, device) for name, step in methods.items()}
    times = interleaved({name: step for name, step in methods.items() if name != "MAML"}, repeats)
    # Several times a step's cost: fewer rounds, apart from the others, with a plain step in each.
    slow = interleaved({"SGD": methods["SGD"], "MAML": methods["MAML"]}, max(repeats // 3, 2), warm_up=0)
    records = [_record(name, times[name], times["SGD"], peaks[name]) for name in times]
    records.append(_record("MAML", slow["MAML"], slow["SGD"], peaks["MAML"]))
    records.append({"method": "LiFT", "part": "breakdown", **lift.breakdown(max(repeats // 2, 2))})
    return [{"part": "step"} | about | record for record in records]


def _peak(step: Callable[[], Any], device: str) -> int | None:
    """Measure the peak memory of one step."""
    reset_high_water_mark()
    step()
    return high_water_mark(device)


def _record(name: str, times: Times, plain_times: Times, peak: int | None) -> Record:
    wall, cpu = times.ratios(plain_times)
    low, ratio, high = quartiles(wall)
    cpu_low, cpu_ratio, cpu_high = quartiles(cpu)
    return {
        "method": name,
        "seconds_per_step": quartiles(times.wall)[1],
        "seconds_per_visit": quartiles(times.wall)[1],
        "cpu_seconds_per_step": quartiles(times.cpu)[1],
        "ratio_to_plain": ratio,
        "ratio_quartiles": [low, high],
        "cpu_ratio_to_plain": cpu_ratio,
        "cpu_ratio_quartiles": [cpu_low, cpu_high],
        "repeats": len(times.wall),
        "peak_bytes": peak,
    }


def large(backbone: str, repeats: int, device: str, dtype: torch.dtype) -> list[Record]:
    """Time a few steps on a large backbone: Union Train, which is plain PEFT, LiFT with K = 5, and MAML.

    One method after the other, so that none holds memory while another is measured; a method that does not fit says so.
    """
    torch.manual_seed(0)
    shape, before = BACKBONES[backbone], torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # the weights are made in it, so that they are never there in float32 too
    try:
        net = shape.make()
    finally:
        torch.set_default_dtype(before)
    weights = sum(p.numel() for p in net.parameters())
    adapter = adapt_backbone(net, recipe(net, rank=4)).to(device)
    tasks = [shape.task(i).to(device) for i in range(2)]
    about = {
        "part": "large",
        "backbone": backbone,
        "weights": weights,
        "dtype": str(dtype).removeprefix("torch."),
        "rank": 4,
        "dim": adapter.dim,
        "rows": shape.rows,
    }
    methods: dict[str, Callable[[], Callable[[], None]]] = {
        "SGD": lambda: plain(adapter, tasks, torch.optim.SGD, shape.rows),
        "LiFT": lambda: TimedLiFT(adapter, tasks, batch=shape.rows).step,
        "MAML": lambda: maml(adapter, tasks, shape.rows),
    }
    records: list[Record] = []
    for name, make in methods.items():
        gc.collect()
        record: Record = {"method": name, "components": K if name == "LiFT" else None}
        try:
            step = make()
            record["peak_bytes"] = _peak(step, device)
            times = interleaved({name: step}, repeats, warm_up=0)[name]
            record |= {"seconds_per_step": quartiles(times.wall)[1], "cpu_seconds_per_step": quartiles(times.cpu)[1]}
            record["repeats"] = repeats
            del step
        except (MemoryError, torch.OutOfMemoryError) as error:
            record["does_not_fit"] = str(error)
        records.append(about | record)
    return records


# ------------------------------------------------------------------------------------------------ memory, curves


def bandwidth(size: int, repeats: int, device: str, compiled: bool = True) -> list[Record]:
    """Time a mixture's update at K = 5 against a copy, in bytes a second.

    Compiled and piece by piece with every component read to its end, and piece by piece as it is.
    """
    records = []
    for fused, early, name in (
        (True, False, "EM, compiled"),
        (False, False, "EM, piece by piece"),
        (False, True, "EM, piece by piece, stopping early"),
    ):
        if fused and not (compiled and compiles(torch.device(device).type)):
            continue
        update, stream = mixture_step(size, K, device, fused)
        stream.early = early
        update()  # compiles
        times = interleaved({"copy": copy_seconds(size, device), "em": update}, repeats)
        wall, cpu = times["em"].ratios(times["copy"])
        # Read once: x, K means, K variances; of the component that moves, both and their averages, read and written.
        moved = 4.0 * size * (2 * K + 1 + 9) / (8.0 * size)
        low, share, high = quartiles([moved / ratio for ratio in cpu])
        records.append(
            {
                "part": "em",
                "method": name,
                "components": K,
                "dim": size,
                "seconds_per_step": quartiles(times["em"].wall)[1],
                "copy_bytes_per_second": 8.0 * size / quartiles(times["copy"].wall)[1],
                "share_of_copy_bandwidth": share,
                "share_quartiles": [low, high],
                "share_on_the_wall": quartiles([moved / ratio for ratio in wall])[1],
                "repeats": repeats,
            }
        )
        del update, stream
    return records


def curves(short: bool, repeats: int, device: str) -> list[Record]:
    """Measure step time against D, N and K, one at a time; the sampler and the mixture alone."""
    records = []
    top = 2 if short else 4
    for size in [10_000 * 10**k for k in range(top)]:
        seconds = interleaved({"sampler": sampler_alone(size, 10, device)}, repeats)["sampler"]
        records.append(_point("D", size, "sampler", seconds, dim=size, tasks=10))
        if size * K > 100_000:
            seconds = interleaved({"em": mixture_step(size, K, device)[0]}, repeats)["em"]
            records.append(_point("D", size, "mixture, K = 5", seconds, dim=size, components=K))
        gc.collect()
    counts = {count: sampler_alone(100_000, count, device) for count in [10 * 10**k for k in range(top)]}
    times = interleaved({str(count): step for count, step in counts.items()}, 3 * repeats)
    records += [_point("N", n, "sampler", times[str(n)], dim=100_000, tasks=n) for n in counts]
    size = 200_000 if short else 1_000_000
    steps: dict[str, Callable[[], None]] = {}
    sizes = (1, 2, 4) if short else (1, 2, 4, 8, 16)
    for components in sizes:
        for early in (True, False):
            steps[f"{components} {early}"], stream = mixture_step(size, components, device)
            stream.early = early
    times = interleaved(steps, repeats)
    for early, name in ((True, "mixture"), (False, "mixture, every component to its end")):
        records += [_point("K", k, name, times[f"{k} {early}"], dim=size, components=k) for k in sizes]
    return records


def blocks(backbone: str, sizes: Sequence[int], repeats: int, device: str) -> list[Record]:
    """Measure step time and visits a second against B, tasks of one pass, beside B steps of one task."""
    torch.manual_seed(0)
    shape = BACKBONES[backbone]
    net = shape.make()
    adapter = adapt_backbone(net, recipe(net, rank=4)).to(device)
    tasks = [shape.task(i).to(device) for i in range(max(sizes))]
    times = interleaved({str(B): block_step(adapter, tasks, B) for B in sizes}, repeats)
    records = []
    for B in sizes:
        wall, cpu = times[str(B)].ratios(times[str(sizes[0])])
        about = {"backbone": backbone, "rank": 4, "dim": adapter.dim, "block_size": B, "rows": shape.rows}
        low, ratio, high = quartiles([B / r for r in cpu])
        records.append(
            _point("B", B, backbone, times[str(B)], **about)
            | {
                "visits_per_second": B / quartiles(times[str(B)].wall)[1],
                "visits_to_one_by_one": quartiles([B / r for r in wall])[1],
                "cpu_visits_to_one_by_one": ratio,
                "cpu_visits_quartiles": [low, high],
            }
        )
    return records


def _point(curve: str, at: int, method: str, times: Times, **about: Any) -> Record:
    low, middle, high = quartiles(times.cpu)
    seconds = {"cpu_seconds_per_step": middle, "cpu_seconds_quartiles": [low, high]}
    seconds |= {"seconds_per_step": quartiles(times.wall)[1]}
    return {"part": "curve", "curve": curve, "at": at, "method": method, **about, **seconds}
