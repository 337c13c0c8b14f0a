"""Costs, the paper's Tables 10 and 11: seconds of an iteration of LiFT, of joint training and of MAML, at two ranks.

The three are timed in turn, in one process, on the same tasks and minibatches, by the steps that ``pyro-lift bench
speed`` times. A stage's seconds are its number of iterations times the median of one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyro_lift.bench.paper.problems import problem_of
from pyro_lift.bench.paper.sizes import Scale
from pyro_lift.bench.steps import TimedLiFT, maml, plain
from pyro_lift.bench.timing import interleaved, quartiles

__all__ = ["FAMILY", "RANKS", "ROUNDS", "TASKS", "TIMED", "rank_of", "run_costs"]

RANKS = (4, 64)
#: LiFT's mixture in these tables.
COMPONENTS = 5
#: The network of these tables writes its answers, as the paper's does: the family whose setting does so, by scale.
FAMILY: dict[Scale, str] = {"paper": "crossfit", "small": "flan-t5-xl"}
#: Tasks that are visited in turn, and rounds.
TASKS, ROUNDS = 4, 9
#: Contestants whose iterations are timed.
TIMED = ("union-train", "maml", f"lift-k{COMPONENTS}")


def rank_of(split: str) -> int:
    """Return the adapter's rank in a split: ``"rank-4"`` has 4."""
    return int(split.removeprefix("rank-"))


def run_costs(scale: Scale, split: str, root: str | None, *, smoke: bool = False) -> dict[str, Any]:
    """Measure seconds an iteration, wall and processor, and the seconds of warm-up and burn-in.

    Args:
        scale: of the network and of the numbers of iterations.
        split: ``"rank-4"`` or ``"rank-64"``.
        root: where the data lie.
        smoke: two rounds.
    """
    place = None if root is None else Path(root)
    problem = problem_of(scale, FAMILY[scale], "CLS-45", 0, place, smoke=smoke, rank=rank_of(split))
    tasks, sizes, adapter = problem.tasks.train[:TASKS], problem.sizes, problem.adapter
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        steps = (
            plain(adapter, tasks, torch.optim.SGD, sizes.batch_size),
            maml(adapter, tasks, sizes.batch_size),
            TimedLiFT(adapter, tasks, COMPONENTS, sizes.batch_size).step,
        )
        times = interleaved(dict(zip(TIMED, steps, strict=True)), 2 if smoke else ROUNDS)
    seconds = {name: quartiles(found.wall)[1] for name, found in times.items()}
    burn_in = sizes.visits // 3 if sizes.burn_in is None else sizes.burn_in
    return {
        "costs": seconds,
        "cpu_costs": {name: quartiles(found.cpu)[1] for name, found in times.items()},
        "stages": {"warm-up": sizes.warm_up * seconds[TIMED[0]], "burn-in": burn_in * seconds[TIMED[-1]]},
        "adapter_weights": adapter.dim,
        "backbone": problem.setting.backbone,
    }
