"""The one place where the tests of random programs touch the kernel.

A kernel is made to move by next to nothing, without noise: what it adds to a position, over half its step size, is the
gradient that it uses. Nothing is asked of its insides but where theta and S are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pyro_lift import SGLD, SGLDGibbs
from pyro_lift.inference import stability
from pyro_lift.inference.gibbs.conjugate import draw

__all__ = ["STEP", "Seam", "Visit", "whole_gradient"]

#: Small enough that a gradient is that of the position before, and large enough to be told from rounding.
STEP = 1e-8


def _unmeasured() -> AbstractContextManager[Any]:
    """Without the curvature, which is only for the report where the step is given: it would be a third of the time."""
    return mock.patch.object(stability, "CURVATURE_DIMENSIONS", 0)


def whole_gradient(
    program: Callable[[], None], values: list[Tensor], **options: Any
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient that SGLD on all sites uses at ``values`` (in the program's order), and the values, by site.

    Raises:
        ValueError: the kernel's refusal at set-up.
    """
    kernel = SGLD(program, **{"temperature": 0.0, "check_stability": False, "step_size": STEP} | options)
    with _unmeasured():
        kernel.setup(0)
    position = dict(zip(kernel.initial_params, values, strict=True))
    moved = kernel.sample(position)
    return {name: 2.0 * (moved[name] - x) / STEP for name, x in position.items()}, position


class Visit(NamedTuple):
    """What one visit did: gradients of theta by task and local site, in the program's order, and phi around it."""

    tasks: list[int]
    phi: dict[str, Tensor]
    moved_phi: dict[str, Tensor]
    gradients: dict[int, list[Tensor]]


class Seam:
    """A kernel that is asked for its gradients.

    Args:
        program: a Pyro program.
        options: of the kernel: which update, integrator, power.

    Raises:
        ValueError: the kernel's refusal at set-up.
    """

    def __init__(self, program: Callable[[], None], **options: Any) -> None:
        options = {"temperature": 0.0, "check_stability": False, "step_size": STEP, "phi_step_size": STEP} | options
        self.kernel = SGLDGibbs(program, **options)
        with _unmeasured():
            self.kernel.setup(0)
        self.structure: Any = self.kernel.structure

    def sweep(self) -> None:
        """Visit every task once."""
        params = self.kernel.initial_params
        for _ in range(self.visits):
            params = self.kernel.sample(params)

    @property
    def visits(self) -> int:
        """Visits that a sweep takes."""
        return int(-(-self.structure.num_tasks // self.structure.block_size))

    def theta(self) -> dict[int, list[Tensor]]:
        """Unconstrained values of the local sites of each task, in the program's order."""
        return {task: list(self.kernel.theta(task).values()) for task in range(self.structure.num_tasks)}

    def scatter(self, generator: torch.Generator, spread: float = 0.7) -> None:
        """Put every theta and phi at a random point, and S where it belongs."""
        store = self.kernel.store
        assert store is not None
        for task in range(self.structure.num_tasks):
            (row,) = store.read([task])
            store.write([task], [spread * torch.randn(row.shape, generator=generator, dtype=row.dtype)])
        phi = {
            name: spread * torch.randn(value.shape, generator=generator, dtype=value.dtype)
            for name, value in self.kernel.state.phi.items()
        }
        sums = {}
        for name, pair in self.structure.pairs.items():
            parts = [self.kernel.theta(task).get(pair.family) for task in range(self.structure.num_tasks)]
            # A task may lack the site where nothing rests on S.
            kept = [part.reshape(phi[name].shape) for part in parts if part is not None]
            sums[name] = torch.stack(kept).sum(0).double()
        self.kernel.state = self.kernel.state._replace(phi=phi, sums=sums)

    def visit(self) -> Visit:
        """Move the next block and phi by one step."""
        before, phi = self.theta(), dict(self.kernel.state.phi)
        moved = self.kernel.sample(phi)
        after = self.theta()
        tasks = list(self.kernel._info.tasks)  # type: ignore[union-attr]
        gradients = {
            task: [2.0 * (new - old) / STEP for old, new in zip(before[task], after[task], strict=True)]
            for task in tasks
        }
        return Visit(tasks, phi, moved, gradients)

    def variances(self) -> Mapping[str, Tensor]:
        """Variance of the exact draw, by global site."""
        found = {}
        for name, pair in self.structure.pairs.items():
            phi, S = self.kernel.state.phi[name], self.kernel.state.sums[name]
            noise = torch.ones_like(phi)
            draws = [draw(pair, S, self.structure.num_tasks, 1.0, scale * noise) for scale in (0.0, 1.0)]
            found[name] = (draws[1] - draws[0]).square()
        return found
