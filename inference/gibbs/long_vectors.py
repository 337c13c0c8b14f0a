r"""A visit's arithmetic on long vectors: theta, S and phi, piece by piece.

A precision that is the same for all coordinates is one number; one that differs, as by module, is one more vector to
read.

The plain form is :func:`pyro_lift.inference.sgld.exponential` and :func:`pyro_lift.inference.gibbs.conjugate.draw`;
the noise is theirs too, number for number. With :math:`m = e^{-a} - 1`, :math:`a = \tfrac\eta2 P p` and p the precision
of theta given phi, one exponential gives all three coefficients:

.. math:: \theta' = \theta + m\,\big(\theta - \phi - G/p\big) + \sqrt{-T\,m\,(2 + m)/p}\;\xi, \qquad
          S' = S + \theta' - \theta,

.. math:: \phi' = v\,\tfrac{m_0}{\sigma^2} + \tfrac{v}{\beta^2}\,S' + \sqrt{T\,v}\;\xi', \qquad
          v = \Big(\tfrac1{\sigma^2} + \tfrac{N}{\beta^2}\Big)^{-1}.

Read: theta, phi, G, S, then S' and m_0; written: theta', S', phi'. Nothing is checked here: with a gradient of finite
norm and finite theta and phi, all of these are finite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.tiles import Buffers, split, tile_size, total

__all__ = ["FLAT_FROM", "LongStep", "Workspace", "draw_phi", "is_flat", "mean_root", "move_theta"]

#: From this many numbers on a visit goes piece by piece; below, the plain form is faster and easier to look into.
FLAT_FROM = 50_000


#: A precision: one number, or one for each coordinate ``[D]``.
Precision: TypeAlias = float | Tensor


def _steady(precision: Tensor) -> Precision:
    return float(precision) if precision.numel() == 1 else precision.contiguous()


def _pieces(precision: Precision, tile: int, count: int) -> Sequence[Precision]:
    return split(precision, tile) if isinstance(precision, Tensor) else [precision] * count


def is_flat(pair: NormalPair, value: Tensor) -> bool:
    """Whether a pair's vectors are long, and its precisions are single numbers or one for each coordinate."""
    widths = {pair.local_variance.numel(), pair.prior_precision.numel()}
    return widths <= {1, value.numel()} and value.dim() == 1 and value.numel() >= FLAT_FROM and value.is_contiguous()


class Workspace:
    """Buffers for vectors of one length, kept from visit to visit.

    Args:
        like: a vector of this length.
        tile: numbers of a piece.
        recycle: whether the S that a visit writes is the memory of the visit before last's: a fresh float64 vector
            would cost more in page faults than the whole visit computes.
    """

    def __init__(self, like: Tensor, tile: int | None = None, *, recycle: bool = False) -> None:
        self.recycle = recycle
        self.tile = tile or tile_size(like)
        self.buffers = Buffers(3, like, min(self.tile, len(like)))
        self._spare: Tensor | None = None
        #: The second moment whose mean root was measured last, and that mean.
        self.root_of: Tensor | None = None
        self.root: float | Tensor = 0.0
        self._precisions: tuple[NormalPair, Precision, Precision] | None = None

    def precisions(self, pair: NormalPair) -> tuple[Precision, Precision]:
        """Return the precisions of phi and of theta given phi, as numbers or vectors; a device is asked for them once.

        Equal numbers are one number: it is a vector less to read.
        """
        if self._precisions is None or self._precisions[0] is not pair:
            self._precisions = pair, _steady(pair.prior_precision), _steady(pair.local_variance.reciprocal())
        return self._precisions[1:]

    def spare_sum(self, current: Tensor) -> Tensor:
        """Return memory for the next S; where it is recycled, ``current`` becomes the spare one after the visit."""
        if not self.recycle:
            return torch.empty_like(current)
        spare, self._spare = self._spare, current
        return torch.empty_like(current) if spare is None or spare is current else spare


def mean_root(second_moment: Tensor, workspace: Workspace) -> float | Tensor:
    """Mean of the root of the running mean square, as the preconditioner's damping takes it; stays on a device."""
    parts = []
    for v in split(second_moment, workspace.tile):
        (root, *_) = workspace.buffers.of(len(v))
        parts.append(torch.sqrt(v, out=root).sum())
    mean = total(parts) / len(second_moment)
    return float(mean) if mean.device.type == "cpu" else mean


