"""Rows of the store and values by site: how a task's local values lie in its flat row, and where they start."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.conjugate import values_of
from pyro_lift.inference.gibbs.new_tasks import learn
from pyro_lift.inference.gibbs.normal_sites import local_normal
from pyro_lift.inference.gibbs.regression import coefficients
from pyro_lift.inference.gibbs.state import Chain, SGLDGibbsState, Streams, Structure
from pyro_lift.inference.program import Evaluation, LocalSite, Rows
from pyro_lift.inference.stores.store import HoldsMatrix
from pyro_lift.support.random_streams import own_global_stream, stream_seed

__all__ = [
    "Values",
    "block_values",
    "mean_square",
    "packed_matrix",
    "pair_rows",
    "put_at_start",
    "regrouped",
    "shifted_values",
    "task_rows",
    "task_values",
    "unpacked_matrix",
    "write_values",
]

#: Local values by task (None for a vectorised block) and family.
Values = Mapping[int | None, Rows]
NO_OFFSET: Rows = {}


def block_values(state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams) -> Values:
    """Return the local values of a block, which are put at their start where one of its tasks was never visited."""
    values = task_values(chain, tuple(index.tolist()), state.offset)
    chain.cache.fresh = values is None
    return _first_visit(state, chain, index, streams) if values is None else values


def task_values(
    chain: Chain, tasks: tuple[int, ...], offset: Rows = NO_OFFSET
) -> dict[int | None, dict[str, Tensor]] | None:
    """Return the local values of some tasks; None where one of them was never visited.

    Args:
        chain: with its store.
        tasks: by number.
        offset: what stands between the stored theta and the theta, by global site; none where nothing is shifted.
    """
    matrix = _matrix(chain, tasks)
    if matrix is not None:
        return {None: _plus(chain, unpacked_matrix(chain, matrix), offset, 1.0)}
    if not all(chain.store.has(task) for task in tasks):
        return None
    rows, layouts = chain.store.read(tasks), chain.cache.layouts
    if chain.structure.sequential:
        read = {task: _unpacked(layouts[task], row) for task, row in zip(tasks, rows, strict=True)}
        return {task: _plus(chain, values, offset, 1.0) for task, values in read.items()}
    layout = layouts[None]
    parts = [_unpacked(layout, row) for row in rows]
    stacked = {s.family: torch.stack([part[s.family] for part in parts], s.plate_dim) for s in layout}
    return {None: _plus(chain, stacked, offset, 1.0)}


def _matrix(chain: Chain, tasks: tuple[int, ...]) -> Tensor | None:
    """The rows of a vectorised block of all tasks in order, where the store keeps them as one matrix."""
    if not _is_whole(chain, tasks) or not isinstance(chain.store, HoldsMatrix) or None not in chain.cache.layouts:
        return None
    return chain.store.read_all()


def _is_whole(chain: Chain, tasks: tuple[int, ...]) -> bool:
    structure = chain.structure
    return not structure.sequential and len(tasks) == structure.num_tasks and tasks == tuple(range(len(tasks)))


def unpacked_matrix(chain: Chain, matrix: Tensor) -> dict[str, Tensor]:
    """Return values by family from the rows of a vectorised block ``[tasks, length]``; views."""
    layout = chain.cache.layouts[None]
    parts = matrix.split([site.shape.numel() for site in layout], 1)
    return {
        site.family: part.reshape(len(matrix), *site.shape).movedim(0, site.plate_dim)
        for site, part in zip(layout, parts, strict=True)
    }


def packed_matrix(chain: Chain, values: Rows) -> Tensor:
    """Return the rows of a vectorised block ``[tasks, length]`` from values by family; a copy."""
    parts = [values[site.family].movedim(site.plate_dim, 0) for site in chain.cache.layouts[None]]
    flat = [part.reshape(len(part), -1) for part in parts]
    return flat[0].clone() if len(flat) == 1 else torch.cat(flat, 1)


def write_values(chain: Chain, tasks: tuple[int, ...], values: Values, offset: Rows = NO_OFFSET) -> None:
    """Write a block's values to the store, without the offset; as one matrix where the store keeps such a one."""
    if _is_whole(chain, tasks) and isinstance(chain.store, HoldsMatrix):
        chain.store.write_all(packed_matrix(chain, _plus(chain, values[None], offset, -1.0)))
    else:
        chain.store.write(tasks, task_rows(chain, tasks, values, offset))


def _plus(chain: Chain, values: Rows, offset: Rows, sign: float) -> dict[str, Tensor]:
    """Values by family, those of pairs moved by the offset of their global site."""
    moved = dict(values)
    for name, by in offset.items():
        family = chain.structure.pairs[name].family
        moved[family] = moved[family] + sign * by.to(moved[family].dtype)
    return moved


def shifted_values(chain: Chain, values: Values, shifts: Rows) -> Values:
    """Return local values with those of pairs shifted, by global site."""
    return {task: _plus(chain, own, shifts, 1.0) for task, own in values.items()} if shifts else values


