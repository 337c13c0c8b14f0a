"""Stochastic gradient Langevin dynamics, as a pure step on a dict of tensors (Eq. 6, 10 and 18).

Everywhere in this package a step size eta means ``theta + (eta / 2) * gradient + sqrt(eta) * noise``, the gradient
being that of the *full-data* log density: a minibatch's sum scaled by N/b, never a mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.schedules import Schedule
from pyro_lift.inference.watch import Failure, Watch
from pyro_lift.models.priors import LocalGaussian

__all__ = [
    "DivergedError",
    "Drift",
    "Integrator",
    "Preconditioner",
    "SGLDInfo",
    "SGLDSettings",
    "SGLDState",
    "check_finite",
    "check_moved",
    "diverged",
    "euler",
    "exponential",
    "init",
    "precondition",
    "step",
    "update_second_moment",
]

Integrator = Literal["exponential", "euler"]
Preconditioner = Literal["rms"]

#: What an error of a chain that diverged says before its advice.
STOPPED = "The chain has stopped at its last good state."


class DivergedError(RuntimeError):
    """A chain met a loss or a gradient that is not finite; its last good state is kept.

    Attributes:
        step: the number of transitions completed before.
        tasks: the tasks being visited, by number, or by name where they are adapted to; empty for a program without a
            task plate.
    """

    def __init__(self, message: str, step: int, tasks: tuple[int | str, ...] = ()) -> None:
        super().__init__(message)
        self.step = step
        self.tasks = tasks

    def __reduce__(self) -> tuple[Any, ...]:
        # A chain in a process of its own sends it to the first one.
        return type(self), (str(self), self.step, self.tasks)


class Drift(NamedTuple):
    """What a density tells the sampler at a position.

    Attributes:
        log_likelihood: scalar, summed over the full data (an estimate where the program subsamples).
        gradient: per site, the gradient of everything but the site's own Gaussian prior.
        gaussian: per site, that Gaussian prior (or the one that touches a mixture); None where ``gradient``
            already holds the prior.
    """

    log_likelihood: Tensor
    gradient: dict[str, Tensor]
    gaussian: dict[str, LocalGaussian | None]


class SGLDState(NamedTuple):
    """Steps taken, position, and the running mean square of the gradient (empty without preconditioner)."""

    step: int
    position: dict[str, Tensor]
    second_moment: dict[str, Tensor]


class SGLDInfo(NamedTuple):
    """What a reader of the log wants to know of one step."""

    log_likelihood: Tensor
    grad_norm: Tensor
    step_size: float
    clipped: bool | Tensor


def euler(
    x: Tensor,
    gradient: Tensor,
    prior: LocalGaussian | None,
    *,
    step_size: float | Tensor,
    temperature: float,
    noise: Tensor,
    preconditioner: Tensor | float = 1.0,
) -> Tensor:
    r"""The Euler-Maruyama step of the paper.

    .. math:: x' = x + \tfrac{\eta}{2} P\,(G - p\,(x - c)) + \sqrt{T\,\eta\,P}\;\xi

    On a Gaussian target with precision ``L`` (G and prior together, P = 1) it is stable for eta < 4/L and leaves
    the variance ``T / (L - (eta/4) L^2)`` instead of ``T / L``.

    Args:
        x: position.
        gradient: G, gradient of the full-data log likelihood (and of the prior, if ``prior`` is None).
        prior: c and p, mean and precision of a Gaussian prior.
        step_size: eta.
        temperature: T, multiplies the variance of the noise; 0 is plain gradient ascent.
        noise: standard normal, of x's shape.
        preconditioner: P, elementwise and positive.
    """
    if prior is not None:
        gradient = gradient - prior.precision * (x - prior.mean)
    drifted = x + (0.5 * step_size) * (preconditioner * gradient)
    if temperature == 0.0:
        return drifted
    scale = _root(temperature * step_size * preconditioner)
    return drifted + scale * noise


def exponential(
    x: Tensor,
    gradient: Tensor,
    prior: LocalGaussian | None,
    *,
    step_size: float | Tensor,
    temperature: float,
    noise: Tensor,
    preconditioner: Tensor | float = 1.0,
) -> Tensor:
    r"""A step that moves exactly under a Gaussian prior, and by Euler under the likelihood.

    .. math:: a = \tfrac{\eta}{2} P p,\quad e = e^{-a},\quad
              x' = c + e\,(x - c) + \tfrac{1 - e}{p}\,G + \sqrt{T\,(1 - e^2)/p}\;\xi

    It equals :func:`euler` to first order in a. The prior alone is sampled exactly at any step size; with a
    likelihood of curvature H the step is stable where ``H / p < (1 + e) / (1 - e)``.

    Args: as in :func:`euler`; without a Gaussian prior the step *is* :func:`euler`.
    """
    if prior is None:
        return euler(
            x,
            gradient,
            None,
            step_size=step_size,
            temperature=temperature,
            noise=noise,
            preconditioner=preconditioner,
        )
    mean, precision = prior
    if precision.dim() and not any(precision.stride()):  # one number spread over a shape
        precision = precision.as_strided((), ())
    a = (0.5 * step_size) * (preconditioner * precision)
    decay = torch.exp(-a)
    drifted = mean + decay * (x - mean) - torch.expm1(-a) / precision * gradient
    if temperature == 0.0:
        return drifted
    return drifted + (temperature * -torch.expm1(-2.0 * a) / precision).sqrt() * noise


def _root(value: Tensor | float) -> Tensor | float:
    return value.sqrt() if isinstance(value, Tensor) else value**0.5


INTEGRATORS: dict[str, Callable[..., Tensor]] = {"euler": euler, "exponential": exponential}


def precondition(second_moment: Tensor, damping: float) -> Tensor:
    r"""The RMS preconditioner :math:`P = 1/(\sqrt V + \epsilon\,\overline{\sqrt V})`.

    With it a step moves every coordinate by about eta/2, as Adam with learning rate eta/2 does. The damping is
    relative to the mean of sqrt(V), so that P scales as the inverse of the gradient, inflated or not. A site whose
    gradient has been zero so far has no scale yet: P = 1.
    """
    root = second_moment.sqrt()
    scale = root + damping * root.mean()
    return torch.where(root.mean() > 0.0, 1.0 / (scale + torch.finfo(root.dtype).tiny), torch.ones_like(scale))


def shortened(gradient: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """Clamp a gradient to at most so much by coordinate, and tell whether any was clamped, as one boolean."""
    limited = torch.maximum(torch.minimum(gradient, most), -most)
    return limited, (limited != gradient).any()


def update_second_moment(second_moment: Tensor | None, gradient: Tensor, decay: float) -> Tensor:
    """Exponential moving average of the squared gradient; it starts at the first square."""
    return running_mean(second_moment, gradient.square(), decay)


def running_mean(mean: Tensor | None, value: Tensor, decay: float) -> Tensor:
    """Exponential moving average that starts at the first value that is not all zeros.

    A global site may start exactly where its gradient vanishes; that says nothing of its scale.
    """
    if mean is None:
        return value
    return torch.where(mean.any(), torch.lerp(value, mean, decay), value)


def init(position: dict[str, Tensor]) -> SGLDState:
    """A chain at ``position`` that has taken no step."""
    return SGLDState(0, dict(position), {})


@dataclass(frozen=True)
class SGLDSettings:
    """Options of a step of SGLD.

    Attributes:
        step_size: eta as a function of the steps taken.
        temperature: T, multiplies the noise's variance.
        integrator: ``"euler"`` or ``"exponential"``.
        decay: of the moving average behind the RMS preconditioner; None for no preconditioner.
        damping: epsilon of :func:`precondition`.
        site_step_scale: factor on eta by site.
        site_temperature: factor on T by site.
        max_move: with the preconditioner, the most that the gradient moves a coordinate in a step, over eta / 2; None
            sets no limit. Where it binds it changes the target.
    """

    step_size: Schedule
    temperature: float = 1.0
    integrator: Integrator = "euler"
    decay: float | None = None
    damping: float = 0.1
    site_step_scale: Mapping[str, float] = field(default_factory=dict)
    site_temperature: Mapping[str, float] = field(default_factory=dict)
    max_move: float | None = None


def step(
    state: SGLDState,
    density: Callable[[dict[str, Tensor]], Drift],
    settings: SGLDSettings,
    *,
    adapt: bool = False,
    generator: torch.Generator | None = None,
    watch: Watch | None = None,
) -> tuple[SGLDState, SGLDInfo]:
    """Make one transition of SGLD on every site at once; pure.

    Args:
        state: where the chain is.
        density: gives the :class:`Drift` at a position.
        settings: of the step.
        adapt: whether the preconditioner's moving average still moves. Frozen after burn-in it leaves the target
            untouched; while it moves, the term that its dependence on the position would call for is left out.
        generator: source of the noise.
        watch: of a chain on an accelerator, to which loss and gradient are left in place of a look at them.

    Raises:
        DivergedError: loss or gradient not finite; ``state`` is unchanged.
    """
    drift, s = density(state.position), settings
    eta = s.step_size(state.step)
    norm = check_finite(drift, state.step, watch=watch)
    moments = dict(state.second_moment)
    position = {}
    clipped: Tensor = torch.zeros((), dtype=torch.bool, device=norm.device)
    for name, x in state.position.items():
        gradient = drift.gradient[name]
        preconditioner: Tensor | float = 1.0
        if s.decay is not None:
            if adapt or name not in moments:
                moments[name] = update_second_moment(moments.get(name), gradient, s.decay)
            preconditioner = precondition(moments[name], s.damping)
            if s.max_move is not None:
                gradient, shorter = shortened(gradient, s.max_move / preconditioner)
                clipped = clipped | shorter
        position[name] = INTEGRATORS[s.integrator](
            x,
            gradient,
            drift.gaussian[name],
            step_size=eta * s.site_step_scale.get(name, 1.0),
            temperature=s.temperature * s.site_temperature.get(name, 1.0),
            noise=gaussian_noise(x, generator),
            preconditioner=preconditioner,
        )
    if watch is not None:
        position = watch.kept_all(position, state.position)
        moments = watch.kept_all(moments, state.second_moment)
    info = SGLDInfo(drift.log_likelihood, norm, eta, clipped if s.max_move is not None else False)
    return SGLDState(state.step + 1, position, moments), info


def gaussian_noise(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise of a tensor's shape, dtype and device."""
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def check_finite(drift: Drift, step: int, tasks: tuple[int, ...] = (), watch: Watch | None = None) -> Tensor:
    """Norm of the whole gradient; raises :class:`DivergedError` where it or the loss is not finite.

    With a ``watch`` it is told of both, and nothing is raised here.
    """
    norms = [torch.linalg.vector_norm(g).square() for g in drift.gradient.values()]
    norm = (norms[0] if len(norms) == 1 else torch.stack(norms).sum()).sqrt()
    if watch is not None:
        watch.see(step, tasks, drift.log_likelihood, norm)
    elif not torch.isfinite(norm + drift.log_likelihood):
        raise diverged(Failure(step, tasks, float(drift.log_likelihood), float(norm), ()))
    return norm


def check_moved(moved: Mapping[str, Tensor], step: int, tasks: tuple[int, ...], watch: Watch | None = None) -> None:
    """Raise :class:`DivergedError` unless every moved value is finite; with a ``watch``, tell it of them instead."""
    if watch is not None:
        watch.see_moved(moved)
        return
    for name, value in moved.items():
        if not torch.isfinite(value).all():
            raise diverged(Failure(step, tasks, 0.0, 0.0, (name,)))


def diverged(failure: Failure) -> DivergedError:
    """Make the error of a transition that failed."""
    step, tasks, log_likelihood, norm, sites = failure
    where = f"step {step}" + (f", task {', '.join(map(str, tasks))}" if tasks else "")
    if sites and math.isfinite(log_likelihood + norm):
        text = f"{where}: the site {sites[0]!r} left the finite numbers. {STOPPED} Use a smaller step_size."
    else:
        text = (
            f"{where}: log likelihood {log_likelihood}, gradient norm {norm}. {STOPPED} Use a smaller step_size, or "
            "look at this task's data."
        )
    return DivergedError(text, step, tasks)
