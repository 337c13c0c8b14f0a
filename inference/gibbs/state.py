"""State, settings and structure of an SGLD-Gibbs chain, and the tasks' rows in its store."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs import conjugate
from pyro_lift.inference.gibbs.accumulator import Accumulator, GradientTable
from pyro_lift.inference.gibbs.conjugate import NormalPair, values_of
from pyro_lift.inference.gibbs.long_vectors import Workspace
from pyro_lift.inference.program import Evaluation, LocalSite, Program, Rows
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.sgld import Integrator
from pyro_lift.inference.stores.store import ThetaStore

__all__ = [
    "PhiUpdate",
    "SGLDGibbsInfo",
    "SGLDGibbsState",
    "Settings",
    "Structure",
    "at_start",
    "first_visit",
    "init",
    "per_coordinate",
    "plate_dim_of",
    "regrouped",
    "task_rows",
    "task_values",
    "unpacked",
]


PhiUpdate = Literal["gibbs", "langevin"]


class SGLDGibbsState(NamedTuple):
    """What the next visit needs beside the store of theta_i and the table of gradients.

    Attributes:
        step: visits made.
        phi: global sites, unconstrained.
        sums: S per normal pair, in float64.
        J: sum of the stored gradients per global site, in float64 (``accumulator="table"`` only).
        second_moment: running mean square of the likelihood gradient per local family.
        momentum: running mean of the gradient per normal pair, in the SGD warm-up only.
    """

    step: int
    phi: dict[str, Tensor]
    sums: dict[str, Tensor]
    J: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    momentum: dict[str, Tensor]


class SGLDGibbsInfo(NamedTuple):
    """What a reader of the log wants to know of one visit."""

    tasks: tuple[int, ...]
    log_likelihood: Tensor
    grad_norm: Tensor
    step_size: float
    refused: bool
    phase: str


@dataclass(frozen=True)
class Settings:
    """How a visit moves; see :class:`pyro_lift.inference.gibbs.kernel.SGLDGibbs` for each."""

    step_size: Schedule
    phi_step_size: Schedule
    phi_update: PhiUpdate = "gibbs"
    accumulator: Accumulator = "exact"
    single_scale: Literal["N", "1"] = "N"
    integrator: Integrator = "exponential"
    temperature: float = 1.0
    n_inflate: float = 1.0
    decay: float | None = None
    damping: float = 0.1
    theta_steps_per_visit: int = 1
    max_grad_norm: float | None = None
    sgd_step_size: Schedule = field(default_factory=lambda: constant(1e-3))
    site_step_scale: Mapping[str, float] = field(default_factory=dict)
    site_temperature: Mapping[str, float] = field(default_factory=dict)


@dataclass
class Structure:
    """What was learned about the program at set-up.

    Attributes:
        num_tasks: N.
        block_size: B.
        sequential: whether the task plate is iterated over (sites named by task) or vectorised.
        pairs: global sites that are the mean of one normal local family.
        reasons: for each other global site, why not.
        coupled: local families whose distribution depends on another local site.
        reruns: whether the gradient of phi needs a second run after theta has moved: the likelihood depends on a
            global site directly, or local sites depend on each other.
        start: unconstrained starting value of each pair's local family.
        layouts: what a task's row is made of; filled at the first visit.
        workspaces: buffers per pair whose vectors are long (:mod:`~pyro_lift.inference.gibbs.long_vectors`).
        pass_size: tasks that one run of the program takes; fewer than B where several runs make a visit, 0 for B.
    """

    num_tasks: int
    block_size: int
    sequential: bool
    pairs: dict[str, NormalPair]
    reasons: dict[str, str]
    coupled: frozenset[str]
    reruns: bool
    start: dict[str, Tensor]
    layouts: dict[int | None, tuple[LocalSite, ...]] = field(default_factory=dict)
    table: GradientTable | None = None
    workspaces: dict[str, Workspace] = field(default_factory=dict)
    pass_size: int = 0

    def __post_init__(self) -> None:
        self.pass_size = self.pass_size or self.block_size

    def workspace(self, site: str, like: Tensor) -> Workspace:
        """The buffers of one pair."""
        if site not in self.workspaces:
            self.workspaces[site] = Workspace(like)
        return self.workspaces[site]

    @property
    def pair_of(self) -> dict[str, NormalPair]:
        """The pairs by local family."""
        return {pair.family: pair for pair in self.pairs.values()}


def init(structure: Structure, phi: Rows) -> SGLDGibbsState:
    """A chain whose theta_i all stand at phi's own start: S = N phi, and J = 0 is exactly right."""
    sums = {name: structure.num_tasks * structure.start[pair.family].double() for name, pair in structure.pairs.items()}
    J = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in phi.items()}
    return SGLDGibbsState(0, dict(phi), sums, J if structure.table is not None else {}, {}, {})


