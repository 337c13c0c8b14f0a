"""Sizes of a run at the two scales: gradients, steps, rows, seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pyro_lift.support.options import check_number

__all__ = ["SCALES", "Scale", "Sizes"]

Scale = Literal["paper", "small"]
SCALES: tuple[Scale, ...] = ("paper", "small")


@dataclass(frozen=True)
class Sizes:
    """Everything that all contestants of a family are given alike."""

    seeds: int = field(default=3, metadata={"help": "repetitions: adapters, minibatches, chains"})
    ablation_seeds: int | None = field(
        default=None, metadata={"help": "repetitions of what ablations add to other tables; none: as many"}
    )
    warm_up: int = field(
        default=120, metadata={"help": "gradients of joint training that every meta-learner begins with"}
    )
    visits: int = field(default=80, metadata={"help": "minibatches of meta-training after it"})
    burn_in: int | None = field(default=None, metadata={"help": "of LiFT's visits; none: a third"})
    thinning: int = field(default=1, metadata={"help": "of LiFT's draws of phi"})
    steps: int = field(default=24, metadata={"help": "adaptation steps on a new task"})
    draws: int = field(default=4, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=8, metadata={"help": "rows of a minibatch"})
    rates: tuple[float, ...] = field(default=(1.0, 0.25, 4.0), metadata={"help": "of adaptation, to choose from"})
    relative: bool = field(default=True, metadata={"help": "whether rates are multiples of the network's own step"})
    meta_rate: float | None = field(default=None, metadata={"help": "of meta-training; none: the network's own step"})
    dev_tasks: int = field(default=3, metadata={"help": "tasks that rate and temperature are chosen on, at most"})
    test_tasks: int = field(default=1000, metadata={"help": "tasks to be judged by, at most"})
    test_rows: int = field(default=64, metadata={"help": "rows that a task is judged by, at most"})
    max_length: int = field(default=64, metadata={"help": "longest text in tokens"})
    rank: int = field(default=4, metadata={"help": "of the adapter"})
    beams: int = field(default=1, metadata={"help": "of the search for a written answer"})
    max_new_tokens: int = field(default=16, metadata={"help": "longest written answer"})
    lift: Mapping[str, Any] = field(
        default_factory=dict, metadata={"help": "LiFT's settings; what lacks is its default"}
    )

    def __post_init__(self) -> None:
        for name in ("seeds", "visits", "steps", "draws", "batch_size", "dev_tasks", "test_tasks", "test_rows", "rank"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)
        if not self.rates:
            raise ValueError("rates is empty: give at least one rate of adaptation.")

    def smoke(self) -> Sizes:
        """Return sizes that take seconds; the numbers mean nothing."""
        return replace(
            self, seeds=1, warm_up=3, visits=9, burn_in=None, thinning=1, steps=4, draws=2, batch_size=4,
            rates=self.rates[:2], dev_tasks=1, test_tasks=2, test_rows=12, max_length=16, beams=1, max_new_tokens=3,
        )  # fmt: skip


#: The paper's Appendix C: sigma = beta = 0.01, p(phi) around zero, the asynchronous J of its equation 11. The power on
#: the likelihood is the one reading under which its step sizes can be run (docs/sampler.md).
PAPERS_LIFT: Mapping[str, Any] = {
    "beta": 0.01,
    "sigma": 0.01,
    "prior_mean": "zero",
    "n_inflate": 1000.0,
    "phi_update": "langevin",
    "accumulator": "table",
    "translation": "none",
}
