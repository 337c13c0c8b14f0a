"""The SGLD-Gibbs kernel in Pyro's MCMC interface."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor

from pyro_lift.inference import sgld
from pyro_lift.inference.admission import check_common, coupled_families, refuse_discrete, site_factors, site_transforms
from pyro_lift.inference.gibbs import shared_visit, visit
from pyro_lift.inference.gibbs.accumulator import Accumulator, GradientTable, langevin_limit
from pyro_lift.inference.gibbs.conjugate import NormalPair, find_pairs
from pyro_lift.inference.gibbs.state import (
    PhiUpdate,
    Settings,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Structure,
    init,
    task_values,
)
from pyro_lift.inference.gibbs.warmup import end_of_sgd
from pyro_lift.inference.kernel import Kernel, Model, log
from pyro_lift.inference.program import Evaluation, LocalSite, Program, depends
from pyro_lift.inference.schedules import Schedule, as_schedule, constant
from pyro_lift.inference.sgld import Integrator
from pyro_lift.inference.stability import (
    DEFAULT_SHARE,
    check_prior_steps,
    curvature_limit,
    default_step,
    measured_curvature,
    step_too_large,
)
from pyro_lift.inference.stores.store import ReadsAhead, ThetaStore, make_store
from pyro_lift.support import distributed
from pyro_lift.support.options import check_choice, check_number, named_options

__all__ = ["SGLDGibbs", "Scan", "probed"]


Scan = Literal["round_robin", "random"]


def probed(schedule: Schedule) -> list[float]:
    """A schedule by a few of its values."""
    return [schedule(step) for step in (0, 1, 10, 100, 1_000, 10_000, 100_000)]


class SGLDGibbs(Kernel):
    r"""SGLD-Gibbs for hierarchical programs: the task plate is the Gibbs block (Eq. 9-11).

    The kernel reads the program: sites outside the plate are global (phi), latent sites inside it local (theta and
    whatever else belongs to one task), observed sites the likelihood. A visit chooses a block of tasks, moves their
    theta by SGLD given phi, and then phi given all theta.

    Args:
        model: a Pyro program with ``pyro.plate(plate, N, subsample_size=1)``, vectorised or iterated over (tasks of
            unequal shapes). A plate without ``subsample_size`` is one block of all N tasks when vectorised.
        plate: name of the task plate.
        step_size: eta of Eq. 10: eta/2 times the gradient of the full-data log density, sqrt(eta) noise; a number
            or a function of the number of visits. None measures the curvature at the start and takes a twentieth of
            the largest stable step (small programs).
        phi_update: ``"gibbs"`` draws phi exactly, for phi normal and theta normal around it; ``"langevin"`` takes
            the step of Eq. 9 with an accumulator.
        accumulator: of the Langevin step: ``"exact"``, ``"table"`` (the paper's), ``"single"``;
            see :mod:`pyro_lift.inference.gibbs.accumulator`.
        single_scale: ``"N"`` or ``"1"``, the factor on a single task's gradient.
        phi_step_size: eta of Eq. 9; None takes ``step_size``.
        integrator: of theta's step: ``"exponential"`` (exact for normal priors) or ``"euler"`` (the paper's).
        temperature: T, multiplies the variance of all noise, of phi and of theta.
        n_inflate: power on the likelihood.
        block_size: B, tasks per visit; None takes the plate's own ``subsample_size``.
        scan: ``"round_robin"`` or ``"random"``.
        share: whether the processes of ``torchrun`` share each visit, every one keeping the theta of its own tasks
            (:mod:`~pyro_lift.inference.gibbs.shared_visit`). The plate's ``subsample_size`` is then what one pass
            takes, and ``block_size`` what all processes visit together; None is one pass each.
        thinning: visits per draw, after the warm-up.
        theta_steps_per_visit: SGLD steps of the block before phi moves.
        preconditioner: None or ``"rms"``: adapts in the warm-up, frozen after it, one for all tasks.
        decay: of the preconditioner's moving average.
        damping: of the preconditioner, relative to its mean.
        sgd_steps: of the warm-up's visits, how many are joint training by Adam of one vector shared by all tasks.
            They need a normal pair; the chain starts where they end.
        sgd_step_size: learning rate of those.
        max_grad_norm: likelihood gradients above it are scaled down to it and counted as divergences; it changes
            the target.
        site_step_scale: factor on the step size by local family, e.g. ``{"head": 10.0}``.
        site_temperature: factor on the temperature by local family; ``{"head": 0.0}`` moves heads to their mode
            while everything else is sampled.
        store: where theta lives between visits: ``"device"``, ``"host"`` (pinned memory), ``"disk"`` (a file, the next
            block read ahead), ``"auto"`` (the first of these that fits), or a store.
        init_strategy: where sites start. Local sites centred on a global one start at it.
        check_stability: refuse step sizes that cannot be stable.

    Raises:
        ValueError, TypeError: an option out of range or unknown; at set-up, a program that this kernel cannot
            sample, with the reason and the way out.
        DivergedError: a loss or gradient that is not finite; names task and step, the last good state is kept.

    References:
        Learning to fine-tune: Bayesian meta-learning of LoRA adapters (LiFT), section 2.3.
    """

    @named_options
    def __init__(
        self,
        model: Model,
        plate: str = "tasks",
        *,
        step_size: float | Schedule | None = None,
        phi_update: PhiUpdate = "gibbs",
        accumulator: Accumulator = "exact",
        single_scale: Literal["N", "1"] = "N",
        phi_step_size: float | Schedule | None = None,
        integrator: Integrator = "exponential",
        temperature: float = 1.0,
        n_inflate: float = 1.0,
        block_size: int | None = None,
        scan: Scan = "round_robin",
        share: bool = False,
        thinning: int = 1,
        theta_steps_per_visit: int = 1,
        preconditioner: Literal["rms"] | None = None,
        decay: float = 0.99,
        damping: float = 0.1,
        sgd_steps: int = 0,
        sgd_step_size: float | Schedule = 1e-3,
        max_grad_norm: float | None = None,
        site_step_scale: Mapping[str, float] | None = None,
        site_temperature: Mapping[str, float] | None = None,
        store: str | ThetaStore = "auto",
        init_strategy: Callable[..., Tensor] = init_to_mean,
        check_stability: bool = True,
    ) -> None:
        super().__init__(model, thinning, init_strategy)
        check_common(temperature, n_inflate, integrator, preconditioner, decay, damping)
        check_choice("phi_update", phi_update, ["gibbs", "langevin"])
        check_choice("accumulator", accumulator, ["exact", "table", "single"])
        check_choice("single_scale", single_scale, ["N", "1"])
        check_choice("scan", scan, ["round_robin", "random"])
        if isinstance(store, str):
            check_choice("store", store, ["auto", "device", "host", "disk"])
        check_number("theta_steps_per_visit", theta_steps_per_visit, least=1, open_below=False, whole=True)
        check_number("sgd_steps", sgd_steps, open_below=False, whole=True)
        if block_size is not None:
            check_number("block_size", block_size, least=1, open_below=False, whole=True)
        if max_grad_norm is not None:
            check_number("max_grad_norm", max_grad_norm)
        step_scale, temperatures = site_factors(site_step_scale, site_temperature)
        self.plate = plate
        self.block_size = block_size
        self.scan: Scan = scan
        self.share = share
        self.sgd_steps = sgd_steps
        self.store_kind = store
        self.check_stability = check_stability
        self._schedule = None if step_size is None else as_schedule(step_size)
        self._phi_schedule = None if phi_step_size is None else as_schedule(phi_step_size)
        self._settings = partial(
            Settings,
            phi_update=phi_update,
            accumulator=accumulator,
            single_scale=single_scale,
            integrator=integrator,
            temperature=temperature,
            n_inflate=n_inflate,
            decay=decay if preconditioner == "rms" else None,
            damping=damping,
            theta_steps_per_visit=theta_steps_per_visit,
            max_grad_norm=max_grad_norm,
            sgd_step_size=as_schedule(sgd_step_size),
            site_step_scale=step_scale,
            site_temperature=temperatures,
        )
        self.settings = self._settings(step_size=constant(1.0), phi_step_size=constant(1.0))
        self.state = SGLDGibbsState(0, {}, {}, {}, {}, {})
        self.store: ThetaStore | None = None
        self.structure: Structure | None = None
        self._program: Program | None = None
        self._info: SGLDGibbsInfo | None = None
        self._report: dict[str, float | str] = {}

    def __getstate__(self) -> dict[str, Any]:
        # A file on the disk belongs to one process; set-up makes a store anew.
        return {**super().__getstate__(), "store": None}

    # -------------------------------------------------------------------------------------------- set-up

    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the program, check it and the step sizes, and put the chain at its start."""
        if self.sgd_steps > warmup_steps:
            raise ValueError(
                f"sgd_steps={self.sgd_steps} is more than the warm-up's {warmup_steps} visits; the SGD visits are the "
                "first part of the warm-up. Raise warmup_steps or lower sgd_steps."
            )
        self._begin(warmup_steps)
        if self.share:
            distributed.join()
            assert self._generator is not None
            self._generator.manual_seed(distributed.from_first(self._generator.initial_seed()))
        program = self._program = Program(self.model, self.plate, args, kwargs, self.init_strategy)
        peeked, subsampled = program.peek(self._generator)
        _check_plate(self.plate, peeked)
        refuse_discrete(peeked)
        num_tasks = peeked.plates[self.plate].size
        sequential = any(site.task is not None for site in peeked.locals.values())
        declared = peeked.plates[self.plate].taken
        block = self._block(num_tasks, declared, subsampled[self.plate], sequential)
        pass_size = min(declared, block) if self.share else block
        index = torch.arange(pass_size)
        run = program.run(self._preset or {}, {}, index, self._generator)
        _check_block(run)
        self.transforms = {k: t for k, t in site_transforms(run).items() if k in run.globals}
        pairs, reasons = find_pairs(program, run, num_tasks - 1 - index, self._generator)
        self._check_phi_update(pairs, reasons, num_tasks, block)
        start = {pair.family: run.globals[name].leaf.detach().clone() for name, pair in pairs.items()}
        self.structure = Structure(
            num_tasks,
            block,
            sequential,
            pairs,
            reasons,
            coupled_families(run.locals),
            _reruns(run),
            start,
            pass_size=pass_size,
        )
        if self.share:
            shared_visit.check_share(self.structure, self.settings, self.scan)
        if self.settings.phi_update == "langevin" and self.settings.accumulator == "table":
            self.structure.table = GradientTable(num_tasks // block)
        phi = {name: site.leaf.detach().clone() for name, site in run.globals.items()}
        self._noise_from(phi)
        self._start_log_likelihood = float(run.log_likelihood.detach())
        self._check_saddle(run)
        self._set_steps(run)
        rows = [site.leaf for site in run.locals.values()]
        row_bytes = sum(x.numel() * x.element_size() for x in rows) // pass_size
        device = next((x.device for x in rows), torch.device("cpu"))
        self.store = make_store(self.store_kind, num_tasks, row_bytes, device)
        self.state = init(self.structure, phi)
        if self.share:
            norms = {f"norm of {name}": float(value.norm()) for name, value in phi.items()}
            shared_visit.check_alike({**_flat(self.fingerprint()), **norms})

    def _block(self, num_tasks: int, declared: int, subsampled: bool, sequential: bool) -> int:
        if self.share:
            return self.block_size or declared * distributed.process()[1]
        if subsampled:
            if self.block_size not in (None, declared):
                raise ValueError(
                    f"block_size={self.block_size}, but the program takes subsample_size={declared} of the plate "
                    f"{self.plate!r}. Give the plate subsample_size={self.block_size}, or leave block_size out."
                )
            return declared
        if self.block_size is not None:
            if self.block_size > num_tasks:
                raise ValueError(f"block_size={self.block_size} is more than the plate's {num_tasks} tasks.")
            return self.block_size
        # A program that iterates over its plate takes any indices; a vectorised one that never asked for a
        # subsample may hold the data of all tasks, so it is one block.
        return 1 if sequential else num_tasks

    def _check_phi_update(
        self, pairs: Mapping[str, NormalPair], reasons: Mapping[str, str], num_tasks: int, block: int
    ) -> None:
        settings = self.settings
        if not pairs and not reasons:
            raise ValueError(
                f"the program has no latent site outside the plate {self.plate!r}: its tasks share nothing. "
                "Use SGLD for independent tasks."
            )
        exact = settings.phi_update == "gibbs" or settings.accumulator == "exact"
        if exact and reasons:
            site, reason = next(iter(reasons.items()))
            name = "gibbs" if settings.phi_update == "gibbs" else "exact"
            raise ValueError(
                f"{name!r} needs every global site normal and the mean of one normal local family, and {site!r} is "
                f'not: {reason}. Use phi_update="langevin", accumulator="table", which works for any program.'
            )
        if settings.accumulator == "table" and settings.phi_update == "langevin" and num_tasks % block:
            raise ValueError(
                f'accumulator="table" stores one gradient per block, and {num_tasks} tasks are no whole number of '
                f"blocks of {block}. Use a block_size that divides {num_tasks}."
            )
        if self.sgd_steps and not pairs:
            site, reason = next(iter(reasons.items()))
            raise ValueError(
                f"sgd_steps={self.sgd_steps} trains one vector shared by all tasks, which needs a normal local family "
                f"around a global site; {site!r} is none: {reason}. Leave sgd_steps at 0."
            )

    def _check_saddle(self, run: Evaluation) -> None:
        """Adapters at zero have gradients that are exactly zero, and no chain would ever leave."""
        drift = run.drift(run.locals, self.structure.coupled if self.structure else (), self.settings.n_inflate)
        sgld.check_finite(drift, 0, (0,))
        if run.log_likelihood.requires_grad and all(not g.any() for g in drift.gradient.values()):
            raise ValueError(
                "the likelihood's gradient is exactly zero at the start, for every local site: a saddle, as adapters "
                "at zero are. Start elsewhere: init_strategy=init_to_value(values={'phi': adapter.initial}) or "
                "MCMC(..., initial_params={'phi': ...})."
            )

    def _set_steps(self, run: Evaluation) -> None:
        """Choose or check the step sizes, and report them without dimensions."""
        assert self.structure is not None
        settings, structure = self.settings, self.structure
        curvature = measured_curvature(run, settings.n_inflate, wanted=self._schedule is None)
        schedule = self._schedule or default_step(curvature)
        eta = schedule(0)
        phi_schedule = self._phi_schedule
        if phi_schedule is None:
            phi_schedule = schedule
            if self._schedule is None and structure.pairs and settings.phi_update == "langevin":
                limits = [
                    langevin_limit(settings.accumulator, p, structure.num_tasks, structure.block_size)
                    for p in structure.pairs.values()
                ]
                phi_schedule = constant(DEFAULT_SHARE * min(limits))
        self.settings = self._settings(step_size=schedule, phi_step_size=phi_schedule)
        self._report = self._dimensionless(eta, phi_schedule(0), curvature)
        log.info("dimensionless steps at the start: %s", self._report)
        if not self.check_stability:
            return
        if settings.integrator == "euler" and settings.decay is None:
            check_prior_steps(run, eta, settings.site_step_scale)
            limit = curvature_limit(curvature)
            if eta >= limit:
                raise ValueError(step_too_large("step_size", eta, limit, "4 / (largest curvature at the start)"))
        if settings.phi_update == "langevin":
            for pair in structure.pairs.values():
                limit = langevin_limit(settings.accumulator, pair, structure.num_tasks, structure.block_size)
                if settings.accumulator != "single" and phi_schedule(0) >= limit:
                    formula = "4 β²/N" if settings.accumulator == "exact" else "π² β² B/N²"
                    raise ValueError(step_too_large("phi_step_size", phi_schedule(0), limit, formula))

    def _dimensionless(self, eta: float, phi_eta: float, curvature: float | None) -> dict[str, float | str]:
        assert self.structure is not None
        report: dict[str, float | str] = {
            "step_size": eta,
            "curvature": math.nan if curvature is None else curvature,
            "phi_update": self.settings.phi_update,
            "block_size": float(self.structure.block_size),
            "tasks": float(self.structure.num_tasks),
            "thinning": float(self.thinning),
        }
        for name, pair in self.structure.pairs.items():
            variance = float(pair.local_variance.min())
            report[f"a_theta ({name})"] = eta / (2.0 * variance)
            report[f"a_phi ({name})"] = (
                0.5 * phi_eta * (self.structure.num_tasks / variance + float(pair.prior_precision.max()))
                if self.settings.phi_update == "langevin"
                else 0.0
            )
        return report

    def report(self) -> dict[str, float | str]:
        """Step sizes without dimensions: below 2 the Euler step is stable, far below 1 its bias is small.

        ``a_theta`` = eta / (2 beta^2): a theta_i forgets phi in 1/a_theta visits. ``a_phi`` is the same of Eq. 9.
        """
        return dict(self._report)

    # -------------------------------------------------------------------------------------------- sampling

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where phi starts, unconstrained."""
        return dict(self.state.phi)

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._preset = dict(params)

    @property
    def phase(self) -> Literal["sgd", "burn-in", "sample"]:
        """Of the next visit: SGD warm-up, burn-in, or sampling."""
        if self.state.step < self.sgd_steps:
            return "sgd"
        return "burn-in" if self.state.step < self._warmup_steps else "sample"

    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One visit in the warm-up, ``thinning`` of them after it; returns phi."""
        self.state = self.state._replace(phi=dict(params))
        phase = self.phase
        for _ in range(self.thinning if phase == "sample" else 1):
            self._visit()
        if phase == "sample" and self._info is not None:
            self._keep(self._info, self._info.tasks[0])
        return dict(self.state.phi)

    def _visit(self) -> None:
        assert self._program is not None and self.structure is not None and self.store is not None
        if self.sgd_steps and self.state.step == self.sgd_steps:
            self.state = end_of_sgd(self.state, self.structure, self.store)
        if self.share:
            self._shared_visit()
            return
        block = self._next_block()
        if isinstance(self.store, ReadsAhead) and self.scan == "round_robin":
            after: list[int] = ((block + len(block)) % self.structure.num_tasks).tolist()
            self.store.prefetch([*block.tolist(), *after])
        self.state, self._info = visit.step(
            self.state,
            self._program,
            self.structure,
            self.store,
            block,
            self.settings,
            phase=self.phase,
            generator=self._generator,
            noise_generator=self._noise_generator,
        )

    def _shared_visit(self) -> None:
        assert self._program is not None and self.structure is not None and self.store is not None
        assert self._generator is not None
        block = shared_visit.block_at(self.structure, self.state.step)
        if isinstance(self.store, ReadsAhead):
            after = shared_visit.block_at(self.structure, self.state.step + 1)
            own = [shared_visit.own_passes(self.structure, part) for part in (block, after)]
            self.store.prefetch([task for passes in own for tasks in passes for task in tasks.tolist()])
        self.state, self._info = shared_visit.visit(
            self.state,
            self._program,
            self.structure,
            self.store,
            block,
            self.settings,
            phase=self.phase,
            seed=self._generator.initial_seed(),
        )

    def _next_block(self) -> Tensor:
        assert self.structure is not None
        N, B = self.structure.num_tasks, self.structure.block_size
        if self.scan == "round_robin":
            step: int = self.state.step
            return (step * B + torch.arange(B)) % N
        if self.structure.table is not None:
            block = torch.randint(N // B, (), generator=self._generator)
            return block * B + torch.arange(B)
        return torch.randperm(N, generator=self._generator)[:B]

    def state_dict(self) -> dict[str, Any]:
        """See the base class; also what was learned of the tasks' layouts."""
        assert self.structure is not None
        layouts = [
            [task, [[site.family, list(site.shape), site.plate_dim] for site in sites]]
            for task, sites in self.structure.layouts.items()
        ]
        if self.share:  # each process has seen its own tasks
            known = {task: [task, sites] for found in distributed.collected(layouts) for task, sites in found}
            layouts = [known[task] for task in sorted(known, key=lambda task: -1 if task is None else task)]
        return {**super().state_dict(), "layouts": layouts, "start": dict(self.structure.start)}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """See the base class."""
        assert self.structure is not None
        super().load_state_dict(tree)
        here = next(iter(self.state.phi.values())).device
        self.structure.start = {name: value.to(here) for name, value in tree["start"].items()}
        self.structure.layouts = {
            task: tuple(LocalSite(family, torch.Size(shape), dim) for family, shape, dim in sites)
            for task, sites in tree["layouts"]
        }

    def rows(self) -> dict[str, Any]:
        """The tasks' weights, and the stored gradients of the table where there is one."""
        assert self.structure is not None and self.store is not None
        table = self.structure.table
        if self.share:
            return {"store": shared_visit.OwnRows(self.store, self.structure)}
        return {"store": self.store} | ({} if table is None else {"table": table})

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for the chain to be the same: options, sites, tasks, the likelihood at the start."""
        assert self.structure is not None
        options = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(self.settings)}
        options |= {name: probed(value) for name, value in options.items() if callable(value)}
        options |= {"scan": self.scan, "thinning": self.thinning, "sgd_steps": self.sgd_steps}
        if self.share:  # its streams of noise are others
            options["share"] = True
        return {
            "kernel": "SGLDGibbs",
            "options": {**options, "warmup_steps": self._warmup_steps},
            "sites": {name: list(value.shape) for name, value in self.state.phi.items()},
            "num_tasks": self.structure.num_tasks,
            "block_size": self.structure.block_size,
            "start_log_likelihood": self._start_log_likelihood,
        }

    def theta(self, task: int) -> dict[str, Tensor]:
        """The latest values of one task's local sites, by family, unconstrained."""
        if self.structure is None or self.store is None:
            raise RuntimeError("the kernel has not run yet.")
        values = task_values(self.structure, self.store, (task,))
        if values is None:
            elsewhere = " by this process; another may keep it" if self.share and distributed.process()[1] > 1 else ""
            raise KeyError(f"task {task} was never visited{elsewhere}.")
        if self.structure.sequential:
            return dict(values[task])
        layout = {site.family: site.plate_dim for site in self.structure.layouts[None]}
        return {family: value.squeeze(layout[family]) for family, value in values[None].items()}

    def logging(self) -> dict[str, str]:
        """For Pyro's progress bar."""
        return self._log(self.state.step, self._info, self._info.phase if self._info else "")


def _flat(facts: Mapping[str, Any], at: str = "") -> dict[str, Any]:
    """Nested plain data by dotted names, as JSON gives it back."""
    found: dict[str, Any] = {}
    for name, value in facts.items():
        inner = _flat(value, f"{at}{name}.") if isinstance(value, Mapping) else {f"{at}{name}": value}
        found |= inner
    return found


def _check_plate(plate: str, run: Evaluation) -> None:
    if plate not in run.plates:
        known = ", ".join(map(repr, run.plates)) or "none"
        raise ValueError(
            f"the program has no plate named {plate!r} (its plates: {known}). Name the task plate with "
            f'SGLDGibbs(model, plate="..."), and write it as pyro.plate("...", N, subsample_size=1).'
        )
    if not run.locals:
        raise ValueError(
            f"the plate {plate!r} holds no latent site, so there is nothing to sample for a task. Sample each task's "
            f'own variable inside it: with pyro.plate({plate!r}, N, subsample_size=1): pyro.sample("theta", ...).'
        )


def _check_block(run: Evaluation) -> None:
    for site in run.locals.values():
        if site.scale != 1.0:
            raise ValueError(
                f"the local site {site.name!r} stands inside a second subsampled plate (scale {site.scale:g}): its "
                "value would belong to other rows at each visit. Take it out of that plate."
            )


def _reruns(run: Evaluation) -> bool:
    direct = any(depends(run.log_likelihood, site.leaf) for site in run.globals.values())
    return direct or bool(coupled_families(run.locals))