def per_coordinate(square: Tensor, family: str, plate_dim: int | None, structure: Structure) -> Tensor:
    """Mean square by coordinate, over the block; by family alone where the tasks' shapes may differ."""
    if structure.sequential:
        return square if family in structure.pair_of else square.mean()
    return square.mean(plate_dim, keepdim=True)


def plate_dim_of(run: Evaluation, family: str) -> int:
    """Return the dimension of the task plate in a stacked local site."""
    plate_dim = run.locals[family].plate_dim
    assert plate_dim is not None
    return plate_dim


def regrouped(run: Evaluation, moved: Mapping[str, Tensor]) -> dict[int | None, dict[str, Tensor]]:
    """Values by site name to values by task and family."""
    grouped: dict[int | None, dict[str, Tensor]] = {}
    for name, site in run.locals.items():
        grouped.setdefault(site.task, {})[site.family] = moved[name]
    return grouped


def at_start(structure: Structure, rows: Rows) -> Rows:
    """Return the rows with every paired family at its starting value."""
    return {
        family: torch.broadcast_to(structure.start[family], value.shape).clone() if family in structure.start else value
        for family, value in rows.items()
    }


def task_values(
    structure: Structure, store: ThetaStore, tasks: tuple[int, ...]
) -> dict[int | None, dict[str, Tensor]] | None:
    """The block's local values by task and family; None when one of its tasks was never visited."""
    if not all(store.has(task) for task in tasks):
        return None
    rows = store.read(tasks)
    if structure.sequential:
        return {task: unpacked(structure.layouts[task], row) for task, row in zip(tasks, rows, strict=True)}
    layout = structure.layouts[None]
    parts = [unpacked(layout, row) for row in rows]
    return {None: {s.family: torch.stack([part[s.family] for part in parts], s.plate_dim) for s in layout}}


def unpacked(layout: tuple[LocalSite, ...], row: Tensor) -> dict[str, Tensor]:
    """Return the local values of one task, by family, as views of its flat row."""
    if len(layout) == 1:
        return {layout[0].family: row.view(layout[0].shape)}
    parts = row.split([site.shape.numel() for site in layout])
    return {site.family: part.view(site.shape) for site, part in zip(layout, parts, strict=True)}


def task_rows(structure: Structure, tasks: tuple[int, ...], values: Mapping[int | None, Rows]) -> list[Tensor]:
    """Return one flat row per task from the local values by task and family."""
    rows = []
    for k, task in enumerate(tasks):
        layout = structure.layouts[task if structure.sequential else None]
        source = values[task if structure.sequential else None]
        parts = [
            (source[s.family] if structure.sequential else source[s.family].select(s.plate_dim, k)).reshape(-1)
            for s in layout
        ]
        # A task's only site is a vector of its own already; a block's rows are views of one.
        alone = parts[0] if structure.sequential else parts[0].clone()
        rows.append(alone if len(parts) == 1 else torch.cat(parts))
    return rows


def first_visit(
    state: SGLDGibbsState,
    program: Program,
    structure: Structure,
    store: ThetaStore,
    index: Tensor,
    generator: torch.Generator | None,
) -> Mapping[int | None, Rows]:
    """Learn the block's layout and give its new tasks their start: phi's start for paired families."""
    tasks = tuple(index.tolist())
    run = program.run(state.phi, {}, index, generator, want_grad=False)
    for pair in structure.pairs.values():
        conjugate.check_pair(pair, run)
    for site in run.locals.values():
        dim = -1 if site.plate_dim is None else site.plate_dim
        shape = site.leaf.shape if structure.sequential else site.leaf.select(dim, 0).shape
        known = structure.layouts.get(site.task, ())
        if site.family not in {s.family for s in known}:
            structure.layouts[site.task] = (*known, LocalSite(site.family, shape, dim))
    values = {task: at_start(structure, rows) for task, rows in values_of(run).items()}
    rows = task_rows(structure, tasks, values)
    new = [k for k, task in enumerate(tasks) if not store.has(task)]
    store.write([tasks[k] for k in new], [rows[k] for k in new])
    found = task_values(structure, store, tasks)
    assert found is not None
    return found
