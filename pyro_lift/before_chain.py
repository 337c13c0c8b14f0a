"""What LiFT finds out before its chain: whether joint training helps, how long, the prior's widths, the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.defaults import (
    fitted,
    for_targets,
    loosened,
    one_width,
    resolved,
    resolved_adaptation,
    widened,
    with_translation,
)
from pyro_lift.inference.adaptation.chain import rows_of_moments
from pyro_lift.inference.adaptation.unmoved import usual_share
from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.effective_weights import MOVED, weights_moved
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.digest import digest
from pyro_lift.models.heads import FewRows
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.observation import has_head, own_head_scale
from pyro_lift.models.task import Task, check_kinds, mean_rows
from pyro_lift.models.weight_scales import by_weight, groups_of_weights, sizes_of_tensors
from pyro_lift.new_tasks.heads_beside_layer import many_rows
from pyro_lift.posterior import TaskPosterior
from pyro_lift.prior import LiFTPrior
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.tuning.chain_kernel import chain_kernel
from pyro_lift.tuning.class_power import POWERS
from pyro_lift.tuning.cross_fit import CrossFit, Judge, cross_fit, predicted
from pyro_lift.tuning.few_classes import with_few_classes
from pyro_lift.tuning.few_values import said_by_unseen, with_few_values
from pyro_lift.tuning.half_chain import Settled, half_chain
from pyro_lift.tuning.halves import (
    SOME_PASSES,
    Joint,
    Score,
    Vectors,
    has_trial,
    joint_on_trial,
    log_probs_at,
    steps_beside_trial,
)
from pyro_lift.tuning.head_mean import HeadMean, asked_at, head_mean
from pyro_lift.tuning.joint_run import JointRun, Standing, few_passes, passes
from pyro_lift.tuning.lost_chain import Slower
from pyro_lift.tuning.matching_biases import matching_biases
from pyro_lift.tuning.noise import Noise
from pyro_lift.tuning.share_of_tokens import log_probs_of_tokens
from pyro_lift.tuning.usual_priors import Asked, few_rows
from pyro_lift.tuning.whose_heads import (
    asks_dispersion,
    asks_few_classes,
    asks_few_values,
    asks_kept_rows,
    counts_rounds,
    fades_temperature,
    fades_with_rows,
    finds_class_power,
    finds_matching_biases,
    finds_share_of_tokens,
    finds_sureness_of_matching,
    finds_unmoved,
    grows_heads,
    has_few_rows,
    has_few_values,
    has_head_mean,
    has_usual_widths,
    has_value_widths,
    leaves_outliers_out,
    lets_one_task_lose,
    sharpens_by_rows,
    takes_a_share,
    tempers_around_rates,
    trains_through_mean,
    tries_known_classes,
)
from pyro_lift.watching.watch import Watchers

__all__ = ["BeforeChain", "ChainSetup"]


class BeforeChain(NamedTuple):
    """What is known before a chain begins.

    Attributes:
        run: what the chain is of, with the settings that were found.
        program: that it samples.
        settings: the same, filled in.
        adapt: settings of adaptation, likewise.
        joint: what the trial of joint training said; None where there was none.
        halves: what unseen tasks said; None where they were not asked.
    """

    run: ChainSetup
    program: AdapterHierarchy
    settings: LiFTSettings
    adapt: AdaptSettings
    joint: Joint | None
    halves: CrossFit | None


class ChainSetup:
    """A network with settings: the program and the kernel of its chain, and what is found before that begins.

    Args:
        adapter: the network as a function of theta.
        settings: of meta-training.
        adapt_settings: of adaptation.
        seed: of everything random.
    """

    def __init__(
        self, adapter: RandomAdapter, settings: LiFTSettings, adapt_settings: AdaptSettings, seed: int | None
    ) -> None:
        self.adapter, self.settings, self.adapt_settings, self.seed = adapter, settings, adapt_settings, seed
        self.head_mean: HeadMean | None = None
        #: What regressions say of heads of few rows, at vectors that have not seen them.
        self.few_values: FewRows = ()
        #: Folder inside a run's in which what is found before its chain is kept; the run's own where it is empty.
        self.kept_under = ""

    def before_chain(
        self,
        tasks: Sequence[Task],
        session: Session | None = None,
        start: Tensor | None = None,
        *,
        crossed: bool = True,
        progress: bool = False,
        watchers: Watchers | None = None,
    ) -> BeforeChain:
        """Find what is left to the tasks: whether joint training helps, the prior's widths, what unseen tasks say."""
        on_step = {part: None if watchers is None else watchers.of(part) for part in ("joint-trial", "cross-fit")}
        run = self._with(for_targets(self.settings, tasks))
        rules = {"widths": has_usual_widths(session), "around": has_value_widths(session)}
        rules |= {"few_rows": has_few_rows(session), "layer": tries_known_classes(session)}
        rules |= {"few_values": has_few_values(session), "share": takes_a_share(session)}
        rules["matching"] = finds_matching_biases(session)
        run.head_mean = run._head_mean(tasks, **rules) if has_head_mean(session) else None
        if run.head_mean is not None and not trains_through_mean(session):
            run.head_mean = run.head_mean._replace(halves=())
        if run.head_mean is not None and not fades_with_rows(session):
            run.head_mean = run.head_mean.with_one_sureness()
        joint = None if start is not None else run._joint(tasks, session, progress, on_step["joint-trial"])
        run = run if joint is None else run._after(joint)
        run = run._with(with_translation(run.settings, tasks, by_rounds=counts_rounds(session)))
        run = run if joint is None or not counts_rounds(session) else run._no_faster_than(joint, len(tasks))
        program = run.program(tasks)
        s = run._fitted(program, leave_out=leaves_outliers_out(session))
        adapt = resolved_adaptation(self.adapt_settings, self.settings, s, program.solved is not None)
        kinds = ("classification", "regression") if program.solved is None else ("regression",)
        grows = grows_heads(session) if program.solved is None else asks_kept_rows(session)
        if tasks[0].kind in kinds and adapt.many_rows is None and grows:
            adapt = replace(adapt, many_rows=many_rows(tasks))
        if not crossed:
            return BeforeChain(run, program, self._widened(s, program, joint), adapt, joint, None)
        noise = run.settings.noise_scale if self.settings.noise_scale is None else None
        shown = {"progress": progress, "on_step": on_step["cross-fit"]}
        halves = run._cross_fitted(program, joint, s, session, noise, **shown)
        if halves is not None:
            run.settings, s = (replace(settings, **halves.settings()) for settings in (run.settings, s))
            program.noise_scale = s.noise_sd
            if halves.power != 1.0 and self.leaves_power_open:  # a run that goes on may have been given one since
                adapt = replace(adapt, n_inflate=halves.power * (s.n_inflate or 1.0))
            if run.head_mean is not None and tasks[0].kind == "regression":
                run.few_values = halves.few_rows
            elif run.head_mean is not None:
                run.head_mean = run.head_mean.with_few(halves.few_rows)
            if halves.unmoved is not None and self.leaves_share_open:
                adapt = replace(adapt, unmoved_few=halves.unmoved)
        return BeforeChain(run, program, self._widened(s, program, joint), adapt, joint, halves)

    def _widened(self, s: LiFTSettings, program: AdapterHierarchy, joint: Joint | None) -> LiFTSettings:
        """Give phi's prior room for what joint training moves, where its widths were left open."""
        if joint is None or self.settings.sigma is not None or self.settings.beta is not None:
            return s
        s = replace(s, sigma=widened(s.sigma, joint.widths(s.sgd_steps)))
        program.sigma = by_weight(self.adapter, s.sigma)
        return s

    @property
    def leaves_power_open(self) -> bool:
        """Whether the power on the likelihood in adaptation may be found."""
        return self.adapt_settings.n_inflate is None and self.settings.n_inflate is None

    @property
    def leaves_share_open(self) -> bool:
        """Whether the share of draws that stay at the start of an adaptation may be found."""
        a = self.adapt_settings
        return a.unmoved is None and a.unmoved_few is None and a.dev_every == 0 and a.draws > 1

    def noise_of(self, tasks: Sequence[Task]) -> Noise | None:
        """Find the noise of regressions as :meth:`meta_train` does; None where it is given, or there is none."""
        check_kinds(tasks)
        if self.settings.noise_scale is not None or any(task.kind != "regression" for task in tasks):
            return None
        halves = self.before_chain(tasks).halves
        if halves is None or halves.noise is None:
            return None
        return Noise(halves.noise, halves.temperature, halves.power, halves.dispersion)

    @property
    def leaves_rate_open(self) -> bool:
        """Whether a chain that has lost what it knew may begin again at another rate than it had."""
        s = self.settings
        return s.learning_rate is None and not s.stop_every and not s.ranks_block_size

    def _joint(
        self, tasks: Sequence[Task], session: Session | None, progress: bool, on_step: Watchers | None
    ) -> Joint | None:
        """Put the joint training on trial, where its rate was left open; None where there is none."""
        s = resolved(self.settings, self.adapter)
        kept, saved_without = WorkBefore.of(session, "joint", partial(digest, self.adapter, tasks), self.kept_under)
        given = self.settings.sgd_learning_rate is not None
        steps = steps_beside_trial(s.sgd_steps, len(tasks)) if s.sgd_includes_trial else s.sgd_steps
        if given or s.ranks_block_size or saved_without or not has_trial(steps, len(tasks)):
            return None
        head_scale = self._head_scale(tasks, s)
        if head_scale is not None and s.head == "langevin":  # without steps of its own, such a head says nothing
            return None
        tasks = [task.to(self.adapter.initial.device) for task in tasks]
        score = self._score(s, head_scale)
        assert s.sgd_learning_rate is not None
        few = few_passes(steps, s.batch_size, tasks)

        def begin(half: Sequence[Task], rate: float, most: int) -> JointRun:
            title = f"joint training on trial, half of the tasks at {rate:.2g}"
            return self._joint_run(half, rate, most, title, progress=progress, on_step=on_step)

        start, rate = self.adapter.initial, s.sgd_learning_rate
        seldom = not few and passes(steps, s.batch_size, tasks) < SOME_PASSES
        scarce, lets_one = s.sgd_includes_trial and seldom, lets_one_task_lose(session)
        of = Vectors(few, sizes_of_tensors(self.adapter), scarce=scarce, one_may_lose=lets_one)
        joint = joint_on_trial(tasks, start, rate, steps, begin, score, kept, of=of)
        within = joint.helps and s.sgd_includes_trial
        return joint._replace(steps=s.sgd_steps - joint.spent) if within else joint

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
        heads, tasks = program.solved is not None, program.tasks
        kept, saved_without = WorkBefore.of(session, "cross-fit", partial(digest, self.adapter, tasks), self.kept_under)
        if joint is not None and joint.helps and few_passes(joint.steps, s.batch_size, tasks):
            joint = None
        if saved_without or s.ranks_block_size or (joint is None and noise is None) or len(tasks) < 2:
            return None
        known = all(task.kind == "classification" for task in tasks)
        classes = known or (finds_sureness_of_matching(session) and all(task.kind == "matching" for task in tasks))
        sure, tokens = noise is not None or classes, all(task.kind == "tokens" for task in tasks)
        strength = self.leaves_power_open and (noise is not None or tokens)
        says_at_start = heads or not any(has_head(task, program.head_scale) for task in tasks)
        finds_share = (classes and finds_unmoved(session)) or (tokens and finds_share_of_tokens(session))
        may_stay = finds_share and says_at_start and self.leaves_share_open
        usual = usual_share(heads) if may_stay else None
        begin = partial(self._joint_run, title="joint training of half of the tasks", **shown)
        chains: dict[int, Settled | None] = {}  # of the halves, by their standing: for every power the same
        asked: list[Asked] = []  # what unseen tasks say of heads of few rows, where the chains of the halves arrive
        score = self._score(s, program.head_scale)

        def adapt(
            standing: Standing, unseen: Sequence[Task], noise: float | None, power: float
        ) -> Sequence[TaskPosterior]:
            variance = one_width(s.beta) ** 2 / max(len(tasks) // 2, 1)
            at = Moments(torch.ones(1), standing.vector.unsqueeze(0), torch.full_like(standing.vector, variance)[None])
            scale = None
            if joint is not None and classes:
                if id(standing) not in chains:
                    chains[id(standing)] = self._half_chain(standing, joint, s, len(tasks), **shown)
                settled = chains[id(standing)]
                if settled is not None:
                    at, standing = settled.phi, standing._replace(moments=settled.second_moments)
                    scale = settled.matching_scale
            how = resolved_adaptation(self.adapt_settings, self.settings, s, heads)
            if heads and classes:  # as after the whole chain, whose preconditioner this one's is taken to be like
                how = self._loosened(how, s, self._moved(s, standing.moments, tasks), tasks)
            mixture = OnlineGaussianMixture.from_moments(at, max(len(tasks) // 2, 1), dtype=standing.vector.dtype)
            at_noise = replace(s, noise_scale=noise or s.noise_scale)
            rescaled = (s.noise_sd / at_noise.noise_sd) ** 4  # of square gradients
            moments = {name: rescaled * moment for name, moment in standing.moments.items()}
            rows = rows_of_moments(tasks, alike=s.task_steps == "tasks")
            mean = None if self.head_mean is None else self.head_mean.unseen_by(unseen)
            if known and mean is not None and mean.few and standing.tasks:
                seen = {task.name for task in standing.tasks}
                others = [task for task in tasks if task.name not in seen]
                asked.extend(asked_at(self.adapter, others, at.mean[0], mean))
            prior = LiFTPrior(
                self.adapter,
                mixture,
                at_noise,
                how,
                moments,
                rows=rows,
                matching_scale=scale,
                head_mean=mean,
                around_rates=tempers_around_rates(session),
            )
            options: dict[str, Any] = {} if power == 1.0 else {"n_inflate": power * (s.n_inflate or 1.0)}
            if usual is not None:
                options["unmoved_few"] = 1.0 / how.draws  # one stays: predictions of all shares can be had
            return prior.adapt_many(unseen, seed=0, **options)

        predict = partial(predicted, self.adapter) if classes and not heads else None
        values = None
        if self.head_mean is not None and tasks[0].kind == "regression" and asks_few_values(session):
            values = partial(said_by_unseen, self.adapter, tasks)
        finds = known and not heads and self.leaves_power_open and finds_class_power(session)
        judge = Judge(
            score,
            predict,
            adapt if sure or strength or may_stay else None,
            noise,
            strength=strength,
            usual_share=usual,
            few_rows=partial(few_rows, asked),
            careful=sharpens_by_rows(session),
            few_values=values,
            dispersed=asks_dispersion(session),
            powers=POWERS if finds and says_at_start else (),
            fades=fades_temperature(session),
            token_log_probs=partial(log_probs_of_tokens, self.adapter) if tokens and may_stay else None,
        )
        return cross_fit(tasks, self.adapter.initial, joint, begin, judge, kept)

    def _moved(self, s: LiFTSettings, moments: dict[str, Tensor], tasks: Sequence[Task]) -> dict[str, float]:
        """Report how many weights a task's data move, by a preconditioner."""
        widths = by_weight(self.adapter, s.beta)
        return weights_moved(moments, widths, tasks, batch_size=s.batch_size, power=s.n_inflate or 1.0)

    def _loosened(
        self, how: AdaptSettings, s: LiFTSettings, moved: dict[str, float], tasks: Sequence[Task]
    ) -> AdaptSettings:
        """Let solved heads' adaptation move more than the prior does, where that holds all weights."""
        return loosened(how, self.settings, s, moved[MOVED], mean_rows(tasks)) if MOVED in moved else how

    def _half_chain(
        self, standing: Standing, joint: Joint, s: LiFTSettings, tasks: int, **shown: Any
    ) -> Settled | None:
        """Run the chain of one half of the tasks, no longer than its joint training; None where it has none."""
        if not standing.tasks:
            return None
        share = min(0.5, 0.5 * joint.steps / (s.burn_in + s.samples * s.thinning))
        burn_in, draws = round(share * s.burn_in), max(round(share * s.samples), 2)
        step = self.settings.translation_step_size  # of all tasks
        step = None if step is None else step * tasks / len(standing.tasks)
        settings = replace(self.settings, sgd_steps=0, burn_in=burn_in, samples=draws, translation_step_size=step)
        run = self._with(settings)
        program = run.program(standing.tasks)
        program.beta = by_weight(self.adapter, s.beta)
        run._widened(s, program, joint)
        kernel = chain_kernel(program, resolved(run.settings, self.adapter), standing.vector, self.seed)
        settled = half_chain(kernel, standing, burn_in, draws, **shown)
        if settled is None or program.solved is None:
            return settled
        return settled._replace(matching_scale=program.solved.mean_scale())

    def _joint_run(self, tasks: Sequence[Task], rate: float, steps: int, title: str, **shown: Any) -> JointRun:
        """Make the first part of the chain, over some tasks, at a rate."""
        settings = replace(self.settings, sgd_steps=steps, sgd_learning_rate=rate)
        run = self._with(replace(settings, translation="none", translation_step_size=None))
        return JointRun(run.kernel(run.program(tasks)), steps, tasks, title, **shown)

    def _after(self, joint: Joint) -> ChainSetup:
        """Make the run that follows the trial of joint training.

        Where joint training does not help, nor does a translation, which pulls phi in the same direction.
        """
        settings = replace(self.settings, sgd_steps=joint.steps, sgd_learning_rate=joint.rate)
        if settings.translation is None and not joint.helps:
            settings = replace(settings, translation="none", translation_step_size=None)
        return self._with(settings)

    def _no_faster_than(self, joint: Joint, tasks: int) -> ChainSetup:
        """Bring the translation down to the rate of joint training, where the trial has taken a smaller one.

        It pulls phi in the same direction, and would go on at the rate that unseen tasks were not helped by.
        """
        default = resolved(replace(self.settings, sgd_learning_rate=None), self.adapter)
        assert default.sgd_learning_rate is not None and default.learning_rate is not None
        slower = joint.rate / default.sgd_learning_rate
        left_open = default.translation != "none" and default.translation_step_size is None
        if not (joint.helps and left_open and slower < 1.0):
            return self
        step = 2.0 * default.learning_rate * slower / tasks
        return self._with(replace(self.settings, translation_step_size=step))

    def work_of_chain(self, tasks: Sequence[Task], session: Session | None) -> Callable[[], WorkBefore]:
        """Return what makes the work that is kept of a chain itself, beside its checkpoints."""
        return lambda: WorkBefore.of(session, "slower", partial(digest, self.adapter, tasks), self.kept_under)[0]

    def slower(self, found: BeforeChain, slower: Slower) -> BeforeChain:
        """Return what was found before a chain with the rates at which it begins again, of those that are open."""
        (chain, joint), s, run = slower.factors, found.settings, copy(found.run)
        assert s.learning_rate is not None
        changed: dict[str, Any] = {"learning_rate": chain * s.learning_rate}
        step = run.settings.translation_step_size
        if step is not None and self.settings.translation_step_size is None:
            changed["translation_step_size"] = chain * step
        if self.settings.sgd_learning_rate is None and s.sgd_learning_rate is not None:
            changed["sgd_learning_rate"] = joint * s.sgd_learning_rate
        run.settings = replace(run.settings, **changed)
        return found._replace(run=run, settings=replace(s, **changed))

    def _with(self, settings: LiFTSettings) -> ChainSetup:
        run = ChainSetup(self.adapter, settings, self.adapt_settings, self.seed)
        run.head_mean, run.kept_under = self.head_mean, self.kept_under
        return run

    def _score(self, s: LiFTSettings, head_scale: float | None) -> Score:
        """Return what judges a vector by tasks that have not trained it, nor the head that theirs stand around."""

        def score(theta: Tensor, tasks: Sequence[Task]) -> Tensor:
            mean = None if self.head_mean is None else self.head_mean.unseen_by(tasks)
            return log_probs_at(
                self.adapter, theta, tasks, head_scale=head_scale, noise_scale=s.noise_sd, head_mean=mean
            )

        return score

    def _head_mean(self, tasks: Sequence[Task], *, matching: bool, **rules: bool) -> HeadMean | None:
        """Find the head that tasks' own stand around, where these are solved, or what they say of their biases."""
        if self.settings.head in ("langevin", "shared"):
            return None
        on_device = [task.to(self.adapter.initial.device) for task in tasks]
        if all(task.kind == "matching" for task in tasks):  # their heads stand beside texts, whatever the output is
            biases = matching_biases(self.adapter, on_device) if matching else None
            return None if biases is None else HeadMean(biases, 0.0, 0.0)
        if self._head_scale(tasks, self.settings) is None:
            return None
        return head_mean(self.adapter, on_device, **rules)

    def head_of_new(self, phi: Tensor, program: AdapterHierarchy, session: Session | None) -> ClassHead | None:
        """Return the head that new tasks' own stand around, with what tasks at phi say of those of few rows."""
        head = None if self.head_mean is None else self.head_mean.head
        if not asks_few_values(session):
            return head
        phi = phi.to(self.adapter.initial)
        if asks_few_classes(session):
            head = with_few_classes(head, self.adapter, program.tasks, phi)
        return with_few_values(head, self.adapter, program.tasks, phi, program.noise_scale, self.few_values)

    def program(self, tasks: Sequence[Task]) -> AdapterHierarchy:
        """Return the Pyro program that :meth:`meta_train` samples."""
        s, device = resolved(for_targets(self.settings, tasks), self.adapter), self.adapter.initial.device
        mean = self.head_mean
        program = AdapterHierarchy(
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
            head_mean=None if mean is None else mean.of(tasks),
        )
        if program.solved is not None and mean is not None:
            # Of regressions the noise is that of heads of their own, under which the shared one may be far off.
            program.solved.through_mean = bool(mean.halves) and tasks[0].kind == "classification"
        return program

    def _head_scale(self, tasks: Sequence[Task], s: LiFTSettings) -> float | None:
        return own_head_scale(self.adapter, tasks, s.head_scale, solve=s.head not in ("langevin", "shared"))

    def _fitted(self, program: AdapterHierarchy, *, leave_out: bool = True) -> LiFTSettings:
        """Look at what the prior does to the tasks' loss, and give the program the widths that come of it."""
        s = fitted(replace(self.settings, head_scale=program.head_scale), self.adapter, program.tasks, leave_out)
        program.beta, program.sigma = by_weight(self.adapter, s.beta), by_weight(self.adapter, s.sigma)
        return s

    def kernel(self, program: AdapterHierarchy) -> SGLDGibbs:
        """Return the kernel that :meth:`meta_train` runs."""
        return chain_kernel(program, resolved(self.settings, self.adapter), self.adapter.initial, self.seed)
