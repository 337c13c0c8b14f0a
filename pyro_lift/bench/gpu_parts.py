"""The parts of :mod:`~pyro_lift.bench.first_hour`: each measures one thing and writes what it finds at once."""

from __future__ import annotations

import gc
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyro
import torch
import torch.distributed as dist
from torch import Tensor

from pyro_lift.bench import speed
from pyro_lift.bench.memory import peak_bytes
from pyro_lift.bench.records import Record, write_records
from pyro_lift.bench.shapes import BACKBONES
from pyro_lift.bench.steps import TimedLiFT
from pyro_lift.bench.timing import interleaved, quartiles
from pyro_lift.inference.footprint import chain_needs
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.factors import factor, normal
from pyro_lift.models.linear_gaussian import LinearGaussian, fit, gaussian_kl
from pyro_lift.models.task import Task

__all__ = [
    "Measured", "Sizes", "blocks_of", "curves", "demo", "device_name", "graphs", "large", "laws", "memory", "mixture",
    "nccl", "resume", "steps_of", "tests",
]  # fmt: skip

#: Lines of a test run's output that a record keeps.
TAIL = 15


@dataclass(frozen=True)
class Sizes:
    """Sizes of all parts.

    Attributes:
        device: that is measured.
        tiny: whether every part takes its smallest form.
        repeats: rounds of what is timed.
        block_sizes: tasks of a pass.
        mixture_size: D of the mixture alone.
        draws: of phi, for the laws.
    """

    device: str = "cuda"
    tiny: bool = False
    repeats: int = 31
    block_sizes: tuple[int, ...] = (4, 16, 64)
    mixture_size: int = 10_000_000
    draws: int = 8_000

    @classmethod
    def smoke(cls, device: str) -> Sizes:
        """Return sizes that take seconds on a CPU."""
        return cls(device, True, 2, (2,), 200_000, 60)

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")


class Measured:
    """The records of one part, in its file as soon as they are known.

    Args:
        path: of the file.
        common: what every record says.
        judged: whether numbers are held against what is wanted of them.
    """

    def __init__(self, path: Path, common: Mapping[str, Any], judged: bool = True) -> None:
        self.path, self.common, self.judged = path, dict(common), judged
        self.records: list[Record] = []

    def add(self, *records: Mapping[str, Any]) -> None:
        """Write some more records."""
        self.records += [{**record, **self.common} for record in records]
        write_records(self.records, self.path)

    def value(self, what: str, value: float, **wanted: Any) -> None:
        """Write a number for the table; ``most`` or ``least`` is what is wanted of it."""
        self.add({"what": what, "value": value, **(wanted if self.judged else {})})

    def skip(self, what: str, reason: str) -> None:
        """Write that something was not run, and why."""
        self.add({"what": what, "skipped": reason})


def device_name(device: str) -> str:
    """Return the card's name, or the device's."""
    return torch.cuda.get_device_name() if device.startswith("cuda") else device


# ------------------------------------------------------------------------------------------------ what must hold


def tests(sizes: Sizes, measured: Measured) -> None:
    """Run the tests marked ``gpu``, which a wheel does not bring: from a checkout.

    Only the files that hold some are collected: others may need packages that a machine with a GPU lacks.
    """
    folder = Path(__file__).resolve().parents[2]
    if not (folder / "tests" / "conftest.py").exists():
        measured.skip("tests marked gpu", "no checkout: the tests are not in the wheel")
        return
    files = sorted((folder / "tests").rglob("test_*.py"))
    marked = [str(file) for file in files if "pytest.mark.gpu" in file.read_text("utf-8")]
    chosen = ["tests/test_lift.py"] if sizes.tiny else marked
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", "--tb=short", *chosen]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    measured.add({"what": "tests marked gpu, exit code", "value": done.returncode, "most": 0, "output": lines[-TAIL:]})


#: Every update, on the toy; the steps are as of ``bench sampler``.
LAWS: dict[str, dict[str, Any]] = {
    "gibbs": {},
    "gibbs, blocks": {"subsample": 5},
    "gibbs, rms": {"preconditioner": "rms", "step_size": 5e-2},
    "gibbs, host store": {"store": "host"},
    "langevin, exact": {"phi_update": "langevin", "accumulator": "exact", "phi_step_size": 2e-3},
    "langevin, table": {"phi_update": "langevin", "accumulator": "table", "phi_step_size": 1e-3},
}


