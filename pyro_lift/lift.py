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

from pyro_lift.before_chain import BeforeChain, ChainSetup
from pyro_lift.defaults import resolved, resolved_adaptation, say_loosened, warn_of_rates, with_translation
from pyro_lift.inference.adaptation.chain import rows_of_moments
from pyro_lift.inference.adaptation.failures import named_chain, those_kept
from pyro_lift.inference.adaptation.tempered_rows import tempered_rows
from pyro_lift.inference.chain_summary import ChainSummary, LogMean, SummaryMaker
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.checkpoint.signals import stops_with_a_word
from pyro_lift.inference.effective_weights import MOVED, warn_of_few
from pyro_lift.inference.footprint import mixture_need
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.lost import ChainLostError, LossWatch
from pyro_lift.inference.mcmc import StreamingMCMC
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.class_names import class_numbers_by_name
from pyro_lift.models.common_classes import classes_in_common, with_common_classes
from pyro_lift.models.given_away import warn_of_what_is_given_away
from pyro_lift.models.hierarchical import VARIANCE
from pyro_lift.models.out_of_proportion import usual_sizes
from pyro_lift.models.solved_heads import has_solved_head
from pyro_lift.models.target_units import advice_on_units, of_one_unit, warn_of_units
from pyro_lift.models.task import Task, check_kinds, check_to_learn_from, mean_rows
from pyro_lift.posterior import TaskPosterior as TaskPosterior  # its place in earlier versions
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings, upgraded_run
from pyro_lift.support import distributed
from pyro_lift.support.devices import check_device
from pyro_lift.support.durations import seconds_of
from pyro_lift.support.moved import names_moved_from
from pyro_lift.support.options import check_choice, check_number, current_names, settings_of
from pyro_lift.support.said_of import said_of
from pyro_lift.support.said_once import said_once
from pyro_lift.tuning.both_ways import loses_to
from pyro_lift.tuning.candidates import LiFTContender, lift_candidates, shortened
from pyro_lift.tuning.early_stopping import HeldOutLooks, mean_loss, with_held_out
from pyro_lift.tuning.held_out import has_unseen_rows
from pyro_lift.tuning.joint_run import moments_of
from pyro_lift.tuning.learned_beta import learned_beta, with_rounds_to_learn
from pyro_lift.tuning.lost_chain import Slower, advice_where, once_slower, slower_so_far
from pyro_lift.tuning.search import Candidate, Tuning, search, trial_bar
from pyro_lift.tuning.whose_heads import (
    RULES,
    as_saved,
    asks_value_layer,
    counts_together,
    fades_temperature,
    heads_settled,
    leaves_units_out,
    rules_of_heads,
    run_config,
    sharpens_by_rows,
    tempers_around_rates,
)
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

if TYPE_CHECKING:
    import peft

__all__ = ["LiFT"]

log = logging.getLogger("pyro_lift")

#: Folder inside a run's for what is found of the network with its own last layer.
CLASS_LAYER = "class-layer"
#: What held-out tasks are adapted to for.
LOOK = "a look at held-out tasks"


