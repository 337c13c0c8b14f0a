"""What makes many tasks affordable: layers below the adapter computed once a row, and tasks adapted to together."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.bench.records import Record
from pyro_lift.bench.shapes import BACKBONES, ROWS, Shape
from pyro_lift.bench.steps import BETA, SIGMA, STEP, mixture_at
from pyro_lift.bench.timing import interleaved, quartiles
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.prefix import PrefixMode
from pyro_lift.models.task import Task
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import LiFTSettings

__all__ = ["adapt_records", "plain_adaptation", "prefix_records"]

#: Layers at the end of the network that are adapted.
LAST = 2
#: Spread of heads before a task is seen.
HEAD_SCALE = 1.0


def _adapted(shape: Shape, net: nn.Module, last: int | None, mode: PrefixMode = "auto") -> RandomAdapter:
    options: dict[str, Any] = {"init_lora_weights": True}
    if last is not None:
        first = shape.layers - last
        pattern = "|".join(str(k) for k in range(first, shape.layers))
        if shape.targets is None:
            options["layers_to_transform"] = list(range(first, shape.layers))
        else:
            options["target_modules"] = shape.targets.format(pattern)
    return adapt_backbone(net, recipe(net, rank=4, **options), seed=0, frozen_prefix=mode)


def _visit(adapter: RandomAdapter, tasks: Sequence[Task], head_scale: float | None) -> Callable[[], None]:
    """Return one visit of a chain over the tasks, its heads solved; all rows have been seen before."""
    program = AdapterHierarchy(
        adapter,
        tasks,
        beta=BETA,
        sigma=SIGMA,
        batch_size=ROWS,
        prior_mean=adapter.initial,
        head_scale=head_scale,
        head="solve",
    )
    kernel = SGLDGibbs(program, step_size=STEP, seed=0)
    kernel.setup(0)
    for task in tasks:
        adapter(*task.train.positional, theta=adapter.initial, **task.train.named)

    def step() -> None:
        kernel.sample(kernel.state.phi)

    for _ in tasks:
        step()
    return step


def prefix_records(names: Sequence[str], repeats: int, device: str) -> list[Record]:
    """Time a visit with the adapter on the last two layers, with and without the layers below computed once a row."""
    records: list[Record] = []
    for name in names:
        torch.manual_seed(0)
        shape = BACKBONES[name]
        net = shape.make().eval()
        tasks = [shape.task(i).to(device) for i in range(2)]
        last = min(LAST, max(shape.layers - 1, 1))
        modes: dict[str, PrefixMode] = {"without": "off", "with": "auto"}
        steps = {}
        for method, mode in modes.items():
            adapter = _adapted(shape, net, last, mode).to(device)
            steps[method] = _visit(adapter, tasks, HEAD_SCALE if shape.features else None)
        times = interleaved(steps, max(repeats, 2))
        wall, cpu = times["with"].ratios(times["without"])
        low, ratio, high = quartiles(cpu)
        records.append(
            {
                "part": "prefix",
                "method": "LiFT, layers below once a row",
                "backbone": name,
                "layers": shape.layers,
                "adapted": last,
                "dim": adapter.dim,
                "rows": ROWS,
                "seconds_per_visit": quartiles(times["with"].wall)[1],
                "cpu_seconds_per_visit": quartiles(times["with"].cpu)[1],
                "cpu_seconds_without": quartiles(times["without"].cpu)[1],
                "ratio_to_without": quartiles(wall)[1],
                "cpu_ratio_to_without": ratio,
                "cpu_ratio_quartiles": [low, high],
                "repeats": len(cpu),
            }
        )
    return records


# ------------------------------------------------------------------------------------------------ many new tasks


def plain_adaptation(
    net: nn.Module, config: Any, task: Task, steps: int, draws: int, *, rate: float = STEP
) -> tuple[Tensor, nn.Linear]:
    """Fine-tune on one task as a user of PEFT would: AdamW on LoRA and a head, minibatches padded to their longest.

    Args:
        net: that PEFT's layers are put into.
        config: of PEFT.
        task: texts and their classes.
        steps: of AdamW, 16 rows each.
        draws: late iterates that are kept.
        rate: of AdamW.

    Returns:
        The iterates of the adapter ``[draws, D]``, and the head.
    """
    import peft

    rows, classes = task.train, task.num_classes or 2
    model = peft.get_peft_model(net, config)  # type: ignore[arg-type]
    head = nn.Linear(net.config.hidden_size, classes)  # type: ignore[union-attr, arg-type]
    weights = [p for p in model.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW([*weights, *head.parameters()], lr=rate)
    kept = []
    order = torch.randperm(len(rows))
    for step in range(steps):
        if len(order) < ROWS:
            order = torch.cat([order, torch.randperm(len(rows))])
        batch, order = rows.take(order[:ROWS]), order[ROWS:]
        mask = batch.inputs["attention_mask"]
        longest = int(mask.sum(-1).max())
        inputs = {name: x[:, :longest] for name, x in batch.inputs.items()}
        states = model(**inputs).last_hidden_state
        weight = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        features = (states * weight).sum(1) / weight.sum(1)
        loss = nn.functional.cross_entropy(head(features), batch.target)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if step >= steps - draws:
            kept.append(torch.cat([p.detach().flatten() for p in weights]))
    return torch.stack(kept), head


def adapt_records(name: str, count: int, steps: int, draws: int, repeats: int) -> list[Record]:
    """Time the adaptation to new tasks of 50 rows: plain PEFT + AdamW one by one, and ``adapt_many``; on one CPU core.

    Every method makes as many steps with as many rows on the same layers, and sees the tasks for the first time in
    every round.
    """
    shape = BACKBONES[name]
    records: list[Record] = []
    for last in (None, LAST):
        torch.manual_seed(0)
        net = shape.make().eval()
        tasks = [shape.task(100 + i) for i in range(count)]
        adapter = _adapted(shape, net, last)
        settings = LiFTSettings(head_scale=HEAD_SCALE)
        prior = LiFTPrior(adapter, mixture_at(adapter.initial, 1), settings, seed=0)
        config = adapter.backbone.peft_config["default"]  # type: ignore[index, union-attr]

        def plain(net: nn.Module = net, config: Any = config, tasks: Sequence[Task] = tasks) -> None:
            for task in tasks:
                plain_adaptation(copy.deepcopy(net), copy.deepcopy(config), task, steps, draws)

        def lift(block_size: int, prior: LiFTPrior = prior, tasks: Sequence[Task] = tasks) -> None:
            prior.adapter.prefix.forget()  # tasks are new in every round
            prior.adapt_many(tasks, block_size=block_size, steps=steps, draws=draws)

        methods: dict[str, Callable[[], None]] = {
            "PEFT + AdamW": plain,
            "LiFT, one by one": partial(lift, 1),
            "LiFT, 8 in a pass": partial(lift, 8),
        }
        times = interleaved(methods, repeats, warm_up=0)
        for method in methods:
            wall, cpu = times["PEFT + AdamW"].ratios(times[method])
            low, ratio, high = quartiles(cpu)
            records.append(
                {
                    "part": "adapt",
                    "method": method,
                    "backbone": name,
                    "layers": shape.layers,
                    "adapted": shape.layers if last is None else last,
                    "tasks": count,
                    "steps": steps,
                    "draws": draws,
                    "seconds_per_task": quartiles(times[method].wall)[1] / count,
                    "cpu_seconds_per_task": quartiles(times[method].cpu)[1] / count,
                    "times_as_fast": quartiles(wall)[1],
                    "cpu_times_as_fast": ratio,
                    "cpu_times_quartiles": [low, high],
                    "repeats": repeats,
                }
            )
    return records
