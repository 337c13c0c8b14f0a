r"""Linear heads of tasks, solved: the mode under a normal prior, draws around it, and the width of the prior.

Given the network's features a task's own head is a convex problem, so it is solved and not stepped. Features are
standardised by the task's own rows and the prior is put on the standardised head,

.. math:: w_c \sim \mathcal N(0, s^2 I), \quad b_c \sim \mathcal N(0, s_b^2), \qquad
          \max_{w, b} \sum_n \log p\big(y_n \mid w\,\tfrac{x_n - m}{d} + b\big) + \log p(w, b).

The result is folded back into one matrix on the features as they come, ``[C, E + 1]`` with the bias last, which is what
:func:`pyro_lift.models.observation.outputs` takes: the observation model does not change.

Leading dimensions are tasks (or folds) that are solved in one pass; ``weight`` says how often a row counts, and leaves
out rows that only fill a shorter task up. Everything inside is float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_lift.support.options import check_choice, check_number

__all__ = [
    "HeadKind",
    "HeadModel",
    "PriorChoice",
    "Scaling",
    "SolvedHead",
    "choose_prior_sd",
    "folds",
    "laplace_head",
    "scaling_of",
    "solve_head",
    "standard_widths",
]

#: Softmax over classes, or a normal observation of each output.
HeadKind = Literal["classification", "regression"]
#: Standard deviations of a logit under the prior (standardised features, so ``s * sqrt(E)``) that are tried.
LOGIT_WIDTHS = (0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
#: Standard deviation of the bias under its prior: wide, but a class without a row keeps a finite probability.
BIAS_SD = 3.0
#: The norm of the gradient, in units of the prior, at which a head counts as solved. The prior alone has curvature one
#: in these units, so the mode is no further away than this.
TOLERANCE = 1e-8
NEWTON_STEPS = 100


class HeadModel(NamedTuple):
    """What a head predicts.

    Attributes:
        num_outputs: C, classes or values; a class without a row is among them.
        kind: the likelihood.
        noise_scale: standard deviation of the noise in regression.
    """

    num_outputs: int
    kind: HeadKind = "classification"
    noise_scale: float = 1.0


class Scaling(NamedTuple):
    """Mean and standard deviation of each feature, ``[..., E]``."""

    mean: Tensor
    sd: Tensor

    def apply(self, features: Tensor) -> Tensor:
        """The features ``[..., n, E]``, standardised."""
        return (features - self.mean.unsqueeze(-2)) / self.sd.unsqueeze(-2)

    def folded(self, head: Tensor) -> Tensor:
        """The head on the features as they come that equals ``head`` on the standardised ones; ``[..., C, E + 1]``."""
        slope = head[..., :-1] / self.sd.unsqueeze(-2)
        bias = head[..., -1] - (slope * self.mean.unsqueeze(-2)).sum(-1)
        return torch.cat([slope, bias.unsqueeze(-1)], -1)

    def unfolded(self, head: Tensor) -> Tensor:
        """The inverse of :meth:`folded`."""
        bias = head[..., -1] + (head[..., :-1] * self.mean.unsqueeze(-2)).sum(-1)
        return torch.cat([head[..., :-1] * self.sd.unsqueeze(-2), bias.unsqueeze(-1)], -1)


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


class _Problem(NamedTuple):
    """A head in coordinates in which its prior is standard normal, the features rotated to at most n of them.

    Attributes:
        z: ``[..., n, r]``.
        target: one-hot or values, ``[..., n, C]``.
        weight: ``[..., n]``.
        offset: what is added to the head's outputs, ``[..., n, C]``, or zero.
        basis: ``[..., r, E + 1]`` with orthonormal rows, or None where nothing was rotated.
        width: standard deviations of the prior, ``[..., 1, E + 1]``.
        model: the likelihood.
    """

    z: Tensor
    target: Tensor
    weight: Tensor
    offset: Tensor
    basis: Tensor | None
    width: Tensor
    model: HeadModel

    def outputs(self, v: Tensor) -> Tensor:
        """Logits or values ``[..., n, C]``."""
        return self.z @ v.mT + self.offset

    def head(self, v: Tensor) -> Tensor:
        """From ``[..., C, r]`` to the standardised head ``[..., C, E + 1]``."""
        return (v if self.basis is None else v @ self.basis) * self.width

    def coordinates(self, head: Tensor) -> Tensor:
        """The inverse of :meth:`head`; what of the head lies outside the rows' span is lost."""
        whitened = head / self.width
        return whitened if self.basis is None else whitened @ self.basis.mT