def laws(sizes: Sizes, measured: Measured) -> None:
    """Hold each update's draws of phi on the device against the toy's exact posterior, by their KL divergence."""
    for name, options in LAWS.items():
        options = dict(options)
        toy = LinearGaussian(10, seed=0, block_size=options.pop("subsample", 1)).to(sizes.device)
        kernel = SGLDGibbs(toy, **{"step_size": 5e-3, "seed": 0, **options})
        mcmc = MCMC(kernel, num_samples=sizes.draws, warmup_steps=sizes.draws // 4, disable_progbar=True)
        mcmc.run()
        kl = gaussian_kl(fit(mcmc.get_samples()["phi"].cpu()), toy.to("cpu").posterior())
        measured.value(f"KL to the exact posterior, {name}", kl, most=0.1)


def resume(sizes: Sizes, measured: Measured) -> None:
    """Begin a run on one device and go on with it on the other; without noise the numbers are the same."""
    there = sizes.device
    whole = _resumed(there, there)
    for begin, end in ((there, "cpu"), ("cpu", there)):
        gap = float((_resumed(begin, end) - whole).abs().max())
        measured.value(f"largest difference, {begin} then {end}", gap, most=1e-6)


def _resumed(begin: str, end: str) -> Tensor:
    with tempfile.TemporaryDirectory() as folder:
        for device, samples, how in ((begin, 20, "checkpoint"), (end, 40, "resume")):
            toy = LinearGaussian(6, seed=0).to(device)
            kernel = SGLDGibbs(toy, step_size=5e-3, seed=0, temperature=0.0, preconditioner="rms")
            mcmc = MCMC(kernel, num_samples=samples, warmup_steps=20, disable_progbar=True)
            where: dict[str, Any] = {how: Path(folder) / "run"}
            mcmc.run(**where)
    phi: Tensor = kernel.state.phi["phi"]
    return phi.cpu()


def nccl(sizes: Sizes, measured: Measured) -> None:
    """Run a distributed chain in a group of one process: NCCL on a GPU, gloo elsewhere; against the same without."""
    phi = []
    for grouped in (False, True):
        with _group_of_one(sizes) if grouped else nullcontext():
            toy = LinearGaussian(6, seed=0, block_size=2).to(sizes.device)
            kernel = SGLDGibbs(toy, step_size=1e-4, seed=0, distributed=True, block_size=2)
            kernel.setup(0)
            for _ in range(6):
                kernel.sample(kernel.initial_params)
            if grouped:
                total = torch.ones(4, dtype=torch.float64, device=sizes.device)
                dist.all_reduce(total)
                measured.add({"backend": dist.get_backend(), "all_reduce": float(total.sum())})
            phi.append(kernel.initial_params["phi"].cpu())
    measured.value("largest difference with a group of one", float((phi[0] - phi[1]).abs().max()), most=0.0)


@contextmanager
def _group_of_one(sizes: Sizes) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        where = f"file://{folder}/meet"
        backend = "cpu:gloo,cuda:nccl" if sizes.on_gpu else "gloo"
        dist.init_process_group(backend, init_method=where, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def memory(sizes: Sizes, measured: Measured) -> None:
    """Hold the memory that was reckoned for a chain's state against what the device gave."""
    D = 100_000 if sizes.tiny else sizes.mixture_size
    mean = torch.zeros(D, device=sizes.device)

    def program() -> None:
        phi = pyro.sample("phi", normal(mean, 0.3).to_event(1))
        for i in pyro.plate("tasks", 4, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", normal(phi, 0.03).to_event(1))
            factor(f"obs_{i}", theta[:10].sum())

    kernel = SGLDGibbs(program, step_size=1e-4, seed=0, check_stability=False, store="device")

    def run() -> None:
        kernel.setup(0)
        for _ in range(8):
            kernel.sample(kernel.initial_params)

    taken = peak_bytes(run, torch.device(sizes.device))
    needs = chain_needs(kernel.chain, kernel.state.phi, 4 * D)
    measured.value("reckoned bytes of a chain over those taken", sum(n.nbytes for n in needs) / taken, least=0.6)


def demo(sizes: Sizes, measured: Measured) -> None:
    """Run the demo on the device; its methods' mean scores are the records."""
    from pyro_lift.bench import demo as this

    settings = (
        this.DemoSettings.smoke(sizes.device)
        if sizes.tiny
        else this.DemoSettings(seeds=1, workers=1, device=sizes.device)
    )
    records = this.run(settings, measured.path.parent / "cuda-demo", progress=False)
    for method in dict.fromkeys(str(record["method"]) for record in records):
        nll = [float(record["nll"]) for record in records if record["method"] == method]
        measured.value(f"mean NLL, {method}", sum(nll) / len(nll))


# ------------------------------------------------------------------------------------------------ what is timed


def steps_of(backbone: str, rank: int) -> Callable[[Sizes, Measured], None]:
    """Return the part that times a step of LiFT beside a plain one."""
    return _Steps(backbone, rank)


@dataclass(frozen=True)
class _Steps:
    backbone: str
    rank: int

    def __call__(self, sizes: Sizes, measured: Measured) -> None:
        name = _tiny(self.backbone) if sizes.tiny else self.backbone
        records = speed.steps(name, self.rank, sizes.repeats, sizes.device)
        measured.add(*({"kind": record["part"], **record} for record in records))
        for record in records:
            if record["method"] in ("LiFT", "LiFT, RMS", "MAML"):
                wanted = {"most": 1.02} if record["method"] == "LiFT" and "ratio_to_plain" in record else {}
                if "ratio_to_plain" in record:
                    ratio = float(record["ratio_to_plain"])
                    measured.value(f"{record['method']} over plain SGD, {name}, rank {self.rank}", ratio, **wanted)


def _tiny(backbone: str) -> str:
    return f"{backbone.split('-')[0]}-tiny"


def blocks_of(backbone: str) -> Callable[[Sizes, Measured], None]:
    """Return the part that counts visits a second in blocks, beside those of one task."""
    return _Blocks(backbone)


@dataclass(frozen=True)
class _Blocks:
    backbone: str

    def __call__(self, sizes: Sizes, measured: Measured) -> None:
        name = _tiny(self.backbone) if sizes.tiny else self.backbone
        for B in sizes.block_sizes:  # one after the other: what does not fit leaves the smaller ones measured
            gc.collect()
            try:
                records = speed.blocks(name, (1, B), max(sizes.repeats // 2, 2), sizes.device)
            except torch.OutOfMemoryError as error:
                measured.skip(f"B = {B}, {name}", f"does not fit: {str(error).splitlines()[0]}")
                continue
            measured.add(*({"kind": "curve", **record} for record in records))
            ratio = float(records[-1]["visits_to_one_by_one"])
            wanted = {"least": 6.0} if B == 16 else {}
            measured.value(f"visits a second, B = {B} over B = 1, {name}", ratio, **wanted)


def mixture(sizes: Sizes, measured: Measured) -> None:
    """Measure the mixture's update against the device's own copy."""
    for record in speed.bandwidth(sizes.mixture_size, sizes.repeats, sizes.device, compiled=not sizes.tiny):
        measured.add({"kind": "em", **record})
        wanted = {"least": 0.8} if record["method"] == "EM, compiled" else {}
        share = float(record["share_on_the_wall"])
        measured.value(f"share of the copy bandwidth, {record['method']}", share, **wanted)


def curves(sizes: Sizes, measured: Measured) -> None:
    """Measure how a step grows with D, N and K."""
    records = speed.curves(sizes.tiny, max(sizes.repeats // 4, 2), sizes.device)
    measured.add(*({"kind": "curve", **record} for record in records))
    largest = max((r for r in records if r["curve"] == "D"), key=lambda r: int(r["at"]))
    what = f"seconds of a step without a backbone, {largest['method']}, D = {largest['at']:,}"
    measured.value(what, float(largest["seconds_per_step"]))


def large(sizes: Sizes, measured: Measured) -> None:
    """Time T5-XL in bfloat16: Union Train, LiFT and MAML, with their peaks of memory."""
    name = "t5-tiny" if sizes.tiny else "t5-xl"
    records = {r["method"]: r for r in speed.large(name, min(sizes.repeats, 7), sizes.device, torch.bfloat16)}
    measured.add(*({"kind": "large", **record} for record in records.values()))
    plain = records["SGD"].get("seconds_per_step")
    for method, record in records.items():
        if "does_not_fit" in record:
            measured.skip(f"{method}, {name}", f"does not fit: {record['does_not_fit'].splitlines()[0]}")
            continue
        if record.get("peak_bytes"):
            measured.value(f"peak memory in GiB, {method}, {name}", record["peak_bytes"] / 2**30)
        if plain and method != "SGD":
            wanted = {"most": 1.05} if method == "LiFT" else {}
            measured.value(f"{method} over Union Train, {name}", record["seconds_per_step"] / plain, **wanted)


# -------------------------------------------------------------------------------------- what may pay, tried


def graphs(sizes: Sizes, measured: Measured) -> None:
    """Try what starts a pass's operations at once: ``torch.compile`` and CUDA graphs of the network's pass.

    The pass (forward and backward at theta) is most of a visit where the network is small; the record of each form is
    its time over the eager pass's, and what a visit would take with it.
    """
    for name in ("vit-tiny",) if sizes.tiny else ("bart-base", "vit-b16", "vit-small"):
        adapter, task = _adapter(name, sizes)
        visit = TimedLiFT(adapter, [task]).step
        eager = _pass(adapter, task)
        times = interleaved({"visit": visit, "pass": eager}, sizes.repeats)
        seconds = {key: quartiles(value.wall)[1] for key, value in times.items()}
        measured.value(f"share of the eager pass in a visit, {name}", seconds["pass"] / seconds["visit"])
        for form, make in FORMS.items():
            try:
                changed = make(adapter, task, sizes)
            except Exception as error:  # what cannot be captured or compiled says so in PyTorch's own words
                measured.skip(f"{form}, {name}", str(error).splitlines()[0] if str(error) else type(error).__name__)
                continue
            pair = interleaved({"eager": eager, form: changed}, sizes.repeats)
            ratio = quartiles(pair[form].ratios(pair["eager"])[0])[1]
            visit_ratio = 1.0 - (1.0 - ratio) * seconds["pass"] / seconds["visit"]
            measured.value(f"{form} over the eager pass, {name}", ratio, of_a_visit=visit_ratio)


def _adapter(name: str, sizes: Sizes) -> tuple[RandomAdapter, Task]:
    torch.manual_seed(0)
    net = BACKBONES[name].make()
    return adapt_backbone(net, recipe(net, rank=4)).to(sizes.device), BACKBONES[name].task(0).to(sizes.device)


class _Pass(torch.nn.Module):
    """The loss of a minibatch as a function of theta, of tensors alone: what a graph can hold."""

    def __init__(self, adapter: RandomAdapter, task: Task) -> None:
        super().__init__()
        self.adapter, self.rows = adapter, task.train.take(slice(0, 16))

    def forward(self, theta: Tensor) -> Tensor:
        output = self.adapter(*self.rows.positional, theta=theta, **self.rows.named)
        return torch.nn.functional.cross_entropy(output.flatten(0, -2).float(), self.rows.target.flatten())


def _step_of(function: Callable[[Tensor], Tensor], adapter: RandomAdapter) -> Callable[[], Any]:
    theta = adapter.initial.clone().requires_grad_()
    return lambda: torch.autograd.grad(function(theta), theta)


def _pass(adapter: RandomAdapter, task: Task) -> Callable[[], Any]:
    return _step_of(_Pass(adapter, task), adapter)


def _compiled(adapter: RandomAdapter, task: Task, sizes: Sizes, mode: str | None = None) -> Callable[[], Any]:
    how: dict[str, Any] = {"backend": "eager"} if sizes.tiny else {"mode": mode}
    step = _step_of(torch.compile(_Pass(adapter, task), **how), adapter)
    step()  # compiles
    return step


def _reduced(adapter: RandomAdapter, task: Task, sizes: Sizes) -> Callable[[], Any]:
    return _compiled(adapter, task, sizes, "reduce-overhead")


def _graphed(adapter: RandomAdapter, task: Task, sizes: Sizes) -> Callable[[], Any]:
    if not sizes.on_gpu:
        raise RuntimeError("a CPU has no graphs")
    theta = adapter.initial.clone().requires_grad_()
    graphed: Any = torch.cuda.make_graphed_callables(_Pass(adapter, task), (theta,))
    return _step_of(graphed, adapter)


FORMS: dict[str, Callable[[RandomAdapter, Task, Sizes], Callable[[], Any]]] = {
    "torch.compile": _compiled,
    "torch.compile, reduce-overhead": _reduced,
    "CUDA graph": _graphed,
}
