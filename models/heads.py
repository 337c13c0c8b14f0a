r"""Linear heads of tasks, solved: the mode under a normal prior, draws around it, and the width of the prior.

Given the network's features a task's own head is a convex problem, so it is solved and not stepped. Features are
standardised by the task's own rows and the prior is put on the standardised head,

.. math:: w_c \sim \mathcal N(0, s^2 I), \quad b_c \sim \mathcal N(0, s_b^2), \qquad
          \max_{w, b} \sum_n \log p\big(y_n \mid w\,\tfrac{x_n - m}{d} + b\big) + \log p(w, b).

The result is folded back into one matrix on the features as they come, ``[C, E + 1]`` with the bias last, which is what
:func:`pyro_lift.models.observation.outputs` takes: the observation model does not change.

Under label matching the logits have one term more, the similarity of an input to each label's text times a scale that
is a coefficient of the same problem, convex still,

.. math:: o_c(x) = s \cos\big(f(x), f(\ell_c)\big) + w_c\,\tfrac{x - m}{d} + b_c, \qquad s \sim \mathcal N(s_0, \tau^2).

Its features are then ``[..., n, E + C]``, the C similarities last, and its head is ``[C, E + C + 1]`` with s on the
diagonal of the similarities' part: a linear head like any other for whoever applies it. Without a row the mode is s_0
and a head of zeros, which is plain label matching. Where E is 0 (every row has options of its own) there is no linear
part and no bias, only s.

Leading dimensions are tasks (or folds) that are solved in one pass; ``weight`` says how often a row counts, and leaves
out rows that only fill a shorter task up. Everything inside is float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.head_problem import (
    BIAS_SD,
    HeadKind,
    HeadModel,
    ScalePrior,
    Scaling,
    conjugate_gradients,
    curvature,
    head_problem,
    least_squares,
    newton,
    norm_of,
    scale_of,
    terms,
)
from pyro_lift.support.options import check_number
from pyro_lift.support.small_problems import on_one_thread

__all__ = [
    "BIAS_SD",
    "BIAS_SDS",
    "LOGIT_WIDTHS",
    "ODD",
    "SURE",
    "FewRows",
    "HeadKind",
    "HeadModel",
    "PriorChoice",
    "ScalePrior",
    "Scaling",
    "SolvedHead",
    "UsualPrior",
    "between",
    "choose_prior_sd",
    "folds",
    "laplace_head",
    "scale_of",
    "scaling_of",
    "solve_head",
    "standard_widths",
    "usual_penalty",
    "width_penalty",
]

#: Standard deviations of a logit under the prior (standardised features, so ``s * sqrt(E)``) that are tried.
LOGIT_WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Standard deviations of a bias that are tried where several tasks choose together.
BIAS_SDS = (0.1, 0.3, 1.0, BIAS_SD)
#: Precision of the log of a width around the one that other tasks have, over that around the middle of the grid: a
#: standard deviation of a quarter, a factor of 1.3. Tasks of 25 rows then have the usual width, of hundreds their own.
SURE = 16.0
#: Nats over a task's rows by which another prior than the usual has to predict rows that were left out better: of few
#: rows cross-validation finds several by chance, and of hundreds they are next to nothing a row.
ODD = 8.0
#: Rows of a task by which the width of its prior is chosen, at most.
CHOOSING = 1_000
#: Of the median over features, the least standard deviation that one is divided by which fewer than so many rows make
#: vary. On 144 tasks of 20 digits and ReLU networks that is 0.048 +- 0.019 nats a row; on the encoders of the
#: benchmarks, whose features vary alike, nothing.
LEAST_SPREAD, FEW_ROWS = 0.3, 3.0


class SolvedHead(NamedTuple):
    """The mode of a head.

    Attributes:
        head: ``[..., C, E + 1]`` on the features as they come, bias last, in the features' dtype.
        loss: negative log posterior at the mode, up to constants, ``[...]``: the sum over rows, plus the prior's term.
        gradient_norm: of the loss in units of the prior, ``[...]``: a bound on the distance to the mode.
        iterations: Newton steps taken.
    """

    head: Tensor
    loss: Tensor
    gradient_norm: Tensor
    iterations: int


class UsualPrior(NamedTuple):
    """What tasks say together of the prior of their heads.

    Attributes:
        width: standard deviation of a logit, ``s * sqrt(E)``.
        bias_sd: standard deviation of a bias.
    """

    width: float
    bias_sd: float


#: Numbers of rows, rising, and the prior of heads of so many.
FewRows = tuple[tuple[int, UsualPrior], ...]


def between(known: FewRows, rows: int) -> UsualPrior:
    """Return the prior of a head of so many rows: between two numbers its logarithms go as that of the number.

    Before the first number and after the last it is theirs.

    Args:
        known: one number at least.
        rows: n.
    """
    after = next((k for k, (number, _) in enumerate(known) if number >= rows), len(known) - 1)
    high, other = known[after]
    if after == 0 or high <= rows:
        return other
    low, one = known[after - 1]
    t = math.log(rows / low) / math.log(high / low)
    return UsualPrior(*(x ** (1.0 - t) * y**t for x, y in zip(one, other, strict=True)))


class PriorChoice(NamedTuple):
    """The prior's width that predicts left-out rows best.

    Attributes:
        sd: s, of a weight on a standardised feature.
        scores: mean negative log likelihood of left-out rows, one for each of ``tried``.
        tried: the standard deviations.
    """

    sd: float
    scores: tuple[float, ...]
    tried: tuple[float, ...]

    @property
    def loss(self) -> float:
        """Mean negative log likelihood of left-out rows under the chosen width; NaN for a single row."""
        return self.scores[self.tried.index(self.sd)] if self.sd in self.tried else math.nan


def scaling_of(features: Tensor, weight: Tensor | None = None) -> Scaling:
    r"""Mean and standard deviation of each feature over the rows; one where a feature is constant.

    A feature that one row alone makes vary, as a unit of a ReLU network that is off in all the others, may vary a
    hundred times as much over rows to come. Divided by what it varies by here it would outweigh all the rest there. So
    where the :math:`(\sum_n d_n^2)^2 / \sum_n d_n^4` rows that its deviations d come from are fewer than
    :data:`FEW_ROWS`, as they are of two rows in all, it is divided by no less than :data:`LEAST_SPREAD` of the median
    over features. Where no row counts, features are taken as they come.
    """
    x = features.detach().double()
    if x.shape[-1] == 0:
        return Scaling(x.sum(-2), x.sum(-2))
    w = x.new_ones(x.shape[:-1]) if weight is None else weight.double()
    total, w = w.sum(-1, keepdim=True).clamp_min(1e-12), w.unsqueeze(-1)
    mean = (w * x).sum(-2) / total
    square = (x - mean.unsqueeze(-2)).square()
    sum_of_squares = (w * square).sum(-2)
    sd = (sum_of_squares / total).sqrt()
    varies = sd > 1e-9 * (1.0 + mean.abs())
    usual = sd.where(varies, torch.nan).nanmedian(-1, keepdim=True).values.nan_to_num(0.0)
    told_by = sum_of_squares.square() / (w * square.square()).sum(-2)
    at_least = (LEAST_SPREAD * usual).where(told_by < FEW_ROWS, 0.0)
    return Scaling(mean, sd.maximum(at_least).where(varies, 1.0))


def standard_widths(features: int) -> tuple[float, ...]:
    """The prior standard deviations that are tried for so many features; without features there is nothing to try."""
    if features == 0:
        return (1.0,)
    return tuple(width / math.sqrt(features) for width in LOGIT_WIDTHS)


def width_penalty(width: float, middle: float) -> float:
    r"""Return :math:`\tfrac12 \log^2 (s / s_0)`, a width's negative log prior, :math:`s_0` the middle one."""
    return 0.5 * math.log(width / middle) ** 2


