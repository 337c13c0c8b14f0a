"""What a step of LiFT costs beside a plain PEFT step on the same backbone and batch, and what each part of it costs."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import Tensor, nn

from pyro_lift.bench import speed_report
from pyro_lift.bench.records import write_records
from pyro_lift.bench.timing import Stopwatch, Times, copy_seconds, interleaved, peak_bytes, quartiles, reset_peak
from pyro_lift.inference import program as program_module
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import twice_differentiable
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.gibbs import visit as gibbs_visit
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.mixture.compiled import compiles
from pyro_lift.inference.mixture.in_place import MixtureStream
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.stores.memory import DeviceStore
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice

__all__ = ["BACKBONES", "run"]

ROWS, TOKENS, LABEL_TOKENS, VOCABULARY = 16, 64, 8, 50265
K = 5
BETA, SIGMA = 0.03, 0.3
#: A step that moves the weights by next to nothing, so that a long run of them stays where it is.
STEP = 1e-8

Record = dict[str, Any]
PARTS = ("steps", "em", "blocks", "curves", "large")


@dataclass(frozen=True)
class Shape:
    """A backbone with random weights, and one task for it."""

    make: Callable[[], nn.Module]
    task: Callable[[int], Task]
    #: Of a minibatch.
    rows: int = ROWS


def _bart(layers: int, width: int, heads: int, vocabulary: int) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=vocabulary, d_model=width, encoder_layers=layers, decoder_layers=layers,
        encoder_attention_heads=heads, decoder_attention_heads=heads, encoder_ffn_dim=4 * width,
        decoder_ffn_dim=4 * width, dropout=0.0,
    )  # fmt: skip
    model: nn.Module = BartForConditionalGeneration(config)
    return model


def _vit(size: int, patch: int, width: int, depth: int, heads: int) -> nn.Module:
    from timm.models import VisionTransformer

    net: nn.Module = VisionTransformer(
        img_size=size, patch_size=patch, num_classes=10, embed_dim=width, depth=depth, num_heads=heads
    )
    return net


def _t5(layers: int, width: int, hidden: int, heads: int, vocabulary: int = 32128) -> nn.Module:
    """T5 1.1."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=width // heads, d_ff=hidden, num_layers=layers, num_heads=heads,
        dropout_rate=0.0, feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


def _text_task(vocabulary: int, number: int, rows: int = ROWS, tokens: int = TOKENS) -> Task:
    generator = torch.Generator().manual_seed(number)
    draw = partial(torch.randint, 5, vocabulary, generator=generator)
    x, target = draw(size=(2 * rows, tokens)), draw(size=(2 * rows, LABEL_TOKENS))
    inputs = {"input_ids": x, "attention_mask": torch.ones_like(x), "decoder_input_ids": target.roll(1, -1)}
    return Task(f"text{number}", (inputs, target), "tokens")


def _picture_task(size: int, number: int) -> Task:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(2 * ROWS, 3, size, size, generator=generator)
    return Task(f"pictures{number}", ({"x": x}, torch.arange(2 * ROWS) % 10))


#: The shapes of the paper's backbones, and small ones whose own cost does not hide what is beside it.
BACKBONES: dict[str, Shape] = {
    "bart-base": Shape(partial(_bart, 6, 768, 12, VOCABULARY), partial(_text_task, VOCABULARY)),
    "vit-b16": Shape(partial(_vit, 224, 16, 768, 12, 12), partial(_picture_task, 224)),
    "bart-small": Shape(partial(_bart, 2, 128, 4, 1000), partial(_text_task, 1000)),
    "vit-small": Shape(partial(_vit, 32, 8, 128, 4, 4), partial(_picture_task, 32)),
    "bart-tiny": Shape(partial(_bart, 1, 16, 2, 50), partial(_text_task, 50)),
    "vit-tiny": Shape(partial(_vit, 8, 4, 16, 1, 2), partial(_picture_task, 8)),
    # Few rows and tokens: what fits beside 3 billion weights, and what is over in a minute without a GPU.
    "t5-xl": Shape(partial(_t5, 24, 2048, 5120, 32), partial(_text_task, 32128, rows=4, tokens=64), 4),
    "t5-large": Shape(partial(_t5, 24, 1024, 2816, 16), partial(_text_task, 32128, rows=2, tokens=16), 2),
    "t5-tiny": Shape(partial(_t5, 1, 16, 32, 2, 50), partial(_text_task, 50, rows=4, tokens=32), 4),
}


