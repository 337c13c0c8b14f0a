"""Draws of every theta_i at the draws that are kept: what predictive checks and comparisons of groups need.

A visit moves one block; the chain's draw is phi *and all theta_i*, those of other blocks as they last were. A draw
copies all N of them, O(N D) memory each; only the rows that have moved since the draw before are read from the store.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.admission import check_fixed_supports
from pyro_lift.inference.footprint import Need
from pyro_lift.inference.gibbs.rows import block_values, shifted_values, task_values
from pyro_lift.inference.gibbs.state import Chain, SGLDGibbsState, Streams
from pyro_lift.inference.program import Latent

__all__ = ["KeptTheta", "draws_need"]


class _Site(NamedTuple):
    """A local site of the program over all tasks: where its rows are, and how its constrained value is made."""

    name: str
    task: int | None
    family: str
    plate_dim: int
    constrain: Callable[[Tensor], Tensor]


class KeptTheta:
    """The local sites of all tasks by their names in the program, constrained.

    In a vectorised plate a site's tasks are stacked along the plate's dimension, in a plate that is iterated over every
    task has sites of its own. Every task is visited for the first time here: tasks that the chain has not come to yet
    stand at their start, as the chain's own S takes them to.

    Args:
        chain: at its start.
        state: of it.
        start_seed: of what starting values are drawn with.

    Raises:
        ValueError: a task that the chain could not sample; a site whose support moves with another site.
    """

    def __init__(self, chain: Chain, state: SGLDGibbsState, start_seed: int | None) -> None:
        self.chain = chain
        self._sites: dict[str, _Site] = {}
        self._raw: dict[int | None, dict[str, Tensor]] = {}
        self._moved: set[int] = set()
        self._parts: dict[str, list[tuple[Tensor, Latent]]] = {}
        structure = chain.structure
        streams = Streams(torch.Generator().manual_seed(0), None, start_seed)
        for begin in range(0, structure.num_tasks, structure.pass_size):
            index = (begin + torch.arange(structure.pass_size)) % structure.num_tasks
            values = block_values(state, chain, index, streams)
            run = chain.program.run(state.phi, values, index, streams.rows)
            check_fixed_supports(run, run.locals)
            fresh = min(structure.pass_size, structure.num_tasks - begin)
            for name, site in run.locals.items():
                self._meet(name, site, index[:fresh])
        self._finish()

    def _meet(self, name: str, site: Latent, index: Tensor) -> None:
        if site.task is not None:
            if name in self._sites and self._sites[name].task != site.task:
                raise ValueError(
                    f"keep_theta=True: the tasks {self._sites[name].task} and {site.task} both name a site {name!r}, "
                    'and their draws could not be told apart. Name sites by task, as f"theta_{i}".'
                )
            transform = site.transform
            self._sites[name] = _Site(name, site.task, site.family, 0, transform if transform is not None else _same)
        else:
            self._parts.setdefault(name, []).append((index, site))

    def _finish(self) -> None:
        """Join the maps of the blocks: a support may have other bounds in each."""
        for name, parts in self._parts.items():
            site = parts[0][1]
            dim = 0 if site.plate_dim is None else site.plate_dim
            self._sites[name] = _Site(name, None, site.family, dim, _joined(parts, dim))
        self._parts = {}

    def touch(self, tasks: tuple[int, ...]) -> None:
        """Take note of tasks whose theta have moved since the last draw."""
        self._moved.update(tasks)

    def values(self, state: SGLDGibbsState) -> dict[str, Tensor]:
        """Return all local sites as they are, read anew from the store; copies."""
        self._raw = {}
        values = self.draw(state)
        self._raw = {}  # before the first draw that is kept, rows may change in other ways than by visits
        return values

    def draw(self, state: SGLDGibbsState) -> dict[str, Tensor]:
        """Return all local sites as they are, reading only what has moved since the last call; copies."""
        tasks = tuple(sorted(self._moved if self._raw else range(self.chain.structure.num_tasks)))
        if tasks:
            read = task_values(self.chain, tasks)
            assert read is not None
            self._take(tasks, read)
        self._moved = set()
        rows = shifted_values(self.chain, self._raw, state.offset)
        return {
            name: site.constrain(rows[site.task][site.family]).detach().clone() for name, site in self._sites.items()
        }

    def _take(self, tasks: tuple[int, ...], read: Mapping[int | None, dict[str, Tensor]]) -> None:
        if self.chain.structure.sequential or not self._raw:
            self._raw |= {task: dict(values) for task, values in read.items()}
            return
        for site in self._sites.values():
            whole = self._raw[None][site.family]
            index = torch.tensor(tasks, device=whole.device)
            whole.index_copy_(site.plate_dim, index, read[None][site.family])


def draws_need(nbytes: int) -> Need:
    """Return what draws of so many bytes take: each by itself, and then all of them as one tensor."""
    return Need("draws of theta", 2 * nbytes, False, "fewer draws (thinning=) or keep_theta=False")


def _same(value: Tensor) -> Tensor:
    return value


def _joined(parts: list[tuple[Tensor, Latent]], dim: int) -> Callable[[Tensor], Tensor]:
    if all(site.transform is None for _, site in parts):
        return _same
    if all(site.transform is parts[0][1].transform for _, site in parts):  # one object: it does not hang on the task
        first = parts[0][1].transform
        assert first is not None
        return first

    def constrain(value: Tensor) -> Tensor:
        pieces = []
        for index, site in parts:
            size = site.leaf.shape[dim]
            piece = value.index_select(dim, index.to(value.device))
            lacking = size - piece.shape[dim]  # the last block goes on with the first tasks, whose bounds it has too
            if lacking:
                again = value.narrow(dim, 0, lacking)
                piece = torch.cat([piece, again], dim)
            mapped = piece if site.transform is None else site.transform(piece)
            pieces.append(mapped.narrow(dim, 0, size - lacking))
        return torch.cat(pieces, dim)

    return constrain
