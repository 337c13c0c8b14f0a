"""Prior and posterior predictive checks: is what was observed the kind of data that the program makes?"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pyro_lift.diagnostics.layout import read_layout
from pyro_lift.diagnostics.passes import predictions, prior_draws
from pyro_lift.inference.whole import whole

__all__ = ["PredictiveCheck", "posterior_check", "prior_check"]

#: Of the observed data, by site, to a number; with its name.
Statistics = Mapping[str, Callable[[dict[str, Tensor]], Any]]


@dataclass(frozen=True)
class PredictiveCheck:
    """One statistic of the data, observed and predicted.

    Attributes:
        name: of the statistic.
        observed: of the data.
        predicted: of each predicted data set, ``[S]``.
    """

    name: str
    observed: float
    predicted: Tensor

    @property
    def p_value(self) -> float:
        """The share of predictions at least as large as what was observed, ties by half; near 0 or 1 is odd."""
        above = (self.predicted > self.observed).double().mean()
        return float(above + 0.5 * (self.predicted == self.observed).double().mean())

    def __str__(self) -> str:
        low, high = np.quantile(self.predicted.numpy(), [0.05, 0.95])
        predicted = f"predicted {low:.4g} to {high:.4g} (90 %)"
        return f"{self.name}: observed {self.observed:.4g}, {predicted}, p = {self.p_value:.3g}"


def posterior_check(mcmc: Any, statistics: Statistics, *, seed: int = 0) -> list[PredictiveCheck]:
    """Compare statistics of the observed data with those of data drawn at each draw of the posterior.

    Args:
        mcmc: a finished run that keeps draws of all latent sites, as of ``SGLDGibbs(model, keep_theta=True)``.
        statistics: functions of ``{site: data}`` by name.
        seed: of the data that are drawn.

    Raises:
        ValueError: a latent site without draws.
    """
    draws = {name: value.flatten(0, 1) for name, value in mcmc._samples.items()}
    model, args, kwargs = whole(mcmc.kernel.model), mcmc._args or (), mcmc._kwargs or {}
    predicted = predictions(model, args, kwargs, draws, seed)
    observed = read_layout(model, args, kwargs, {name: value[0] for name, value in draws.items()}).values
    return _checks(statistics, observed, predicted)


def prior_check(
    model: Callable[..., Any], statistics: Statistics, *, args: Sequence[Any] = (), draws: int = 500, seed: int = 0
) -> list[PredictiveCheck]:
    """Compare statistics of the observed data with those of data drawn from the program's prior.

    Args:
        model: a Pyro program, with its data.
        statistics: functions of ``{site: data}`` by name.
        args: of the program.
        draws: of data.
        seed: of them.
    """
    _, predicted = prior_draws(whole(model), tuple(args), {}, draws, seed)
    return _checks(statistics, read_layout(whole(model), tuple(args), {}, {}).values, predicted)


def _checks(statistics: Statistics, observed: Mapping[str, Tensor], predicted: Mapping[str, Tensor]) -> list[Any]:
    count = len(next(iter(predicted.values())))
    data = [{name: value[s] for name, value in predicted.items()} for s in range(count)]
    return [
        PredictiveCheck(name, float(of(dict(observed))), torch.tensor([float(of(one)) for one in data]).double())
        for name, of in statistics.items()
    ]
