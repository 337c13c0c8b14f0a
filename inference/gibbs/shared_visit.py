r"""One visit shared by several processes: each moves its own tasks of the block, and only S travels.

Given phi, the theta of a block are independent, so R processes take a share of the block each. What they know of each
other is the block's change of S,

.. math:: S' = S + \sum_{r=1}^{R} \sum_{i \in \text{share}_r} (\theta_i' - \theta_i),

one ``all_reduce`` a visit, of D numbers and a few more; in the warm-up, the gradient of the joint training in its
place, and the preconditioner beside it. Phi is drawn by every process alike, from a generator that all of them have.

The numbers do not depend on how many processes there are: minibatches and noise of a pass come from a generator of its
own, named by the chain's seed, the visit and the pass's first task. So one process with the same block is the
reference for R, and a chain may be resumed by another number of processes.

Rows of theta stay where their task is: the k-th share of a block is always the same process's, and blocks begin at
multiples of B. Where B does not divide N, the last block of a round is shorter, and some processes wait.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs import translation
from pyro_lift.inference.gibbs import visit as gibbs_visit
from pyro_lift.inference.gibbs.state import (
    Chain,
    Phase,
    Settings,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Streams,
    Structure,
)
from pyro_lift.inference.gibbs.warmup import sgd_gradient, sgd_update
from pyro_lift.inference.sgld import DivergedError, check_moved
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.support.distributed import add_up, collected, process
from pyro_lift.support.random_streams import generator

__all__ = ["OwnRows", "block_at", "check_alike", "check_share", "generator_of", "own_passes", "visit"]


class _Head(NamedTuple):
    """The numbers that travel in front of S, all of them sums over processes.

    Attributes:
        failed: processes that failed.
        unknown: families of local sites that not every process knows.
        log_likelihood: of the block.
        squared_norm: of its gradient.
        clipped: passes whose gradient was scaled down.
    """

    failed: Tensor
    unknown: Tensor
    log_likelihood: Tensor
    squared_norm: Tensor
    clipped: Tensor


def check_share(structure: Structure, settings: Settings, scan: str) -> None:
    """Refuse what cannot be shared so that rows stay with their process.

    Raises:
        ValueError: names the option and the way out.
    """
    count = process()[1]
    B, N, size = structure.block_size, structure.num_tasks, structure.pass_size
    if settings.phi_update != "gibbs":
        raise ValueError(f'phi_update={settings.phi_update!r} with distributed=True: only "gibbs" needs nothing but S.')
    if scan != "round_robin":
        raise ValueError(
            f'scan={scan!r} with distributed=True: use "round_robin", where a task always has one process.'
        )
    if B % (count * size):
        raise ValueError(
            f"block_size={B} cannot be shared by {count} processes in passes of {size}: use a multiple of "
            f"{count * size}."
        )
    if N % size:
        raise ValueError(
            f"{N} tasks are no whole number of passes of {size}, which the program takes: let it take a number that "
            f"divides {N}."
        )
    if B > N:
        raise ValueError(f"block_size={B} is more than the {N} tasks there are.")


def check_alike(facts: Mapping[str, Any]) -> None:
    """Refuse to begin where the processes have built different models.

    Args:
        facts: plain data by name; numbers may differ by rounding.

    Raises:
        ValueError: names the first difference.
    """
    first, *others = collected(dict(facts))
    for number, found in enumerate(others, start=1):
        for name, value in found.items():
            close = isinstance(value, float) and math.isclose(value, first[name], rel_tol=1e-3, abs_tol=1e-3)
            if value != first[name] and not close:
                raise ValueError(
                    f"process {number} begins with {name} = {value!r} and process 0 with {first[name]!r}: every "
                    "process must build the same model from the same tasks. Seed alike, with pyro.set_rng_seed, "
                    "before the backbone is made."
                )


def block_at(structure: Structure, visit: int, begin: int | None = None) -> Tensor:
    """Tasks of a visit, round robin; the last block of a round holds what is left.

    Args:
        structure: of the chain.
        visit: its number.
        begin: the block's first task, where blocks do not come in order.
    """
    N, B = structure.num_tasks, structure.block_size
    if begin is None:
        begin = B * (visit % -(-N // B))
    return torch.arange(begin, min(begin + B, N))


def own_passes(structure: Structure, index: Tensor) -> list[Tensor]:
    """The part of a block that this process moves, pass by pass."""
    rank, count = process()
    share = structure.block_size // structure.pass_size // count
    return list(index.split(structure.pass_size)[rank * share : (rank + 1) * share])


def generator_of(seed: int, visit: int, number: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return the generator of one pass, or (``number`` = N) of phi; the same in every process."""
    return generator(seed, visit, number, device=device)


