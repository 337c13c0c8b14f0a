"""Movers of theta: the plain step, and the one for long vectors, which brings the change of S with it."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from pyro_lift.inference.gibbs import long_vectors
from pyro_lift.inference.gibbs.dense import move_theta
from pyro_lift.inference.gibbs.long_vectors import LongStep, Workspace, is_flat, mean_root
from pyro_lift.inference.gibbs.state import Chain, Settings, SGLDGibbsState, Structure
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.sgld import INTEGRATORS, gaussian_noise, precondition
from pyro_lift.models.priors import LocalGaussian

__all__ = ["Move", "Mover", "dense", "long", "long_families", "mover_of", "plain"]


class Move(NamedTuple):
    """One step of one local site.

    Attributes:
        site: where it stands.
        gradient: of everything but its own Gaussian prior.
        prior: that Gaussian, or None where the gradient has it.
        step_size: eta of this site; a tensor where the tasks of a block have steps of their own.
        temperature: T of this site.
        second_moment: of the preconditioner, or None.
    """

    site: Latent
    gradient: Tensor
    prior: LocalGaussian | None
    step_size: float | Tensor
    temperature: float
    second_moment: Tensor | None


class Mover(Protocol):
    """A step of theta."""

    def __call__(
        self, move: Move, state: SGLDGibbsState, chain: Chain, noise: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return the moved value, and S where it came with the move."""
        ...


def plain(
    move: Move, state: SGLDGibbsState, chain: Chain, noise: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Step a site by the integrator of the settings (:data:`~pyro_lift.inference.sgld.INTEGRATORS`)."""
    settings, moment = chain.settings, move.second_moment
    moved = INTEGRATORS[settings.integrator](
        move.site.leaf.detach(),
        move.gradient,
        move.prior,
        step_size=move.step_size,
        temperature=move.temperature,
        noise=gaussian_noise(move.site.leaf, noise),
        preconditioner=1.0 if moment is None else precondition(moment, settings.damping),
    )
    return moved, None


def long(
    move: Move, state: SGLDGibbsState, chain: Chain, noise: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Step a long vector and S piece by piece (:mod:`~pyro_lift.inference.gibbs.long_vectors`); the same numbers."""
    pair, moment = chain.structure.pair_of[move.site.family], move.second_moment
    workspace = chain.cache.workspace(pair.global_site, move.site.leaf.detach())
    step = LongStep(
        workspace.precisions(pair)[1],
        float(move.step_size),  # of the one task that a long vector belongs to
        move.temperature,
        moment,
        0.0 if moment is None else _damping(chain.settings, moment, workspace),
    )
    phi, S = state.phi[pair.global_site], state.sums[pair.global_site]
    return long_vectors.move_theta(workspace, move.site.leaf.detach(), phi, move.gradient, S, step, noise)


def dense(
    move: Move, state: SGLDGibbsState, chain: Chain, noise: torch.Generator | None
) -> tuple[Tensor, Tensor | None]:
    """Step a site of correlated coordinates, exactly under its own prior (:func:`.dense.move_theta`)."""
    xi = gaussian_noise(move.site.leaf, noise)
    return move_theta(move.site, move.gradient, move.step_size, move.temperature, xi), None


def mover_of(structure: Structure, family: str) -> Mover:
    """Return the mover of a local family, as it was chosen at set-up."""
    if family in structure.long:
        return long
    level = structure.level_of(family)
    return plain if level is None or level.dense is None else dense


def long_families(structure: Structure, settings: Settings, run: Evaluation) -> frozenset[str]:
    """Return the paired families that go piece by piece: long, one task's own, moved once a visit with an exact phi."""
    exact = settings.theta_update == "sgld" and settings.phi_update == "gibbs" and settings.integrator == "exponential"
    alone = structure.sequential and structure.pass_size == 1 and settings.theta_steps_per_visit == 1
    if not (exact and alone):
        return frozenset()
    return frozenset(
        family
        for family, pair in structure.pair_of.items()
        if family not in settings.site_update
        and pair.law is None
        and pair.dense is None
        and is_flat(pair, run.globals[pair.global_site].leaf)
        and all(site.leaf.dim() == 1 for site in run.locals.values() if site.family == family)
    )


def _damping(settings: Settings, moment: Tensor, workspace: Workspace) -> float | Tensor:
    """Return what the preconditioner adds to the root, as :func:`~pyro_lift.inference.sgld.precondition` does."""
    if workspace.root_of is not moment:  # frozen after the warm-up, it needs no second look
        workspace.root_of, workspace.root = moment, mean_root(moment, workspace)
    return settings.damping * workspace.root + torch.finfo(moment.dtype).tiny
