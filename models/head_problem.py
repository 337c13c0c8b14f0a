"""The convex problem of a linear head: its coordinates, its curvature, and Newton's method on many at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from pyro_lift.support.options import check_choice

__all__ = [
    "BIAS_SD",
    "HeadKind",
    "HeadModel",
    "HeadProblem",
    "ScalePrior",
    "Scaling",
    "apply_head",
    "conjugate_gradients",
    "curvature",
    "head_problem",
    "least_squares",
    "newton",
    "norm_of",
    "scale_of",
    "terms",
]

#: Softmax over classes, or a normal observation of each output.
HeadKind = Literal["classification", "regression"]
#: Standard deviation of the bias under its prior: wide, but a class without a row keeps a finite probability.
BIAS_SD = 3.0
#: The norm of the gradient, in units of the prior, at which a head counts as solved. The prior alone has curvature one
#: in these units, so the mode is no further away than this.
TOLERANCE = 1e-8
NEWTON_STEPS = 100
#: Steps of conjugate gradients between two looks at the residuals on an accelerator, which each look makes the host
#: wait for. A problem that is solved already stands still meanwhile.
LOOK_EVERY = 8


class ScalePrior(NamedTuple):
    """The normal prior of the scale of label matching.

    Attributes:
        mean: s_0, the scale without rows; one number, or one for each problem, ``[...]``.
        sd: tau; at 0 the scale is not solved for but given.
    """

    mean: float | Tensor
    sd: float


class HeadModel(NamedTuple):
    """What a head predicts.

    Attributes:
        num_outputs: C, classes or values; a class without a row is among them.
        kind: the likelihood.
        noise_scale: standard deviation of the noise in regression.
        scale: the last C features are similarities to the labels' texts, and this is the prior of their scale; None
            has no such features.
        around: the head at which the prior stands, ``[C, E + 1]`` on the features as they come; None is a head of
            zeros.
        bias_sd: standard deviation of a bias; one number, or one for each problem, ``[...]``.
        centred: whether the biases' prior stands at the mean of the targets that count, which no unit and no level of
            these changes; for regression. One value, or one (of zeros and ones) for each problem, ``[...]``.
        least_spread: what features are divided by at least when they are standardised, ``[..., E]``; None for no limit.
        level_spread: whether features that are level on the rows have ``least_spread`` in place of 1. It changes no
            mode, which knows nothing of them, but how far a head may be off where they are not level.
    """

    num_outputs: int
    kind: HeadKind = "classification"
    noise_scale: float = 1.0
    scale: ScalePrior | None = None
    around: Tensor | None = None
    bias_sd: float | Tensor = BIAS_SD
    centred: bool | Tensor = False
    least_spread: Tensor | None = None
    level_spread: bool = False

    def offset(self, features: Tensor, given: Tensor | None = None) -> Tensor | None:
        """Add the outputs ``[..., n, C]`` of the head that the prior stands at to an offset; None stands for zero."""
        if self.around is None:
            return given
        own = apply_head(features.double(), self.around.to(features.device).double())
        return own if given is None else given + own

    def apart(self, head: Tensor) -> Tensor:
        """Return a head less the one that the prior stands at."""
        return head if self.around is None else head - self.around.to(head)

    def whole(self, head: Tensor) -> Tensor:
        """Return the inverse of :meth:`apart`."""
        return head if self.around is None else head + self.around.to(head)

    def limited(self, scaling: Scaling) -> Scaling:
        """Return a scaling that divides by no less than :attr:`least_spread`."""
        if self.least_spread is None:
            return scaling
        return scaling._replace(sd=scaling.sd.maximum(self.least_spread.to(scaling.sd)))

    def split(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Split features ``[..., n, E + C]`` into those of the linear part and the similarities, if there are any."""
        if self.scale is None:
            return features, None
        if features.shape[-1] < self.num_outputs:
            raise ValueError(
                f"{features.shape[-1]} features are fewer than the similarities to {self.num_outputs} labels."
            )
        return features[..., : -self.num_outputs], features[..., -self.num_outputs :]


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