def scaling_of(features: Tensor, weight: Tensor | None = None) -> Scaling:
    """Mean and standard deviation of each feature over the rows; one where a feature is constant."""
    x = features.detach().double()
    w = torch.ones_like(x[..., 0]) if weight is None else weight.double()
    share = (w / w.sum(-1, keepdim=True)).unsqueeze(-1)
    mean = (share * x).sum(-2)
    sd = (share * (x - mean.unsqueeze(-2)).square()).sum(-2).sqrt()
    return Scaling(mean, torch.where(sd > 1e-9 * (1.0 + mean.abs()), sd, torch.ones_like(sd)))


def standard_widths(features: int) -> tuple[float, ...]:
    """The prior standard deviations that are tried for so many features."""
    return tuple(width / math.sqrt(features) for width in LOGIT_WIDTHS)


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
        features: ``[..., n, E]``.
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
    scaling = scaling_of(features, weight)
    problem = _problem(scaling.apply(features.double()), target, model, prior_sd, weight, offset)
    v = problem.z.new_zeros(*problem.z.shape[:-2], model.num_outputs, problem.z.shape[-1])
    if start is not None:
        v = v + problem.coordinates(scaling.unfolded(start.double()))
    v, iterations = (_least_squares(problem), 1) if model.kind == "regression" else _newton(problem, v)
    loss, gradient = _terms(problem, v)
    return SolvedHead(scaling.folded(problem.head(v)).to(features.dtype), loss, _norm(gradient), iterations)