class LiFT(ChainSetup):
    """Learn a prior over LoRA weights from many tasks.

    Args:
        backbone: a module, a PEFT model, or a :class:`~pyro_lift.models.adapters.RandomAdapter`. A plain module is not
            changed, and may be given to any number of LiFT objects: its weights are shared, PEFT's layers are not.
        peft_config: the adapter to attach to a plain module.
        settings: a :class:`LiFTSettings`; or give its fields as keywords.
        adapt: how new tasks are adapted to, :class:`AdaptSettings`.
        device: where to compute; None stays where the backbone is.
        seed: of everything random, a new adapter's start too; None draws one from torch's global stream.

    Raises:
        ValueError: an unknown setting, with the nearest known one; a setting out of range.
        TypeError: settings that are none.

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
        for name in options:
            check_choice("setting", name, [f.name for f in fields(LiFTSettings)])
        if seed is not None:
            check_number("seed", seed, open_below=False, whole=True)
        adapter = _adapter(backbone, peft_config, seed)
        if device is not None:
            if adapter is backbone:  # the caller's stays where it is
                adapter = adapter.beginning_at(adapter.initial)
            check_device(device)
            adapter.to(device)
        settings = replace(settings_of("settings", settings, LiFTSettings), **options)
        super().__init__(adapter, settings, settings_of("adapt", adapt, AdaptSettings), seed)
        if self.settings.stop_patience != LiFTSettings.stop_patience and not self.settings.stop_every:
            log.warning(
                "stop_patience=%d does nothing without stop_every: no held-out tasks are looked at. Give "
                "stop_every=20, say, beside it.", self.settings.stop_patience,
            )  # fmt: skip
        # Whether heads are settled, what it is with the network's last layer, and what was found before the chain.
        self._heads_are_settled = False
        self._beside: LiFT | None = None
        self._found: BeforeChain | None = None
        #: How much slower its chain goes that has lost what it knew; None where the run's folder says it.
        self._slower: Slower | None = None
        #: How :meth:`tune` chose the settings; None where they are as they were given.
        self.tuning: Tuning | None = None

    @at_top_level()
    @said_once()
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
        check_to_learn_from(tasks)
        tasks = of_one_unit(with_common_classes(tasks))
        noise = self.noise_of(tasks)
        found: dict[str, Any] = {} if noise is None else {"noise_scale": noise.scale}
        settled = self._settled(tasks, None, crossed=False)
        settings, adapter = replace(settled.settings, **found), settled.adapter
        given, stronger = self.adapt_settings, dict[str, Any]()
        if noise is not None and noise.power != 1.0:
            stronger = {"n_inflate": noise.power * (settings.n_inflate or 1.0)}
            given = replace(given, **stronger)
        seconds = max(seconds - (time.monotonic() - begun), 1e-3)
        known = resolved(with_translation(settings, tasks), adapter)
        scale = settled._head_scale(tasks, known)
        heads = known.head != "langevin" and any(has_solved_head(adapter, task, scale) for task in tasks)
        adapt = resolved_adaptation(given, self.settings, known, heads)
        candidates = lift_candidates(known, adapt, trainings=trainings, heads=heads)

        def make(candidate: Candidate, share: float) -> LiFTContender:
            short = shortened(replace(settings, **candidate.meta), share)
            return LiFTContender(LiFT(adapter, settings=short, adapt=given, seed=self.seed), candidate)

        with trial_bar(progress, callbacks) as on_trial:
            tuning = search(candidates, make, tasks, seconds=seconds, on_trial=on_trial)
        if noise is not None:
            meta, chosen = {**tuning.meta, **found}, {**stronger, **tuning.adapt}
            said: dict[str, Any] = {"temperature": noise.temperature, "dispersion": noise.dispersion}
            tuning = replace(tuning, meta=meta, adapt=chosen, **said)
        self.follow(tuning)
        return tuning

    def follow(self, tuning: Tuning) -> None:
        """Take over settings that :meth:`tune` chose, here or in an earlier process; what is meta-trained has them."""
        self.tuning = tuning
        self.settings = replace(self.settings, **tuning.meta)
        self.adapt_settings = replace(self.adapt_settings, **tuning.adapt)

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
            ValueError: no task, two of one name, a task without data, labels outside the head's range, a start of
                another length; no task to calibrate on; another run at work in the folder; before any training.
            DivergedError: a loss that is not finite; names the task and the step.
            ChainLostError: a loss that has climbed back to chance; at smaller rates too, where the rate was left open.
            RunStopped: SIGTERM or Ctrl-C, where the run is saved.
        """
        on_step = hooks.pop("on_step", None)
        for name in hooks:
            raise TypeError(f"meta_train has no argument {name!r}; hooks are callbacks=[...] and on_step.")
        check_to_learn_from(tasks)
        unseen = [task for task in of_one_unit(tasks, says=False) if has_unseen_rows(task)] if calibrate else []
        if calibrate and not unseen:
            raise ValueError(
                "calibrate=True: no task has test or dev rows, which meta-training does not see. Hold some tasks out, "
                "and give them to prior.calibrate(...)."
            )
        session = self.session(tasks, checkpoint, resume, checkpoint_every)
        shown: dict[str, Any] = {"progress": progress, "on_step": on_step, "callbacks": callbacks}
        shown |= {"session": session, "start": start, "crossed": calibrate is None and self.tuning is None}
        if session is None:
            priors = self.meta_train_many(tasks, [self.settings.components], **shown)
        else:
            with session.alone(shared=bool(self.settings.ranks_block_size)):
                priors = self.meta_train_many(tasks, [self.settings.components], **shown)
        try:
            if calibrate:
                priors[0].calibrate(unseen)
        except DivergedError as error:  # the prior is there, and took long
            log.warning("the temperature of predictions was not fitted; give prior.calibrate other tasks. %s", error)
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
        if (folder := checkpoint if resume is None else resume) is None:
            return None
        options.setdefault("resume_hint", f"meta_train(tasks, resume={str(folder)!r})")
        rules = RULES
        if resume is not None:
            self.settings, rules = as_saved(self.settings, Path(folder))
        config = run_config(self.settings, self.seed, self.adapter, tasks, rules=rules)
        return Session(
            folder, every=checkpoint_every, resume=resume is not None, config=config, upgrade=upgraded_run, **options
        )

    @at_top_level()
    @said_once()
    @stops_with_a_word
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
            if k > self.settings.samples:
                raise ValueError(
                    f"samples={self.settings.samples} with components={k}: a component needs a draw of phi at least. "
                    "Raise samples, or lower components."
                )
        given = tasks
        tasks = with_common_classes(tasks) if counts_together(session) else tasks
        tasks = of_one_unit(tasks) if leaves_units_out(session) else tasks
        again: dict[str, Any] = {"session": session, "start": start, "crossed": crossed}
        again |= {"progress": progress, "on_step": on_step, "callbacks": callbacks}
        if (settled := self._settled(tasks, session, crossed)) is not self:
            return settled.meta_train_many(given, components, **again)
        check_kinds(tasks)
        if start is not None and start.shape != self.adapter.initial.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}; the adapter has {self.adapter.dim} weights.")
        own_heads = self._head_scale(tasks, self.settings) is not None
        classes = {} if own_heads else class_numbers_by_name(tasks)  # which all share the network's outputs
        warn_of_units(self.adapter, tasks, own_heads=own_heads)
        warn_of_what_is_given_away(tasks)
        all_tasks = tasks
        tasks, held_out = with_held_out(tasks) if self.settings.stop_every else (tasks, [])
        if self.settings.ranks_block_size:
            distributed.join()
        rows, names, sizes = [len(task.train) for task in tasks], [task.name for task in tasks], usual_sizes(tasks)
        watchers = Watchers(callbacks, Run("meta-train"), rows, names, on_step)
        shown: dict[str, Any] = {"progress": progress, "watchers": watchers}
        with said_of("" if self._beside is None else "on trial, heads of the tasks' own"):
            found = self._found or self.before_chain(tasks, session, start, crossed=crossed, **shown)
        if self._beside is not None:
            with said_of("on trial, the network as it stands"):
                beside = self._beside.before_chain(tasks, session, start, crossed=crossed, **shown)
            if loses_to(found.halves, beside.halves):
                self._beside._found = beside
                return self._beside.meta_train_many(given, components, **again)
        folder = None if session is None else session.folder / self.kept_under
        work = self.work_of_chain(tasks, session)
        slower = slower_so_far(folder, work) if self._slower is None else self._slower
        run, program, s, adapt, joint, halves = found if slower == Slower() else self.slower(found, slower)
        s = with_rounds_to_learn(s, len(tasks)) if run.settings.learns_beta else s
        warn_of_rates(s, self.adapter)
        kernel = run.kernel(program)
        advice = advice_where(self.settings), advice_on_units(program.tasks)
        watch = LossWatch.of(program.tasks, s.noise_sd, *advice, visits=session.transitions if session else 0)
        if session is not None:
            session.beside = {"losses": watch}
        make = SummaryMaker(tuple(components), s.covariance, self.adapter)
        kernel.memory_beside += [mixture_need(x, self.adapter.initial, s.samples) for x in make().mixtures.values()]
        warmup_steps = s.sgd_steps + s.burn_in
        watchers.run = replace(watchers.run, settings=asdict(s))
        kept = StatsOfDict({(0, VARIANCE): LogMean} if program.learned is not None else {}, default=make)

        def beta_of() -> Any:
            return learned_beta(s.beta, kept.stats.get((0, VARIANCE)))

        temperature, at_rows = (1.0, None) if halves is None else (halves.temperature, halves.rows)
        if self.tuning is not None and self.tuning.temperature is not None:
            temperature = self.tuning.temperature
            at_rows = tempered_rows(tasks, fades=fades_temperature(session)) if sharpens_by_rows(session) else None
        of_tuning = None if self.tuning is None else self.tuning.dispersion
        dispersion = of_tuning if halves is None or halves.dispersion is None else halves.dispersion

        def prior(k: int, summary: ChainSummary, moments: dict[str, Tensor], results: dict[str, float]) -> LiFTPrior:
            return LiFTPrior(
                self.adapter,
                summary.mixtures[k],
                replace(s, components=k, sgd_steps=self.settings.sgd_steps, beta=beta_of()),
                adapt,
                moments,
                mcmc,
                self.seed,
                tasks=names,
                rows=rows_of_moments(tasks, alike=s.task_steps == "tasks"),
                results=results,
                kinds=sorted({task.kind for task in tasks}),
                classes=classes,
                prediction_temperature=temperature,
                tuning=None if self.tuning is None else self.tuning.to_dict(),
                matching_scale=None if program.solved is None else program.solved.mean_scale(),
                head_mean=run.head_of_new(summary.mixtures[k].get().mean, program, session),
                input_sizes=sizes,
                dispersion=dispersion,
                value_heads=asks_value_layer(session),
                common_classes=classes_in_common(all_tasks) if own_heads else 0,
                around_rates=tempers_around_rates(session),
                tempered_rows=at_rows,
                encoding=next((task.encoding for task in tasks if task.encoding is not None), None),
            )

        with chain_bar(
            warmup_steps + s.samples, "meta-train", progress, session.transitions if session else 0, watchers
        ) as bar:

            def hook(kernel: SGLDGibbs, *where: Any) -> None:
                bar(kernel, *where)
                if (last := kernel.last_visit) is not None:
                    rate = float(last.step_size) if last.phase == "sgd" else None
                    watch.see(last.log_likelihood, last.tasks, last.phase, rate)

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
                    *those_kept(held_out, partial(prior(components[0], summary, moments, {}).adapt_many, seed=0), LOOK)
                ),
                every=s.stop_every,
                patience=s.stop_patience,
                session=session,
            )
            lost = None
            with named_chain(names, s.learning_rate or 0.0, s.sgd_learning_rate or 0.0, s.sgd_steps):
                try:
                    mcmc.run(checkpoint=session, until=looks.ends if held_out else None)
                except ChainLostError as error:
                    if not (slower.may_go_on and self.leaves_rate_open):
                        raise
                    lost = error
            mcmc.sampler.hook = None  # the bar's, which no pickle of the prior could take
        if lost is not None:
            if session is not None:
                session.begin_again()
            next_one = copy(self)
            again_at = once_slower(slower, lost, work(), in_joint=lost.step <= s.sgd_steps)
            next_one._beside, next_one._found, next_one._slower = None, found, again_at
            return next_one.meta_train_many(given, components, **again)
        summary, moments = looks.kept() or (kept.stats[(0, "phi")], moments_of(kernel))
        chosen = [f.name for f in fields(LiFTSettings) if getattr(self.settings, f.name) not in (None, "learn")]
        moved = self._moved(replace(s, beta=beta_of()), moments, program.tasks)
        if MOVED in moved:
            log.info("the data of a task move about %.3g of the adapter's %d weights", moved[MOVED], self.adapter.dim)
        held = adapt
        if program.solved is not None and (halves is None or halves.noise is None):  # which comes with a power
            adapt = self._loosened(held, s, moved, program.tasks)
        if adapt is not held:
            say_loosened(moved[MOVED], mean_rows(tasks))
        elif halves is None or halves.power == 1.0:  # at a power that was found they move more
            told: dict[str, Any] = {"power": s.n_inflate or 1.0, "temperature": s.temperature or 0.0, "given": chosen}
            warn_of_few(moved, self.adapter.dim, program.tasks, heads=program.solved is not None, **told)
        before = [work.results() for work in (joint, halves, run.head_mean) if work is not None]
        results = {**moved, **{name: x for part in before for name, x in part.items()}, **looks.results()}
        return [prior(k, summary, moments, results) for k in components]

    def _settled(self, tasks: Sequence[Task], session: Session | None, crossed: bool) -> LiFT:
        """Return itself, or what it is with its heads settled, beside it what it is with the network's last layer."""
        if self._heads_are_settled:
            return self
        by = rules_of_heads(session)
        settings, adapter, layer = heads_settled(self.settings, self.adapter, tasks, trial=crossed, **by)
        if settings == self.settings and adapter is self.adapter:
            return self
        lift, beside = copy(self), copy(self)
        lift.settings, lift.adapter, lift._heads_are_settled = settings, adapter, True
        if layer is not None:
            beside.settings, beside.kept_under, beside._heads_are_settled = layer, CLASS_LAYER, True
            lift._beside = beside
        return lift


def _adapter(backbone: nn.Module, peft_config: peft.PeftConfig | None, seed: int | None) -> RandomAdapter:
    if not isinstance(backbone, RandomAdapter):
        return adapt_backbone(backbone, peft_config, seed=seed)
    if peft_config is not None:
        raise TypeError("the backbone is a RandomAdapter, which has its adapter already; leave peft_config out.")
    return backbone


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