class LongStep(NamedTuple):
    """Numbers of one step of the exponential integrator.

    Attributes:
        precision: p, of theta given phi; one number or ``[D]``.
        step_size: eta.
        temperature: T.
        second_moment: of the RMS preconditioner; None for P = 1.
        damping: what is added to its root.
    """

    precision: Precision
    step_size: float
    temperature: float
    second_moment: Tensor | None = None
    damping: float | Tensor = 0.0


def move_theta(
    workspace: Workspace,
    x: Tensor,
    phi: Tensor,
    gradient: Tensor,
    S: Tensor,
    step: LongStep,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Step theta by the exponential integrator, and S by its change.

    Args:
        workspace: of this length.
        x: theta ``[D]``.
        phi: its prior mean ``[D]``.
        gradient: G ``[D]``.
        S: sum of all theta, float64 ``[D]``.
        step: numbers of the step.
        generator: of the noise.

    Returns:
        theta' in fresh memory, and S' in the workspace's.
    """
    precision, step_size, temperature, second_moment, damping = step
    moved, S_new = torch.empty_like(x), workspace.spare_sum(S)
    tile = workspace.tile
    count = -(-len(x) // tile)
    moments = [None] * count if second_moment is None else split(second_moment, tile)
    vectors = (split(vector, tile) for vector in (x, phi, gradient, S, moved, S_new))
    for p, v, x_, phi_, G, S_, out, S_out in zip(_pieces(precision, tile, count), moments, *vectors, strict=True):
        noise, m, scale = workspace.buffers.of(len(x_))
        noise.normal_(generator=generator)
        if v is None and not isinstance(p, Tensor):
            whole = math.expm1(-0.5 * step_size * p)
            spread = math.sqrt(-temperature * whole * (2.0 + whole) / p)
            torch.lerp(x_, phi_, -whole, out=out).add_(G, alpha=-whole / p).add_(noise, alpha=spread)
        else:
            _decay(p, v, step_size, damping, out=m)
            torch.sub(x_, phi_, out=out)
            (out.addcdiv_(G, p, value=-1.0) if isinstance(p, Tensor) else out.add_(G, alpha=-1.0 / p)).mul_(m).add_(x_)
            if temperature > 0.0:
                torch.add(m, 2.0, out=scale).mul_(m)
                (scale.div_(p).mul_(-temperature) if isinstance(p, Tensor) else scale.mul_(-temperature / p)).sqrt_()
                out.addcmul_(scale, noise)
        torch.add(S_, out, out=S_out).sub_(x_)
    return moved, S_new


def _decay(p: Precision, v: Tensor | None, step_size: float, damping: float | Tensor, *, out: Tensor) -> None:
    r"""Write :math:`m = e^{-\\eta P p / 2} - 1`, with P = 1 where there is no v."""
    if v is None:
        torch.mul(torch.as_tensor(p), -0.5 * step_size, out=out)
    else:
        torch.sqrt(v, out=out).add_(damping).reciprocal_()
        (out.mul_(p).mul_(-0.5 * step_size) if isinstance(p, Tensor) else out.mul_(-0.5 * step_size * p))
    out.expm1_()


def draw_phi(
    workspace: Workspace,
    pair: NormalPair,
    S: Tensor,
    num_tasks: int,
    temperature: float,
    generator: torch.Generator | None,
    like: Tensor,
) -> Tensor:
    """The exact draw of phi, in fresh memory of the dtype of ``like``."""
    own, local = workspace.precisions(pair)
    phi, tile = torch.empty_like(like), workspace.tile
    prior_mean = torch.broadcast_to(pair.prior_mean, like.shape)
    count = -(-len(like) // tile)
    widths = (_pieces(precision, tile, count) for precision in (own, local))
    for a, b, out, S_, m in zip(*widths, *(split(vector, tile) for vector in (phi, S, prior_mean)), strict=True):
        (noise, *_) = workspace.buffers.of(len(out))
        noise.normal_(generator=generator)
        precision = a + num_tasks * b
        if isinstance(precision, Tensor):
            torch.mul(S_, b / precision, out=out).addcmul_(m, a / precision)
            out.addcmul_(noise, (temperature / precision).sqrt_())
        else:
            spread = math.sqrt(temperature / precision)
            torch.mul(S_, b / precision, out=out).add_(m, alpha=a / precision).add_(noise, alpha=spread)
    return phi
