r"""The accumulator J of Eq. 9-11: what the Langevin step of phi adds for the tasks.

.. math:: J \approx \nabla_\phi \sum_{i=1}^N \log p(\theta_i \mid \phi)

``exact``
    :math:`J = (S - N\phi)/\beta^2` at the current phi, from the running sum S. Normal given normal only.
``table``
    The paper's asynchronous J. At a visit of task i the gradient *stored at its last visit* is subtracted and the new
    one added. Any conditional, by autograd; memory O(N D). It is a feedback loop with a mean delay of N/(2B) visits:
    stable for :math:`\eta < \pi^2\beta^2 B/N^2`.
``single``
    One block's gradient alone, times N/B (unbiased, noisy) or times 1 (Table 9, Table 5: another target).

Eq. 11 read literally subtracts the old task's gradient *at the current phi*. Then phi cancels from J, the restoring
force :math:`-N\phi/\beta^2` is lost, and the chain runs away at any step size; :func:`literal_update` keeps it for the
record, and no kernel offers it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.watch import Watch

__all__ = ["Accumulator", "GradientTable", "exact", "langevin_limit", "langevin_step", "literal_update"]

Accumulator = Literal["exact", "table", "single"]


def exact(pair: NormalPair, phi: Tensor, S: Tensor, num_tasks: int) -> Tensor:
    r""":math:`J = (S - N\phi)/\beta^2`, in the dtype of phi."""
    return ((S - num_tasks * phi.double()) / pair.local_variance.double()).to(phi.dtype)


def literal_update(J: Tensor, theta_old: Tensor, theta_new: Tensor, phi: Tensor, local_variance: Tensor) -> Tensor:
    r"""Eq. 11 to the letter: both gradients at the current phi, which cancels. It diverges; see the module's text."""
    return J - (theta_old - phi) / local_variance + (theta_new - phi) / local_variance


class GradientTable:
    """The stored gradients of the paper's J: one row per block of tasks, all zero before the first visit.

    ``change`` is pure and ``store`` mutates: J plus the change is the sum of the rows once the row is stored.

    Args:
        num_blocks: N / B.
    """

    def __init__(self, num_blocks: int) -> None:
        self.rows: list[Tensor | None] = [None] * num_blocks

    def change(self, block: int, gradient: Tensor) -> Tensor:
        """New minus stored gradient of a block, in float64."""
        old, new = self.rows[block], gradient.detach().double()
        return new if old is None else new - old.double()

    def store(self, block: int, gradient: Tensor, watch: Watch | None = None) -> None:
        """Keep the gradient of a block's last visit; with a ``watch``, unless that visit failed."""
        old, new = self.rows[block], gradient.detach().clone()
        if watch is not None:
            new = watch.kept(new, torch.zeros_like(new) if old is None else old)
        self.rows[block] = new

    def tasks(self) -> Iterator[int]:
        """Blocks that have a row; with ``read`` and ``write``, the verbs of a store, for checkpoints."""
        return (block for block, row in enumerate(self.rows) if row is not None)

    def read(self, blocks: Sequence[int]) -> list[Tensor]:
        """The stored gradients of some blocks."""
        return [row for row in (self.rows[block] for block in blocks) if row is not None]

    def write(self, blocks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the stored gradients of some blocks."""
        for block, row in zip(blocks, rows, strict=True):
            self.store(block, row)

    def total(self) -> Tensor:
        """J from scratch: the sum of the stored gradients, in float64."""
        rows = [row.double() for row in self.rows if row is not None]
        return torch.stack(rows).sum(0)


def langevin_limit(accumulator: Accumulator, pair: NormalPair, num_tasks: int, block_size: int = 1) -> float:
    r"""The step size of phi at which the Langevin update of a normal pair loses stability.

    ``exact``: :math:`4/(N/\beta^2 + 1/\sigma^2)`, which is just below :math:`4\beta^2/N`. ``table``: a gain of
    :math:`\eta N/(2\beta^2)` a visit behind a mean delay of N/(2B) visits, :math:`\pi^2\beta^2 B/N^2`. ``single`` times
    N has no sharp limit; its variance is inflated threefold there.
    """
    variance = float(pair.local_variance.min())
    fresh = 4.0 / (num_tasks / variance + float(pair.prior_precision.max()))
    if accumulator == "exact":
        return fresh
    return min(torch.pi**2 * variance * block_size / num_tasks**2, fresh)


def langevin_step(
    share: float, accumulator: Accumulator, beta: float | Tensor, sigma: float | Tensor, tasks: int
) -> float:
    """Return a share of the largest stable step of phi, by the narrowest of its coordinates.

    Args:
        share: of :func:`langevin_limit`.
        accumulator: how the pull of the tasks is gathered.
        beta: standard deviation of a task's weights around phi; one number, or ``[D]``.
        sigma: of phi, likewise.
        tasks: their number.
    """
    narrowest = [torch.as_tensor(width).min().reshape(1) for width in (beta, sigma)]
    pair = NormalPair("phi", "theta", torch.zeros(1), narrowest[1] ** -2, narrowest[0] ** 2)
    return share * langevin_limit(accumulator, pair, tasks)