class HeadProblem(NamedTuple):
    """A head in coordinates in which its prior is standard normal, the features rotated to at most n of them.

    Attributes:
        z: ``[..., n, r]``.
        target: one-hot or values, ``[..., n, C]``.
        weight: ``[..., n]``.
        offset: what is added to the head's outputs, ``[..., n, C]``, or zero.
        level: where the biases' prior stands, ``[..., C]``; None is zero.
        similarity: to the labels' texts, times tau / sqrt(C), ``[..., n, C]``; None where no scale is solved for.
        basis: ``[..., r, E + 1]`` with orthonormal rows, or None where nothing was rotated.
        width: standard deviations of the prior, ``[..., 1, E + 1]``.
        model: the likelihood.
    """

    z: Tensor
    target: Tensor
    weight: Tensor
    offset: Tensor
    level: Tensor | None
    similarity: Tensor | None
    basis: Tensor | None
    width: Tensor
    model: HeadModel

    @property
    def start(self) -> Tensor:
        """The coordinates ``[..., C, r]`` of the prior's mode."""
        columns = self.z.shape[-1] + (self.similarity is not None)
        return self.z.new_zeros(*self.z.shape[:-2], self.model.num_outputs, columns)

    def linear(self, v: Tensor) -> Tensor:
        """The linear map of the outputs ``[..., n, C]``, without the offset.

        The scale is spread over the C rows of the last column, t_c ~ N(0, 1): s = s_0 + tau sum_c t_c / sqrt(C) has its
        own prior exactly, and heads are matrices with a similarity as without.
        """
        if self.similarity is None:
            return self.z @ v.mT
        return self.z @ v[..., :-1].mT + v[..., -1].sum(-1)[..., None, None] * self.similarity

    def adjoint(self, residual: Tensor) -> Tensor:
        """The transpose of :meth:`linear`, ``[..., C, r]``."""
        gradient = residual.mT @ self.z
        if self.similarity is None:
            return gradient
        shared = (residual * self.similarity).sum((-2, -1))[..., None, None]
        return torch.cat([gradient, shared.expand(*gradient.shape[:-1], 1)], -1)

    def outputs(self, v: Tensor) -> Tensor:
        """Logits or values ``[..., n, C]``."""
        output = self.linear(v) + self.offset
        return output if self.level is None else output + self.level.unsqueeze(-2)

    def of_rows(self, weight: Tensor) -> HeadProblem:
        """Return the same problem under several weights of its rows, ``[F, n]``."""
        target = self.target.expand(len(weight), *self.target.shape)
        level = None if self.level is None else _level(target, self.offset, weight, self.model.centred)
        z = self.z.expand(len(weight), *self.z.shape)
        return self._replace(z=z, target=target, weight=weight, level=level)

    def head(self, v: Tensor, scaling: Scaling) -> Tensor:
        """From ``[..., C, r]`` to the head on the features as they come, ``[..., C, E + 1]`` (``E + C + 1``)."""
        scale = self.model.scale
        body = v if self.similarity is None else v[..., :-1]
        body = scaling.folded((body if self.basis is None else body @ self.basis) * self.width)
        if self.level is not None:
            body = torch.cat([body[..., :-1], body[..., -1:] + self.level.unsqueeze(-1)], -1)
        if scale is None:
            return body
        C = self.model.num_outputs
        s = torch.as_tensor(scale.mean, dtype=v.dtype, device=v.device).expand(v.shape[:-2])
        if self.similarity is not None:
            s = s + scale.sd / math.sqrt(C) * v[..., -1].sum(-1)
        diagonal = s[..., None, None] * torch.eye(C, dtype=v.dtype, device=v.device)
        return torch.cat([body[..., :-1], diagonal, body[..., -1:]], -1)

    def coordinates(self, head: Tensor, scaling: Scaling) -> Tensor:
        """The inverse of :meth:`head`; what of the head lies outside the rows' span is lost."""
        scale, C = self.model.scale, self.model.num_outputs
        body = head if scale is None else torch.cat([head[..., : -C - 1], head[..., -1:]], -1)
        if self.level is not None:
            body = torch.cat([body[..., :-1], body[..., -1:] - self.level.unsqueeze(-1)], -1)
        whitened = scaling.unfolded(body) / self.width
        whitened = whitened if self.basis is None else whitened @ self.basis.mT
        if scale is None or self.similarity is None:
            return whitened
        shared = (scale_of(head) - scale.mean) / scale.sd / math.sqrt(C)
        return torch.cat([whitened, shared[..., None, None].expand(*whitened.shape[:-1], 1)], -1)


