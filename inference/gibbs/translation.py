r"""The translation move: phi and every theta_i are shifted by one vector, which the likelihood pulls on directly.

Given all theta_i, phi is drawn around their mean; a visit changes that mean by one task's step over N, so that phi
moves N times more slowly than joint training would move it. A shift of phi *and every theta_i* by one vector leaves
each :math:`p(\theta_i \mid \phi)` as it is and has Jacobian one: the shift's conditional density is
:math:`p(\phi + \delta) \prod_i p(D_i \mid \theta_i + \delta)^\kappa`, and a step of SGLD on it is

.. math:: \delta = \tfrac{\eta_d}{2} P \Big[\hat g - \frac{\phi - m_0}{\sigma^2}\Big] + \sqrt{T\,\eta_d\,P}\;\xi,
          \qquad \hat g \approx \kappa \sum_{j=1}^N \nabla \log p(D_j \mid \theta_j).

It is the non-centred half of an interweaved sampler (Yu and Meng 2011), a group move (Liu and Sabatti 2000).

Cost. The gradients are those that the visit has computed anyway. No theta_j is touched: :math:`\theta_j = x_j + o` with
one offset o and the stored x_j, and the sum of all theta changes by :math:`N\delta`.

Estimates of the sum over tasks, from the block's gradients g_i:

``falling``
    :math:`(N/B) \sum_i g_i`, with a step that falls with the visits, since the noise of this estimate stays in phi.
    Where tasks have factors w_i on their steps it is :math:`(N/B) \sum_i w_i\,g_i`: one task of many rows would carry
    phi away with each of its visits. The law is that of the limit, where the step has fallen.
``saga``
    A control variate for each task: its gradient at its last visit (Defazio, Bach and Lacoste-Julien 2014), moved on by
    a curvature h that all tasks share (Gower, Le Roux and Bach 2018). With :math:`r_i = g_i + h\,\theta_i`, stored,

    .. math:: \hat g = R - h\,S + \tfrac{N}{B} \sum_i (g_i + h\,\theta_i - r_i), \qquad
              R = \sum_j r_j,\quad S = \sum_j \theta_j,

    which is unbiased for blocks in random order, whatever the r_j and h are. The theta_j have moved since their r_j
    were stored, each by its own steps and all by the shifts; S knows where they are, so both cost nothing. Until every
    task has been visited once, :math:`(N/B) \sum_i g_i` stands in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.gibbs.rows import Values, pair_rows, regrouped
from pyro_lift.inference.gibbs.state import Chain, Settings, SGLDGibbsState, Translation
from pyro_lift.inference.program import Evaluation, Rows
from pyro_lift.inference.sgld import check_moved, gaussian_noise, precondition
from pyro_lift.support.random_streams import generator

__all__ = ["Pull", "block_start", "keep", "pull_of", "shift", "shifted"]


class Pull(NamedTuple):
    """What a block's gradients say of the sum over all tasks; pulls of several passes add up.

    Attributes:
        gradient: by global site, sum of g_i over the block, each times its task's factor, in float64; empty where
            ``change`` is used in its place.
        change: by global site, sum of the new r_i minus the stored ones, in float64; empty without a table.
        size: tasks of the block.
        rows: the new r_i, one a task.
    """

    gradient: dict[str, Tensor]
    change: dict[str, Tensor]
    size: int
    rows: list[Tensor]


def pull_of(
    state: SGLDGibbsState, chain: Chain, run: Evaluation, gradient: Mapping[str, Tensor], before: Values
) -> Pull:
    """Collect what a visit's gradients say, at the theta of before the visit.

    Args:
        state: before the visit.
        chain: with a translation.
        run: of the block, its first one.
        gradient: of the likelihood, by local site.
        before: theta of the block at that run.
    """
    translation = _translation(chain)
    found = pair_rows(chain, run.tasks, regrouped(run, gradient))
    plain = not translation.corrects(state.step)
    factors = chain.settings.task_step_scale
    alike = found if factors is None else [factors[task] * g for task, g in zip(run.tasks, found, strict=True)]
    total = _by_site(chain, _total(alike)) if plain else {}
    table = translation.table
    if table is None:
        return Pull(total, {}, len(found), [])
    rows, h = found, translation.curvature
    if h is not None:
        rows = [torch.addcmul(g, h, theta) for g, theta in zip(found, pair_rows(chain, run.tasks, before), strict=True)]
    change = _total(rows)
    for task in run.tasks:
        if table.has(task):
            change = change - table.read([task])[0].double()
    return Pull(total, _by_site(chain, change), len(found), rows)


def keep(chain: Chain, tasks: Sequence[int], pull: Pull) -> None:
    """Store the block's r_i, once the visit has succeeded."""
    table, watch, rows = _translation(chain).table, chain.cache.watch, pull.rows
    if table is None:
        return
    if watch is not None:
        known = [table.read([task])[0] if table.has(task) else None for task in tasks]
        old = [torch.zeros_like(row) if r is None else r for r, row in zip(known, rows, strict=True)]
        rows = [watch.kept(*pair) for pair in zip(rows, old, strict=True)]
    table.write(tasks, rows)