def usual_penalty(width: float, usual: float) -> float:
    r"""Return :math:`\min(16\,p, 8 + p)`, p the penalty around the width that other tasks have."""
    return min(SURE * width_penalty(width, usual), ODD + width_penalty(width, usual))


@on_one_thread
@torch.no_grad()
def solve_head(
    features: Tensor,
    target: Tensor,
    model: HeadModel,
    *,
    prior_sd: float | Tensor,
    weight: Tensor | None = None,
    offset: Tensor | None = None,
    start: Tensor | None = None,
) -> SolvedHead:
    """Bring a linear head to its mode: Newton's method with conjugate gradients; regression in closed form.

    Args:
        features: ``[..., n, E]``; with similarities to label texts ``[..., n, E + C]``.
        target: class numbers ``[..., n]``; for regression values ``[..., n]`` or ``[..., n, C]``.
        model: the likelihood.
        prior_sd: s, standard deviation of a weight on a standardised feature; or one for each problem, ``[...]``.
        weight: how often each row counts, ``[..., n]``; zero leaves it out, of the standardisation too.
        offset: logits or values that the head is added to, ``[..., n, C]``.
        start: a head to begin from, ``[..., C, E + 1]``, as a former solution gave it.

    Raises:
        ValueError: no row, a label outside ``0 .. C - 1``, features that are not finite.
        ArithmeticError: the mode was not reached (never seen; the problem is strictly convex).
    """
    if not isinstance(prior_sd, Tensor):
        check_number("prior_sd", prior_sd)
    x, similarity = model.split(features.double())
    offset = model.offset(features, offset)
    scaling = model.limited(scaling_of(x, weight))
    problem = head_problem(scaling.apply(x), target, model, prior_sd, weight, offset, similarity=similarity)
    v = problem.start
    if start is not None:
        v = v + problem.coordinates(model.apart(start.double()), scaling)
    v, iterations = (least_squares(problem), 1) if model.kind == "regression" else newton(problem, v)
    loss, gradient = terms(problem, v)
    head = model.whole(problem.head(v, scaling)).to(features.dtype)
    return SolvedHead(head, loss, norm_of(gradient), iterations)


