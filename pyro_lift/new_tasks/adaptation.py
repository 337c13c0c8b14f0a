"""Adaptation of new tasks under a learned prior (Eq. 15-18): one by one, or in blocks that share their passes.

The steps are the same for one task and for a block: heads are solved at the candidates for a start, where they are
solved; the program is made, and the start of each chain chosen; the chain is run; and each task's draws, some of them
put back to its start, are its posterior.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lift.defaults import longest_move
from pyro_lift.inference.adaptation.chain import Shown, Source, moments_for, run_chain, run_watched, times_before
from pyro_lift.inference.adaptation.class_rates import class_counts
from pyro_lift.inference.adaptation.early_stopping import DrawWindows
from pyro_lift.inference.adaptation.failures import all_kept
from pyro_lift.inference.adaptation.meta_testing import (
    UNTOUCHED,
    Start,
    Untouched,
    best_start,
    best_starts,
    heads_at_best_start,
)
from pyro_lift.inference.adaptation.tempered_rows import TemperedRows
from pyro_lift.inference.adaptation.unmoved import Unmoved
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.few_values import MOVES_FROM
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.hierarchical import can_share_pass
from pyro_lift.models.observation import own_head_scale
from pyro_lift.models.priors import broadened
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.target_units import warn_of_width
from pyro_lift.models.task import Task
from pyro_lift.models.weight_scales import by_weight
from pyro_lift.posterior import TaskPosterior
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.tuning.development import windows_of

__all__ = ["Adaptation", "new_head_scale"]

#: What is added to the number of a block whose tasks are none of the kind, so that its chains have noise of their own.
APART = 1_000_000


def new_head_scale(adapter: RandomAdapter, settings: LiFTSettings, tasks: Sequence[Task]) -> float | None:
    """Return the scale of new tasks' own heads: that of meta-training; one without a head has features to say so.

    Args:
        adapter: the network as a function of theta.
        settings: of meta-training.
        tasks: new ones.
    """
    solve = settings.head not in ("langevin", "shared")
    return own_head_scale(adapter, tasks, settings.head_scale, solve=solve, by_width=False)


@dataclass(frozen=True)
class Adaptation:
    """What the adaptation of new tasks takes of a prior; the tasks have passed its door.

    Attributes:
        adapter: the network as a function of theta.
        mixture: over phi.
        settings: of meta-training, filled in.
        how: settings of this adaptation, filled in.
        second_moment: the preconditioner that meta-training learned, by local family.
        rows: that the preconditioner is of; None leaves a task's number of rows, and the limit of a step, out.
        rescales: whether the preconditioner is brought to the power of this adaptation.
        matching_scale: of label matching without rows; None takes the readout's.
        prediction_temperature: that posteriors predict with.
        head_mean: the head that tasks' own have their prior around; None is zero.
        around_rates: whether predictions are tempered around the rates of a task's classes.
        tempered_rows: that tasks had from which the temperature was found, where below 1 it holds for such; None for
            all.
        dispersion: how unevenly regressions vary around the noise; None takes them for alike.
        value_heads: whether regressions on a network's own output have heads where they have rows for that.
    """

    adapter: RandomAdapter
    mixture: OnlineGaussianMixture
    settings: LiFTSettings
    how: AdaptSettings
    second_moment: Mapping[str, Tensor]
    rows: float | None
    rescales: bool
    matching_scale: float | None
    prediction_temperature: float
    head_mean: ClassHead | None = None
    around_rates: bool = True
    tempered_rows: TemperedRows | None = None
    dispersion: Dispersion | None = None
    value_heads: bool = True

    def alone(self, task: Task, source: Source, shown: Shown) -> TaskPosterior:
        """Adapt to one task, by a chain of its own."""
        mixture, untouched = self.mixture.get(), self._untouched()
        task = task.to(self.adapter.initial.device)
        solved, starts = self._solved([task], mixture, untouched)
        unmoved = self._unmoved([task], solved)
        program = FlatAdapter(
            self.adapter,
            unmoved.tasks[0],
            self._broadened(mixture),
            batch_size=self.how.batch_size,
            head_scale=self._head_scale([task]),
            noise_scale=self.settings.noise_sd,
            solved=unmoved.solved,
            admitted=True,
        )
        start = starts[0] if starts else best_start(program, mixture, untouched)
        if untouched is not None and start.component == UNTOUCHED:
            program.prior = self._broadened(untouched.prior(mixture))
        solve = None if solved is None else partial(self._heads, solved, 0, seed=source.seed)
        windows = windows_of(self.adapter, task, self.how, solve, self.settings.noise_sd)
        chain = self._run(program, start.theta, source, shown, windows)
        draws = chain.get_samples()
        thetas = unmoved.put_back(0, start.theta, draws["theta"])
        heads = draws.get("head") if solve is None else solve(thetas)
        told = self._told(solved, 0, start.theta, thetas)
        return self._posterior(task, thetas, heads, start.component, chain, told)

    def many(self, tasks: Sequence[Task], block_size: int, seed: int | None, shown: Shown) -> list[TaskPosterior]:
        """Adapt to several tasks: to a block of them in one pass where they can share it, else one by one.

        Args:
            tasks: that have passed the door.
            block_size: tasks of one pass.
            seed: of all chains; None takes torch's global stream.
            shown: bar and callbacks.

        Raises:
            LostTasksError: chains of some tasks diverged; it has the others' posteriors.
        """
        apart = block_size == 1 or (self.how.dev_every > 0 and any(task.dev is not None for task in tasks))
        if apart or not can_share_pass(tasks, self._head_scale(tasks), self.settings.head != "langevin"):
            sources = [Source(seed, count) for count in times_before(tasks)]  # a task's first chain is that of `adapt`
            of = [shown._replace(tasks=[task]) for task in tasks]
            return all_kept(tasks, 1, lambda k, alone: [self.alone(alone[0], sources[k], of[k])])
        return all_kept(tasks, block_size, lambda k, block: self._block(block, Source(seed, k), shown))

    def _block(self, tasks: Sequence[Task], source: Source, shown: Shown) -> list[TaskPosterior]:
        mixture, untouched = self.mixture.get(), self._untouched()
        tasks = [task.to(self.adapter.initial.device) for task in tasks]
        solved, starts = self._solved(tasks, mixture, untouched)
        unmoved = self._unmoved(tasks, solved)
        program = FlatBlock(
            self.adapter,
            unmoved.tasks,
            self._broadened(mixture),
            batch_size=self.how.batch_size,
            head_scale=self._head_scale(tasks),
            noise_scale=self.settings.noise_sd,
            solved=unmoved.solved,
            admitted=True,
        )
        starts = starts or best_starts(program, mixture, untouched)
        none_of_the_kind = [start.component == UNTOUCHED for start in starts]
        if any(none_of_the_kind) and not all(none_of_the_kind):
            return self._in_two(tasks, none_of_the_kind, source, shown)
        if untouched is not None and all(none_of_the_kind):
            program.prior = self._broadened(untouched.prior(mixture))
        at = torch.stack([start.theta for start in starts])
        mcmc = self._run(program, at, source, shown._replace(tasks=tasks), None)
        draws, heads = mcmc.get_samples()["theta"], mcmc.get_samples().get("head")
        posteriors = []
        for k, (task, start) in enumerate(zip(tasks, starts, strict=True)):
            theta, head = draws[:, k], None if heads is None else heads[:, k]
            theta = unmoved.put_back(k, start.theta, theta)
            if solved is not None:
                head = self._heads(solved, k, theta, source.seed)
            told = self._told(solved, k, start.theta, theta)
            posteriors.append(self._posterior(task, theta, head, start.component, mcmc, told))
        return posteriors

    def _in_two(
        self, tasks: Sequence[Task], none_of_the_kind: Sequence[bool], source: Source, shown: Shown
    ) -> list[TaskPosterior]:
        """Adapt to the tasks that are none of the kind in a pass of their own: their prior is another."""
        posteriors: dict[int, TaskPosterior] = {}
        for which in (False, True):
            places = [k for k, is_none in enumerate(none_of_the_kind) if is_none == which]
            number = source.number + (APART if which else 0)
            part = self._block([tasks[k] for k in places], Source(source.seed, number), shown)
            posteriors |= dict(zip(places, part, strict=True))
        return [posteriors[k] for k in range(len(tasks))]

    def _broadened(self, mixture: dist.MixtureSameFamily) -> dist.MixtureSameFamily:
        """Make the prior of a task's weights, which stand around phi."""
        return broadened(mixture, by_weight(self.adapter, self.settings.beta))

    def _untouched(self) -> Untouched | None:
        """Make the start that needed no meta-training, where it is a candidate."""
        return Untouched(self.adapter.initial, self.how.untouched) if self.how.untouched else None

    def _solved(
        self, tasks: Sequence[Task], mixture: dist.MixtureSameFamily, untouched: Untouched | None
    ) -> tuple[SolvedHeads | None, list[Start]]:
        """Solve the heads of new tasks at the starts; None, and no starts, where they are not solved."""
        scale = self._head_scale(tasks)
        if self.settings.head == "langevin" or not all(has_solved_head(self.adapter, task, scale) for task in tasks):
            return None, []
        return heads_at_best_start(
            self.adapter,
            tasks,
            mixture,
            untouched,
            scale=self.matching_scale,
            mean=self.head_mean,
            noise_scale=self.settings.noise_sd,
        )

    def _head_scale(self, tasks: Sequence[Task]) -> float | None:
        return new_head_scale(self.adapter, self.settings, tasks)

    def _unmoved(self, tasks: Sequence[Task], solved: SolvedHeads | None) -> Unmoved:
        """Keep some rows from the chains, and find on them how many draws go back to the start."""
        how, scale = self.how, self.settings.head_scale
        looks = how.dev_every > 0
        return Unmoved(tasks, solved, share=how.unmoved, few=how.unmoved_few, looks=looks, head_scale=scale)

    def _heads(self, solved: SolvedHeads, task: int, thetas: Tensor, seed: int | None) -> Tensor:
        """Solve a task's head at each draw ``[S, D]``, or draw it there: ``[S, C, E + 1]``."""
        if self._takes_modes():
            return solved.solve_each(task, thetas)
        return solved.draw_each(task, thetas, seed)

    def _takes_modes(self) -> bool:
        return self.settings.head in ("solve", "shared")

    def _told(self, solved: SolvedHeads | None, task: int, start: Tensor, thetas: Tensor) -> dict[str, Any]:
        """Find how far a regression's predictions may be off; draws of heads need nobody to say it.

        Its modes by the last draw, and the noise of its rows at the start, where no draw has seen them.
        """
        if solved is None or not self._takes_modes():
            return {}
        left_out, found = solved.left_out(task, start), None
        if left_out is not None and self.dispersion is not None:
            found = self.dispersion.of(left_out, len(solved.tasks[task].train))
            if found.odd:
                warn_of_width(solved.tasks[task], found.missed, self.settings.noise_sd)
        factors = None if found is None else found.factors
        return {"head_spread": solved.spread(task, thetas[-1]), "left_out": left_out, "dispersion": factors}

    def _run(
        self, program: Any, start: Tensor, source: Source, shown: Shown, windows: DrawWindows | None
    ) -> MCMC | DrawWindows:
        """Run the chain of Eq. 18 from a start, through windows if there are any."""
        s, a = self.settings, self.how
        assert a.learning_rate is not None and a.n_inflate is not None
        power = (s.n_inflate or 1.0) if self.rescales else a.n_inflate
        limited = self.rows is not None and s.preconditioner == "rms"
        options: dict[str, Any] = {
            "step_size": 2.0 * a.learning_rate,
            "temperature": a.temperature,
            "n_inflate": a.n_inflate,
            "preconditioner": "rms" if s.preconditioner == "rms" else None,
            "second_moment": moments_for(
                self.second_moment, shown.tasks, power=a.n_inflate / power, rows=self.rows, block=start.dim() == 2
            ),
            "max_move": longest_move(a.learning_rate, self.adapter) if limited else None,
            "site_step_scale": {"head": s.head_lr_scale},
            "site_temperature": {"head": s.head_temperature},
        }
        if windows is not None:
            return run_watched(program, start, windows, source, shown, **options)
        return run_chain(program, start, a.steps, a.draws, source, shown, **options)

    def _posterior(
        self,
        task: Task,
        thetas: Tensor,
        heads: Tensor | None,
        component: int,
        chain: MCMC | DrawWindows,
        told: Mapping[str, Any],
    ) -> TaskPosterior:
        mcmc, results = (None, chain.results) if isinstance(chain, DrawWindows) else (chain, None)
        told = {**told, "results": results, "noise_scale": self.settings.noise_sd}
        temperature = self.prediction_temperature
        few, rows = None if self.head_mean is None else self.head_mean.few_values, len(task.train)
        if few is not None and few.of(rows) is not None:  # at phi tasks have said how wide predictions are
            temperature = 1.0 if rows < MOVES_FROM else max(temperature, 1.0)
        elif self.tempered_rows is not None:
            temperature = self.tempered_rows.holds(temperature, task)
        told["prediction_temperature"] = temperature
        told["class_counts"] = class_counts(task) if self.around_rates else None
        return TaskPosterior(self.adapter, task, thetas, heads, component, mcmc, **told)