def apply_head(features: Tensor, head: Tensor) -> Tensor:
    """Apply a head ``[..., C, E + 1]`` to features ``[..., n, E]``: its outputs ``[..., n, C]``.

    A head that is nothing but a scale, of rows with options of their own, takes rows of any number of options.
    """
    C = head.shape[-2]
    if head.shape[-1] == C + 1 and features.shape[-1] != C:
        scale = scale_of(head)[..., None, None]
        if torch.equal(head[..., :-1], scale * torch.eye(C).to(head)):
            return scale * features
    return features @ head[..., :-1].mT + head[..., -1].unsqueeze(-2)


def scale_of(head: Tensor) -> Tensor:
    """The scale ``[...]`` of heads of label matching ``[..., C, E + C + 1]``."""
    return head[..., 0, -head.shape[-2] - 1]


def head_problem(
    x: Tensor,
    target: Tensor,
    model: HeadModel,
    prior_sd: float | Tensor,
    weight: Tensor | None,
    offset: Tensor | None,
    *,
    similarity: Tensor | None = None,
    rotate: bool = True,
) -> HeadProblem:
    """The problem in whitened coordinates, of standardised features ``[..., n, E]``; checks what it is given."""
    check_choice("kind", model.kind, get_args(HeadKind))
    n, E = x.shape[-2:]
    if model.scale is not None and model.kind != "classification":
        raise ValueError(f"a head on similarities is for classes, not for {model.kind}.")
    if n == 0 and model.scale is None:
        raise ValueError("features [0, E]: a head cannot be solved without a row.")
    if not torch.isfinite(x).all() or (similarity is not None and not torch.isfinite(similarity).all()):
        raise ValueError("features hold values that are not finite.")
    if model.kind == "classification":
        low, high = (int(target.min()), int(target.max())) if n else (0, 0)
        if low < 0 or high >= model.num_outputs:
            wrong = low if low < 0 else high
            raise ValueError(f"label {wrong} is outside the head's range 0 .. {model.num_outputs - 1}.")
        y = one_hot(target, model.num_outputs).double()
    else:
        y = target.double().unsqueeze(-1) if target.dim() == x.dim() - 1 else target.double()
    slope = torch.as_tensor(prior_sd, dtype=x.dtype, device=x.device)[..., None, None].expand(*x.shape[:-2], 1, E)
    bias = torch.as_tensor(model.bias_sd if E else 1.0, dtype=x.dtype, device=x.device)[..., None, None]
    width = torch.cat([slope, bias.expand(*x.shape[:-2], 1, 1)], -1)
    # Rows with options of their own have none in common that a bias could be of.
    z = torch.cat([x, torch.full_like(x.sum(-1, keepdim=True), 1.0 if E else 0.0)], -1) * width
    basis = None
    if rotate and n < E + 1:
        q, r = torch.linalg.qr(z.mT)  # z = r^T q^T: the rows' span, in which the mode lies
        z, basis = r.mT, q.mT
    count = z.new_ones(z.shape[:-1]) if weight is None else weight.double().expand(z.shape[:-1])
    added = y.new_zeros(*y.shape[:-1], 1) if offset is None else offset.double()
    if similarity is not None and model.scale is not None:
        mean = torch.as_tensor(model.scale.mean, dtype=x.dtype, device=x.device)
        added = added + mean[..., None, None] * similarity
        similarity = similarity * (model.scale.sd / math.sqrt(model.num_outputs)) if model.scale.sd else None
    level = None if model.centred is False else _level(y, added, count, model.centred)
    return HeadProblem(z, y, count, added, level, similarity, basis, width, model)


def _level(target: Tensor, offset: Tensor, weight: Tensor, centred: bool | Tensor) -> Tensor:
    """Average what is left of the targets of the rows that count, ``[..., C]``."""
    w = weight.unsqueeze(-1)
    mean = (w * (target - offset)).sum(-2) / w.sum(-2).clamp_min(1e-12)
    return mean if centred is True else torch.as_tensor(centred).to(mean).unsqueeze(-1) * mean


