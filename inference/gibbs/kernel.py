"""The SGLD-Gibbs kernel in Pyro's MCMC interface: it owns the chain, its phase and its streams."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor

from pyro_lift.inference.admission import check_common, site_factors
from pyro_lift.inference.footprint import Need, chain_needs, check_fits
from pyro_lift.inference.gibbs import exact_visit, shared_visit, together
from pyro_lift.inference.gibbs import translation as translations
from pyro_lift.inference.gibbs import visit as gibbs_visit
from pyro_lift.inference.gibbs.account import in_force, steps_of
from pyro_lift.inference.gibbs.accumulator import Accumulator
from pyro_lift.inference.gibbs.blocks import Request, Scan
from pyro_lift.inference.gibbs.flat_facts import flat_facts
from pyro_lift.inference.gibbs.kept_theta import KeptTheta, draws_need
from pyro_lift.inference.gibbs.longest_move import check_limits
from pyro_lift.inference.gibbs.plan import Plan
from pyro_lift.inference.gibbs.rows import task_values
from pyro_lift.inference.gibbs.saved_chain import learned_of, options_of, probed, put_learned
from pyro_lift.inference.gibbs.solved_sites import SiteUpdate, checked_updates
from pyro_lift.inference.gibbs.state import (
    Chain,
    Phase,
    PhiUpdate,
    Settings,
    SGLDGibbsInfo,
    SGLDGibbsState,
    Streams,
    Structure,
    ThetaUpdate,
    TranslationKind,
)
from pyro_lift.inference.gibbs.task_factors import checked_factors
from pyro_lift.inference.gibbs.together_plan import chosen_plan
from pyro_lift.inference.gibbs.warmup import end_of_sgd, sgd_step
from pyro_lift.inference.kernel import Kernel, Model
from pyro_lift.inference.program import Program
from pyro_lift.inference.schedules import Schedule, as_schedule
from pyro_lift.inference.sgld import Integrator
from pyro_lift.inference.stores.store import ThetaStore, read_ahead
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.support import distributed
from pyro_lift.support.options import check_choice, check_number, named_options, renamed_keywords

__all__ = ["SGLDGibbs", "probed"]


@renamed_keywords(share="distributed")
class SGLDGibbs(Kernel):
    r"""SGLD-Gibbs for hierarchical programs: the task plate is the Gibbs block (Eq. 9-11).

    The kernel reads the program: sites outside the plate are global (phi), latent sites inside it local (theta and
    whatever else belongs to one task), observed sites the likelihood. A visit chooses a block of tasks, moves their
    theta by SGLD given phi, and then phi given all theta.

    Args:
        model: a Pyro program with ``pyro.plate(plate, N, subsample_size=1)``, vectorised or iterated over (tasks of
            unequal shapes). A plate without ``subsample_size`` is one block of all N tasks.
        plate: name of the task plate; None is ``"tasks"``, or else the only plate with latent sites inside.
        step_size: eta of Eq. 10: eta/2 times the gradient of the full-data log density, sqrt(eta) noise; a number
            or a function of the number of visits. None measures the curvature and takes a twentieth of the largest
            stable step, for each family, adapted through the warm-up
            (:mod:`pyro_lift.inference.gibbs.step_adaptation`).
        phi_update: ``"gibbs"`` draws phi exactly, for phi normal and theta normal around it, and so a scale of
            theta's that is a site itself (:mod:`~pyro_lift.inference.gibbs.scale_draws`); ``"langevin"`` takes the
            step of Eq. 9 with an accumulator; ``"nuts"`` moves phi and all theta together, in any program whose visit
            can see everything (:mod:`~pyro_lift.inference.gibbs.together`). ``"auto"`` is ``"gibbs"`` where it
            applies, and ``"nuts"`` elsewhere if no other option says more.
        accumulator: of the Langevin step: ``"exact"``, ``"table"`` (the paper's), ``"single"`` (:mod:`~.accumulator`).
        single_scale: ``"N"`` or ``"1"``, the factor on a single task's gradient.
        phi_step_size: eta of Eq. 9; None takes 2 % of the limit with the table, as it is at the start, and
            ``step_size`` otherwise.
        theta_update: ``"sgld"``, Langevin steps; ``"underdamped"``, such with momentum
            (:mod:`pyro_lift.inference.gibbs.underdamped`); ``"exact"`` draws theta, where a visit takes all tasks and
            their likelihood is Gaussian (:mod:`pyro_lift.inference.gibbs.exact_visit`); where it is evaluated whole,
            ``"mala"`` or ``"hmc"``, steps with a Metropolis test (:mod:`pyro_lift.inference.gibbs.metropolis`), whose
            tuning begins at ``step_size``. ``"auto"``: exact where it can be and no step was chosen, else SGLD.
        leapfrog_steps: of a trajectory of ``"hmc"``; each costs a run of the program.
        momentum: share of its velocity that theta keeps at a step of ``"underdamped"``; at least 0, below 1.
        control_variates: visits after which a task's reference is renewed, at whose gradient of all rows the noise of
            its minibatches cancels (:mod:`pyro_lift.inference.gibbs.control_variates`); 0 for none.
        integrator: of theta's step: ``"exponential"`` (exact for normal priors) or ``"euler"`` (the paper's).
        temperature, n_inflate: T, multiplies the variance of all noise, of phi and of theta; power on the likelihood.
        block_size: B, tasks per visit; None takes the plate's own ``subsample_size``, and without one all tasks (one,
            in a program that iterates over them and is too large to be seen whole: :mod:`~.blocks`).
        scan: ``"round_robin"`` or ``"random"``.
        distributed: whether the processes of ``torchrun`` share each visit, every one keeping the theta of its own
            tasks (:mod:`~pyro_lift.inference.gibbs.shared_visit`). The plate's ``subsample_size`` is then what one pass
            takes, and ``block_size`` what all processes visit together; None is one pass each.
        thinning, theta_steps_per_visit: visits per draw, after the warm-up; SGLD steps of the block before phi moves.
        translation: how phi and every theta are shifted together, along the likelihood's gradient
            (:mod:`pyro_lift.inference.gibbs.translation`): ``"saga"`` with a control variate for each task, kept in a
            second store; ``"falling"`` without, by a step that falls; ``"none"``. It needs the exact draw of phi.
            ``"auto"`` is ``"saga"`` where the curvature of whole tasks can be measured, and ``"none"`` elsewhere.
        translation_step_size: eta_d of it; None takes a share of the largest stable one from measured curvatures, and
            ``step_size`` / N where they are not measured (:mod:`pyro_lift.inference.gibbs.translation_plan`).
        preconditioner: None or ``"rms"``: adapts in the warm-up, frozen after it, one for all tasks.
        decay, damping: of the preconditioner's moving average; added to its root, relative to its mean.
        sgd_steps: of the warm-up's visits, how many are joint training by Adam of one vector shared by all tasks.
            They need a normal pair; the chain starts where they end. ``sgd_step_size`` is their learning rate.
        sgd_weights: factors on the tasks' gradients in joint training, one a task; None: they grow with a task's data.
        max_grad_norm, max_move: norm to which the likelihood's gradients are scaled down; the most that they move a
            coordinate, over step_size / 2 (:mod:`~.longest_move`). Both count as clipped, and change the target.
        site_step_scale: factor on the step size by local family, e.g. ``{"head": 10.0}``.
        task_step_scale: factor on the step size by task; the preconditioner sees gradients times it.
        site_temperature: factor on the temperature by local family; ``{"head": 0.0}`` moves heads to their mode
            while everything else is sampled.
        site_update: by local family that is convex given the rest, ``"mode"`` or ``"laplace"``: a Gibbs block that
            solves it, or draws it around its mode, before the others step (:mod:`~.solved_sites`); whole rows only.
        store: where theta lives between visits: ``"device"``, ``"host"`` (pinned memory), ``"disk"`` (a file, the next
            block read ahead), ``"auto"`` (the first of these that fits), or a store.
        keep_theta: whether a draw is phi *and the theta of every task*, under their names in the program (what
            predictions and ``from_mcmc(mcmc, log_likelihood=True)`` need); N theta of memory a draw.
        init_strategy: where sites start. Local sites centred on a global one start at it.
        check_stability: refuse step sizes that cannot be stable.
        seed: of everything random in the chain, which then leaves the global streams alone; chains of one run get
            streams of their own. None draws one from torch's global stream.

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
        plate: str | None = None,
        *,
        step_size: float | Schedule | None = None,
        phi_update: PhiUpdate = "auto",
        accumulator: Accumulator = "exact",
        single_scale: Literal["N", "1"] = "N",
        phi_step_size: float | Schedule | None = None,
        theta_update: ThetaUpdate = "auto",
        leapfrog_steps: int = 10,
        momentum: float = 0.9,
        control_variates: int = 0,
        integrator: Integrator = "exponential",
        temperature: float = 1.0,
        n_inflate: float = 1.0,
        block_size: int | None = None,
        scan: Scan = "round_robin",
        distributed: bool = False,
        thinning: int = 1,
        theta_steps_per_visit: int = 1,
        translation: TranslationKind = "none",
        translation_step_size: float | Schedule | None = None,
        preconditioner: Literal["rms"] | None = None,
        decay: float = 0.99,
        damping: float = 0.1,
        sgd_steps: int = 0,
        sgd_step_size: float | Schedule = 1e-3,
        sgd_weights: Sequence[float] | None = None,
        max_grad_norm: float | None = None,
        max_move: float | None = None,
        site_step_scale: Mapping[str, float] | None = None,
        task_step_scale: Sequence[float] | None = None,
        site_temperature: Mapping[str, float] | None = None,
        site_update: Mapping[str, SiteUpdate] | None = None,
        store: str | ThetaStore = "auto",
        keep_theta: bool = False,
        init_strategy: Callable[..., Tensor] = init_to_mean,
        check_stability: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, thinning, init_strategy, seed)
        check_common(temperature, n_inflate, integrator, preconditioner, decay, damping)
        check_choice("phi_update", phi_update, ["auto", "gibbs", "langevin", "nuts"])
        check_choice("accumulator", accumulator, ["exact", "table", "single"])
        check_choice("single_scale", single_scale, ["N", "1"])
        check_choice("theta_update", theta_update, ["auto", "exact", "sgld", "underdamped", "mala", "hmc"])
        check_choice("scan", scan, ["round_robin", "random"])
        check_choice("translation", translation, ["auto", "saga", "falling", "none"])
        if isinstance(store, str):
            check_choice("store", store, ["auto", "device", "host", "disk"])
        check_number("theta_steps_per_visit", theta_steps_per_visit, least=1, open_below=False, whole=True)
        check_number("leapfrog_steps", leapfrog_steps, least=1, open_below=False, whole=True)
        for name, count in (("sgd_steps", sgd_steps), ("control_variates", control_variates)):
            check_number(name, count, open_below=False, whole=True)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum={momentum!r}: expected at least 0 and below 1.")
        if block_size is not None:
            check_number("block_size", block_size, least=1, open_below=False, whole=True)
        check_limits(max_grad_norm, max_move, preconditioner)
        step_scale, temperatures = site_factors(site_step_scale, site_temperature)
        self.plate_named = plate is not None
        asked = (plate or "tasks", block_size, scan, distributed, sgd_steps, store, check_stability)
        self._request = Request(*asked, plate_named=self.plate_named)
        self.settings = Settings(
            step_size=None if step_size is None else as_schedule(step_size),
            phi_step_size=None if phi_step_size is None else as_schedule(phi_step_size),
            phi_update=phi_update,
            accumulator=accumulator,
            single_scale=single_scale,
            theta_update=theta_update,
            leapfrog_steps=leapfrog_steps,
            momentum=momentum,
            control_variates=control_variates,
            integrator=integrator,
            temperature=temperature,
            n_inflate=n_inflate,
            decay=decay if preconditioner == "rms" else None,
            damping=damping,
            theta_steps_per_visit=theta_steps_per_visit,
            max_grad_norm=max_grad_norm,
            max_move=max_move,
            sgd_step_size=as_schedule(sgd_step_size),
            sgd_weights=checked_factors("sgd_weights", sgd_weights),
            task_step_scale=checked_factors("task_step_scale", task_step_scale),
            site_step_scale=step_scale,
            site_temperature=temperatures,
            site_update=checked_updates(site_update),
            translation=translation,
            translation_step_size=None if translation_step_size is None else as_schedule(translation_step_size),
        )
        self.state = SGLDGibbsState(0, {}, {}, {}, {}, {})
        self.memory_beside: list[Need] = []  # what the run needs beside the chain: its statistics, say
        self.keep_theta = keep_theta
        self._kept: KeptTheta | None = None
        self._plan: Plan | None = None
        self._info: SGLDGibbsInfo | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A file on the disk belongs to one process; set-up makes a store anew.
        return {**super().__getstate__(), "_plan": None, "_kept": None}

    def begin_run(self, num_chains: int = 1) -> None:
        """See the base class; a store of the caller's serves one chain."""
        super().begin_run(num_chains)
        store = self._request.store
        if num_chains > 1 and not isinstance(store, str):
            raise ValueError(
                f"store={store!r} is one store for {num_chains} chains, and each needs its own. Name a kind instead, "
                'for example store="disk", or run each chain by itself.'
            )

    @property
    def plate(self) -> str | None:
        """Name of the plate inside which sites are local."""
        return self._request.plate if self._plan is None else self._plan.chain.program.plate

    @property
    def chain(self) -> Chain:
        """The program, its structure, the store and the settings of a visit, once the kernel is set up."""
        if self._plan is None:
            raise RuntimeError("the kernel has not run yet: run it with MCMC(kernel).run().")
        return self._plan.chain

    @property
    def structure(self) -> Structure | None:
        """The structure of the program; None before set-up."""
        return None if self._plan is None else self._plan.chain.structure

    @property
    def store(self) -> ThetaStore | None:
        """The store of the theta_i; None before set-up."""
        return None if self._plan is None else self._plan.chain.store

    @property
    def distributed(self) -> bool:
        """Whether the processes of ``torchrun`` share each visit."""
        return self._request.distributed

    @property
    def temperature(self) -> float:
        """T, the factor on the variance of all noise."""
        return self.settings.temperature

    @property
    def n_inflate(self) -> float:
        """The power on the likelihood."""
        return self.settings.n_inflate

    # -------------------------------------------------------------------------------------------- set-up

    @at_top_level()
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the program, check it and the step sizes, and put the chain at its start."""
        request = dataclasses.replace(self._request, warmup_steps=warmup_steps)
        if request.sgd_steps > warmup_steps:
            raise ValueError(
                f"sgd_steps={request.sgd_steps} is more than the warm-up's {warmup_steps} visits; the SGD visits are "
                "the first part of the warm-up. Raise warmup_steps or lower sgd_steps."
            )
        self._begin(warmup_steps)
        request = dataclasses.replace(request, says=self._chain == 0)
        if request.distributed and self.keep_theta:
            raise ValueError("keep_theta=True with distributed=True: each process has the theta of its own tasks only.")
        if request.distributed:
            distributed.join()
            assert self._generator is not None
            self._generator.manual_seed(distributed.from_first(self._generator.initial_seed()))
        program = Program(self.model, request.plate, args, kwargs, self.init_strategy)
        with self._own_stream():
            settings = dataclasses.replace(self.settings, adapts=self._adapting(warmup_steps))
            self._plan = chosen_plan(program, request, settings, self._start_of, self._generator)
        self._check_memory(self._plan)
        self.state, self.transforms = self._plan.state, self._plan.transforms
        self._start_log_likelihood = self._plan.start_log_likelihood
        self._noise_from(self.state.phi)
        planned = self._plan.chain
        if planned.structure.scales or planned.gaussian is not None or planned.raw is not None:
            self._watch = None  # a slice, or a trajectory, must know at once where its density is
        self._plan.chain.cache.watch = self._watch
        self._kept = KeptTheta(self.chain, self.state, self._start_seed()) if self.keep_theta else None
        if request.distributed:
            norms = {f"norm of {name}": float(value.norm()) for name, value in self.state.phi.items()}
            shared_visit.check_alike({**flat_facts(self.fingerprint()), **norms})

    def _adapting(self, warmup_steps: int) -> int:
        """Return for how many visits steps adapt: of the warm-up, where theta's step is left to us."""
        settings = self.settings
        left = settings.step_size is None and settings.is_untested and settings.decay is None
        return warmup_steps if left and not self._request.distributed else 0

    def _check_memory(self, planned: Plan) -> None:
        """Hold what the run will keep against what is free (:mod:`~pyro_lift.inference.footprint`)."""
        chain, phi = planned.chain, planned.state.phi
        needs = chain_needs(chain, phi, planned.row_bytes)
        if self.keep_theta:
            needs.append(draws_need(self.draws_to_keep * chain.structure.num_tasks * planned.row_bytes))
        check_fits([*needs, *self.memory_beside], next(iter(phi.values())).device)

    def report(self) -> dict[str, float | str]:
        """Step sizes without dimensions: below 2 the Euler step is stable, far below 1 its bias is small.

        ``a_theta`` = eta / (2 beta^2): a theta_i forgets phi in 1/a_theta visits. ``a_phi`` is the same of Eq. 9.
        """
        if self._plan is None:
            return {}
        return {**steps_of(self._plan, self.state.tuned), "thinning": float(self.thinning)}

    def in_force(self) -> dict[str, Any]:
        """See the base class."""
        return {} if self._plan is None else in_force(self._plan, self.settings)

    # -------------------------------------------------------------------------------------------- sampling

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where phi starts, unconstrained; and every theta as it stands, constrained, where its draws are kept."""
        return {**self.state.phi, **({} if self._kept is None else self._kept.values(self.state))}

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._preset = dict(params)

    @property
    def phase(self) -> Phase:
        """Phase of the next visit: SGD warm-up, burn-in or sampling."""
        if self.state.step < self._request.sgd_steps:
            return "sgd"
        return "burn-in" if self.state.step < self._warmup_steps else "sample"

    @at_top_level()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One visit in the warm-up, ``thinning`` of them after it; returns phi, and theta where its draws are kept."""
        self.state = self.state._replace(phi={name: params[name] for name in self.state.phi})
        phase = self.phase
        for _ in range(self.thinning if phase == "sample" else 1):
            self._visit()
        if phase == "sample" and self._info is not None:
            self._keep(self._info, self._info.tasks[0])
        kept = self._kept if phase == "sample" else None
        return {**self.state.phi, **({} if kept is None else kept.draw(self.state))}

    def _visit(self) -> None:
        chain, phase = self.chain, self.phase
        if self._request.sgd_steps and self.state.step == self._request.sgd_steps:
            self.look()
            self.state = end_of_sgd(self.state, chain)
        if self._request.distributed:
            self._shared_visit()
            return
        if chain.gaussian is not None:
            streams = Streams(self._generator, self._noise_generator, self._start_seed())
            self.state, self._info = exact_visit.step(self.state, chain, streams, phase)
            if self._kept is not None:
                self._kept.touch(self._info.tasks)
            return
        block = self._next_block()
        if self._request.scan == "round_robin":
            read_ahead(chain.stores().values(), lambda: [block, self._block_at(self.state.step + 1)])
        streams = Streams(self._generator, self._noise_generator, self._start_seed())
        if phase == "sgd":
            self.state, self._info = sgd_step(self.state, chain, block, streams)
        elif chain.raw is not None:
            self.state, self._info = together.visit(self.state, chain, block, streams, phase)
        else:
            self.state, self._info = gibbs_visit.step(self.state, chain, block, streams, phase)
        if self._kept is not None:
            self._kept.touch(self._info.tasks)
        self.look(due=True)

    def _shared_visit(self) -> None:
        assert self._generator is not None
        chain, structure = self.chain, self.chain.structure
        block = self._block_at(self.state.step)

        def own() -> list[Tensor]:
            after = self._block_at(self.state.step + 1)
            return [part for index in (block, after) for part in shared_visit.own_passes(structure, index)]

        read_ahead(chain.stores().values(), own)
        seed = self._generator.initial_seed()
        self.state, self._info = shared_visit.visit(self.state, chain, block, self.phase, seed)

    def _next_block(self) -> Tensor:
        structure = self.chain.structure
        N, B = structure.num_tasks, structure.block_size
        if self._request.scan == "round_robin":
            return self._block_at(self.state.step)
        if self.chain.cache.table is not None:
            block = torch.randint(N // B, (), generator=self._generator)
            return block * B + torch.arange(B)
        return torch.randperm(N, generator=self._generator)[:B]

    def _block_at(self, step: int) -> Tensor:
        """Return the block of a visit of a scan by rounds."""
        chain, begin = self.chain, None
        N, B = chain.structure.num_tasks, chain.structure.block_size
        if chain.translation is not None and step >= chain.translation.begins:
            assert self._generator is not None
            begin = translations.block_start(chain.translation, N, B, step, self._generator.initial_seed())
        if self._request.distributed:
            return shared_visit.block_at(chain.structure, step, begin)
        return ((step * B if begin is None else begin) + torch.arange(B)) % N

    def state_dict(self) -> dict[str, Any]:
        """See the base class; also what was learned of the tasks."""
        return {**super().state_dict(), **learned_of(self.chain, shared=self._request.distributed)}

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """See the base class."""
        super().load_state_dict(tree)
        put_learned(self.chain, tree, next(iter(self.state.phi.values())))

    def resume_as(self, fingerprint: Mapping[str, Any]) -> None:
        """Take the saved run's block for the default one, which has been another."""
        self._request = dataclasses.replace(self._request, resumed_block_size=fingerprint.get("block_size"))

    def rows(self) -> dict[str, Any]:
        """The tasks' weights, and the stored gradients of the table where there is one."""
        chain = self.chain
        rows: dict[str, Any] = dict(chain.stores())
        if self._request.distributed:
            return {name: shared_visit.OwnRows(store, chain.structure) for name, store in rows.items()}
        return rows | ({} if chain.cache.table is None else {"table": chain.cache.table})

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for the chain to be the same: options, sites, tasks, the likelihood at the start."""
        settings, structure = self.chain.settings, self.chain.structure
        options = options_of(settings)
        options |= {"scan": self._request.scan, "thinning": self.thinning, "sgd_steps": self._request.sgd_steps}
        options |= {"keep_theta": True} if self.keep_theta else {}
        if self._request.distributed:  # its streams of noise are others
            options["share"] = True
        return {
            "kernel": "SGLDGibbs",
            "options": {**options, "warmup_steps": self._warmup_steps},
            "sites": {name: list(value.shape) for name, value in self.state.phi.items()},
            "num_tasks": structure.num_tasks,
            "block_size": structure.block_size,
            "start_log_likelihood": self._start_log_likelihood,
        }

    def theta(self, task: int) -> dict[str, Tensor]:
        """The latest values of one task's local sites, by family, unconstrained."""
        chain = self.chain
        self.look()
        values = task_values(chain, (task,), self.state.offset)
        if values is None:
            shared = self._request.distributed and distributed.process()[1] > 1
            elsewhere = " by this process; another may keep it" if shared else ""
            raise KeyError(f"task {task} was never visited{elsewhere}.")
        if chain.structure.sequential:
            return dict(values[task])
        layout = {site.family: site.plate_dim for site in chain.cache.layouts[None]}
        return {family: value.squeeze(layout[family]) for family, value in values[None].items()}

    @property
    def last_visit(self) -> SGLDGibbsInfo | None:
        """Diagnostics of the last transition; None before the first."""
        return self._info

    def logging(self) -> dict[str, str]:
        """For Pyro's progress bar."""
        return self._log(self.state.step, self._info, self._info.phase if self._info else "")
