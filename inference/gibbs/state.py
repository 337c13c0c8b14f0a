"""State and parts of an SGLD-Gibbs chain: what moves, what is fixed at set-up, and what is kept beside both."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.accumulator import Accumulator, GradientTable
from pyro_lift.inference.gibbs.conjugate import NormalPair
from pyro_lift.inference.gibbs.dense import CorrelationSite
from pyro_lift.inference.gibbs.gaussian_tasks import GaussianTasks
from pyro_lift.inference.gibbs.long_vectors import Workspace
from pyro_lift.inference.gibbs.regression import Coefficients, Regression
from pyro_lift.inference.gibbs.scales import ScaleSite
from pyro_lift.inference.program import LocalSite, Program, Rows
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.sgld import Integrator
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.inference.watch import Watch

__all__ = [
    "Cache",
    "Chain",
    "ControlVariates",
    "Phase",
    "PhiUpdate",
    "SGLDGibbsInfo",
    "SGLDGibbsState",
    "Settings",
    "Streams",
    "Structure",
    "ThetaUpdate",
    "Translation",
    "TranslationKind",
    "init",
    "kept_state",
]


PhiUpdate = Literal["auto", "gibbs", "langevin", "nuts"]
Phase = Literal["sgd", "burn-in", "sample"]
ThetaUpdate = Literal["auto", "exact", "sgld", "underdamped", "mala", "hmc"]
TranslationKind = Literal["auto", "saga", "falling", "none"]
#: Power with which the step of ``translation="falling"`` falls with the rounds.
FALL = 0.6


class SGLDGibbsState(NamedTuple):
    """The state of the chain, beside the store of theta_i and the table of gradients.

    Attributes:
        step: visits made.
        phi: global sites, unconstrained.
        sums: S per normal pair, in float64.
        J: sum of the stored gradients per global site, in float64 (``accumulator="table"`` only).
        second_moment: running mean square of the likelihood gradient per local family.
        momentum: running mean of the gradient per normal pair, in the SGD warm-up only.
        offset: theta minus the stored theta per normal pair, in float64; empty where nothing was shifted.
        gradients: R per normal pair, in float64 (``translation="saga"`` only).
        squares: sum of (theta_i - phi)^2 at this phi, per normal pair of unknown scale, in float64; of
            (theta_i - phi)(theta_i - phi)^T where its coordinates are correlated. Beside them C and Q of the
            regressions (:mod:`~pyro_lift.inference.gibbs.regression`), by their own names.
        widths: logarithm of the width of the proposal of the scaling move, per scale site.
        tuned: what steps of theta are tuned by (:mod:`~pyro_lift.inference.gibbs.metropolis`, `.step_adaptation`).
    """

    step: int
    phi: dict[str, Tensor]
    sums: dict[str, Tensor]
    J: dict[str, Tensor]
    second_moment: dict[str, Tensor]
    momentum: dict[str, Tensor]
    offset: dict[str, Tensor] = {}  # noqa: RUF012 - a NamedTuple's default; states are never changed in place
    gradients: dict[str, Tensor] = {}  # noqa: RUF012
    squares: dict[str, Tensor] = {}  # noqa: RUF012
    widths: dict[str, Tensor] = {}  # noqa: RUF012
    tuned: dict[str, Tensor] = {}  # noqa: RUF012


class SGLDGibbsInfo(NamedTuple):
    """Diagnostics of one visit.

    Attributes:
        tasks: of the block.
        log_likelihood: of the block's minibatches, scaled to their tasks' rows; summed.
        grad_norm: Euclidean norm of the gradient in all local sites of the block.
        step_size: eta.
        clipped: whether the gradient was scaled down to ``max_grad_norm``, or shortened by ``max_move``.
        phase: of the visit.
        acceptance: mean probability with which the block's proposals were taken; NaN where they are not tested.
        diverged: whether a trajectory left the region in which its step is stable.
    """

    tasks: tuple[int, ...]
    log_likelihood: Tensor
    grad_norm: Tensor
    step_size: float | Tensor
    clipped: bool | Tensor
    phase: str
    acceptance: float | Tensor = math.nan
    diverged: bool = False


@dataclass(frozen=True)
class Settings:
    """Options of a visit; see :class:`pyro_lift.inference.gibbs.kernel.SGLDGibbs` for each.

    The step sizes are None until the plan has chosen them.
    """

    step_size: Schedule | None = None
    phi_step_size: Schedule | None = None
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
    max_move: float | None = None
    sgd_step_size: Schedule = field(default_factory=lambda: constant(1e-3))
    sgd_weights: tuple[float, ...] | None = None
    task_step_scale: tuple[float, ...] | None = None
    site_step_scale: Mapping[str, float] = field(default_factory=dict)
    site_temperature: Mapping[str, float] = field(default_factory=dict)
    translation: TranslationKind = "none"
    translation_step_size: Schedule | None = None
    theta_update: ThetaUpdate = "sgld"
    leapfrog_steps: int = 10
    site_update: Mapping[str, str] = field(default_factory=dict)
    momentum: float = 0.9
    control_variates: int = 0
    #: Visits of the warm-up through which steps that nobody chose adapt; 0 where they do not.
    adapts: int = 0

    @property
    def is_untested(self) -> bool:
        """Whether theta moves by steps that no test corrects, whose size makes their bias and has a limit."""
        return self.theta_update in ("auto", "sgld", "underdamped")

    @property
    def limited_as(self) -> Integrator:
        """The integrator whose limit theta's step has: with momentum it is Euler's, the prior included."""
        return "euler" if self.theta_update == "underdamped" else self.integrator

    def eta(self, step: int) -> float:
        """Return the step size of theta at a visit."""
        assert self.step_size is not None
        return self.step_size(step)

    def phi_eta(self, step: int) -> float:
        """Return the step size of the Langevin update of phi at a visit."""
        assert self.phi_step_size is not None
        return self.phi_step_size(step)


@dataclass(frozen=True)
class Structure:
    """The structure of a program, as it was read at set-up; it does not change.

    Attributes:
        num_tasks: N.
        block_size: B.
        sequential: whether the task plate is iterated over (sites named by task) or vectorised.
        pairs: global sites that are the mean of one normal local family.
        reasons: for each other global site, why it is none.
        coupled: local families whose distribution depends on another local site, in the first tasks.
        reruns: whether the gradient of phi needs a second run after theta has moved, in the first tasks: the likelihood
            depends on a global site directly, or local sites depend on each other.
        pass_size: tasks that one run of the program takes; fewer than B where several runs make a visit.
        long: paired local families that a visit moves piece by piece, together with S
            (:mod:`~pyro_lift.inference.gibbs.long_vectors`).
        checks_steps: whether the step size is held against each task's own curvature, at its first visit.
        exact: whether the chain rests on the pairs: by their exact draw, the exact accumulator, or joint training.
        scales: global sites that are the scale, or the correlations, of pairs' families and enter nowhere else.
        scaling: whether tau and all theta_i - phi are multiplied together (:mod:`~pyro_lift.inference.gibbs.scaling`).
        regressions: local families whose mean is linear in several global sites.
        hold: visits before which the scales stay where they start: until every theta_i has moved, their spread says
            nothing.
    """

    num_tasks: int
    block_size: int
    sequential: bool
    pairs: Mapping[str, NormalPair]
    reasons: Mapping[str, str]
    coupled: frozenset[str]
    reruns: bool
    pass_size: int
    long: frozenset[str] = frozenset()
    exact: bool = True
    checks_steps: bool = False
    scales: Mapping[str, ScaleSite | CorrelationSite] = field(default_factory=dict)
    scaling: bool = False
    hold: int = 0
    regressions: Mapping[str, Regression] = field(default_factory=dict)

    @property
    def regressed(self) -> frozenset[str]:
        """Global sites that a regression draws."""
        return frozenset(name for level in self.regressions.values() for name in level.sites)

    def level_of(self, family: str) -> NormalPair | Regression | None:
        """Return the pair or the regression of a local family; None where it has neither."""
        return self.pair_of.get(family) or self.regressions.get(family)

    @cached_property
    def pair_of(self) -> dict[str, NormalPair]:
        """The pairs by local family."""
        return {pair.family: pair for pair in self.pairs.values()}


@dataclass
class Cache:
    """What a chain learns or reuses on its way: all that mutates, beside the store.

    Attributes:
        start: unconstrained starting value of each pair's local family; moved by the end of the joint training.
        layouts: the sites that a task's row is made of; filled at its first visit.
        table: the stored gradients of the paper's J, where it is used.
        workspaces: buffers per pair whose vectors are long.
        coupled: as of the structure, with what later tasks added.
        reruns: likewise.
        recycle: whether the memory of the S of the state before last is used again. Then a state may be held for one
            visit only; without it, a visit leaves every earlier state as it was.
        watch: of a chain on an accelerator; None has every visit looked at as it is made.
        fresh: whether the block that was read last has a task that was never visited before.
        coefficients: by family of a regression.
    """

    start: dict[str, Tensor]
    layouts: dict[int | None, tuple[LocalSite, ...]] = field(default_factory=dict)
    table: GradientTable | None = None
    workspaces: dict[str, Workspace] = field(default_factory=dict)
    coupled: frozenset[str] = frozenset()
    reruns: bool = False
    recycle: bool = False
    watch: Watch | None = None
    fresh: bool = False
    coefficients: dict[str, Coefficients] = field(default_factory=dict)

    def workspace(self, site: str, like: Tensor) -> Workspace:
        """Return the buffers of one pair, made at the first call."""
        if site not in self.workspaces:
            self.workspaces[site] = Workspace(like, recycle=self.recycle)
        return self.workspaces[site]


@dataclass(frozen=True)
class Translation:
    """The translation move of a chain (:mod:`~pyro_lift.inference.gibbs.translation`).

    Attributes:
        kind: ``"saga"`` or ``"falling"``.
        step_size: eta_d by the number of visits.
        begins: visits before the first translation: those of the joint training.
        round_length: visits in which every task is visited once.
        blocks: N / B: by what one block's part stands for all; a whole number where the last block of a round is short.
        table: the r_i of ``"saga"``; None where one block holds all tasks, and nothing is estimated.
        curvature: h, of the pairs one after another ``[D]``; None for 0.
        wraps: whether a block may go on from the last task to the first.
    """

    kind: TranslationKind
    step_size: Schedule
    begins: int
    round_length: int
    blocks: float
    table: ThetaStore | None = None
    curvature: Tensor | None = None
    wraps: bool = True

    def eta(self, step: int) -> float:
        """Return eta_d at a visit."""
        eta = self.step_size(step)
        return eta * (1.0 + (step - self.begins) / self.round_length) ** -FALL if self.kind == "falling" else eta

    def corrects(self, step: int) -> bool:
        """Return whether the control variate is used at a visit: once every task has been visited."""
        return self.table is not None and step - self.begins >= self.round_length


class ControlVariates(NamedTuple):
    """Control variates of minibatches of rows (:mod:`~pyro_lift.inference.gibbs.control_variates`).

    Attributes:
        store: of each task's reference, the gradient of all its rows there, and the visits that have used it.
        every: visits of a task from one reference to the next.
        program: with whole plates of rows.
    """

    store: ThetaStore
    every: int
    program: Program


class Chain(NamedTuple):
    """All that a visit needs beside the state: set once, at set-up.

    Attributes:
        program: the model, read through its task plate.
        structure: what was learned of it.
        store: where the theta_i live.
        settings: how a visit moves.
        cache: what mutates.
        translation: how phi and all theta are shifted together; None where they are not.
        gaussian: the likelihoods of all tasks, where theta is drawn exactly; None where it is not.
        momenta: where the velocities of theta live, where it has any.
        variates: of minibatches of rows; None without them.
        raw: of a chain that moves phi and all theta together (:mod:`~pyro_lift.inference.gibbs.together`), the families
            that are also moved by their distance from their location; None for any other chain.
    """

    program: Program
    structure: Structure
    store: ThetaStore
    settings: Settings
    cache: Cache
    translation: Translation | None = None
    gaussian: GaussianTasks | None = None
    momenta: ThetaStore | None = None
    variates: ControlVariates | None = None
    raw: frozenset[str] | None = None

    def stores(self) -> dict[str, ThetaStore]:
        """Return every store of the chain, by the name under which it is saved."""
        found: dict[str, ThetaStore | None] = {"store": self.store, "momenta": self.momenta}
        found["gradients"] = None if self.translation is None else self.translation.table
        found["variates"] = None if self.variates is None else self.variates.store
        return {name: store for name, store in found.items() if store is not None}


class Streams(NamedTuple):
    """Sources of randomness of a visit.

    Attributes:
        rows: of minibatch indices, on the host.
        noise: on the device of the values.
        start_seed: of what starting values are drawn with at a task's first visit; None takes torch's global stream.
    """

    rows: torch.Generator | None = None
    noise: torch.Generator | None = None
    start_seed: int | None = None


def _zero_square(pair: NormalPair, S: Tensor) -> Tensor:
    return torch.zeros_like(S) if pair.dense is None else torch.zeros(len(S), len(S), dtype=S.dtype, device=S.device)


def init(structure: Structure, cache: Cache, phi: Rows) -> SGLDGibbsState:
    """Return a chain's state whose theta_i all stand at phi's own start: S = N phi, and J = 0 is exactly right."""
    sums = {name: structure.num_tasks * cache.start[pair.family].double() for name, pair in structure.pairs.items()}
    J = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in phi.items()}
    squares = {name: _zero_square(pair, sums[name]) for name, pair in structure.pairs.items() if pair.is_free}
    for level in structure.regressions.values():
        squares |= level.zeros()
    return SGLDGibbsState(0, dict(phi), sums, J if cache.table is not None else {}, {}, {}, squares=squares)


def kept_state(watch: Watch, new: SGLDGibbsState, old: SGLDGibbsState) -> SGLDGibbsState:
    """Return the state after a visit, or what the visit began with where it or one before it has failed."""
    keep = watch.kept_all
    return SGLDGibbsState(
        new.step,
        keep(new.phi, old.phi),
        keep(new.sums, old.sums),
        keep(new.J, old.J),
        keep(new.second_moment, old.second_moment),
        keep(new.momentum, old.momentum),
        keep(new.offset, old.offset),
        keep(new.gradients, old.gradients),
        keep(new.squares, old.squares),
        keep(new.widths, old.widths),
        keep(new.tuned, old.tuned),
    )
