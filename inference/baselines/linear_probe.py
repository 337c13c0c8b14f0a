r"""Linear probe: logistic or ridge regression on the frozen network's features, the bar of every comparison.

.. math:: \hat w = \arg\max_w \sum_n \log p\big(y_n \mid w\,\tfrac{f(x_n) - m}{d}\big)
                   - \tfrac{1}{2 s^2} \lVert w \rVert^2

Cost: one forward pass of a task's rows, then a regression by scikit-learn; nothing is meta-trained.

Our choices: features are what the task's own head would see where tasks have heads (``Budget.heads``), else what the
network's own head sees (:func:`pyro_lift.models.features.head_features`; for label matching the pooled text of length
one, as matching compares them); each is standardised by the task's training rows. s is chosen by cross-validation on
these rows, stratified as far as classes have rows: by the mean log probability of left-out rows, ten folds, or each row
in turn where there are ten or fewer, under a log-normal prior on s around the middle of the grid, as solved heads
have it (:func:`pyro_lift.models.heads.choose_prior_sd`); for regression by the closed-form leave-one-out error, where
the mean of the other rows, s = 0, is a candidate too. With one row nothing can be left out: the middle of the grid is
taken, and regression predicts that row's value. The bias has a prior too (sd 3), so that a class without a row keeps
a finite probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_lift.inference.adaptation.inner_loop import HeadPolicy
from pyro_lift.inference.adaptation.predict import rows_of
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.door import check_inputs, check_rows
from pyro_lift.models.features import Reader, all_features, features, head_features
from pyro_lift.models.heads import BIAS_SD, folds, scaling_of, standard_widths, width_penalty
from pyro_lift.models.likelihoods import shaped_as
from pyro_lift.models.observation import has_head, network_output
from pyro_lift.models.task import Rows, Task, shares_classes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CHOICE_TOLERANCE",
    "LinearProbe",
    "LinearProbeState",
    "ProbePosterior",
    "RidgeFit",
    "check_probed",
    "fit_logistic",
    "fit_ridge",
    "has_probe",
    "reader_of",
    "ridge_head",
    "softmax_heads",
]

#: Folds of the cross-validation, at most.
FOLDS = 10
#: Largest mean gradient of a row at which scikit-learn stops: of the head that is kept, and of those that are compared.
TOLERANCE, CHOICE_TOLERANCE = 1e-7, 1e-4


class LinearProbeState(NamedTuple):
    """The weights ``[D]`` whose features are used; nothing was learned."""

    theta: Tensor
    meta_steps: int = 0


@dataclass(frozen=True)
class ProbePosterior:
    """A point estimate of a head on frozen features.

    Attributes:
        theta: weights of the adapter, ``[D]``.
        head: ``[C, E + 1]`` on the features as they come, bias last.
        prior_sd: s that cross-validation chose, of a weight on a standardised feature.
    """

    adapter: RandomAdapter
    task: Task
    theta: Tensor
    head: Tensor
    prior_sd: float
    reader: Reader

    @torch.no_grad()
    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]``; for regression values of the targets' shape."""
        rows = rows_of(inputs, self.task)
        check_inputs(self.adapter, rows)
        rows = rows.to(self.theta.device)
        output = all_features(self.adapter, rows, self.theta, self.reader) @ self.head[:, :-1].T + self.head[:, -1]
        if self.task.kind != "regression":
            return output.softmax(-1)
        return shaped_as(output, self.task.train.target)


