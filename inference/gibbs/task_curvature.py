r"""How the likelihood of a task curves, on average over tasks: what the step of a translation is measured by.

A shift of all theta together is pulled by the sum of all tasks' likelihoods, of curvature :math:`N\bar H + 1/\sigma^2`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.state import Structure
from pyro_lift.inference.program import Evaluation, Latent, Program, Rows
from pyro_lift.inference.stability import CURVATURE_DIMENSIONS
from pyro_lift.support.random_streams import own_global_stream

__all__ = ["TaskCurvature", "sampled_tasks", "task_curvature"]

#: Tasks that are looked at, spread evenly over all.
SAMPLE = 8
#: Products by which the largest curvature is found, and the diagonal where it is long.
ITERATIONS, PROBES = 15, 8


class TaskCurvature(NamedTuple):
    """Curvature of a task's likelihood (raised to its power) in the paired theta, a mean over tasks.

    Attributes:
        largest: the largest eigenvalue of minus the Hessian, at least 0.
        diagonal: its diagonal, pair after pair, at least 0; ``[D]``.
        subsampled: whether the tasks' rows are, so that these are a minibatch's.
    """

    largest: float
    diagonal: Tensor
    subsampled: bool


def sampled_tasks(num_tasks: int, pass_size: int) -> Tensor:
    """Return the tasks that are looked at, pass after pass."""
    passes = min(-(-SAMPLE // pass_size), -(-num_tasks // pass_size))
    first = torch.arange(passes).unsqueeze(1) * num_tasks // passes
    return ((first + torch.arange(pass_size)) % num_tasks).reshape(-1)


def task_curvature(program: Program, phi: Rows, structure: Structure, n_inflate: float) -> TaskCurvature | None:
    """Measure some tasks' curvature where the chain starts; None where it is too large or has no second derivative.

    Nothing of the chain's randomness is used: minibatches, probes and starts come from streams of their own.

    Args:
        program: the model.
        phi: the start, by global site.
        structure: of the program; every global site is the mean of a pair.
        n_inflate: power on the likelihood.
    """
    if sum(value.numel() for value in phi.values()) > CURVATURE_DIMENSIONS:
        return None
    stream = torch.Generator().manual_seed(0)
    largest: list[Tensor] = []
    diagonals: list[Tensor] = []
    subsampled = False
    for index in sampled_tasks(structure.num_tasks, structure.pass_size).split(structure.pass_size):
        run, sites = _read(program, phi, structure, index, stream)
        if run is None:
            continue
        try:
            products = _Products(n_inflate * run.log_likelihood, sites)
            largest.append(products.largest(stream))
            diagonals.append(products.diagonal(stream))
        except RuntimeError:  # a network without second derivatives
            return None
        others = (count for name, count in run.plates.items() if name != program.plate)
        subsampled = subsampled or any(count.taken < count.size for count in others)
    if not largest:
        return None
    found = torch.cat(largest)
    if not bool(torch.isfinite(found).all()):
        return None
    like = next(iter(phi.values()))
    diagonal = torch.cat(diagonals).mean(0).clamp(min=0.0).to(like)
    return TaskCurvature(float(found.clamp(min=0.0).mean()), diagonal, subsampled)


def _read(
    program: Program, phi: Rows, structure: Structure, index: Tensor, stream: torch.Generator
) -> tuple[Evaluation | None, list[Latent]]:
    """Run some tasks; return their paired sites, or None for tasks that are not as the first ones are.

    Whether those can be sampled is for their first visit to say, which names them.
    """
    try:
        with own_global_stream(0):
            run = program.run(dict(phi), {}, index, stream)
    except ValueError:
        return None, []
    sites: list[Latent] = []
    for name, pair in structure.pairs.items():
        own = [site for site in run.locals.values() if site.family == pair.family]
        if [site.task for site in own] != (list(run.tasks) if structure.sequential else [None]):
            return None, []
        count = 1 if structure.sequential else len(run.tasks)
        if any(site.leaf.numel() != count * phi[name].numel() for site in own):
            return None, []
        sites += own
    return run, sites


class _Products:
    """Products of every task's Hessian with a vector of its own, at once: tasks do not touch each other given phi.

    Vectors are ``[tasks, D]``.
    """

    def __init__(self, objective: Tensor, sites: Sequence[Latent]) -> None:
        self.sites = sites
        self.leaves = [site.leaf for site in sites]
        self.used = objective.requires_grad
        if self.used:
            grads = torch.autograd.grad(objective, self.leaves, create_graph=True, allow_unused=True)
            self.grads = [torch.zeros_like(x) if g is None else g for g, x in zip(grads, self.leaves, strict=True)]
            self.used = any(g.requires_grad for g in self.grads)
        self.shape = self._rows(self.leaves).shape

    def _rows(self, values: Sequence[Tensor]) -> Tensor:
        """Values of the sites, one row a task."""
        parts: dict[int | None, list[Tensor]] = {}
        for site, value in zip(self.sites, values, strict=True):
            if site.task is None:
                rows = value.detach().movedim(0 if site.plate_dim is None else site.plate_dim, 0)
                rows = rows.reshape(len(rows), -1)
            else:
                rows = value.detach().reshape(1, -1)
            parts.setdefault(site.task, []).append(rows)
        return torch.cat([torch.cat(row, 1) for row in parts.values()])

    def _values(self, rows: Tensor) -> list[Tensor]:
        """The inverse of :meth:`_rows`."""
        tasks = list(dict.fromkeys(site.task for site in self.sites))
        used = dict.fromkeys(tasks, 0)
        values = []
        for site in self.sites:
            leaf, begin = site.leaf, used[site.task]
            if site.task is None:
                dim = 0 if site.plate_dim is None else site.plate_dim
                shape = leaf.movedim(dim, 0).shape
                size = shape[1:].numel()
                values.append(rows[:, begin : begin + size].reshape(shape).movedim(0, dim))
            else:
                size = leaf.numel()
                values.append(rows[tasks.index(site.task), begin : begin + size].reshape(leaf.shape))
            used[site.task] = begin + size
        return values

    def _times(self, rows: Tensor) -> Tensor:
        """Minus the Hessian times a vector, task by task."""
        if not self.used:
            return torch.zeros_like(rows)
        pairs = [(g, v) for g, v in zip(self.grads, self._values(rows), strict=True) if g.requires_grad]
        products = torch.autograd.grad(
            [g for g, _ in pairs],
            self.leaves,
            [v for _, v in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        filled = [torch.zeros_like(x) if p is None else p for p, x in zip(products, self.leaves, strict=True)]
        return -self._rows(filled)

    def largest(self, stream: torch.Generator) -> Tensor:
        """Largest curvature by task, by power iteration; ``[tasks]``."""
        like = self.leaves[0]
        rows = torch.randn(self.shape, generator=stream, dtype=torch.float64).to(like)
        value = rows.new_zeros(len(rows))
        for _ in range(ITERATIONS):
            rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
            times = self._times(rows)
            value = (rows * times).sum(1)
            rows = times
        return value

    def diagonal(self, stream: torch.Generator) -> Tensor:
        """Diagonal of the curvature: exact where it is short, by random signs where it is long; ``[tasks, D]``."""
        count, D = self.shape
        if D <= PROBES:
            units = torch.eye(D).to(self.leaves[0])
            return torch.stack([self._times(unit.expand(count, D))[:, k] for k, unit in enumerate(units)], 1)
        total = torch.zeros(self.shape).to(self.leaves[0])
        for _ in range(PROBES):
            signs = (torch.randint(2, self.shape, generator=stream) * 2 - 1).to(total)
            total = total + signs * self._times(signs)
        return total / PROBES
