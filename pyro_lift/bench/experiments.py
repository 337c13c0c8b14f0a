"""Experiments of ``pyro-lift bench methods``: a network, tasks to learn from, and tasks to be judged by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pyro_lift.config import BackboneConfig, OutputConfig, RunConfig, TasksConfig
from pyro_lift.data.load import load_tasks
from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_choice, check_number
from pyro_lift.wiring import adapter_of, encode_tasks

__all__ = ["BENCHMARKS", "DIGITS", "Experiment", "MethodsSettings", "Problem", "on_tasks"]


@dataclass(frozen=True)
class MethodsSettings:
    """Sizes of the experiment."""

    seeds: int = field(default=5, metadata={"help": "families of tasks, or repetitions on given tasks"})
    warm_up: int = field(default=300, metadata={"help": "minibatches of joint training"})
    visits: int = field(default=240, metadata={"help": "minibatches of meta-training after it"})
    steps: int = field(default=60, metadata={"help": "adaptation steps on a new task"})
    draws: int = field(default=5, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    num_train: int = field(default=24, metadata={"help": "tasks to meta-train on, at most"})
    num_test: int = field(default=3, metadata={"help": "tasks to be judged by, at most"})
    test_rows: int = field(default=150, metadata={"help": "rows that a task is judged by, at most"})
    cost_visits: int = field(default=12, metadata={"help": "minibatches that costs are measured on"})
    workers: int = field(default=2, metadata={"help": "processes"})
    trials: int = field(default=24, metadata={"help": "settings of each method that --tune tries"})
    device: str = field(default="cpu", metadata={"help": "cpu or cuda"})

    def __post_init__(self) -> None:
        for name in (
            "seeds",
            "warm_up",
            "visits",
            "steps",
            "draws",
            "batch_size",
            "num_train",
            "num_test",
            "workers",
            "trials",
        ):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @classmethod
    def smoke(cls, device: str = "cpu") -> MethodsSettings:
        """Return sizes that take seconds instead of minutes; the numbers mean nothing."""
        few = {"num_train": 3, "num_test": 1, "test_rows": 16, "cost_visits": 9, "workers": 1, "trials": 3}
        return cls(1, 4, 12, 4, 2, batch_size=4, device=device, **few)


class Problem(NamedTuple):
    """The problem of one seed: the network, tasks to learn from, and tasks to be judged by."""

    adapter: RandomAdapter
    train: list[Task]
    test: list[Task]
    heads: HeadPolicy = HeadPolicy()


class Experiment(NamedTuple):
    """A source of problems: a top-level function and its arguments, so that processes can be given it.

    Attributes:
        name: for titles.
        make: from settings, a seed, and the part (``"test"`` or ``"dev"``) to the problem.
        arguments: further ones of ``make``.
    """

    name: str
    make: Callable[..., Problem]
    arguments: tuple[Any, ...] = ()

    def problem(self, settings: MethodsSettings, seed: int, part: str = "test") -> Problem:
        """Make the problem of one seed, no larger than the settings say."""
        problem = self.make(settings, seed, part, *self.arguments)
        test = [_shortened(task, settings.test_rows) for task in problem.test[: settings.num_test]]
        return problem._replace(train=problem.train[: settings.num_train], test=test)


def digits(settings: MethodsSettings, seed: int, part: str) -> Problem:
    """Make a problem of the embedded family: the shipped ViT, LoRA on its attention, one scanner a task."""
    from pyro_lift.data.digits import digit_backbone, digit_family
    from pyro_lift.models.backbones import adapt_backbone, recipe

    family = digit_family(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone = digit_backbone()
        adapter = adapt_backbone(backbone, recipe(backbone, 4)).to(settings.device)
    return Problem(adapter, family.train, family.dev if part == "dev" else family.test)


def benchmark(settings: MethodsSettings, seed: int, part: str, config: RunConfig, scale: float | None) -> Problem:
    """Make a problem of real tasks, wired as a TOML run's; ``scale`` is that of per-task heads, where there are any."""
    t = config.tasks
    loaded = load_tasks(t.benchmark, t.split, t.root, **t.options)
    judged = loaded.dev if part == "dev" and loaded.dev else loaded.test
    few = replace(loaded, train=loaded.train[: settings.num_train], dev=(), test=judged[: settings.num_test])
    encoded = encode_tasks(few, config)
    adapter = adapter_of(replace(config, output=replace(config.output, seed=seed))).to(settings.device)
    return Problem(adapter, list(encoded.train), list(encoded.test), HeadPolicy(scale=scale))


DIGITS = Experiment("digits", digits)


class Defaults(NamedTuple):
    """Defaults of one benchmark: backbone and its kind, scale of per-task heads, and options of the loader."""

    backbone: str
    kind: Any
    head_scale: float | None
    options: dict[str, Any]


#: The backbones are those that the repository keeps; see docs/backbones.md.
BENCHMARKS: dict[str, Defaults] = {
    "crossfit": Defaults("backbones/bart-novels", "encoder", None, {}),
    "vtab": Defaults("backbones/vit-patches", "vision", 1.0, {"others": True}),
    "shakespeare": Defaults("backbones/bart-novels", "seq2seq", None, {}),
}


def on_tasks(
    name: str, split: str | None = None, root: str | None = None, backbone: str | None = None, kind: Any = None
) -> Experiment:
    """Make the experiment on a benchmark's real tasks.

    Args:
        name: crossfit, vtab or shakespeare.
        split: of the benchmark; None takes its first.
        root: where the data lies.
        backbone: folder or name; None takes the repository's own, from the current folder.
        kind: of the backbone.

    Raises:
        ValueError: an unknown benchmark; no backbone there.
    """
    check_choice("tasks", name, BENCHMARKS)
    default = BENCHMARKS[name]
    if backbone is None and not Path(default.backbone).is_dir():
        raise ValueError(
            f"{default.backbone}: no such folder here. Run this from the root of the repository, or give --backbone."
        )
    config = RunConfig(
        backbone=BackboneConfig(name=backbone or default.backbone, kind=kind or default.kind),
        tasks=TasksConfig(benchmark=name, split=split, root=root, options=dict(default.options)),
        output=OutputConfig(),
    )
    return Experiment(f"{name} {split or ''}".strip(), benchmark, (config, default.head_scale))


#: Rows of a task of tokens that are judged at most: their probabilities are [rows, tokens, vocabulary].
TOKEN_ROWS = 32


def _shortened(task: Task, rows: int) -> Task:
    """Return the task with no more test rows than these, its first."""
    if task.test is None:
        raise ValueError(f"task {task.name!r} has no test rows to be judged by.")
    test: Rows = task.test.take(slice(0, min(rows, TOKEN_ROWS) if task.kind == "tokens" else rows))
    return replace(task, test=test)