def shift(
    state: SGLDGibbsState, chain: Chain, pull: Pull, moments: Rows, noise: torch.Generator | None
) -> dict[str, Tensor]:
    """Draw the shift of every pair.

    Args:
        state: before the visit.
        chain: with a translation.
        pull: of the whole block.
        moments: mean squares of the preconditioner by local family, as theta's step has used them.
        noise: source of the noise.

    Raises:
        DivergedError: a shift that left the finite numbers.
    """
    structure, settings, translation = chain.structure, chain.settings, _translation(chain)
    eta, shifts = translation.eta(state.step), {}
    curvature = {} if translation.curvature is None else _by_site(chain, translation.curvature)
    for name, pair in structure.pairs.items():
        phi = state.phi[name]
        if translation.corrects(state.step):
            estimate = state.gradients[name] + translation.blocks * pull.change[name]
            if name in curvature:
                estimate = estimate - curvature[name].double() * state.sums[name]
        else:
            estimate = pull.gradient[name] * (structure.num_tasks / pull.size)
        gain = eta * _preconditioner(chain, moments, pair.family, phi)
        shifts[name] = _step(settings, pair, phi, estimate, gain, gaussian_noise(phi, noise))
    short = {k: v for k, v in shifts.items() if structure.pairs[k].family not in structure.long}
    check_moved(short, state.step, (), chain.cache.watch)
    return shifts


def _step(
    settings: Settings, pair: NormalPair, phi: Tensor, estimate: Tensor, gain: Tensor | float, xi: Tensor
) -> Tensor:
    r"""Draw one shift by the integrator of the settings; the exponential one samples phi's own prior exactly.

    .. math:: \delta = m\,\big(\phi - m_0 - \sigma^2 \hat g\big)
              + \sqrt{-T\,\sigma^2\,m\,(2 + m)}\;\xi, \qquad m = e^{-\eta_d P / (2 \sigma^2)} - 1

    Without it a preconditioner that is large where gradients are small would throw phi past its prior.
    """
    p, apart = pair.prior_precision.double(), phi.double() - pair.prior_mean.double()
    T = settings.temperature
    if settings.integrator == "euler":
        drift = (estimate - apart * p).to(phi.dtype)
        return 0.5 * gain * drift + (T * gain) ** 0.5 * xi
    m = torch.expm1(-0.5 * gain * p)
    return (m * (apart - estimate / p)).to(phi.dtype) + (-T * m * (2.0 + m) / p).sqrt().to(phi.dtype) * xi


def shifted(
    state: SGLDGibbsState, chain: Chain, sums: Rows, pull: Pull, shifts: Rows
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """Return S, the offset and R after a shift.

    Args:
        state: before the visit.
        chain: with a translation.
        sums: S with the block's own moves in it.
        pull: of the whole block.
        shifts: by global site.
    """
    N = chain.structure.num_tasks
    moved = {name: S + N * shifts[name].double() for name, S in sums.items()}
    offset = {name: _plus(state.offset.get(name), value.double()) for name, value in shifts.items()}
    gradients = {name: _plus(state.gradients.get(name), change) for name, change in pull.change.items()}
    return moved, offset, gradients


def block_start(translation: Translation, num_tasks: int, block_size: int, step: int, seed: int) -> int | None:
    """Return the first task of a visit's block; None in the first round, whose blocks come in order.

    In later rounds the blocks come in an order of the round's own, named by the seed: each block once. Where B does not
    divide N, the blocks of a round begin at a place of its own, too.
    """
    count = -(-num_tasks // block_size)
    round_, place = divmod(step - translation.begins, count)
    if round_ == 0 or count == 1:
        return None
    stream = generator(seed, round_, num_tasks + 1)
    order = torch.randperm(count, generator=stream)
    ragged = num_tasks % block_size != 0 and translation.wraps
    first = int(torch.randint(num_tasks, (), generator=stream)) if ragged else 0
    return first + block_size * int(order[place])


def _translation(chain: Chain) -> Translation:
    assert chain.translation is not None
    return chain.translation


def _total(rows: Sequence[Tensor]) -> Tensor:
    total = rows[0].double()
    for row in rows[1:]:
        total = total + row
    return total


def _plus(old: Tensor | None, change: Tensor) -> Tensor:
    return change if old is None else old + change


def _by_site(chain: Chain, flat: Tensor) -> dict[str, Tensor]:
    shapes = {name: chain.cache.start[pair.family].shape for name, pair in chain.structure.pairs.items()}
    parts = flat.split([shape.numel() for shape in shapes.values()])
    return {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}


def _preconditioner(chain: Chain, moments: Rows, family: str, phi: Tensor) -> Tensor | float:
    if chain.settings.decay is None:
        return 1.0
    gain = precondition(moments[family], chain.settings.damping)
    return gain.reshape(phi.shape) if gain.numel() == phi.numel() else gain
