"""The prior that meta-training leaves: a Gaussian mixture over phi, ready to adapt to new tasks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.adapter_library import prior_from_adapters
from pyro_lift.data.encoding import TextEncoding
from pyro_lift.defaults import inherited, longest_move, one_width, resolved, warn_of_adaptation
from pyro_lift.generation.decode import generate
from pyro_lift.inference.adaptation.chain import Shown, Source, moments_for, run_chain, run_watched, times_before
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
from pyro_lift.inference.adaptation.unmoved import Unmoved
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_names import check_class_numbers
from pyro_lift.models.door import check_rows
from pyro_lift.models.flat import FlatAdapter, FlatBlock
from pyro_lift.models.hierarchical import can_share_pass
from pyro_lift.models.observation import own_head_scale
from pyro_lift.models.priors import broadened
from pyro_lift.models.solved_heads import SolvedHeads, has_solved_head
from pyro_lift.models.target_units import warn_of_new_units
from pyro_lift.models.task import Task, check_kinds, undeclared
from pyro_lift.models.weight_scales import by_weight
from pyro_lift.posterior import TaskPosterior
from pyro_lift.saving.folders import chosen_weights, export_library, export_prior, load_prior, save_prior
from pyro_lift.saving.hub import push
from pyro_lift.saving.served import export_served
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.options import check_choice, check_number
from pyro_lift.tuning.development import windows_of
from pyro_lift.tuning.figure import plot_tuning
from pyro_lift.tuning.predictions import fitted_on_held_out

__all__ = ["LiFTPrior"]

#: What is added to the number of a block whose tasks are none of the kind, so that its chains have noise of their own.
APART = 1_000_000

#: What a merged prior has of its first chain's, beside the settings.
_OF_THE_TASKS = ("tasks", "matching_scale", "encoding", "tuning", "rescales", "rows", "kinds", "classes", "masks")


class LiFTPrior:
    """The learned prior: a Gaussian mixture over what the tasks share, ready to adapt to a new task.

    Attributes:
        adapter: the network as a function of theta.
        mixture: the :class:`~pyro_lift.inference.mixture.online_em.OnlineGaussianMixture` over phi.
        settings: of meta-training.
        second_moment: the preconditioner that meta-training learned, by local family; adaptation begins with it.
        mcmc: the finished run, for :func:`pyro_lift.from_mcmc`; None for a prior that was loaded.
        tasks: names of the tasks it was learned from, in order.
        results: measures to be saved with it, by name.
        matching_scale: of label matching without rows, the mean over the tasks it was learned from, and where a new
            task's own choice begins; None takes the readout's.
        encoding: how its tasks' strings are encoded; None where they were given in tensors.
        prediction_temperature: of the predictions of its tasks, see :meth:`calibrate`; 1 where nobody has.
        tuning: how the settings were chosen, as :meth:`pyro_lift.tuning.search.Tuning.to_dict` tells; None where they
            were given.
        rescales: whether the preconditioner is brought to the power of an adaptation that has another.
        rows: that the preconditioner is of (:func:`.rows_of_moments`): it is brought to a new task's fewer, and no step
            is longer than :func:`longest_move` says; None, as of a prior saved before, does neither.
        kinds: of the tasks it was learned from; empty where nobody says.
        classes: the output of each class name, where they shared the network's outputs.
        masks: whether shared outputs that are no classes of a new task have no probability; False of one saved before.
    """

    def __init__(
        self,
        adapter: RandomAdapter,
        mixture: OnlineGaussianMixture,
        settings: LiFTSettings,
        adapt_settings: AdaptSettings | None = None,
        second_moment: dict[str, Tensor] | None = None,
        mcmc: Any = None,
        seed: int | None = None,
        *,
        tasks: Sequence[str] = (),
        results: Mapping[str, Any] | None = None,
        matching_scale: float | None = None,
        encoding: TextEncoding | None = None,
        prediction_temperature: float = 1.0,
        tuning: dict[str, Any] | None = None,
        rescales: bool = True,
        rows: float | None = None,
        kinds: Sequence[str] = (),
        classes: Mapping[str, int] | None = None,
        masks: bool = True,
    ) -> None:
        self.adapter, self.mixture, self.settings = adapter, mixture, resolved(settings, adapter)
        self.matching_scale, self.rescales, self.rows = matching_scale, rescales, rows
        self.tasks, self.kinds, self.results = tuple(tasks), tuple(kinds), dict(results or {})
        self.prediction_temperature, self.tuning, self.classes = prediction_temperature, tuning, dict(classes or {})
        self.adapt_settings = adapt_settings or AdaptSettings()
        self.second_moment = second_moment or {}
        self.mcmc, self.seed, self.encoding, self.masks = mcmc, seed, encoding, masks

    def __repr__(self) -> str:
        return f"LiFTPrior({self.mixture!r}, beta={one_width(self.settings.beta):.3g}, adapter={self.adapter!r})"

    @property
    def beta(self) -> float | Tensor:
        """Standard deviation of a task's weights around phi: one number, or ``[D]``."""
        return by_weight(self.adapter, self.settings.beta)

    def merge(self, *others: LiFTPrior) -> LiFTPrior:
        """Merge this prior with those of other chains, as if their draws were one chain's.

        Mixtures are merged by matching components, preconditioners averaged.

        Args:
            others: of the same tasks, settings and adapter, with other seeds; one process each is enough.

        Raises:
            ValueError: another model; names what differs.
        """
        for other in others:
            # First the adapters: what settings leave open is filled in from them, and differs where they do.
            if not torch.equal(self.adapter.initial, other.adapter.initial.to(self.adapter.initial.device)):
                raise ValueError(
                    "the priors' adapters begin at other weights, around which phi's own prior stands: only chains of "
                    "one model can be merged. Make one adapter and give it to each LiFT(adapter, seed=...)."
                )
            for name in ("tasks", "settings"):
                if getattr(self, name) != getattr(other, name):
                    raise ValueError(f"the priors' {name} differ: only chains of one model can be merged.")
        mixture = self.mixture
        for other in others:
            mixture = mixture.merge(other.mixture)
        chains = [self, *others]
        moments = {
            k: torch.stack([p.second_moment[k].to(v) for p in chains]).mean(0) for k, v in self.second_moment.items()
        }
        return LiFTPrior(
            self.adapter,
            mixture,
            self.settings,
            self.adapt_settings,
            moments,
            seed=self.seed,
            prediction_temperature=math.exp(sum(math.log(p.prediction_temperature) for p in chains) / len(chains)),
            **{name: getattr(self, name) for name in _OF_THE_TASKS},
        )

    @at_top_level()
    def calibrate(
        self, tasks: Sequence[Task], *, seed: int | None = None, most_rows: int = 200, **options: Any
    ) -> float:
        """Fit the temperature of predictions, and keep it with the prior: later posteriors predict with it.

        Each task is adapted to on its training rows, and one temperature is fitted to the predictions of rows that it
        did not see: its test or dev rows, else a third of its rows.

        Args:
            tasks: of the prior's kind; best are some that it was not learned from.
            seed: of the chains; None takes the prior's.
            most_rows: of a task, that the fit looks at.
            options: fields of :class:`AdaptSettings` to change.

        Returns:
            The temperature: above 1 where predictions were too sure. Of regressions it multiplies the variance.

        Raises:
            ValueError: no task, or regressions beside others.
        """
        adapt = partial(self.adapt_many, seed=seed, **options)
        self.prediction_temperature = fitted_on_held_out(tasks, adapt, most_rows)
        return self.prediction_temperature

    @at_top_level()
    def adapt(
        self, task: Task, *, seed: int | None = None, progress: bool = False, callbacks: Any = (), **options: Any
    ) -> TaskPosterior:
        """Draw from the posterior of a new task's weights (Eq. 15-18).

        Args:
            task: its training rows.
            seed: of this chain; None takes the prior's.
            progress: whether to show a bar.
            callbacks: of the chain (:mod:`pyro_lift.watching`).
            options: fields of :class:`AdaptSettings` to change for this task; with ``dev_every`` its development rows
                are looked at on the way, and the best draws are kept.

        Raises:
            ValueError: labels outside the head's range, a regression under a prior of classes; before any training.
            DivergedError: a loss that is not finite, or a rate past its limit; names the task, and a rate to try.
        """
        (task,) = self._admitted([task])
        a, seed = inherited(self.adapt_settings, self.settings, options), self.seed if seed is None else seed
        warn_of_adaptation(a, self.settings, self.adapter, [task])
        return self._adapt_alone(task, a, Source(seed), Shown(progress, callbacks, [task]))

    def _adapt_alone(self, task: Task, a: AdaptSettings, source: Source, shown: Shown) -> TaskPosterior:
        s, mixture = self.settings, self.mixture.get()
        task, untouched = task.to(self.adapter.initial.device), self._untouched(a)
        solved, starts = self._solved([task], mixture, untouched)
        unmoved = self._unmoved(a, [task], solved)
        program = FlatAdapter(
            self.adapter,
            unmoved.tasks[0],
            broadened(mixture, self.beta),
            batch_size=a.batch_size,
            head_scale=self._head_scale([task]),
            noise_scale=s.noise_sd,
            solved=unmoved.solved,
            admitted=True,
        )
        start = starts[0] if starts else best_start(program, mixture, untouched)
        if untouched is not None and start.component == UNTOUCHED:
            program.prior = broadened(untouched.prior(mixture), self.beta)
        solve = None if solved is None else partial(self._heads, solved, 0, seed=source.seed)
        windows = windows_of(self.adapter, task, a, solve, s.noise_sd)
        chain = self._run(program, start.theta, a, source, shown, windows)
        draws = chain.get_samples()
        thetas = unmoved.put_back(0, start.theta, draws["theta"])
        heads = draws.get("head") if solve is None else solve(thetas)
        return self._posterior(task, thetas, heads, start.component, chain)

    @at_top_level()
    def adapt_many(
        self,
        tasks: Sequence[Task],
        *,
        block_size: int = 8,
        seed: int | None = None,
        progress: bool = False,
        callbacks: Any = (),
        **options: Any,
    ) -> list[TaskPosterior]:
        """:meth:`adapt` to several tasks; those of a block go through the network in one pass.

        The same task several times gives as many independent chains. With the RMS preconditioner a block's chains
        share the mean that its damping is relative to.

        Args:
            tasks: their training rows. Tasks that differ in kind, or with heads of their own in their number of
                classes, are adapted to one by one; all are where development rows are looked at.
            block_size: tasks of one pass.
            seed: of all chains; None takes the prior's.
            progress: whether to show bars.
            callbacks: of the chains.
            options: fields of :class:`AdaptSettings` to change.

        Raises:
            LostTasksError: chains of some tasks diverged; it names them and has the others' ``posteriors``. There is
                no list with gaps, which would fail later and elsewhere.
        """
        check_number("block_size", block_size, least=1, open_below=False, whole=True)
        tasks = self._admitted(tasks)
        a = inherited(self.adapt_settings, self.settings, options)
        apart = block_size == 1 or (a.dev_every > 0 and any(task.dev is not None for task in tasks))
        warn_of_adaptation(a, self.settings, self.adapter, tasks)
        shown, seed = Shown(progress, callbacks, tasks), self.seed if seed is None else seed
        if apart or not can_share_pass(tasks, self._head_scale(tasks), self.settings.head != "langevin"):
            sources = [Source(seed, count) for count in times_before(tasks)]  # a task's first chain is that of `adapt`
            of = [shown._replace(tasks=[task]) for task in tasks]
            return all_kept(tasks, 1, lambda k, alone: [self._adapt_alone(alone[0], a, sources[k], of[k])])
        return all_kept(tasks, block_size, lambda k, block: self._adapt_block(block, a, Source(seed, k), shown))

    def _adapt_block(
        self, tasks: Sequence[Task], a: AdaptSettings, source: Source, shown: Shown
    ) -> list[TaskPosterior]:
        s, mixture = self.settings, self.mixture.get()
        tasks = [task.to(self.adapter.initial.device) for task in tasks]
        untouched = self._untouched(a)
        solved, starts = self._solved(tasks, mixture, untouched)
        unmoved = self._unmoved(a, tasks, solved)
        program = FlatBlock(
            self.adapter,
            unmoved.tasks,
            broadened(mixture, self.beta),
            batch_size=a.batch_size,
            head_scale=self._head_scale(tasks),
            noise_scale=s.noise_sd,
            solved=unmoved.solved,
            admitted=True,
        )
        starts = starts or best_starts(program, mixture, untouched)
        none_of_the_kind = [start.component == UNTOUCHED for start in starts]
        if any(none_of_the_kind) and not all(none_of_the_kind):
            return self._adapt_apart(tasks, none_of_the_kind, a, source, shown)
        if untouched is not None and all(none_of_the_kind):
            program.prior = broadened(untouched.prior(mixture), self.beta)
        at = torch.stack([start.theta for start in starts])
        mcmc = self._run(program, at, a, source, shown._replace(tasks=tasks), None)
        draws, heads = mcmc.get_samples()["theta"], mcmc.get_samples().get("head")
        posteriors = []
        for k, (task, start) in enumerate(zip(tasks, starts, strict=True)):
            theta, head = draws[:, k], None if heads is None else heads[:, k]
            theta = unmoved.put_back(k, start.theta, theta)
            if solved is not None:
                head = self._heads(solved, k, theta, source.seed)
            posteriors.append(self._posterior(task, theta, head, start.component, mcmc))
        return posteriors

    def _admitted(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Refuse tasks that are no new ones of this prior: the one door, before their heads are solved or they move."""
        check_kinds(tasks, self.kinds)
        check_class_numbers(tasks, self.classes)  # none where they had heads of their own
        check_rows(self.adapter, tasks)  # what comes after takes them as admitted
        if self.tasks and self._head_scale(tasks) is None:  # one in the making has no names, and these are its own
            warn_of_new_units(self.adapter, tasks, self.mixture.get().mean, self.settings.noise_sd)
        return tasks if self.masks else [undeclared(task) for task in tasks]

    def _posterior(
        self, task: Task, thetas: Tensor, heads: Tensor | None, component: int, chain: MCMC | DrawWindows
    ) -> TaskPosterior:
        mcmc, results = (None, chain.results) if isinstance(chain, DrawWindows) else (chain, None)
        told: dict[str, Any] = {"results": results, "noise_scale": self.settings.noise_sd}
        told["prediction_temperature"] = self.prediction_temperature
        return TaskPosterior(self.adapter, task, thetas, heads, component, mcmc, **told)

    def _adapt_apart(
        self, tasks: Sequence[Task], apart: Sequence[bool], a: AdaptSettings, source: Source, shown: Shown
    ) -> list[TaskPosterior]:
        """Adapt to the tasks that are none of the kind in a pass of their own: their prior is another."""
        posteriors: dict[int, TaskPosterior] = {}
        for which in (False, True):
            places = [k for k, is_apart in enumerate(apart) if is_apart == which]
            number = source.number + (APART if which else 0)
            part = self._adapt_block([tasks[k] for k in places], a, Source(source.seed, number), shown)
            posteriors |= dict(zip(places, part, strict=True))
        return [posteriors[k] for k in range(len(tasks))]

    def _untouched(self, a: AdaptSettings) -> Untouched | None:
        """Make the start that needed no meta-training, where it is a candidate."""
        return Untouched(self.adapter.initial, a.untouched) if a.untouched else None

    def _solved(
        self, tasks: Sequence[Task], mixture: Any, untouched: Untouched | None
    ) -> tuple[SolvedHeads | None, list[Start]]:
        """Solve the heads of new tasks at the starts; None, and no starts, where they are not solved."""
        scale = self._head_scale(tasks)
        if self.settings.head == "langevin" or not all(has_solved_head(self.adapter, task, scale) for task in tasks):
            return None, []
        return heads_at_best_start(self.adapter, tasks, mixture, untouched, scale=self.matching_scale)

    def _head_scale(self, tasks: Sequence[Task]) -> float | None:
        """The scale of new tasks' own heads: that of meta-training; one without a head has features to say so."""
        scale, solve = self.settings.head_scale, self.settings.head not in ("langevin", "shared")
        return own_head_scale(self.adapter, tasks, scale, solve=solve, by_width=False)

    def _unmoved(self, a: AdaptSettings, tasks: Sequence[Task], solved: SolvedHeads | None) -> Unmoved:
        scale = self.settings.head_scale
        return Unmoved(tasks, solved, share=a.unmoved, looks=a.dev_every > 0, head_scale=scale)

    def _heads(self, solved: SolvedHeads, task: int, thetas: Tensor, seed: int | None) -> Tensor:
        """Solve a task's head at each draw ``[S, D]``, or draw it there: ``[S, C, E + 1]``."""
        mode = self.settings.head in ("solve", "shared")
        return solved.solve_each(task, thetas) if mode else solved.draw_each(task, thetas, seed)

    def _run(
        self, program: Any, start: Tensor, a: AdaptSettings, source: Source, shown: Shown, windows: DrawWindows | None
    ) -> MCMC | DrawWindows:
        """Run the chain of Eq. 18 from a start, through windows if there are any."""
        assert a.learning_rate is not None and a.n_inflate is not None
        power = (self.settings.n_inflate or 1.0) if self.rescales else a.n_inflate
        limited = self.rows is not None and self.settings.preconditioner == "rms"
        options: dict[str, Any] = {
            "step_size": 2.0 * a.learning_rate,
            "temperature": a.temperature,
            "n_inflate": a.n_inflate,
            "preconditioner": "rms" if self.settings.preconditioner == "rms" else None,
            "second_moment": moments_for(
                self.second_moment, shown.tasks, power=a.n_inflate / power, rows=self.rows, block=start.dim() == 2
            ),
            "max_move": longest_move(a.learning_rate, self.adapter) if limited else None,
            "site_step_scale": {"head": self.settings.head_lr_scale},
            "site_temperature": {"head": self.settings.head_temperature},
        }
        if windows is not None:
            return run_watched(program, start, windows, source, shown, **options)
        return run_chain(program, start, a.steps, a.draws, source, shown, **options)

    def theta(self, task: str) -> Tensor:
        """Return the latest weights ``[D]`` of a meta-training task; a saved prior has none."""
        check_choice("task", task, self.tasks)
        if self.mcmc is None:
            raise ValueError(f"the prior was loaded, and the weights of its tasks are not saved: task={task!r}.")
        theta: Tensor = self.mcmc.kernel.theta(self.tasks.index(task))["theta"]
        return theta

    def generate(self, inputs: Any, which: str | int = "phi", *, task: str = "", **options: Any) -> Any:
        """Write a text for each input without any adaptation, as :meth:`TaskPosterior.generate` does.

        Args:
            inputs: a list of strings, what a tokenizer returns, ``input_ids`` or rows.
            which: ``"phi"`` (the mixture's mean), a component's number, or the name of a meta-training task.
            task: name that goes before strings where training put the task's there; none if empty.
            options: of :func:`pyro_lift.generation.decode.generate` and of transformers' ``generate``.
        """
        theta = chosen_weights(self, which).to(self.adapter.initial)
        encoding = None if self.encoding is None else replace(self.encoding, task=task)
        return generate(self.adapter, theta.unsqueeze(0), inputs, encoding, **options)

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write a folder: the mixture, all that its use needs, a model card, a PEFT adapter of its heaviest mean.

        Args:
            folder: made if it is not there; files of the same names are replaced.
            results: measures by name, for the model card.
        """
        self.results |= dict(results or {})
        saved = save_prior(self, Path(folder))
        if self.tuning is not None:
            plot_tuning(self.tuning, saved / "tuning.png")
        return saved

    @classmethod
    @at_top_level(runs=False)
    def from_pretrained(
        cls, source: str | Path, backbone: nn.Module, *, check_base: bool = True, **options: Any
    ) -> LiFTPrior:
        """Load a prior from its folder, or from a repository of the hub.

        Args:
            source: a folder, or ``"user/name"``.
            backbone: the base model: plain, as a PEFT model or as a
                :class:`~pyro_lift.models.adapters.RandomAdapter`.
            check_base: whether another base model is refused.
            options: of ``huggingface_hub.snapshot_download``, such as ``revision`` and ``token``; ``options={...}``
                of RandomAdapter, such as a readout.

        Raises:
            ValueError: a missing, truncated or altered file, a tensor that does not belong, another base model, a
                newer format; names the file and the tensor.
        """
        return cls(**load_prior(source, backbone, check=check_base, **options)._asdict())

    @classmethod
    @at_top_level()
    def from_adapters(cls, folders: Sequence[str | Path], backbone: nn.Module, **options: Any) -> LiFTPrior:
        """Make a prior from LoRAs that exist already, each a PEFT folder, without training.

        Args:
            folders: at least two, of one rank, one set of layers, one scale, one base model and one initialisation.
            backbone: the base model.
            options: of :func:`pyro_lift.adapter_library.prior_from_adapters`: ``method="exact"``, ``"mixture"`` or
                ``"chain"``, ``components``, ``beta``, ``align``, ...

        Raises:
            ValueError: adapters that cannot share one space; names them.
        """
        return cls(**prior_from_adapters(folders, backbone, **options)._asdict())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to the hub; returns the commit's address."""
        return push(self, repo_id, private=private, **options)

    def to_peft(self, folder: str | Path, which: str | int = "phi") -> Path:
        """Write an ordinary PEFT adapter folder.

        Args:
            folder: for ``peft.PeftModel.from_pretrained``, which needs no pyro_lift.
            which: ``"phi"`` (the mixture's mean), a component's number, or the name of a meta-training task.
        """
        return export_prior(self, Path(folder), which)

    def to_peft_library(self, folder: str | Path) -> list[Path]:
        """Write PEFT folders of phi, of every component and, after meta-training, of every task."""
        return export_library(self, Path(folder))

    def export_adapters(self, folder: str | Path) -> dict[str, Path]:
        """Write the folders of :meth:`to_peft_library` for a server of many LoRAs, such as vLLM or LoRAX.

        Names are made of letters, digits, dots, dashes and underscores; all have one rank and one set of target
        modules, which ``adapters.json`` beside them tells. Returns each adapter's folder by its name.

        Raises:
            ValueError: an adapter that such servers do not load, or two tasks of one name in the end; before any is
                written.
        """
        return export_served(self, Path(folder))

    def to_peft_zoo(self, folder: str | Path) -> list[Path]:
        """Do what :meth:`to_peft_library` does, under its name of version 0.1; goes with the next version."""
        warnings.warn("to_peft_zoo is now called to_peft_library.", FutureWarning, stacklevel=2)
        return self.to_peft_library(folder)
