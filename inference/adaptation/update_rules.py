r"""Update rules: how weights move by a gradient of the mean loss and a Gaussian prior.

A rule is a pair of pure functions, ``init(x) -> state`` and ``update(x, gradient, state, terms) -> (x, state)``, as in
optax, so that a loop can be differentiated (``sgd``), resumed, or run for many tensors. The prior enters as the
Gaussian that touches it at x, with mean c and precision p; per row of the data it pulls by
:math:`p\,(x - c) / N_{\mathrm{eff}}`, since the loss is a mean over rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_lift.inference.sgld import exponential, gaussian_noise, precondition, update_second_moment
from pyro_lift.models.priors import LocalGaussian
from pyro_lift.support.options import check_number

__all__ = ["AdamState", "LangevinState", "Terms", "Update", "UpdateRule", "adam", "langevin", "sgd"]


class Terms(NamedTuple):
    """Everything that an update may use besides the gradient.

    Attributes:
        prior: the Gaussian that touches the prior at x; None for a flat one.
        effective_rows: N_eff, the number of rows that the mean loss stands for (times an inflation, if any); a tensor
            that broadcasts against x where x holds several tasks.
        generator: of the update's noise.
    """

    prior: LocalGaussian | None = None
    effective_rows: float | Tensor = 1.0
    generator: torch.Generator | None = None


NO_TERMS = Terms()


class Update(Protocol):
    """A pure step of one tensor; the state is the rule's own."""

    def __call__(self, x: Tensor, gradient: Tensor, state: Any, terms: Terms = NO_TERMS, /) -> tuple[Tensor, Any]:
        """Return the tensor after the step, and the state."""
        ...


class UpdateRule(NamedTuple):
    """A pair of pure functions: ``init(x) -> state`` and ``update(x, gradient, state, terms) -> (x, state)``."""

    init: Callable[[Tensor], Any]
    update: Update


class AdamState(NamedTuple):
    """Updates made, and the running means of the gradient and of its square."""

    step: int
    mean: Tensor
    square: Tensor


class LangevinState(NamedTuple):
    """Updates made, and the running mean square of the gradient of the *total* loss."""

    step: int
    second_moment: Tensor | None


def sgd(learning_rate: float) -> UpdateRule:
    r"""Gradient descent, :math:`x' = x - \ell\,(g + p(x - c)/N_{\mathrm{eff}})`; differentiable.

    Args:
        learning_rate: :math:`\ell`; 0 stays where it is.
    """
    check_number("learning_rate", learning_rate, open_below=False)

    def update(x: Tensor, gradient: Tensor, state: None, terms: Terms = NO_TERMS) -> tuple[Tensor, None]:
        return x - learning_rate * _with_prior(x, gradient, terms), state

    return UpdateRule(lambda x: None, update)


def adam(
    learning_rate: float,
    *,
    momentum: float = 0.9,
    decay: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    towards: Tensor | float = 0.0,
) -> UpdateRule:
    r"""AdamW on the gradient with the prior's part.

    .. math:: m' = \beta_1 m + (1 - \beta_1) g, \quad v' = \beta_2 v + (1 - \beta_2) g^2, \quad
              x' = x - \ell w (x - c) - \ell\,\frac{m' / (1 - \beta_1^t)}{\sqrt{v' / (1 - \beta_2^t)} + \epsilon}

    Args:
        learning_rate: move per step and weight.
        momentum: beta_1; 0 as in Reptile's inner loop.
        decay: beta_2.
        epsilon: added to the root of the mean square.
        weight_decay: w, decoupled from the gradient.
        towards: c, the point that the weights decay to. Zero would undo an adapter's own start.

    References:
        Adam, a method for stochastic optimization, Kingma and Ba, 2015, arXiv:1412.6980; Decoupled weight decay
        regularization, Loshchilov and Hutter, 2019, arXiv:1711.05101.
    """
    check_number("learning_rate", learning_rate, open_below=False)
    check_number("weight_decay", weight_decay, open_below=False)

    def update(x: Tensor, gradient: Tensor, state: AdamState, terms: Terms = NO_TERMS) -> tuple[Tensor, AdamState]:
        gradient = _with_prior(x, gradient, terms)
        step = state.step + 1
        mean = torch.lerp(gradient, state.mean, momentum)
        square = torch.lerp(gradient.square(), state.square, decay)
        scale = (square / (1.0 - decay**step)).sqrt() + epsilon
        x = x - learning_rate * weight_decay * (x - towards) if weight_decay else x
        return x - learning_rate / (1.0 - momentum**step) * mean / scale, AdamState(step, mean, square)

    return UpdateRule(lambda x: AdamState(0, torch.zeros_like(x), torch.zeros_like(x)), update)


def langevin(
    learning_rate: float,
    *,
    temperature: float = 1.0,
    second_moment: Tensor | None = None,
    decay: float = 0.99,
    damping: float = 0.1,
    adapt_steps: int = 0,
) -> UpdateRule:
    r"""SGLD with an RMS preconditioner and the exponential integrator, as the front door's meta-test moves.

    With the force :math:`f = -N_{\mathrm{eff}}\,g` and the preconditioner G of its running mean square, and no prior,

    .. math:: x' = x + \ell\,G f + \sqrt{2 \ell\,T\,G}\,\xi, \qquad \xi \sim \mathcal N(0, I)

    Under a Gaussian prior the linear part is integrated exactly, see :func:`pyro_lift.inference.sgld.exponential`.

    Args:
        learning_rate: :math:`\ell = \eta / 2` of :mod:`pyro_lift.inference.sgld`, a move per step and weight.
        temperature: T, variance of the noise; 0 switches it off.
        second_moment: a running mean square of the gradient of the *total* loss to begin with.
        decay: of the running mean square.
        damping: of the preconditioner, relative to its mean.
        adapt_steps: updates after which the preconditioner is frozen.

    References:
        Bayesian learning via stochastic gradient Langevin dynamics, Welling and Teh, ICML 2011; Preconditioned
        stochastic gradient Langevin dynamics for deep neural networks, Li et al., 2016, arXiv:1512.07666.
    """
    check_number("learning_rate", learning_rate)
    check_number("temperature", temperature, open_below=False)

    def update(
        x: Tensor, gradient: Tensor, state: LangevinState, terms: Terms = NO_TERMS
    ) -> tuple[Tensor, LangevinState]:
        step, moment = state
        force = -terms.effective_rows * gradient
        if moment is None or step < adapt_steps:
            moment = update_second_moment(moment, force, decay)
        moved = exponential(
            x,
            force,
            terms.prior,
            step_size=2.0 * learning_rate,
            temperature=temperature,
            noise=gaussian_noise(x, terms.generator),
            preconditioner=precondition(moment, damping),
        )
        return moved, LangevinState(step + 1, moment)

    return UpdateRule(lambda x: LangevinState(0, second_moment), update)


def _with_prior(x: Tensor, gradient: Tensor, terms: Terms) -> Tensor:
    if terms.prior is None:
        return gradient
    return gradient + terms.prior.precision * (x - terms.prior.mean) / terms.effective_rows
