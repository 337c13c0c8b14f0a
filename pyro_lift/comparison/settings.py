"""Settings of a comparison, and the methods that may take part in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from pyro_lift.methods.registry import BASELINES
from pyro_lift.support.durations import seconds_of
from pyro_lift.support.options import check_choice, check_number

__all__ = ["REFERENCE", "CompareSettings", "Entrant", "default_methods", "entrant"]

#: What the others are tested against.
REFERENCE = "lift"


class Entrant(NamedTuple):
    """A method as the comparison shows it.

    Attributes:
        title: in tables and figures.
        rank: how much there is to it: 0 a regression on frozen features, 1 an adapter of the task's own, 2 and more
            methods that learn from other tasks; see :mod:`~pyro_lift.comparison.advice`.
        steps: whether it takes steps of gradients, in meta-training or adaptation; regressions on frozen features do
            not.
    """

    title: str
    rank: int
    steps: bool = True

    @property
    def meta(self) -> bool:
        """Whether it learns from other tasks."""
        return self.rank >= 2


_KNOWN = {
    "linear-probe": Entrant("Linear Probe", 0, steps=False),
    "pooled-probe": Entrant("Pooled Probe", 2, steps=False),
    "no-meta-train": Entrant("LoRA alone", 1),
    "lora-tuned": Entrant("Tuned LoRA", 1),
    "union-train": Entrant("Union Train", 3),
    "reptile": Entrant("Reptile", 4),
    "lift": Entrant("LiFT", 5),
}


def entrant(method: str) -> Entrant:
    """Return the title and the rank of a method of the registry."""
    return _KNOWN.get(method, Entrant(method, 4))


def default_methods() -> tuple[str, ...]:
    """Name the methods of the default comparison: of LoRA without meta-learning the most careful that there is."""
    alone = "lora-tuned" if "lora-tuned" in BASELINES else "no-meta-train"
    return ("linear-probe", "pooled-probe", alone, "union-train", "reptile", REFERENCE)


@dataclass(frozen=True)
class CompareSettings:
    """Sizes of a comparison; what the budget has no room for is made smaller, and reported."""

    budget: str | float = field(default="10 min", metadata={"help": "time that the whole may take"})
    seeds: int = field(default=1, metadata={"help": "repetitions: initial adapters, minibatches, chains"})
    methods: Sequence[str] | None = field(default=None, metadata={"help": "of the registry; none: the default six"})
    folds: int = field(default=3, metadata={"help": "parts that tasks are held out in, one after the other"})
    rates: Sequence[float] = field(
        default=(1.0, 0.25, 4.0),
        metadata={
            "help": "rates of adaptation that each method chooses from, over LiFT's own default; the first where "
            "nothing can be chosen on"
        },
    )
    gradients: int = field(default=1200, metadata={"help": "of meta-training, at most"})
    steps: int = field(default=100, metadata={"help": "of adaptation, at most"})
    draws: int = field(default=4, metadata={"help": "networks that a prediction averages over"})
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    test_rows: int = field(default=64, metadata={"help": "rows that a task is judged by, at most"})
    trials: int = field(
        default=0,
        metadata={
            "help": "settings of each method that are tried on tasks held out of those it learns from, in half of the "
            "time; 0: rates of adaptation alone"
        },
    )
    progress: bool = field(default=True, metadata={"help": "whether to show a bar"})

    def __post_init__(self) -> None:
        seconds_of(self.budget)
        for name in ("seeds", "gradients", "steps", "draws", "batch_size", "test_rows"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)
        check_number("trials", self.trials, open_below=False, whole=True)
        check_number("folds", self.folds, least=2, open_below=False, whole=True)
        if not self.rates:
            raise ValueError("rates is empty: give at least one rate of adaptation.")
        for rate in self.rates:
            check_number("rate", rate)
        for method in self.methods or ():
            check_choice("method", method, BASELINES)
        if self.methods is not None and not self.methods:
            raise ValueError("methods is empty: name at least one, or leave it out.")
        if self.steps < 2 * self.draws:
            raise ValueError(f"steps={self.steps}: {self.draws} draws from the last half need {2 * self.draws} steps.")

    @property
    def seconds(self) -> float:
        """The budget in seconds."""
        return seconds_of(self.budget)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the methods, each once."""
        return tuple(dict.fromkeys(self.methods or default_methods()))
