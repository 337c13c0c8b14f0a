"""The one place where the tests of random programs touch the kernel.

A kernel is made to move by next to nothing, without noise: what it adds to a position, over half its step size, is the
gradient that it uses. Nothing is asked of its insides but where theta and S are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from pyro_lift import SGLD, SGLDGibbs
from pyro_lift.inference import stability
from pyro_lift.inference.gibbs import regression
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
        tasks = range(self.structure.num_tasks)
        theta = {f: {task: self._theta_of(f, task) for task in tasks} for f in self.structure.regressions}
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
        squares = dict(self.kernel.state.squares)
        for level in self.structure.regressions.values():
            squares[level.cross] = self._around(level, theta[level.family], phi)
        self.kernel.state = self.kernel.state._replace(phi=phi, sums=sums, squares=squares)

    def _around(self, level: Any, theta: Mapping[int, Tensor], phi: Mapping[str, Tensor]) -> Tensor:
        """Covariates times rest of a regression, after theta and phi were put elsewhere; it is linear in the rest."""
        state, known = self.kernel.state, self.kernel.chain.cache.coefficients[level.family].A
        shift = torch.cat([(phi[name] - state.phi[name]).reshape(-1).double() for name in level.sites])
        total = state.squares[level.cross].clone()
        form = "dk,d->dk" if level.dense is None else "dk,e->dek"
        for task, row in theta.items():
            rest = self._theta_of(level.family, task) - row - known[task] @ shift
            total += torch.einsum(form, known[task], rest)
        assert isinstance(total, Tensor)
        return total

    def _theta_of(self, family: str, task: int) -> Tensor:
        return self.kernel.theta(task)[family].reshape(-1).double()

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

    def covariance(self, names: Sequence[str]) -> Tensor:
        """Covariance of the exact draw of some global sites, one after another."""
        state = self.kernel.state
        sizes = [state.phi[name].numel() for name in names]
        places = dict(zip(names, torch.arange(sum(sizes)).split(sizes), strict=True))
        found = torch.zeros(sum(sizes), sum(sizes), dtype=torch.float64)
        for name, pair in self.structure.pairs.items():
            noise = torch.ones_like(state.phi[name])
            at = [draw(pair, state.sums[name], self.structure.num_tasks, 1.0, scale * noise) for scale in (0.0, 1.0)]
            found[places[name], places[name]] = (at[1] - at[0]).square().reshape(-1).double()
        for level in self.structure.regressions.values():
            gram = self.kernel.chain.cache.coefficients[level.family].gram
            sums = state.squares[level.cross], state.squares[level.square]
            K = len(level.prior_mean)

            def drawn(noise: Tensor, level: Any = level, gram: Tensor = gram, sums: Any = sums) -> Tensor:
                parts = regression.draw(level, gram, sums, state.phi, 1.0, noise)[0]
                return torch.cat([parts[name].reshape(-1).double() for name in level.sites])

            centre = drawn(torch.zeros(K, dtype=torch.float64))
            root = torch.stack([drawn(unit) - centre for unit in torch.eye(K, dtype=torch.float64)], -1)
            place = torch.cat([places[name] for name in level.sites])
            found[place.unsqueeze(-1), place] = root @ root.T
        return found
