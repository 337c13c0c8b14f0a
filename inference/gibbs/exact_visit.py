r"""A visit of all tasks at once whose likelihood is Gaussian in theta: all updates are draws, none runs the program.

1. phi and every theta_i together, given the scales: phi with the theta_i integrated out, then each theta_i given phi.
   With the form of :mod:`~pyro_lift.inference.gibbs.gaussian_tasks`, :math:`A_i = H_i + P` and phi's own prior
   :math:`\mathcal N(m_0, 1/\sigma^2)`,

   .. math:: \phi \sim \mathcal N\big(V\,(m_0/\sigma^2 + \sum_i M_i r_i + P A_i^{-1} g_i),\; T V\big),
             \qquad V^{-1} = 1/\sigma^2 + \sum_i M_i, \quad M_i = P A_i^{-1} H_i.

2. The scales given phi and every theta_i (:mod:`~pyro_lift.inference.gibbs.scale_draws`).
3. A factor on a scale and every theta_i - phi: along :math:`\theta_i = \phi + f r_i` the log likelihood is
   :math:`f b - \tfrac12 f^2 a`, two sums, so that log f is drawn by slice sampling of a function of one number.

3 is the non-centred half of an interweaved sampler (Yu and Meng 2011): scales mix whether the data say much or little
of a theta_i. A visit is O(N D), or O(N D^3) where coordinates are tied.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.dense import covariance_of
from pyro_lift.inference.gibbs.gaussian_tasks import GaussianTasks
from pyro_lift.inference.gibbs.rows import block_values
from pyro_lift.inference.gibbs.scalar_slices import is_exponential, scalar_density, scalar_slice
from pyro_lift.inference.gibbs.scale_draws import draw_scales
from pyro_lift.inference.gibbs.scales import ScaleSite
from pyro_lift.inference.gibbs.scaling import scalable
from pyro_lift.inference.gibbs.state import Chain, Phase, SGLDGibbsInfo, SGLDGibbsState, Streams, Structure
from pyro_lift.inference.program import Rows
from pyro_lift.inference.sgld import check_moved
from pyro_lift.inference.stores.store import HoldsMatrix

__all__ = ["step"]


def step(state: SGLDGibbsState, chain: Chain, streams: Streams, phase: Phase) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """Visit all tasks once.

    Args:
        state: of the chain.
        chain: what was set at set-up, with its Gaussian tasks.
        streams: of noise.
        phase: of the visit, for the record.

    Raises:
        DivergedError: a value that is not finite.
    """
    tasks, structure, T = _tasks_of(chain), chain.structure, chain.settings.temperature
    if None not in chain.cache.layouts:
        block_values(state, chain, torch.arange(structure.num_tasks), streams)  # their layout is learned, and checked
    noise = streams.noise
    phi, theta = _draw_together(state.phi, structure, tasks, T, noise)
    if structure.scales and state.step >= structure.hold:
        phi |= draw_scales(structure, phi, _sums(phi, structure, tasks, theta)[1], T, noise)
    if structure.scaling and state.step >= structure.hold:
        for name in scalable(structure):
            phi, theta = _scaled(name, phi, structure, tasks, theta, state.step, noise)
    gradients = tasks.gradients(theta)
    norm = torch.linalg.vector_norm(gradients) / tasks.power
    like = next(iter(phi.values()))
    rows = theta.to(like.dtype)
    sums, squares = _sums(phi, structure, tasks, rows.double())  # what is stored is rounded, and these are its sums
    check_moved({**sums, **phi}, state.step, tasks.tasks)
    if isinstance(chain.store, HoldsMatrix):
        chain.store.write_all(rows)
    else:
        chain.store.write(tasks.tasks, rows.unbind(0))
    info = SGLDGibbsInfo(tasks.tasks, tasks.value(theta, gradients).to(like.dtype), norm, math.nan, False, phase)
    return state._replace(step=state.step + 1, phi=phi, sums=sums, squares=squares), info


def _tasks_of(chain: Chain) -> GaussianTasks:
    assert chain.gaussian is not None
    return chain.gaussian


def _joined(vectors: list[Tensor]) -> Tensor:
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors)


def _spread(value: Tensor, like: Tensor) -> Tensor:
    """A number for each coordinate of a site, in one vector; float64."""
    return torch.broadcast_to(value.detach().double(), like.shape).reshape(-1)


def _prior_precision(phi: Rows, structure: Structure, tasks: GaussianTasks) -> Tensor:
    """P at the scales as they are: ``[D]`` where no coordinates are correlated, else ``[D, D]``."""
    pairs = [structure.pairs[part.site].at(structure.scales, phi) for part in tasks.parts]
    blocks = []
    for pair in pairs:
        if pair.dense is None:
            blocks.append(1.0 / _spread(pair.local_variance, phi[pair.global_site]))
        else:
            covariance = covariance_of(pair.local_variance, pair.dense.correlation.to(tasks.reference.device))
            blocks.append(torch.cholesky_inverse(torch.linalg.cholesky(covariance)))
    if all(block.dim() == 1 for block in blocks):
        return _joined(blocks)
    whole: Tensor = torch.block_diag(*(torch.diag(block) if block.dim() == 1 else block for block in blocks))
    return whole


def _draw_together(
    phi: Rows, structure: Structure, tasks: GaussianTasks, temperature: float, noise: torch.Generator | None
) -> tuple[dict[str, Tensor], Tensor]:
    """Draw phi and every theta given the scales; return all global sites and theta ``[N, D]``."""
    P, root = _prior_precision(phi, structure, tasks), temperature**0.5
    own, pull = tasks.prior_precision, tasks.prior_precision * tasks.prior_mean
    noises = [_normal(pull, noise), _normal(tasks.reference, noise)]
    if tasks.tied or P.dim() == 2:
        P = P if P.dim() == 2 else torch.diag(P)
        H = tasks.curvature if tasks.tied else torch.diag_embed(tasks.curvature)
        L = torch.linalg.cholesky(H + P)
        W = torch.cholesky_solve(P.expand_as(H), L)  # A^-1 P
        M = H @ W
        pulls = (M @ tasks.reference.unsqueeze(-1) + W.mT @ tasks.gradient.unsqueeze(-1)).squeeze(-1)
        V = torch.linalg.cholesky(torch.diag(own) + 0.5 * (M + M.mT).sum(0))
        mean = torch.cholesky_solve((pull + pulls.sum(0)).unsqueeze(-1), V)
        drawn = (mean + root * torch.linalg.solve_triangular(V.mT, noises[0].unsqueeze(-1), upper=True)).squeeze(-1)
        moved, centre = _put(phi, tasks, drawn)
        held = tasks.gradient + (centre - tasks.reference) @ P
        half = torch.linalg.solve_triangular(L, held.unsqueeze(-1), upper=False) + root * noises[1].unsqueeze(-1)
        return moved, tasks.reference + torch.linalg.solve_triangular(L.mT, half, upper=True).squeeze(-1)
    A = tasks.curvature + P
    share = P / A
    M = share * tasks.curvature
    precision = own + M.sum(0)
    pull = pull + (M * tasks.reference + share * tasks.gradient).sum(0)
    moved, centre = _put(phi, tasks, pull / precision + root * precision.rsqrt() * noises[0])
    mean = tasks.reference + (tasks.gradient + P * (centre - tasks.reference)) / A
    return moved, mean + root * A.rsqrt() * noises[1]


def _normal(like: Tensor, noise: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=noise)


def _put(phi: Rows, tasks: GaussianTasks, drawn: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """The global sites with the means as drawn ``[D]``, and these as they are after rounding."""
    moved = dict(phi)
    for part in tasks.parts:
        moved[part.site] = drawn[part.begin : part.end].reshape(phi[part.site].shape).to(phi[part.site].dtype)
    return moved, _joined([moved[part.site].double().reshape(-1) for part in tasks.parts])


def _sums(
    phi: Rows, structure: Structure, tasks: GaussianTasks, theta: Tensor
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """S of every pair, and Q around phi of those whose scale is unknown."""
    sums, squares = {}, {}
    for part in tasks.parts:
        own, shape = theta[:, part.begin : part.end], phi[part.site].shape
        sums[part.site] = own.sum(0).reshape(shape)
        pair = structure.pairs[part.site]
        if pair.is_free:
            rest = own - phi[part.site].double().reshape(-1)
            squares[part.site] = rest.square().sum(0).reshape(shape) if pair.dense is None else rest.mT @ rest
    return sums, squares


def _scaled(
    name: str,
    phi: dict[str, Tensor],
    structure: Structure,
    tasks: GaussianTasks,
    theta: Tensor,
    step: int,
    noise: torch.Generator | None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Multiply one element of a scale site, and theta - phi with it, by a factor drawn from its conditional."""
    site, leaf = structure.scales[name], phi[name]
    assert isinstance(site, ScaleSite)
    element = step % leaf.numel()
    power, moved = _along(name, structure, tasks, leaf, element)
    if power == 0.0:
        return phi, theta
    centre = _joined([phi[part.site].double().reshape(-1) for part in tasks.parts])
    rest = theta - centre if moved is None else torch.where(moved, theta - centre, 0.0)
    a = float((rest * tasks.times(rest)).sum())
    b = float((rest * tasks.gradients(theta - rest)).sum())
    density = scalar_density(site, leaf, element)
    plain = leaf.numel() == 1 and is_exponential(site.transform)
    start = float(leaf if plain else site.value(leaf.double()).log().reshape(-1)[element])

    def log_density(s: float) -> float:
        f = math.exp(power * s)
        return density(start + s) + f * b - 0.5 * f * f * a

    count = theta.shape[0] * (theta.shape[1] if moved is None else int(moved.sum()))
    s = scalar_slice(log_density, 0.0, 4.0 / math.sqrt(1.0 + 2.0 * count), noise, leaf.device)
    if plain:
        after = torch.full_like(leaf, start + s)
        left = float(after) - start  # of s, after rounding
    else:
        x = site.value(leaf.double()).log()
        target = x.clone()
        target.view(-1)[element] += s
        after = (target.exp() if site.transform is None else site.transform.inv(target.exp())).to(leaf.dtype)
        left = float((site.value(after.double()).log() - x).reshape(-1)[element])
    return {**phi, name: after}, theta + math.expm1(power * left) * rest


def _along(
    name: str, structure: Structure, tasks: GaussianTasks, leaf: Tensor, element: int
) -> tuple[float, Tensor | None]:
    """How theta - phi follows the logarithm of one element of a scale: the power, and the coordinates that do.

    The coordinates are None where they all do. The power is 0 where families follow the scale unlike each other: no one
    factor moves them.
    """
    laws = [structure.pairs[part.site].law for part in tasks.parts]
    powers = {0.5 * law.power for law in laws if law is not None and law.site == name}
    if len(powers) != 1:
        return 0.0, None
    if leaf.numel() == 1 and all(law is not None and law.site == name for law in laws):
        return powers.pop(), None
    one = torch.zeros(leaf.numel(), dtype=torch.float64, device=leaf.device)
    one[element] = 1.0
    moved = torch.zeros(tasks.reference.shape[1], dtype=torch.bool, device=leaf.device)
    for part, law in zip(tasks.parts, laws, strict=True):
        if law is not None and law.site == name:
            moved[part.begin : part.end] = law.spread(one.view(leaf.shape)).reshape(-1) != 0.0
    return powers.pop(), moved
