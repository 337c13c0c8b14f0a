"""The front door: tasks and a backbone in, a better start and calibrated predictions out."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import asdict, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pyro.ops.streaming import StatsOfDict
from torch import Tensor, nn

from pyro_lift.defaults import fitted, for_targets, one_width, resolved, resolved_adaptation
from pyro_lift.inference.adaptation.chain import rows_of_moments
from pyro_lift.inference.chain_summary import ChainSummary, LogMean
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.effective_weights import weights_moved
from pyro_lift.inference.footprint import mixture_need
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.lost import LossWatch
from pyro_lift.inference.mcmc import StreamingMCMC
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.class_names import class_numbers_by_name
from pyro_lift.models.hierarchical import VARIANCE, AdapterHierarchy
from pyro_lift.models.observation import own_head_scale
from pyro_lift.models.solved_heads import has_solved_head
from pyro_lift.models.target_units import warn_of_units
from pyro_lift.models.task import Task, check_kinds, check_tasks
from pyro_lift.models.weight_scales import by_weight, groups_of_weights
from pyro_lift.posterior import TaskPosterior as TaskPosterior  # its place in earlier versions
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings, upgraded_run
from pyro_lift.support import distributed
from pyro_lift.support.durations import seconds_of
from pyro_lift.support.moved import names_moved_from
from pyro_lift.support.options import check_choice, check_number, current_names
from pyro_lift.tuning.candidates import LiFTContender, lift_candidates, shortened
from pyro_lift.tuning.chain_kernel import chain_kernel
from pyro_lift.tuning.cross_fit import PASSES, CrossFit, Judge, cross_fit, passes, predicted
from pyro_lift.tuning.early_stopping import HeldOutLooks, mean_loss, with_held_out
from pyro_lift.tuning.halves import Joint, has_trial, joint_on_trial, log_probs_at
from pyro_lift.tuning.held_out import has_unseen_rows
from pyro_lift.tuning.joint_run import JointRun, Standing, moments_of
from pyro_lift.tuning.learned_beta import learned_beta, with_rounds_to_learn
from pyro_lift.tuning.noise import Noise
from pyro_lift.tuning.search import Candidate, Tuning, search, trial_bar
from pyro_lift.tuning.whose_heads import as_saved, counts_width, run_config, with_heads_settled
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

if TYPE_CHECKING:
    import peft

__all__ = ["LiFT"]

log = logging.getLogger("pyro_lift")

#: What to do where a chain has lost what it knew.
ADVICE = "Leave beta, sigma and temperature open, or lower the temperature (or raise n_inflate, which is the same)."


class LiFT:
    """Learn a prior over LoRA weights from many tasks.

    Args:
        backbone: a module, a PEFT model, or a :class:`~pyro_lift.models.adapters.RandomAdapter`. A plain module is not
            changed, and may be given to any number of LiFT objects: its weights are shared, PEFT's layers are not.
        peft_config: the adapter to attach to a plain module.
        settings: a :class:`LiFTSettings`; or give its fields as keywords.
        adapt: how new tasks are adapted to; a :class:`AdaptSettings`.
        device: where to compute; None stays where the backbone is.
        seed: of everything random, the start of the adapter that is made here too; None draws one from torch's global
            stream.

    Raises:
        ValueError: an unknown setting, with the nearest known one; a setting out of range.

    Example:
        >>> import peft, torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> tasks = [Task(f"t{i}", (torch.randn(8, 4), torch.arange(8) % 3)) for i in range(3)]
        >>> lift = LiFT(net, peft.LoraConfig(r=1, target_modules=["0"]), sgd_steps=5, burn_in=5, samples=20, seed=0)
        >>> prior = lift.meta_train(tasks, progress=False)
        >>> posterior = prior.adapt(tasks[0], steps=20, draws=5)
        >>> posterior.predict(torch.randn(2, 4)).shape
        torch.Size([2, 3])
    """

    @at_top_level()
    def __init__(
        self,
        backbone: nn.Module,
        peft_config: peft.PeftConfig | None = None,
        *,
        settings: LiFTSettings | None = None,
        adapt: AdaptSettings | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> None:
        options = current_names(LiFTSettings, options)
        known = [f.name for f in fields(LiFTSettings)]
        for name in options:
            check_choice("setting", name, known)
        if seed is not None:
            check_number("seed", seed, open_below=False, whole=True)
        self.settings = replace(settings or LiFTSettings(), **options)
        self.adapt_settings = adapt or AdaptSettings()
        self.adapter = _adapter(backbone, peft_config, seed)
        if device is not None:
            if self.adapter is backbone:  # the caller's stays where it is
                self.adapter = self.adapter.beginning_at(self.adapter.initial)
            self.adapter.to(device)
        self.seed = seed
        #: How :meth:`tune` chose the settings; None where they are as they were given.
        self.tuning: Tuning | None = None

    @at_top_level()
    def tune(
        self,
        tasks: Sequence[Task],
        budget: str | float = "10 min",
        *,
        trainings: int = 8,
        progress: bool = True,
        callbacks: Any = (),
    ) -> Tuning:
        """Choose settings on tasks that are held out in turn; what is meta-trained after it has them.

        Successive halving over the length, the fraction of joint training, rates, temperature, beta, heads, and rates
        and steps of adaptation (:mod:`pyro_lift.tuning.candidates`). The choice, its table and the temperature of
        predictions that was fitted on the same rows go with the prior.

        Args:
            tasks: of meta-training, three or more.
            budget: ``"10 min"``, or seconds.
            trainings: different settings of meta-training that are tried, each with three rates of adaptation.
            progress: whether to show a bar.
            callbacks: told of every trial: rung and settings as ``phase``, the loss on the held-out tasks, seconds.

        Raises:
            ValueError: fewer than three tasks, a budget that is no length of time.
        """
        begun, seconds = time.monotonic(), seconds_of(budget)
        noise = self._noise_of(tasks)
        found: dict[str, Any] = {} if noise is None else {"noise_scale": noise.scale}
        settings = replace(with_heads_settled(self.settings, self.adapter, tasks), **found)
        seconds = max(seconds - (time.monotonic() - begun), 1e-3)
        known = resolved(settings, self.adapter)
        scale = self._head_scale(tasks, known)
        heads = known.head != "langevin" and any(has_solved_head(self.adapter, task, scale) for task in tasks)
        adapt = resolved_adaptation(self.adapt_settings, self.settings, known, heads)
        candidates = lift_candidates(known, adapt, trainings=trainings, heads=heads)

        def make(candidate: Candidate, share: float) -> LiFTContender:
            short = shortened(replace(settings, **candidate.meta), share)
            return LiFTContender(self._with(short), candidate)

        with trial_bar(progress, callbacks) as on_trial:
            self.tuning = search(candidates, make, tasks, seconds=seconds, on_trial=on_trial)
        if noise is not None:
            self.tuning = replace(self.tuning, meta={**self.tuning.meta, **found}, temperature=noise.temperature)
        self.settings = replace(self.settings, **self.tuning.meta)
        self.adapt_settings = replace(self.adapt_settings, **self.tuning.adapt)
        return self.tuning

    def _noise_of(self, tasks: Sequence[Task]) -> Noise | None:
        """Find the noise of regressions as :meth:`meta_train` does; None where it is given, or there is none."""
        check_kinds(tasks)
        if self.settings.noise_scale is not None or any(task.kind != "regression" for task in tasks):
            return None
        run = self._with(for_targets(self.settings, tasks))
        run = run if (joint := run._joint(tasks, None, False, None)) is None else run._after(joint)
        program = run.program(tasks)
        s, first = run._fitted(program), run.settings.noise_scale
        halves = run._cross_fitted(program, joint, s, None, first, progress=False, on_step=None)
        return None if halves is None or halves.noise is None else Noise(halves.noise, halves.temperature)

    def meta_train(
        self,
        tasks: Sequence[Task],
        *,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        resume: str | Path | None = None,
        start: Tensor | None = None,
        calibrate: bool | None = None,
        callbacks: Any = (),
        **hooks: Any,
    ) -> LiFTPrior:
        """Run the chain over the tasks and summarise its draws of phi.

        Args:
            tasks: to learn from.
            progress: whether to show a bar.
            checkpoint: folder to save the run in as it goes; must not hold one yet.
            checkpoint_every: visits between two checkpoints. SIGTERM and Ctrl-C save one more.
            resume: folder to go on with; where it holds no checkpoint yet, the run begins and saves there. A folder
                that looks misspelt, because a run is saved beside it, is warned of.
            start: adapter weights ``[D]`` where phi begins, for example of one adapter trained on all tasks, which then
                needs few ``sgd_steps``; None begins at the adapter's own. The prior of phi stays where it is.
            calibrate: whether to fit the temperature of predictions (:meth:`LiFTPrior.calibrate`) on the tasks that
                have test or dev rows; it costs an adaptation to each. None, where the rate of joint training is left
                open, fits it and the length of joint training on training rows that one half of the tasks has not
                seen of the other (:mod:`~pyro_lift.tuning.cross_fit`).
            callbacks: told of every transition (:mod:`pyro_lift.watching`), such as ``[JsonLines("run.jsonl")]``.
            hooks: ``on_step``, called without arguments after each transition.

        Raises:
            TypeError: what is no callback; an unknown hook.
            ValueError: no task, a task without data, labels outside the head's range, a start of another length;
                no task to calibrate on; before any training.
            DivergedError: a loss that is not finite; names the task and the step.
            ChainLostError: a loss that has climbed back to chance.
            RunStopped: SIGTERM or Ctrl-C, where the run is saved.
        """
        on_step = hooks.pop("on_step", None)
        for name in hooks:
            raise TypeError(f"meta_train has no argument {name!r}; hooks are callbacks=[...] and on_step.")
        check_tasks(tasks)
        unseen = [task for task in tasks if has_unseen_rows(task)] if calibrate else []
        if calibrate and not unseen:
            raise ValueError(
                "calibrate=True: no task has test or dev rows, which meta-training does not see. Hold some tasks out, "
                "and give them to prior.calibrate(...)."
            )
        session = self.session(tasks, checkpoint, resume, checkpoint_every)
        shown: dict[str, Any] = {"progress": progress, "on_step": on_step, "callbacks": callbacks}
        shown |= {"session": session, "start": start, "crossed": calibrate is None and self.tuning is None}
        priors = self.meta_train_many(tasks, [self.settings.components], **shown)
        if calibrate:
            priors[0].calibrate(unseen)
        return priors[0]

    def session(
        self,
        tasks: Sequence[Task],
        checkpoint: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: int = 1000,
        **options: Any,
    ) -> Session | None:
        """Return the folder of checkpoints of a run over these tasks; None without a folder. See :meth:`meta_train`."""
        if checkpoint is not None and resume is not None:
            raise ValueError("give checkpoint=folder for a new run, or resume=folder to go on with one, not both.")
        folder = checkpoint if resume is None else resume
        if folder is None:
            return None
        options.setdefault("resume_hint", f"meta_train(tasks, resume={str(folder)!r})")
        by_width = True
        if resume is not None:
            self.settings, by_width = as_saved(self.settings, Path(folder))
        config = run_config(self.settings, self.seed, self.adapter, tasks, by_width=by_width)
        return Session(
            folder, every=checkpoint_every, resume=resume is not None, config=config, upgrade=upgraded_run, **options
        )

    @at_top_level()
    def meta_train_many(
        self,
        tasks: Sequence[Task],
        components: Sequence[int],
        *,
        progress: bool = True,
        session: Session | None = None,
        start: Tensor | None = None,
        crossed: bool = False,
        on_step: Callable[[], None] | None = None,
        callbacks: Any = (),
    ) -> list[LiFTPrior]:
        """Run one chain and make a prior for each number of components; ``crossed`` as ``calibrate=None`` above."""
        for k in components:
            check_number("components", k, least=1, open_below=False, whole=True)
        settings = with_heads_settled(self.settings, self.adapter, tasks, by_width=counts_width(session))
        if settings != self.settings:
            lift, shown = copy(self), {"progress": progress, "on_step": on_step, "callbacks": callbacks}
            lift.settings = settings
            return lift.meta_train_many(tasks, components, session=session, start=start, crossed=crossed, **shown)
        check_kinds(tasks)
        if start is not None and start.shape != self.adapter.initial.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}; the adapter has {self.adapter.dim} weights.")
        classes = {}
        if self._head_scale(tasks, self.settings) is None:  # all share the network's outputs
            classes = class_numbers_by_name(tasks)
            warn_of_units(self.adapter, tasks)
        tasks, held_out = with_held_out(tasks) if self.settings.stop_every else (tasks, [])
        if self.settings.ranks_block_size:
            distributed.join()
        rows, names = [len(task.train) for task in tasks], [task.name for task in tasks]
        watchers = Watchers(callbacks, Run("meta-train"), rows, names, on_step)
        run = self._with(for_targets(self.settings, tasks))
        joint = None if start is not None else run._joint(tasks, session, progress, watchers.of("joint-trial"))
        run = run if joint is None else run._after(joint)
        program = run.program(tasks)
        s = run._fitted(program)
        shown = {"progress": progress, "on_step": watchers.of("cross-fit")}
        open_noise = run.settings.noise_scale if self.settings.noise_scale is None else None
        halves = run._cross_fitted(program, joint, s, session, open_noise, **shown) if crossed else None
        if halves is not None:
            run.settings, s = (replace(settings, **halves.settings()) for settings in (run.settings, s))
            program.noise_scale = s.noise_sd
        s = with_rounds_to_learn(s, len(tasks)) if run.settings.learns_beta else s
        kernel = run.kernel(program)
        watch = LossWatch.of(program.tasks, s.noise_sd, ADVICE)
        make = partial(ChainSummary, tuple(components), s.covariance, self.adapter)
        kernel.memory_beside += [mixture_need(x, self.adapter.initial, s.samples) for x in make().mixtures.values()]
        warmup_steps = s.sgd_steps + s.burn_in
        watchers.run = replace(watchers.run, settings=asdict(s))
        kept = StatsOfDict({(0, VARIANCE): LogMean} if program.learned is not None else {}, default=make)

        def beta_of() -> Any:
            return learned_beta(s.beta, kept.stats.get((0, VARIANCE)))

        def prior(k: int, summary: ChainSummary, moments: dict[str, Tensor], results: dict[str, float]) -> LiFTPrior:
            return LiFTPrior(
                self.adapter,
                summary.mixtures[k],
                replace(s, components=k, sgd_steps=self.settings.sgd_steps, beta=beta_of()),
                resolved_adaptation(self.adapt_settings, self.settings, s, program.solved is not None),
                moments,
                mcmc,
                self.seed,
                tasks=names,
                rows=rows_of_moments(tasks, alike=s.task_steps == "tasks"),
                results=results,
                kinds=sorted({task.kind for task in tasks}),
                classes=classes,
                prediction_temperature=(self.tuning and self.tuning.temperature)
                or (1.0 if halves is None else halves.temperature),
                tuning=None if self.tuning is None else self.tuning.to_dict(),
                matching_scale=None if program.solved is None else program.solved.mean_scale(),
                encoding=next((task.encoding for task in tasks if task.encoding is not None), None),
            )

        with chain_bar(
            warmup_steps + s.samples, "meta-train", progress, session.transitions if session else 0, watchers
        ) as bar:

            def hook(kernel: SGLDGibbs, *where: Any) -> None:
                bar(kernel, *where)
                if kernel.last_visit is not None:
                    watch.see(kernel.last_visit.log_likelihood, kernel.last_visit.tasks, kernel.last_visit.phase)

            mcmc = StreamingMCMC(
                kernel,
                num_samples=s.samples,
                warmup_steps=warmup_steps,
                initial_params=None if start is None else {"phi": start.to(self.adapter.initial)},
                statistics=kept,
                disable_progbar=True,
                hook_fn=hook,
            )
            looks = HeldOutLooks(
                lambda: (kept.stats[(0, "phi")], moments_of(kernel)),
                lambda summary, moments: mean_loss(
                    prior(components[0], summary, moments, {}).adapt_many(held_out, seed=0), held_out
                ),
                every=s.stop_every,
                patience=s.stop_patience,
                session=session,
            )
            mcmc.run(checkpoint=session, until=looks.ends if held_out else None)
        summary, moments = looks.kept() or (kept.stats[(0, "phi")], moments_of(kernel))
        given = [f.name for f in fields(LiFTSettings) if getattr(self.settings, f.name) is not None]
        told: dict[str, Any] = {"power": s.n_inflate or 1.0, "temperature": s.temperature or 0.0, "given": given}
        widths = by_weight(self.adapter, beta_of())
        moved = weights_moved(moments, widths, program.tasks, batch_size=s.batch_size, **told)
        before = [work.results() for work in (joint, halves) if work is not None]
        results = {**moved, **{name: x for part in before for name, x in part.items()}, **looks.results()}
        return [prior(k, summary, moments, results) for k in components]

    def _joint(
        self, tasks: Sequence[Task], session: Session | None, progress: bool, on_step: Watchers | None
    ) -> Joint | None:
        """Put the joint training on trial, where its rate was left open; None where there is none."""
        s = resolved(self.settings, self.adapter)
        kept, saved_without = WorkBefore.of(session, "joint")
        given = self.settings.sgd_learning_rate is not None
        if given or s.ranks_block_size or saved_without or not has_trial(s.sgd_steps, len(tasks)):
            return None
        head_scale = self._head_scale(tasks, s)
        if head_scale is not None and s.head == "langevin":  # without steps of its own, such a head says nothing
            return None
        tasks = [task.to(self.adapter.initial.device) for task in tasks]
        score = partial(log_probs_at, self.adapter, head_scale=head_scale, noise_scale=s.noise_sd)
        assert s.sgd_learning_rate is not None

        def train(half: Sequence[Task], rate: float, steps: int) -> Tensor:
            title = f"joint training on trial, half of the tasks at {rate:.2g}"
            return self._joint_run(half, rate, steps, title, progress=progress, on_step=on_step).to(steps).vector

        return joint_on_trial(tasks, self.adapter.initial, s.sgd_learning_rate, s.sgd_steps, train, score, kept)

    def _cross_fitted(
        self,
        program: AdapterHierarchy,
        joint: Joint | None,
        s: LiFTSettings,
        session: Session | None,
        noise: float | None,
        **shown: Any,
    ) -> CrossFit | None:
        """Find the length of joint training and how sure predictions may be; None where there is nothing to find."""
        kept, saved_without = WorkBefore.of(session, "cross-fit")
        heads, tasks = program.solved is not None, program.tasks
        if joint is not None and joint.helps and passes(joint.steps, s.batch_size, tasks) < PASSES:
            joint = None
        if saved_without or s.ranks_block_size or (joint is None and noise is None) or len(tasks) < 2:
            return None
        sure = noise is not None or (all(task.kind == "classification" for task in tasks) and not heads)
        begin = partial(self._joint_run, title="joint training of half of the tasks", **shown)
        score = partial(log_probs_at, self.adapter, head_scale=program.head_scale, noise_scale=s.noise_sd)

        def adapt(standing: Standing, unseen: Sequence[Task], noise: float | None) -> Sequence[TaskPosterior]:
            variance = one_width(s.beta) ** 2 / max(len(tasks) // 2, 1)
            at = Moments(torch.ones(1), standing.vector.unsqueeze(0), torch.full_like(standing.vector, variance)[None])
            options = resolved_adaptation(self.adapt_settings, self.settings, s, heads)
            mixture = OnlineGaussianMixture.from_moments(at, max(len(tasks) // 2, 1), dtype=standing.vector.dtype)
            at_noise = replace(s, noise_scale=noise or s.noise_scale)
            power = (s.noise_sd / at_noise.noise_sd) ** 4  # of square gradients
            moments = {name: power * moment for name, moment in standing.moments.items()}
            rows = rows_of_moments(tasks, alike=s.task_steps == "tasks")
            prior = LiFTPrior(self.adapter, mixture, at_noise, options, moments, rows=rows)
            return prior.adapt_many(unseen, seed=0)

        predict = partial(predicted, self.adapter) if sure and noise is None else None
        judge = Judge(score, predict, adapt if sure else None, noise)
        return cross_fit(tasks, self.adapter.initial, joint, begin, judge, kept)

    def _joint_run(self, tasks: Sequence[Task], rate: float, steps: int, title: str, **shown: Any) -> JointRun:
        """Make the first part of the chain, over some tasks, at a rate."""
        lift = self._with(replace(self.settings, sgd_steps=steps, sgd_learning_rate=rate, translation="none"))
        return JointRun(lift.kernel(lift.program(tasks)), steps, tasks, title, **shown)

    def _after(self, joint: Joint) -> LiFT:
        """Make the run that follows the trial of joint training.

        Where joint training does not help, nor does a translation, which pulls phi in the same direction.
        """
        translation = self.settings.translation or (None if joint.helps else "none")
        return self._with(
            replace(self.settings, sgd_steps=joint.steps, sgd_learning_rate=joint.rate, translation=translation)
        )

    def _with(self, settings: LiFTSettings) -> LiFT:
        return LiFT(self.adapter, settings=settings, adapt=self.adapt_settings, seed=self.seed)

    def program(self, tasks: Sequence[Task]) -> AdapterHierarchy:
        """Return the Pyro program that :meth:`meta_train` samples."""
        s, device = resolved(for_targets(self.settings, tasks), self.adapter), self.adapter.initial.device
        return AdapterHierarchy(
            self.adapter,
            [task.to(device) for task in tasks],
            beta=by_weight(self.adapter, s.beta),
            sigma=by_weight(self.adapter, s.sigma),
            batch_size=s.batch_size,
            prior_mean=self.adapter.initial if s.prior_mean == "adapter" else None,
            head_scale=self._head_scale(tasks, s),
            noise_scale=s.noise_sd,
            block_size=s.block_size,
            learned=groups_of_weights(self.adapter) if self.settings.learns_beta else None,
            head="sample" if s.head == "langevin" else "solve",
        )

    def _head_scale(self, tasks: Sequence[Task], s: LiFTSettings) -> float | None:
        return own_head_scale(self.adapter, tasks, s.head_scale, solve=s.head not in ("langevin", "shared"))

    def _fitted(self, program: AdapterHierarchy) -> LiFTSettings:
        """Look at what the prior does to the tasks' loss, and give the program the widths that come of it."""
        s = fitted(replace(self.settings, head_scale=program.head_scale), self.adapter, program.tasks)
        program.beta, program.sigma = by_weight(self.adapter, s.beta), by_weight(self.adapter, s.sigma)
        return s

    def kernel(self, program: AdapterHierarchy) -> SGLDGibbs:
        """Return the kernel that :meth:`meta_train` runs."""
        return chain_kernel(program, resolved(self.settings, self.adapter), self.adapter.initial, self.seed)


def _adapter(backbone: nn.Module, peft_config: peft.PeftConfig | None, seed: int | None) -> RandomAdapter:
    if not isinstance(backbone, RandomAdapter):
        return adapt_backbone(backbone, peft_config, seed=seed)
    if peft_config is not None:
        raise TypeError("the backbone is a RandomAdapter, which has its adapter already; leave peft_config out.")
    return backbone


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