def run(
    out: Path,
    *,
    smoke: bool = False,
    device: str = "cpu",
    backbones: Sequence[str] = ("bart-base", "vit-b16", "bart-small", "vit-small"),
    ranks: Sequence[int] = (4, 64),
    repeats: int = 7,
    parts: Sequence[str] = PARTS,
    largest: str | None = None,
    echo: Callable[[str], None] = print,
) -> list[Record]:
    """Measure, and write ``speed.json`` and ``speed.png`` in ``out``; of some parts, ``speed-PARTS.json`` and figure.

    Args:
        out: folder.
        smoke: the tiny backbones at rank 4, two repeats, short vectors.
        device: ``"cpu"`` or ``"cuda"``.
        backbones: of :data:`BACKBONES`.
        ranks: of the adapters.
        repeats: rounds; each method once a round.
        parts: ``"steps"`` (methods on a backbone), ``"em"`` (mixture against the memory's bandwidth), ``"blocks"``
            (visits a second against B, on the small backbones), ``"curves"`` (step time against D, N and K, without a
            backbone), ``"large"`` (a few steps of a large T5, in bfloat16 on a GPU).
        largest: backbone of the last part; None takes t5-xl on a GPU and t5-large on a CPU.
        echo: for progress.
    """
    for name in backbones:
        check_choice("backbone", name, BACKBONES)
    for part in parts:
        check_choice("part", part, PARTS)
    if largest is not None:
        check_choice("largest", largest, BACKBONES)
    if smoke:
        backbones, ranks, repeats = ("bart-tiny", "vit-tiny"), (4,), 2
    size = 200_000 if smoke else 10_000_000
    common = {"device": _device_name(device), "threads": torch.get_num_threads(), "torch": torch.__version__}
    records: list[Record] = []
    if "steps" in parts:
        for backbone in backbones:
            for rank in ranks:
                records += steps(backbone, rank, repeats, device)
                echo(speed_report.steps_table(records[-6:], f"{backbone}, rank {rank}"))
                gc.collect()
    if "em" in parts:
        records += bandwidth(size, repeats, device, compiled=not smoke)
        echo(speed_report.em_table(records))
    if "blocks" in parts:
        for backbone in ("bart-tiny", "vit-tiny") if smoke else ("bart-small", "vit-small"):
            records += blocks(backbone, (1, 2) if smoke else (1, 4, 16, 64), repeats, device)
        echo(speed_report.blocks_table(records))
    if "curves" in parts:
        records += curves(smoke, repeats, device)
        echo(speed_report.curves_table(records))
    if "large" in parts:
        name = "t5-tiny" if smoke else largest or ("t5-xl" if device.startswith("cuda") else "t5-large")
        # Without instructions for it a CPU's products in bfloat16 are 5 to 95 times slower than in float32.
        dtype = torch.bfloat16 if smoke or device.startswith("cuda") else torch.float32
        found = large(name, min(repeats, 3), device, dtype)
        records += found
        echo(speed_report.large_table(found, name))
    records = [common | record for record in records]
    stem = "speed" if set(parts) == set(PARTS) else f"speed-{'-'.join(parts)}"
    write_records(records, out / f"{stem}.json")
    speed_report.draw(records, out / f"{stem}.png")
    return records


def _device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


# ------------------------------------------------------------------------------------------------ one step