class OwnRows:
    """A store as checkpoints see it: of all rows of a saved run, those of other processes' tasks are left out."""

    def __init__(self, store: ThetaStore, structure: Structure) -> None:
        self.store = store
        rank, count = process()
        share = structure.block_size // count
        self.own = {i for i in range(structure.num_tasks) if i % structure.block_size // share == rank}

    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        """The rows of these tasks, in order."""
        return self.store.read(tasks)

    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        """Replace the rows of those of these tasks that are this process's own."""
        own = [(task, row) for task, row in zip(tasks, rows, strict=True) if task in self.own]
        self.store.write([task for task, _ in own], [row for _, row in own])

    def tasks(self) -> Iterator[int]:
        """The tasks written so far, in order."""
        return self.store.tasks()


def visit(
    state: SGLDGibbsState, chain: Chain, index: Tensor, phase: Phase, seed: int
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """Visit the block ``index``, of which this process moves its own share.

    Nothing is kept of a visit that fails, in any process.

    Args:
        state: of the chain.
        chain: what was set at set-up.
        index: the block's tasks.
        phase: as of :func:`~pyro_lift.inference.gibbs.visit.step`.
        seed: of the chain, the same in every process.

    Raises:
        DivergedError: in every process, where one had a loss or gradient that is not finite.
        ProcessLostError: another process is gone.
    """
    structure, settings = chain.structure, chain.settings
    device = next(iter(state.phi.values())).device
    held, total = _Held(chain.store), _Total(state, chain, phase)
    table = None if chain.translation is None or chain.translation.table is None else _Held(chain.translation.table)
    apart = chain._replace(store=held)
    if table is not None and chain.translation is not None:
        apart = apart._replace(translation=replace(chain.translation, table=table))
    failure: DivergedError | None = None
    for part in own_passes(structure, index):
        try:
            _add_pass(total, state, apart, part, phase, _streams(seed, state.step, part, device))
        except DivergedError as error:
            failure = error
            break
    total.share(failure)
    if failure is not None:
        raise failure
    tasks = tuple(index.tolist())
    if phase == "sgd":
        eta = settings.sgd_step_size(state.step)
        after = sgd_update(state, structure, total.parts, total.moments, eta)
        check_moved(after.phi, state.step, tasks)
    else:
        eta = settings.eta(state.step)
        sums = {name: S + total.parts[name] for name, S in state.sums.items()}
        squares = {name: Q + total.squares[name] for name, Q in state.squares.items()}
        noise = generator_of(seed, state.step, structure.num_tasks, device)
        offset, gradients, shifts = state.offset, state.gradients, None
        if chain.translation is not None:
            pull = translation.Pull(total.gradient, total.change, len(tasks), [])
            shifts = translation.shift(state, chain, pull, total.moments, noise)
            sums, offset, gradients = translation.shifted(state, chain, sums, pull, shifts)
        phi, squares = gibbs_visit.draw_globals(state, chain, sums, squares, noise, shifts)
        after = SGLDGibbsState(state.step + 1, phi, sums, {}, total.moments, {}, offset, gradients, squares=squares)
    for store in (held, table):
        if store is not None:
            store.keep()
    return after, SGLDGibbsInfo(tasks, total.log_likelihood, total.grad_norm, eta, total.clipped, phase)


def _streams(seed: int, visit: int, part: Tensor, device: torch.device) -> Streams:
    """The streams of one pass, named by its first task; on a CPU, rows and noise share one."""
    rows = generator_of(seed, visit, int(part[0]))
    noise = rows if device.type == "cpu" else generator_of(seed, visit, int(part[0]), device)
    return Streams(rows, noise, seed)


def _add_pass(total: _Total, state: SGLDGibbsState, chain: Chain, part: Tensor, phase: Phase, streams: Streams) -> None:
    """Move the tasks of one pass and add its change to the visit's total."""
    if phase == "sgd":
        computed = sgd_gradient(state, chain, part, streams)
        total.add(computed.gradient, computed.second_moment, computed.info)
        return
    moved, info, pull = gibbs_visit.visited(state, chain, part, streams, phase, move_phi=False)
    total.add_change(total.parts, moved.sums, state.sums)
    total.add_change(total.squares, moved.squares, state.squares)
    total.add({}, moved.second_moment, info)
    if pull is not None:
        total.add_pull(pull)


class _Held:
    """A store whose writes wait until the whole visit has succeeded."""

    def __init__(self, store: ThetaStore) -> None:
        self.store = store
        self.rows: dict[int, Tensor] = {}

    def has(self, task: int) -> bool:
        return task in self.rows or self.store.has(task)

    def read(self, tasks: Sequence[int]) -> list[Tensor]:
        return [self.rows[task] if task in self.rows else self.store.read([task])[0] for task in tasks]

    def write(self, tasks: Sequence[int], rows: Sequence[Tensor]) -> None:
        self.rows.update(zip(tasks, rows, strict=True))

    def tasks(self) -> Iterator[int]:
        return self.store.tasks()

    def keep(self) -> None:
        self.store.write(list(self.rows), list(self.rows.values()))


def _pulls(state: SGLDGibbsState, chain: Chain, phase: str) -> tuple[bool, bool]:
    """Whether a block's summed gradient travels, and the change of the summed control variates."""
    shifts = chain.translation
    if shifts is None or phase == "sgd":
        return False, False
    return not shifts.corrects(state.step), shifts.table is not None


class _Total:
    """What the passes of a visit add up to: by one vector that is summed over processes.

    Attributes:
        parts: by global site, the change of S, or the gradient of the joint training.
        squares: by global site of a family of unknown scale, the change of Q.
        moments: running mean squares by local family: the mean over those passes that had the family.
        gradient, change: of a translation (:class:`~pyro_lift.inference.gibbs.translation.Pull`), where there is one.
    """

    def __init__(self, state: SGLDGibbsState, chain: Chain, phase: str) -> None:
        structure = chain.structure
        self.old = state.second_moment
        self.step = state.step
        self.dtype = next(iter(state.phi.values())).dtype
        self.shapes = {name: S.shape for name, S in state.sums.items()}
        # Families that every process knows travel with S while they still move.
        still = structure.pair_of if phase == "sgd" else ()
        moving = sorted(self.old.items()) if phase != "sample" else []
        self.known = {family: v.shape for family, v in moving if family not in still}
        squares = {name: Q.shape for name, Q in state.squares.items()}
        sizes = [s.numel() for s in self.shapes.values()] + [1 + s.numel() for s in self.known.values()]
        pulls = _pulls(state, chain, phase)
        sizes += [s.numel() for _ in range(sum(pulls)) for s in self.shapes.values()]
        sizes += [s.numel() for s in squares.values()]
        like = next(iter(state.sums.values()))
        self.vector = torch.zeros(len(_Head._fields) + sum(sizes), dtype=torch.float64, device=like.device)
        head, *rest = self.vector.split([len(_Head._fields), *sizes])
        self.head = _Head(*head.unbind())
        self.parts = {k: part.view(s) for (k, s), part in zip(self.shapes.items(), rest, strict=False)}
        self._sums = dict(zip(self.known, rest[len(self.shapes) :], strict=False))
        parts = iter(rest[len(self.shapes) + len(self.known) :])
        self.gradient, self.change = (
            {k: next(parts).view(s) for k, s in self.shapes.items()} if travels else {} for travels in pulls
        )
        self.squares = {k: next(parts).view(s) for k, s in squares.items()}
        self._new: dict[str, tuple[Tensor, int]] = {}
        self.moments = dict(self.old)

    def add_change(
        self, parts: Mapping[str, Tensor], after: Mapping[str, Tensor], before: Mapping[str, Tensor]
    ) -> None:
        """The change of S, or of Q, in one pass."""
        for name, part in parts.items():
            part.add_(after[name]).sub_(before[name])

    def add_pull(self, pull: translation.Pull) -> None:
        """What one pass says of a translation."""
        for whole, own in ((self.gradient, pull.gradient), (self.change, pull.change)):
            for name, value in own.items():
                whole[name].add_(value)

    def add(self, parts: Mapping[str, Tensor], moments: Mapping[str, Tensor], info: SGLDGibbsInfo) -> None:
        """What else one pass found."""
        for name, value in parts.items():
            self.parts[name].add_(value)
        for family, value in moments.items():
            if family in self._sums:
                if value is not self.old[family]:
                    self._sums[family][0] += 1.0
                    self._sums[family][1:].view(value.shape).add_(value)
            elif family not in self.old:
                total, count = self._new.get(family, (torch.zeros_like(value, dtype=torch.float64), 0))
                self._new[family] = (total + value, count + 1)
        self.head.log_likelihood.add_(info.log_likelihood)
        self.head.squared_norm.add_(info.grad_norm.square())
        self.head.clipped.add_(float(info.clipped))

    def share(self, failure: DivergedError | None) -> None:
        """Add up over processes.

        Raises:
            DivergedError: another process failed, and this one did not.
        """
        self.head.failed.fill_(float(failure is not None))
        self.head.unknown.fill_(float(len(self._new)))
        add_up(self.vector)
        self.log_likelihood, self.grad_norm = self.head.log_likelihood.clone(), self.head.squared_norm.sqrt()
        self.clipped = float(self.head.clipped) > 0.0
        if self.head.failed:
            if failure is None:
                raise DivergedError(
                    f"step {self.step}: the tasks of another process diverged; its own message names them. The chain "
                    "has stopped at its last good state.",
                    self.step,
                    (),
                )
            return
        for family, total in self._sums.items():
            if total[0]:
                self.moments[family] = (total[1:] / total[0]).view(self.known[family]).to(self.old[family])
        if self.head.unknown:
            self._share_new()

    def _share_new(self) -> None:
        """Families that a process has met for the first time: names and shapes travel before the numbers."""
        listed = collected({k: list(v.shape) for k, (v, _) in self._new.items()})
        for family, shape in sorted({k: v for found in listed for k, v in found.items()}.items()):
            total, count = self._new.get(family, (torch.zeros(shape, device=self.vector.device), 0))
            both = add_up(torch.cat([torch.tensor([float(count)]).to(self.vector), total.double().reshape(-1)]))
            self.moments[family] = (both[1:] / both[0]).view(shape).to(self.dtype)