@dataclass(frozen=True)
class LinearProbe:
    """Logistic or ridge regression on the frozen network's features: the bar of every comparison.

    Raises:
        ValueError: a task without classes that all its rows share, and without numbers to predict.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)

    @property
    def space(self) -> SearchSpace:
        """Nothing: its strength is chosen on each task's own rows."""
        return SearchSpace()

    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> LinearProbeState:
        """Learn nothing."""
        del on_step
        for task in tasks:
            check_probed(task)
        check_rows(self.adapter, tasks)
        return LinearProbeState(self.adapter.initial.clone())

    def adapt(self, state: LinearProbeState, task: Task, *, seed: int | None = None) -> ProbePosterior:
        """Fit the regression; nothing is random."""
        del seed
        check_probed(task)
        check_rows(self.adapter, [task])
        task = task.to(state.theta.device)
        reader = reader_of(task, self.budget.heads.fitted(self.adapter, [task]))
        y = task.train.target.cpu().numpy()
        if task.kind == "regression":
            targets = y.astype("float64")
            fit = fit_ridge(self._features(task, state, reader), targets)
            answers = fit_ridge(self._features(task, state, _answers), targets)
            # A network that predicts such targets already is the best feature that few rows can fit.
            if not _is_better(fit, answers):
                fit, reader = answers, _answers
            head, sd = fit.head, fit.prior_sd
        else:
            assert task.num_classes is not None
            head, sd = fit_logistic(self._features(task, state, reader), y, task.num_classes)
        return ProbePosterior(self.adapter, task, state.theta, head.to(state.theta), sd, reader)

    def _features(self, task: Task, state: LinearProbeState, reader: Reader) -> NDArray[np.float64]:
        found = all_features(self.adapter, task.train, state.theta, reader)
        values: NDArray[np.float64] = found.double().cpu().numpy()
        return values


def has_probe(task: Task) -> bool:
    """Whether the task has classes that all its rows share, or numbers to predict."""
    return task.kind == "regression" or shares_classes(task)


def check_probed(task: Task) -> None:
    """Refuse a task that a linear probe says nothing about."""
    if not has_probe(task):
        raise ValueError(
            f"task {task.name!r}: a linear probe needs classes that all its rows share, or numbers to predict; "
            "it has neither. Leave the probe out of this comparison."
        )