@torch.no_grad()
def choose_prior_sd(
    features: Tensor,
    target: Tensor,
    model: HeadModel,
    *,
    tried: Sequence[float] | None = None,
    offset: Tensor | None = None,
    most_folds: int = 10,
) -> PriorChoice:
    """Choose the prior's width by cross-validation on a task's own rows, every fold and width solved exactly at once.

    Folds are stratified and as many as rows up to ``most_folds``; they are a function of the targets alone. With a
    single row nothing can be left out: the middle of ``tried`` is taken.

    Args:
        features: ``[n, E]``.
        target: as for :func:`solve_head`.
        model: the likelihood.
        tried: standard deviations s; None takes :func:`standard_widths`.
        offset: logits or values that the head is added to, ``[n, C]``.
        most_folds: number of folds, at most.
    """
    n = len(features)
    tried = standard_widths(features.shape[-1]) if tried is None else tuple(tried)
    if n < 2:
        return PriorChoice(tried[len(tried) // 2], (math.nan,) * len(tried), tried)
    x = scaling_of(features).apply(features.double())
    fold = folds(target, min(n, most_folds), stratified=model.kind == "classification")
    kept = torch.stack([(fold != k).double() for k in range(int(fold.max()) + 1)]).to(x.device)  # [F, n]
    scores, v = [], None
    for sd in tried:
        whole = _problem(x, target, model, sd, None, offset)
        many = whole._replace(
            z=whole.z.expand(len(kept), *whole.z.shape),
            target=whole.target.expand(len(kept), *whole.target.shape),
            weight=kept,
        )
        if model.kind == "regression":
            v = _least_squares(many)
            value = 0.5 * ((many.outputs(v) - many.target) / model.noise_scale).square().sum(-1)
        else:
            start = many.z.new_zeros(len(kept), model.num_outputs, whole.z.shape[-1]) if v is None else v
            v, _ = _newton(many, start, tolerance=1e-4)
            value = -(many.outputs(v).log_softmax(-1) * many.target).sum(-1)
        scores.append(float(((1.0 - kept) * value).sum() / n))
    best = min(range(len(tried)), key=scores.__getitem__)
    return PriorChoice(tried[best], tuple(scores), tried)


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
    scaling = scaling_of(features)
    problem = _problem(scaling.apply(features.double()), target, model, prior_sd, None, None, rotate=False)
    v = problem.coordinates(scaling.unfolded(solved.double()))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(v.device)

    noise, rows = normal(draws, *v.shape), normal(draws, *problem.target.shape)
    if model.kind == "classification":
        p = problem.outputs(v).softmax(-1)
        rows = p.sqrt() * rows - p * (p.sqrt() * rows).sum(-1, keepdim=True)
    else:
        rows = rows / model.noise_scale
    delta = _conjugate_gradients(_curvature(problem, v), noise + rows.mT @ problem.z, 1e-10, 10 * v.numel())
    heads = scaling.folded(problem.head(v + math.sqrt(temperature) * delta))
    return heads.to(features.dtype)


def folds(target: Tensor, number: int, *, stratified: bool) -> Tensor:
    """The fold of each row ``[n]``; stratified deals the rows of each class out in turn, in their order."""
    n = len(target)
    order = torch.argsort(target, stable=True) if stratified else torch.arange(n, device=target.device)
    fold = torch.empty(n, dtype=torch.long, device=target.device)
    fold[order] = torch.arange(n, device=target.device) % number
    return fold


def _problem(
    x: Tensor,
    target: Tensor,
    model: HeadModel,
    prior_sd: float | Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    rotate: bool = True,
) -> _Problem:
    """The problem in whitened coordinates, of standardised features ``[..., n, E]``; checks what it is given."""
    check_choice("kind", model.kind, get_args(HeadKind))
    n, E = x.shape[-2:]
    if n == 0:
        raise ValueError("features [0, E]: a head cannot be solved without a row.")
    if not torch.isfinite(x).all():
        raise ValueError("features hold values that are not finite.")
    if model.kind == "classification":
        low, high = int(target.min()), int(target.max())
        if low < 0 or high >= model.num_outputs:
            wrong = low if low < 0 else high
            raise ValueError(f"label {wrong} is outside the head's range 0 .. {model.num_outputs - 1}.")
        y = one_hot(target, model.num_outputs).double()
    else:
        y = target.double().unsqueeze(-1) if target.dim() == x.dim() - 1 else target.double()
    slope = torch.as_tensor(prior_sd, dtype=x.dtype, device=x.device)[..., None, None].expand(*x.shape[:-2], 1, E)
    width = torch.cat([slope, torch.full_like(slope[..., :1], BIAS_SD)], -1)
    z = torch.cat([x, torch.ones_like(x[..., :1])], -1) * width
    basis = None
    if rotate and n < E + 1:
        q, r = torch.linalg.qr(z.mT)  # z = r^T q^T: the rows' span, in which the mode lies
        z, basis = r.mT, q.mT
    count = torch.ones_like(z[..., 0]) if weight is None else weight.double().expand(z.shape[:-1])
    added = torch.zeros_like(y[..., :1]) if offset is None else offset.double()
    return _Problem(z, y, count, added, basis, width, model)


def _terms(problem: _Problem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log posterior ``[...]`` up to constants, and its gradient ``[..., C, r]``."""
    output, w = problem.outputs(v), problem.weight
    if problem.model.kind == "regression":
        residual = (output - problem.target) / problem.model.noise_scale**2
        value = 0.5 * problem.model.noise_scale**2 * residual.square().sum(-1)
    else:
        log_p = output.log_softmax(-1)
        residual, value = log_p.exp() - problem.target, -(problem.target * log_p).sum(-1)
    loss = (w * value).sum(-1) + 0.5 * v.square().sum((-2, -1))
    return loss, (w.unsqueeze(-1) * residual).mT @ problem.z + v


def _curvature(problem: _Problem, v: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of the Hessian at ``v`` with a direction ``[..., C, r]``."""
    w = problem.weight.unsqueeze(-1)
    if problem.model.kind == "regression":
        return lambda d: (w * (problem.z @ d.mT)).mT @ problem.z / problem.model.noise_scale**2 + d
    p = problem.outputs(v).softmax(-1)

    def product(d: Tensor) -> Tensor:
        u = p * (problem.z @ d.mT)
        return (w * (u - p * u.sum(-1, keepdim=True))).mT @ problem.z + d

    return product


def _newton(problem: _Problem, v: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, int]:
    """Newton's method with a line search, of all problems at once, until every gradient is below the tolerance."""
    loss, gradient = _terms(problem, v)
    for step in range(NEWTON_STEPS):
        norm = _norm(gradient)
        if bool((norm <= tolerance).all()):
            return v, step
        # Inexact far from the mode, ever more exact near it: quadratic convergence in the end.
        accuracy = norm.clamp(max=1.0).sqrt().clamp(max=0.1)
        direction = _conjugate_gradients(_curvature(problem, v), -gradient, accuracy, 250)
        v, loss, gradient = _line_search(problem, v, direction, loss, gradient, tolerance)
    worst = float(_norm(gradient).max())
    if worst <= 1e3 * tolerance:
        return v, NEWTON_STEPS
    raise ArithmeticError(f"the head was not solved: a gradient of {worst:.2e} after {NEWTON_STEPS} Newton steps.")


def _line_search(
    problem: _Problem, v: Tensor, direction: Tensor, loss: Tensor, gradient: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the steps that do not lower the loss, each problem's on its own; the new point, its loss and gradient."""
    slope, norm = (gradient * direction).sum((-2, -1)), _norm(gradient)
    length = torch.ones_like(loss)
    for _ in range(40):
        moved = v + length[..., None, None] * direction
        new_loss, new_gradient = _terms(problem, moved)
        # Near the mode the loss no longer resolves a step: there a smaller gradient is progress too.
        good = (new_loss <= loss + 1e-4 * length * slope) | (_norm(new_gradient) <= 0.5 * norm) | (norm <= tolerance)
        if bool(good.all()):
            break
        length = torch.where(good, length, 0.5 * length)
    return moved, new_loss, new_gradient


def _norm(x: Tensor) -> Tensor:
    return x.square().sum((-2, -1)).sqrt()


def _conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, accuracy: Tensor | float, most_steps: int
) -> Tensor:
    """Solve ``product(x) = b`` until each residual is below its accuracy times the norm of b; over leading dims."""
    x, r = torch.zeros_like(b), b
    d, rr = r, r.square().sum((-2, -1))
    goal = (torch.as_tensor(accuracy, dtype=b.dtype, device=b.device) ** 2) * rr
    for _ in range(most_steps):
        if bool((rr <= goal).all()):
            break
        q = product(d)
        # A problem that is solved has r = 0 in the limit: its step is kept from dividing zero by zero.
        a = (rr / (d * q).sum((-2, -1)).clamp_min(1e-300))[..., None, None]
        x, r = x + a * d, r - a * q
        new = r.square().sum((-2, -1))
        d, rr = r + (new / rr.clamp_min(1e-300))[..., None, None] * d, new
    return x


def _least_squares(problem: _Problem) -> Tensor:
    """The mode ``[..., C, r]`` of a regression, by Cholesky."""
    weighted = problem.z * (problem.weight / problem.model.noise_scale**2).unsqueeze(-1)
    precision = weighted.mT @ problem.z
    precision = precision + torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    right = weighted.mT @ (problem.target - problem.offset)
    return torch.cholesky_solve(right, torch.linalg.cholesky(precision)).mT
