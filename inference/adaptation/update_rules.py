r"""How weights move by a gradient of the mean loss and a Gaussian prior: gradient descent, Adam, Langevin.

A rule is a pair of pure functions, so that a loop can be differentiated (``sgd``), resumed, or run for many tensors.
The prior enters as the Gaussian that touches it at x, with mean c and precision p; in units of the mean loss it pulls
by :math:`p\,(x - c) / N_{\mathrm{eff}}`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.sgld import exponential, gaussian_noise, precondition, update_second_moment
from pyro_lift.models.priors import LocalGaussian
from pyro_lift.support.options import check_number

__all__ = ["AdamState", "Rule", "adam", "langevin", "sgd"]

Move = Callable[[Tensor, Tensor, LocalGaussian | None, Any, float | Tensor, torch.Generator | None], tuple[Tensor, Any]]


class Rule(NamedTuple):
    """``init(x) -> state`` and ``move(x, gradient, prior, state, n_eff, generator) -> (x, state)``."""

    init: Callable[[Tensor], Any]
    move: Move


class AdamState(NamedTuple):
    """Moves made, and the running means of the gradient and of its square."""

    step: int
    mean: Tensor
    square: Tensor


def sgd(learning_rate: float) -> Rule:
    r""":math:`x' = x - \ell\,(g + p(x - c)/N_{\mathrm{eff}})`; differentiable."""
    check_number("learning_rate", learning_rate, open_below=False)

    def move(
        x: Tensor,
        g: Tensor,
        prior: LocalGaussian | None,
        state: Any,
        n_eff: float | Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Any]:
        del generator
        return x - learning_rate * _with_prior(x, g, prior, n_eff), state

    return Rule(lambda x: None, move)


def adam(
    learning_rate: float,
    *,
    momentum: float = 0.9,
    decay: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    towards: Tensor | float = 0.0,
) -> Rule:
    """AdamW on the gradient with the prior's part.

    Args:
        learning_rate: move per step and weight.
        momentum: beta_1; 0 as in Reptile's inner loop.
        decay: beta_2.
        epsilon: added to the root of the mean square.
        weight_decay: of AdamW, decoupled from the gradient.
        towards: what the weights decay to. Zero would undo an adapter's own start.

    References:
        Decoupled weight decay regularization, Loshchilov and Hutter, 2019, arXiv:1711.05101.
    """
    check_number("learning_rate", learning_rate, open_below=False)
    check_number("weight_decay", weight_decay, open_below=False)

    def move(
        x: Tensor,
        g: Tensor,
        prior: LocalGaussian | None,
        state: AdamState,
        n_eff: float | Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, AdamState]:
        del generator
        g = _with_prior(x, g, prior, n_eff)
        step = state.step + 1
        mean = torch.lerp(g, state.mean, momentum)
        square = torch.lerp(g.square(), state.square, decay)
        scale = (square / (1.0 - decay**step)).sqrt() + epsilon
        x = x - learning_rate * weight_decay * (x - towards) if weight_decay else x
        return x - learning_rate / (1.0 - momentum**step) * mean / scale, AdamState(step, mean, square)

    return Rule(lambda x: AdamState(0, torch.zeros_like(x), torch.zeros_like(x)), move)


def langevin(
    learning_rate: float,
    *,
    temperature: float = 1.0,
    second_moment: Tensor | None = None,
    decay: float = 0.99,
    damping: float = 0.1,
    adapt_steps: int = 0,
) -> Rule:
    r"""SGLD with an RMS preconditioner and the exponential integrator, as the front door's meta-test moves.

    Args:
        learning_rate: move per step and weight: eta / 2 of :mod:`pyro_lift.inference.sgld`.
        temperature: variance of the noise; 0 switches it off.
        second_moment: a running mean square of the gradient of the *total* loss to begin with.
        decay: of the running mean square.
        damping: of the preconditioner, relative to its mean.
        adapt_steps: moves after which the preconditioner is frozen.
    """
    check_number("learning_rate", learning_rate)
    check_number("temperature", temperature, open_below=False)

    def move(
        x: Tensor,
        g: Tensor,
        prior: LocalGaussian | None,
        state: tuple[int, Tensor | None],
        n_eff: float | Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, tuple[int, Tensor | None]]:
        step, moment = state
        force = -n_eff * g
        if moment is None or step < adapt_steps:
            moment = update_second_moment(moment, force, decay)
        moved = exponential(
            x,
            force,
            prior,
            step_size=2.0 * learning_rate,
            temperature=temperature,
            noise=gaussian_noise(x, generator),
            preconditioner=precondition(moment, damping),
        )
        return moved, (step + 1, moment)

    return Rule(lambda x: (0, second_moment), move)


def _with_prior(x: Tensor, g: Tensor, prior: LocalGaussian | None, n_eff: float | Tensor) -> Tensor:
    return g if prior is None else g + prior.precision * (x - prior.mean) / n_eff