def fit_logistic(x: NDArray[np.float64], y: NDArray[np.int64], num_classes: int) -> tuple[Tensor, float]:
    """Logistic regression on standardised features, its strength by cross-validation.

    Args:
        x: ``[n, E]``, as they come.
        y: class numbers ``[n]``.
        num_classes: C; classes without a row are among them.

    Returns:
        The head ``[C, E + 1]`` on the features as they come, bias last, and the prior's standard deviation s.
    """
    import numpy as np

    scaling = scaling_of(torch.from_numpy(x))
    z = scaling.apply(torch.from_numpy(x)).numpy()
    tried = standard_widths(z.shape[1])
    sd = tried[len(tried) // 2]
    if len(y) > 1 and num_classes > 1:
        fold = folds(torch.from_numpy(y), min(len(y), FOLDS), stratified=True).numpy()
        losses = np.array([width_penalty(width, sd) for width in tried])
        for k in range(int(fold.max()) + 1):
            kept, left = fold != k, fold == k
            rows, classes = torch.from_numpy(z[left]), torch.from_numpy(y[left]).unsqueeze(-1)
            for place, head in enumerate(softmax_heads(z[kept], y[kept], num_classes, tried, CHOICE_TOLERANCE)):
                logits = rows @ head[:, :-1].T + head[:, -1]
                losses[place] -= float(logits.log_softmax(-1).gather(-1, classes).sum())
        sd = tried[int(np.argmin(losses))]
    return scaling.folded(next(softmax_heads(z, y, num_classes, (sd,), TOLERANCE))), sd


class RidgeFit(NamedTuple):
    """A head on features, and how it was chosen.

    Attributes:
        head: ``[C, E + 1]`` on the features as they come, bias last.
        prior_sd: s in units of the targets' own noise: the ridge penalty is 1 / s^2. Where no s leaves a smaller error
            of the rows left out than their mean does, it is 0, and the head is the mean.
        errors: square error of each row, left out, ``[n]``.
    """

    head: Tensor
    prior_sd: float
    errors: Tensor


def fit_ridge(x: NDArray[np.float64], y: NDArray[np.float64]) -> RidgeFit:
    """Ridge regression on standardised features, its strength by closed-form leave-one-out.

    Args:
        x: ``[n, E]``, as they come.
        y: ``[n]`` or ``[n, C]``.
    """
    from sklearn.linear_model import RidgeCV

    values = y.reshape(len(y), -1)
    scaling = scaling_of(torch.from_numpy(x))
    tried = standard_widths(x.shape[1])
    mean = torch.zeros(values.shape[1], x.shape[1] + 1, dtype=torch.float64)
    mean[:, -1] = torch.from_numpy(values.mean(0))
    if len(y) < 2:
        return RidgeFit(mean, tried[len(tried) // 2], torch.zeros(len(y), dtype=torch.float64))
    alphas = [width**-2 for width in tried]
    model = RidgeCV(alphas, store_cv_results=True).fit(scaling.apply(torch.from_numpy(x)).numpy(), values)
    # The mean of the other rows is off by n / (n - 1) times what the mean of all is.
    of_mean = torch.from_numpy(((values - values.mean(0)) ** 2).mean(1)) * (len(y) / (len(y) - 1)) ** 2
    if -model.best_score_ >= float(of_mean.mean()):
        return RidgeFit(mean, 0.0, of_mean)
    errors = torch.from_numpy(
        model.cv_results_.reshape(len(y), -1, len(alphas))[:, :, alphas.index(model.alpha_)].mean(1)
    )
    return RidgeFit(scaling.folded(ridge_head(model)), float(model.alpha_) ** -0.5, errors)


def ridge_head(model: Any) -> Tensor:
    """Return the head ``[C, E + 1]`` of a fitted ridge regression of scikit-learn's, bias last."""
    bias = torch.as_tensor(model.intercept_, dtype=torch.float64).reshape(-1, 1)
    return torch.cat([torch.from_numpy(model.coef_).reshape(len(bias), -1), bias], -1)


def _is_better(fit: RidgeFit, simple: RidgeFit) -> bool:
    """Whether a fit is better than a simpler one by more than the standard error of their difference over rows."""
    gains = simple.errors - fit.errors
    return len(gains) > 1 and float(gains.mean()) > float(gains.std()) / math.sqrt(len(gains))


def softmax_heads(
    z: NDArray[np.float64], y: NDArray[np.int64], num_classes: int, widths: Sequence[float], tolerance: float
) -> Iterator[Tensor]:
    """The modes on standardised features ``[C, E + 1]`` for one prior sd after another, by scikit-learn.

    Each begins where the one before ended. The bias is the weight of a constant feature. Each class has a row of weight
    zero, so that scikit-learn gives a class without rows a place in the softmax.
    """
    import numpy as np
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    if num_classes == 1:
        yield from (torch.zeros(1, z.shape[1] + 1, dtype=torch.float64) for _ in widths)
        return
    # Features in units of the prior, C = 1. The softmax of two classes has two vectors of prior sd s, a logistic
    # regression one: their difference, of twice the variance.
    units = math.sqrt(2.0) if num_classes == 2 else 1.0
    classes = np.concatenate([y, np.arange(num_classes)])
    weight = np.concatenate([np.ones(len(z)), np.zeros(num_classes)])
    model = LogisticRegression(C=1.0, fit_intercept=False, tol=tolerance, max_iter=5_000, warm_start=True)
    for before, sd in zip((None, *widths), widths, strict=False):
        inputs = units * np.concatenate([sd * z, np.full((len(z), 1), BIAS_SD)], 1)
        if before is not None:
            model.coef_[:, :-1] *= before / sd
        # Products as small as these take ten times as long where the threads of BLAS, of the loss and of torch wait for
        # one another.
        with threadpool_limits(1):
            model.fit(np.concatenate([inputs, np.zeros((num_classes, inputs.shape[1]))]), classes, weight)
        head = units * torch.from_numpy(np.array(model.coef_, dtype=np.float64))
        if num_classes == 2:
            head = torch.cat([-0.5 * head, 0.5 * head])
        yield torch.cat([sd * head[:, :-1], BIAS_SD * head[:, -1:]], -1)


def reader_of(task: Task, heads: HeadPolicy) -> Reader:
    """Choose the features of a task: what its own head or its label texts meet, else what the network's head sees."""
    if task.kind == "matching":
        return _unit_features
    return network_output if has_head(task, heads.scale) else head_features


def _answers(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    return network_output(adapter, rows, theta).reshape(len(rows), -1)


def _unit_features(adapter: RandomAdapter, rows: Rows, theta: Tensor) -> Tensor:
    return normalize(features(adapter, rows, theta), dim=-1)