def _unpacked(layout: tuple[LocalSite, ...], row: Tensor) -> dict[str, Tensor]:
    if len(layout) == 1:
        return {layout[0].family: row.view(layout[0].shape)}
    parts = row.split([site.shape.numel() for site in layout])
    return {site.family: part.view(site.shape) for site, part in zip(layout, parts, strict=True)}


def task_rows(chain: Chain, tasks: tuple[int, ...], values: Values, offset: Rows = NO_OFFSET) -> list[Tensor]:
    """Return one flat row per task, as the store holds it: without the offset."""
    sequential, rows = chain.structure.sequential, []
    values = {task: _plus(chain, own, offset, -1.0) for task, own in values.items()} if offset else values
    for k, task in enumerate(tasks):
        layout = chain.cache.layouts[task if sequential else None]
        source = values[task if sequential else None]
        parts = [
            (source[s.family] if sequential else source[s.family].select(s.plate_dim, k)).reshape(-1) for s in layout
        ]
        # A task's only site is a vector of its own already; a block's rows are views of one.
        alone = parts[0] if sequential else parts[0].clone()
        rows.append(alone if len(parts) == 1 else torch.cat(parts))
    return rows


def pair_rows(chain: Chain, tasks: tuple[int, ...], values: Values) -> list[Tensor]:
    """Return one flat vector per task of the pairs' values alone, pair after pair."""
    families = [pair.family for pair in chain.structure.pairs.values()]
    if chain.structure.sequential:
        parts = [[values[task][family].reshape(-1) for family in families] for task in tasks]
    else:
        dims = {site.family: site.plate_dim for site in chain.cache.layouts[None]}
        parts = [
            [values[None][family].select(dims[family], k).reshape(-1) for family in families] for k in range(len(tasks))
        ]
    return [part[0] if len(part) == 1 else torch.cat(part) for part in parts]


def regrouped(run: Evaluation, moved: Mapping[str, Tensor]) -> dict[int | None, dict[str, Tensor]]:
    """Return values by site name as values by task and family."""
    grouped: dict[int | None, dict[str, Tensor]] = {}
    for name, site in run.locals.items():
        grouped.setdefault(site.task, {})[site.family] = moved[name]
    return grouped


def _first_visit(state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams) -> Values:
    """Learn the block's layout and give its new tasks their start: phi's start for paired families."""
    structure, layouts = chain.structure, chain.cache.layouts
    tasks = tuple(index.tolist())
    with own_global_stream(None if streams.start_seed is None else stream_seed(streams.start_seed, *tasks)):
        run = chain.program.run(state.phi, {}, index, streams.rows)
    unpaired = learn(chain, run)
    for site in run.locals.values():
        dim = -1 if site.plate_dim is None else site.plate_dim
        shape = site.leaf.shape if structure.sequential else site.leaf.select(dim, 0).shape
        known = layouts.get(site.task, ())
        if site.family not in {s.family for s in known}:
            layouts[site.task] = (*known, LocalSite(site.family, shape, dim))
    begun = {task: _at_start(chain, rows, unpaired) for task, rows in values_of(run).items()}
    new = [k for k, task in enumerate(tasks) if not chain.store.has(task)]
    values = _at_means(chain, run, begun, new)
    rows = task_rows(chain, tasks, values)
    chain.store.write([tasks[k] for k in new], [rows[k] for k in new])
    stored = task_values(chain, tasks, state.offset)
    assert stored is not None
    return stored


def _at_means(chain: Chain, run: Evaluation, values: Values, new: list[int]) -> Values:
    """Put theta of regressions at their means, where they add nothing to the sums; take up the tasks' covariates."""
    started = {task: dict(rows) for task, rows in values.items()}
    for site in run.locals.values():
        level = chain.structure.regressions.get(site.family)
        if level is None:
            continue
        normal, known = local_normal(site), chain.cache.coefficients[site.family]
        assert normal is not None
        started[site.task][site.family] = torch.broadcast_to(normal.mean.detach(), site.leaf.shape).clone()
        tasks = list(run.tasks) if site.task is None else [site.task]
        fresh = [k for k, task in enumerate(tasks) if not bool(known.seen[task])]
        if fresh and (site.task is None or run.tasks.index(site.task) in new):
            known.take([tasks[k] for k in fresh], coefficients(level, site, run)[fresh])
    return started


def put_at_start(chain: Chain) -> None:
    """Put the paired families of every visited task at their starting values."""
    for task in list(chain.store.tasks()):
        values = task_values(chain, (task,))
        assert values is not None
        started = {key: _at_start(chain, rows) for key, rows in values.items()}
        chain.store.write((task,), task_rows(chain, (task,), started))


def _at_start(chain: Chain, rows: Rows, unpaired: Collection[str] = ()) -> Rows:
    start = {family: value for family, value in chain.cache.start.items() if family not in unpaired}
    return {
        family: torch.broadcast_to(start[family], value.shape).clone() if family in start else value
        for family, value in rows.items()
    }


def mean_square(gradient: Tensor, family: str, plate_dim: int | None, structure: Structure) -> Tensor:
    """Return the mean square by coordinate, over the block; by family alone where the tasks' shapes may differ."""
    square = gradient.square()
    if structure.sequential:
        return square if family in structure.pair_of else square.mean()
    return square.mean(plate_dim, keepdim=True)