def steps(backbone: str, rank: int, repeats: int, device: str) -> list[Record]:
    """Plain SGD, Adam, LiFT and MAML in turn, on one backbone and the same batches."""
    torch.manual_seed(0)
    shape = BACKBONES[backbone]
    net = shape.make()
    adapter = adapt_backbone(net, recipe(net, rank=rank)).to(device)
    tasks = [shape.task(i).to(device) for i in range(3)]
    about = {"backbone": backbone, "rank": rank, "dim": adapter.dim, "components": K, "block_size": 1, "rows": ROWS}
    lift = Lift(adapter, tasks)
    methods = {
        "SGD": plain(adapter, tasks, torch.optim.SGD),
        "Adam": plain(adapter, tasks, torch.optim.Adam),
        "LiFT": lift.step,
        "LiFT, RMS": Lift(adapter, tasks, preconditioner="rms").step,
        "MAML": maml(adapter, tasks),
    }
    gc.collect()
    peaks = {name: _peak(step, device) for name, step in methods.items()}
    times = interleaved({name: step for name, step in methods.items() if name != "MAML"}, repeats)
    # Several times a step's cost: fewer rounds of its own, with a plain step in each.
    slow = interleaved({"SGD": methods["SGD"], "MAML": methods["MAML"]}, max(repeats // 3, 2), warm_up=0)
    records = [_record(name, times[name], times["SGD"], peaks[name]) for name in times]
    records.append(_record("MAML", slow["MAML"], slow["SGD"], peaks["MAML"]))
    records.append({"method": "LiFT", "part": "breakdown", **lift.breakdown(max(repeats // 2, 2))})
    return [{"part": "step"} | about | record for record in records]


def _peak(step: Callable[[], Any], device: str) -> int | None:
    """Peak memory of one step."""
    reset_peak()
    step()
    return peak_bytes(device)


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


def plain(
    adapter: RandomAdapter, tasks: Sequence[Task], make: Callable[..., torch.optim.Optimizer], batch: int = ROWS
) -> Callable[[], None]:
    """The usual loop: the PEFT model's own parameters, ``backward`` and ``torch.optim``."""
    parameters = [places[0].module._parameters[places[0].attribute] for places in adapter._slots]
    optimiser = make(parameters, lr=STEP)
    count = iter(range(10**9))

    def step() -> None:
        for parameter in parameters:
            assert parameter is not None
            parameter.requires_grad_(True)
        task = tasks[next(count) % len(tasks)]
        rows = task.train.take(torch.randperm(len(task.train))[:batch].to(adapter.initial.device))
        optimiser.zero_grad()
        output = adapter.backbone(**rows.named)  # type: ignore[operator]
        logits = output.logits if hasattr(output, "logits") else output
        loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), rows.target.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        for parameter in parameters:
            assert parameter is not None
            parameter.requires_grad_(False)

    return step


class Lift:
    """A chain and its mixture, made to run for ever at one place."""

    def __init__(
        self, adapter: RandomAdapter, tasks: Sequence[Task], components: int = K, batch: int = ROWS, **options: Any
    ) -> None:
        self.adapter = adapter
        self.kernel = SGLDGibbs(
            AdapterHierarchy(adapter, tasks, beta=BETA, sigma=SIGMA, batch_size=batch, prior_mean=adapter.initial),
            step_size=STEP,
            init_strategy=init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean),
            **options,
        )
        self.kernel.setup(0)
        self.mixture = mixture_at(adapter.initial, components)
        for _ in tasks:
            self.step()

    def step(self) -> None:
        """A visit, and its draw through the mixture."""
        self.mixture.update(self.kernel.sample(self.kernel.state.phi)["phi"])

    def breakdown(self, repeats: int) -> Record:
        """Processor seconds of a step by part; the parts add up to the step."""
        watch = Stopwatch()
        places: Mapping[str, tuple[Any, str]] = {
            "handlers": (program_module.Program, "run"),
            "forward": (self.adapter, "_call"),
            "backward": (program_module.Evaluation, "drift"),
            "theta": (gibbs_visit, "_move_theta"),
            "phi": (gibbs_visit, "_move_phi"),
            "store": (DeviceStore, "write"),
            "mixture": (self.mixture, "update"),
            "rest": (self, "step"),
        }
        with watch.watching(places):
            for _ in range(repeats):
                self.step()
        seconds = {name: spent / repeats for name, spent in watch.seconds.items()}
        backbone = seconds["forward"] + seconds["backward"]
        return {"cpu_seconds": seconds, "cpu_ratio_to_backbone": sum(seconds.values()) / backbone}


def mixture_at(place: Tensor, components: int, fused: bool | None = None) -> OnlineGaussianMixture:
    """A mixture in mid-stream whose means stand around ``place`` as draws of phi do."""
    spread = (1.0 / SIGMA**2 + 3.0 / BETA**2) ** -0.5
    mean = place + spread * torch.randn(components, len(place), device=place.device)
    weight = torch.full((components,), 1.0 / components, device=place.device)
    moments = Moments(weight, mean, torch.full_like(mean, spread**2))
    numbers = torch.tensor([100.0, 100.0, 0.0], dtype=torch.float64)
    tensors = {f"{part}.{k}": v for part in ("moments", "average") for k, v in moments._asdict().items()}
    mixture = OnlineGaussianMixture(components, fused=fused)
    mixture.load_state_dict({**tensors, "numbers": numbers, "floor": torch.tensor(1e-6 * spread**2)})
    return mixture


def maml(adapter: RandomAdapter, tasks: Sequence[Task], batch: int = ROWS) -> Callable[[], None]:
    """One inner step and its query, second order, on one task: two minibatches."""
    method = MAML(adapter, Budget(), tasks_per_step=1)
    heads, generator = Heads(adapter, tasks, Budget(), 1e-3), torch.Generator().manual_seed(0)
    phi, count = adapter.initial.clone(), iter(range(10**9))

    def step() -> None:
        number = next(count) % len(tasks)
        rows = tasks[number].train
        order = torch.randperm(len(rows)).to(phi.device)
        episode = Episode(number, tasks[number], rows.take(order[:batch]), rows.take(order[batch:]))
        with twice_differentiable(True):
            phi.sub_(method.gradient(phi, episode, heads, generator), alpha=STEP)

    return step


def large(backbone: str, repeats: int, device: str, dtype: torch.dtype) -> list[Record]:
    """A few steps on a large backbone: Union Train, which is plain PEFT, LiFT with K = 5, and MAML.

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
        "LiFT": lambda: Lift(adapter, tasks, batch=shape.rows).step,
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
    """A mixture's update at K = 5 against a copy, in bytes a second.

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
        update, stream = _em(size, K, device, fused)
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


def _em(size: int, components: int, device: str, fused: bool | None = None) -> tuple[Callable[[], None], MixtureStream]:
    place = torch.zeros(size, device=device)
    mixture = mixture_at(place, components, fused)
    if not isinstance(mixture._running, MixtureStream):
        raise ValueError(f"size={size}: too short for a mixture that is updated in place.")
    stream = mixture._running
    x = stream.moments.mean[0].clone()
    return lambda: stream.update(x), stream


class _Free(torch.autograd.Function):
    """A likelihood whose gradient costs nothing: what remains is the sampler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient, None


def sampler_alone(size: int, num_tasks: int, device: str) -> Callable[[], Any]:
    """A visit without a backbone."""
    prior_mean, gradient = torch.zeros(size, device=device), torch.full((size,), 1e-3, device=device)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(prior_mean, SIGMA, validate_args=False).to_event(1))
        for i in pyro.plate("tasks", num_tasks, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, BETA, validate_args=False).to_event(1))
            pyro.factor(f"obs_{i}", _Free.apply(theta, gradient))  # type: ignore[no-untyped-call]

    kernel = SGLDGibbs(model, step_size=STEP)
    kernel.setup(0)
    visited = min(num_tasks, 3)

    def step() -> None:
        # Round and round among the first few tasks, whose rows are there.
        if kernel.state.step >= visited:
            kernel.state = kernel.state._replace(step=0)
        kernel.sample(kernel.state.phi)

    for _ in range(visited):
        step()
    return step


def curves(smoke: bool, repeats: int, device: str) -> list[Record]:
    """Step time against D, N and K, one at a time; the sampler and the mixture alone."""
    records = []
    top = 2 if smoke else 4
    for size in [10_000 * 10**k for k in range(top)]:
        seconds = interleaved({"sampler": sampler_alone(size, 10, device)}, repeats)["sampler"]
        records.append(_point("D", size, "sampler", seconds, dim=size, tasks=10))
        if size * K > 100_000:
            seconds = interleaved({"em": _em(size, K, device)[0]}, repeats)["em"]
            records.append(_point("D", size, "mixture, K = 5", seconds, dim=size, components=K))
        gc.collect()
    counts = {count: sampler_alone(100_000, count, device) for count in [10 * 10**k for k in range(top)]}
    found = interleaved({str(count): step for count, step in counts.items()}, 3 * repeats)
    records += [_point("N", n, "sampler", found[str(n)], dim=100_000, tasks=n) for n in counts]
    size = 200_000 if smoke else 1_000_000
    steps: dict[str, Callable[[], None]] = {}
    sizes = (1, 2, 4) if smoke else (1, 2, 4, 8, 16)
    for components in sizes:
        for early in (True, False):
            steps[f"{components} {early}"], stream = _em(size, components, device)
            stream.early = early
    found = interleaved(steps, repeats)
    for early, name in ((True, "mixture"), (False, "mixture, every component to its end")):
        records += [_point("K", k, name, found[f"{k} {early}"], dim=size, components=k) for k in sizes]
    return records


def blocks(backbone: str, sizes: Sequence[int], repeats: int, device: str) -> list[Record]:
    """Step time and visits a second against B, tasks of one pass, with few-shot batches; against B steps of one."""
    torch.manual_seed(0)
    shape = BACKBONES[backbone]
    net = shape.make()
    adapter = adapt_backbone(net, recipe(net, rank=4)).to(device)
    tasks = [shape.task(i).to(device) for i in range(max(sizes))]
    times = interleaved({str(B): _block_step(adapter, tasks, B) for B in sizes}, repeats)
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


def _block_step(adapter: RandomAdapter, tasks: Sequence[Task], B: int) -> Callable[[], None]:
    hierarchy = AdapterHierarchy(
        adapter, tasks, beta=BETA, sigma=SIGMA, batch_size=ROWS, prior_mean=adapter.initial, block_size=B
    )
    start = init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean)
    kernel = SGLDGibbs(hierarchy, step_size=STEP, init_strategy=start)
    kernel.setup(0)

    def step() -> None:
        kernel.state = kernel.state._replace(step=0)  # the first block, whose rows are there
        kernel.sample(kernel.state.phi)

    step()
    return step


def _point(curve: str, at: int, method: str, times: Times, **about: Any) -> Record:
    low, middle, high = quartiles(times.cpu)
    seconds = {"cpu_seconds_per_step": middle, "cpu_seconds_quartiles": [low, high]}
    return {"part": "curve", "curve": curve, "at": at, "method": method, **about, **seconds}
