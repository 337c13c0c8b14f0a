"""Parts of what is saved: the attributes that a folder is written from, and what reading it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.inference.adaptation.tempered_rows import TemperedRows
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.out_of_proportion import InputSize
from pyro_lift.models.task import Task
from pyro_lift.models.value_spread import ValueSpread
from pyro_lift.settings import AdaptSettings, LiFTSettings

__all__ = ["PosteriorParts", "PriorParts", "Savable", "SavablePosterior", "SavablePrior"]


class PriorParts(NamedTuple):
    """Arguments of :class:`~pyro_lift.prior.LiFTPrior`, by name.

    Attributes:
        adapter: the network as a function of theta.
        mixture: over phi.
        settings: of meta-training.
        adapt_settings: of adaptation.
        second_moment: the preconditioner's mean square, by local family.
        seed: of the run.
        tasks: names of the tasks it was learned from.
        results: measures saved with it.
        matching_scale: of label matching, the mean over its tasks.
        encoding: of strings, or None.
        prediction_temperature: of predictions.
        tuning: how settings were chosen, as plain values; None where they were not.
        rescales: whether the preconditioner is brought to the power of an adaptation that has another.
        rows: that the preconditioner is of; None where the preconditioner is not brought to a task's number.
        kinds: of the tasks it was learned from.
        classes: the output of each class name, where they shared the network's outputs.
        masks: whether shared outputs that are no classes of a new task have no probability.
        around_rates: whether predictions are tempered around the rates of a task's classes.
        tempered_rows: of the tasks that the temperature was found at, where one below 1 holds for such; None for all.
        head_mean: the head that new tasks' own have their prior around, or None.
        input_sizes: of most of its tasks' inputs, by name.
        dispersion: how unevenly its regressions vary around the noise; None takes them for alike.
        common_classes: that each of its tasks has, 0 where there is no such number; None where nobody has said.
        value_heads: whether regressions of many more rows on the network's own output have heads.
    """

    adapter: RandomAdapter
    mixture: OnlineGaussianMixture
    settings: LiFTSettings
    adapt_settings: AdaptSettings | None
    second_moment: dict[str, Tensor]
    seed: int | None
    tasks: tuple[str, ...]
    results: dict[str, Any]
    matching_scale: float | None = None
    encoding: TextEncoding | None = None
    prediction_temperature: float = 1.0
    tuning: dict[str, Any] | None = None
    rescales: bool = True
    rows: float | None = None
    kinds: tuple[str, ...] = ()
    classes: dict[str, int] | None = None
    masks: bool = True
    around_rates: bool = True
    tempered_rows: TemperedRows | None = None
    head_mean: ClassHead | None = None
    input_sizes: dict[str, InputSize] | None = None
    common_classes: int | None = None
    dispersion: Dispersion | None = None
    value_heads: bool = True


class PosteriorParts(NamedTuple):
    """Arguments of :class:`~pyro_lift.posterior.TaskPosterior`, by name.

    Attributes:
        adapter: the network as a function of theta.
        task: what the draws are of; without rows where it was not given.
        thetas: draws ``[S, D]``.
        heads: draws of the task's own head, or None.
        component: the mixture component the chain started from.
        results: measures saved with it.
        encoding: of the task's strings, or None.
        prediction_temperature: of predictions.
        noise_scale: of a regression.
        head_spread: of its solved head, or None.
        input_sizes: of the task's rows; None where these are given, empty where nobody has saved them.
        class_counts: rows of each class, or None.
        dispersion: factors on the variance of a regression's predictions, or None.
    """

    adapter: RandomAdapter
    task: Task
    thetas: Tensor
    heads: Tensor | None
    component: int
    results: dict[str, Any]
    encoding: TextEncoding | None = None
    prediction_temperature: float = 1.0
    noise_scale: float = 1.0
    head_spread: ValueSpread | None = None
    input_sizes: dict[str, InputSize] | None = None
    class_counts: Tensor | None = None
    dispersion: Tensor | None = None


class SavablePrior(Protocol):
    """A prior, as a folder is written from it."""

    adapter: RandomAdapter
    mixture: OnlineGaussianMixture
    settings: LiFTSettings
    adapt_settings: AdaptSettings
    second_moment: dict[str, Tensor]
    seed: int | None
    tasks: tuple[str, ...]
    results: dict[str, Any]
    matching_scale: float | None
    encoding: TextEncoding | None
    prediction_temperature: float
    tuning: dict[str, Any] | None
    rescales: bool
    rows: float | None
    kinds: tuple[str, ...]
    classes: dict[str, int]
    masks: bool
    around_rates: bool
    tempered_rows: TemperedRows | None
    head_mean: ClassHead | None
    input_sizes: dict[str, InputSize]
    common_classes: int | None
    dispersion: Dispersion | None
    value_heads: bool
    mcmc: Any

    def theta(self, task: str) -> Tensor:
        """Return the latest weights ``[D]`` of a meta-training task."""
        ...


class SavablePosterior(Protocol):
    """A posterior, as a folder is written from it."""

    adapter: RandomAdapter
    task: Task
    thetas: Tensor
    heads: Tensor | None
    component: int
    results: dict[str, Any]
    encoding: TextEncoding | None
    prediction_temperature: float
    noise_scale: float
    head_spread: ValueSpread | None
    class_counts: Tensor | None
    dispersion: Tensor | None

    @property
    def input_sizes(self) -> dict[str, InputSize]:
        """How large the task's rows are."""
        ...


class Savable(Protocol):
    """A prior or a posterior, as it is uploaded."""

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write the folder."""
        ...