@on_one_thread
@torch.no_grad()
def choose_prior_sd(
    features: Tensor,
    target: Tensor,
    model: HeadModel,
    *,
    tried: Sequence[float] | None = None,
    offset: Tensor | None = None,
    most_folds: int = 10,
    usual: float | None = None,
    sureness: float = 1.0,
) -> PriorChoice:
    r"""Choose the prior's width by cross-validation on a task's own rows, every fold and width solved exactly at once.

    .. math:: \min_s\ -\sum_n \log p\big(y_n \mid x_n, \hat h_{-k(n)}(s)\big) + \tfrac12 \log^2 (s / s_0)

    with the prior of :func:`width_penalty`: two or three rows that happen to be of one class would have the widest,
    and be sure of it. Folds are stratified and as many as rows up to ``most_folds``; they are a function of the targets
    alone. With a single row nothing can be left out: the middle of ``tried`` is taken. What other tasks say of the
    width, ``usual``, stands in the middle's place, and weighs more (:func:`usual_penalty`).

    Args:
        features: ``[n, E]``.
        target: as for :func:`solve_head`.
        model: the likelihood.
        tried: standard deviations s; None takes :func:`standard_widths`.
        offset: logits or values that the head is added to, ``[n, C]``.
        most_folds: number of folds, at most.
        usual: the width that other tasks have; None where nothing is known of them.
        sureness: how much that weighs, 1 at most; the rest has the prior of tasks that nothing is known of.
    """
    n = len(features)
    x, similarity = model.split(features.double())
    tried = standard_widths(x.shape[-1]) if tried is None else tuple(tried)
    middle = tried[len(tried) // 2] if usual is None else usual
    if n < 2:
        return PriorChoice(middle, (math.nan,) * len(tried), tried)
    offset = model.offset(features, offset)
    if n > CHOOSING:
        some = _evenly(target, CHOOSING, stratified=model.kind == "classification")
        x, target = x[some], target[some]
        similarity, offset = (None if each is None else each[some] for each in (similarity, offset))
    x = scaling_of(x).apply(x)
    fold = folds(target, min(n, most_folds), stratified=model.kind == "classification")
    kept = torch.stack([(fold != k).double() for k in range(int(fold.max()) + 1)]).to(x.device)  # [F, n]
    scores, v = [], None
    for sd in tried:
        whole = head_problem(x, target, model, sd, None, offset, similarity=similarity)
        many = whole.of_rows(kept)
        if model.kind == "regression":
            v = least_squares(many)
            value = 0.5 * ((many.outputs(v) - many.target) / model.noise_scale).square().sum(-1)
        else:
            v, _ = newton(many, many.start if v is None else v, tolerance=1e-4)
            value = -(many.outputs(v).log_softmax(-1) * many.target).sum(-1)
        scores.append(float(((1.0 - kept) * value).sum() / len(x)))
    known, unknown = (0.0, 1.0) if usual is None else (sureness, 1.0 - sureness)

    def cost(k: int) -> float:
        penalty = unknown * width_penalty(tried[k], tried[len(tried) // 2])
        return n * scores[k] + penalty + (0.0 if usual is None else known * usual_penalty(tried[k], usual))

    best = min(range(len(tried)), key=cost)
    return PriorChoice(tried[best], tuple(scores), tried)


@on_one_thread
@torch.no_grad()
def laplace_head(
    features: Tensor,
    target: Tensor,
    model: HeadModel,
    solved: Tensor,
    draws: int,
    *,
    prior_sd: float,
    generator: torch.Generator,
    temperature: float = 1.0,
) -> Tensor:
    r"""Draw heads from the Gaussian approximation at the mode, ``[S, C, E + 1]``; exact for regression.

    With H the Hessian at the mode, :math:`\delta = H^{-1} \epsilon` with :math:`\epsilon \sim \mathcal N(0, H)` has
    covariance :math:`H^{-1}`; epsilon is a sum of one normal vector for the prior and one for each row, so H is never
    formed (perturb and solve).

    Args:
        features: ``[n, E]``, of one task.
        target: as for :func:`solve_head`.
        model: the likelihood.
        solved: the mode ``[C, E + 1]``, without an offset.
        draws: S.
        prior_sd: s, as the mode was solved with.
        generator: of the noise, on the CPU.
        temperature: T, on the covariance.

    References:
        Gaussian sampling by local perturbations, Papandreou and Yuille, 2010.
    """
    check_number("temperature", temperature, open_below=False)
    x, similarity = model.split(features.double())
    scaling = model.limited(scaling_of(x))
    z, offset = scaling.apply(x), model.offset(features)
    problem = head_problem(z, target, model, prior_sd, None, offset, similarity=similarity, rotate=False)
    v = problem.coordinates(model.apart(solved.double()), scaling)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(v.device)

    noise, rows = normal(draws, *v.shape), normal(draws, *problem.target.shape)
    if model.kind == "classification":
        p = problem.outputs(v).softmax(-1)
        rows = p.sqrt() * rows - p * (p.sqrt() * rows).sum(-1, keepdim=True)
    else:
        rows = rows / model.noise_scale
    delta = conjugate_gradients(curvature(problem, v), noise + problem.adjoint(rows), 1e-10, 10 * v.numel())
    return model.whole(problem.head(v + math.sqrt(temperature) * delta, scaling)).to(features.dtype)


def _evenly(target: Tensor, number: int, *, stratified: bool) -> Tensor:
    """The places of some of the rows, rising; stratified takes as large a part of each class, in its order."""
    n = len(target)
    return _order(target, stratified)[torch.arange(number, device=target.device) * n // number].sort().values


def folds(target: Tensor, number: int, *, stratified: bool) -> Tensor:
    """The fold of each row ``[n]``; stratified deals the rows of each class out in turn, in their order."""
    n = len(target)
    fold = torch.empty(n, dtype=torch.long, device=target.device)
    fold[_order(target, stratified)] = torch.arange(n, device=target.device) % number
    return fold


def _order(target: Tensor, stratified: bool) -> Tensor:
    """The places of the rows ``[n]``, those of a class one after the other where it is stratified."""
    return torch.argsort(target, stable=True) if stratified else torch.arange(len(target), device=target.device)