def terms(problem: HeadProblem, v: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log posterior ``[...]`` up to constants, and its gradient ``[..., C, r]``."""
    output, w = problem.outputs(v), problem.weight
    if problem.model.kind == "regression":
        residual = (output - problem.target) / problem.model.noise_scale**2
        value = 0.5 * problem.model.noise_scale**2 * residual.square().sum(-1)
    else:
        log_p = output.log_softmax(-1)
        residual, value = log_p.exp() - problem.target, -(problem.target * log_p).sum(-1)
    loss = (w * value).sum(-1) + 0.5 * v.square().sum((-2, -1))
    return loss, problem.adjoint(w.unsqueeze(-1) * residual) + v


def curvature(problem: HeadProblem, v: Tensor) -> Callable[[Tensor], Tensor]:
    """The product of the Hessian at ``v`` with a direction ``[..., C, r]``."""
    w = problem.weight.unsqueeze(-1)
    if problem.model.kind == "regression":
        return lambda d: (w * (problem.z @ d.mT)).mT @ problem.z / problem.model.noise_scale**2 + d
    p = problem.outputs(v).softmax(-1)

    def product(d: Tensor) -> Tensor:
        u = p * problem.linear(d)
        return problem.adjoint(w * (u - p * u.sum(-1, keepdim=True))) + d

    return product


def newton(problem: HeadProblem, v: Tensor, tolerance: float = TOLERANCE) -> tuple[Tensor, int]:
    """Newton's method with a line search, of all problems at once, until every gradient is below the tolerance."""
    loss, gradient = terms(problem, v)
    for step in range(NEWTON_STEPS):
        norm = norm_of(gradient)
        if bool((norm <= tolerance).all()):
            return v, step
        # Inexact far from the mode, ever more exact near it: quadratic convergence in the end.
        accuracy = norm.clamp(max=1.0).sqrt().clamp(max=0.1)
        direction = conjugate_gradients(curvature(problem, v), -gradient, accuracy, 250)
        v, loss, gradient = _line_search(problem, v, direction, loss, gradient, tolerance)
    worst = float(norm_of(gradient).max())
    if worst <= 1e3 * tolerance:
        return v, NEWTON_STEPS
    raise ArithmeticError(f"the head was not solved: a gradient of {worst:.2e} after {NEWTON_STEPS} Newton steps.")


def _line_search(
    problem: HeadProblem, v: Tensor, direction: Tensor, loss: Tensor, gradient: Tensor, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Halve the steps that do not lower the loss, each problem's on its own; the new point, its loss and gradient."""
    slope, norm = (gradient * direction).sum((-2, -1)), norm_of(gradient)
    length = torch.ones_like(loss)
    for _ in range(40):
        moved = v + length[..., None, None] * direction
        new_loss, new_gradient = terms(problem, moved)
        # Near the mode the loss no longer resolves a step: there a smaller gradient is progress too. Elsewhere it is
        # not: steps across the mode of a saturated softmax would go to and fro.
        level = new_loss <= loss + 1e-9 * (1.0 + loss.abs())
        smaller = level & (norm_of(new_gradient) <= 0.5 * norm)
        good = (new_loss <= loss + 1e-4 * length * slope) | smaller | (norm <= tolerance)
        if bool(good.all()):
            break
        length = torch.where(good, length, 0.5 * length)
    return moved, new_loss, new_gradient


def norm_of(x: Tensor) -> Tensor:
    """Euclidean norms ``[...]`` of coordinates ``[..., C, r]``."""
    return x.square().sum((-2, -1)).sqrt()


def conjugate_gradients(
    product: Callable[[Tensor], Tensor], b: Tensor, accuracy: Tensor | float, most_steps: int
) -> Tensor:
    """Solve ``product(x) = b`` until each residual is below its accuracy times the norm of b; over leading dims."""
    x, r = torch.zeros_like(b), b
    d, rr = r, r.square().sum((-2, -1))
    goal = (torch.as_tensor(accuracy, dtype=b.dtype, device=b.device) ** 2) * rr
    every = 1 if b.device.type == "cpu" else LOOK_EVERY
    for step in range(most_steps):
        if step % every == 0 and bool((rr <= goal).all()):
            break
        q = product(d)
        # A problem that is solved has r = 0 in the limit: its step is kept from dividing zero by zero.
        a = (rr / (d * q).sum((-2, -1)).clamp_min(1e-300))[..., None, None]
        x, r = x + a * d, r - a * q
        new = r.square().sum((-2, -1))
        d, rr = r + (new / rr.clamp_min(1e-300))[..., None, None] * d, new
    return x


def least_squares(problem: HeadProblem) -> Tensor:
    """The mode ``[..., C, r]`` of a regression, by Cholesky."""
    weighted = problem.z * (problem.weight / problem.model.noise_scale**2).unsqueeze(-1)
    precision = weighted.mT @ problem.z
    precision = precision + torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    known = problem.offset if problem.level is None else problem.offset + problem.level.unsqueeze(-2)
    right = weighted.mT @ (problem.target - known)
    return torch.cholesky_solve(right, torch.linalg.cholesky(precision)).mT
