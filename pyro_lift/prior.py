"""The prior that meta-training leaves: a Gaussian mixture over phi, ready to adapt to new tasks."""

from __future__ import annotations

import logging
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
from pyro_lift.defaults import inherited, one_width, resolved, warn_of_adaptation
from pyro_lift.generation.decode import generate
from pyro_lift.inference.adaptation.chain import Shown, Source
from pyro_lift.inference.adaptation.temperature import HIGHEST, LOWEST
from pyro_lift.inference.adaptation.tempered_rows import TemperedRows, tempered_rows
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead, are_alike
from pyro_lift.models.class_names import check_class_numbers
from pyro_lift.models.common_classes import with_classes_of_prior
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.door import check_rows
from pyro_lift.models.given_away import warn_of_what_is_given_away
from pyro_lift.models.one_class import warn_of_one_class
from pyro_lift.models.out_of_proportion import InputSize, warn_of_tasks_of_other_sizes
from pyro_lift.models.target_units import warn_of_new_units
from pyro_lift.models.task import Task, check_kinds, check_tasks, undeclared
from pyro_lift.models.weight_scales import by_weight
from pyro_lift.new_tasks.adaptation import Adaptation, new_head_scale
from pyro_lift.new_tasks.heads_beside_layer import adapt_alone, adapt_together
from pyro_lift.posterior import TaskPosterior
from pyro_lift.saving.folders import chosen_weights, export_library, export_prior, load_prior, save_prior
from pyro_lift.saving.hub import push
from pyro_lift.saving.served import export_served
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.options import check_choice, check_number
from pyro_lift.support.wording import some_names
from pyro_lift.tuning.figure import plot_tuning
from pyro_lift.tuning.held_out import has_unseen_rows
from pyro_lift.tuning.predictions import fitted_on_held_out

__all__ = ["LiFTPrior"]

log = logging.getLogger("pyro_lift")

#: What a merged prior has of its first chain's, beside the settings.
_OF_THE_TASKS = (
    "tasks",
    "matching_scale",
    "encoding",
    "tuning",
    "rescales",
    "rows",
    "kinds",
    "classes",
    "masks",
    "around_rates",
    "tempered_rows",
    "head_mean",
    "input_sizes",
    "common_classes",
    "dispersion",
    "value_heads",
)


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
        around_rates: whether predictions are tempered around the rates of a task's classes where these are plainly
            uneven (:mod:`~pyro_lift.inference.adaptation.class_rates`); False of one saved before.
        tempered_rows: of the tasks that the temperature of predictions was found at, where one below 1 holds for such
            (:mod:`~pyro_lift.inference.adaptation.tempered_rows`); None, as of a prior saved before, for all.
        head_mean: the head that new tasks' own have their prior around, where the tasks it was learned
            from share their classes (:mod:`~pyro_lift.tuning.head_mean`); None is zero.
        input_sizes: how large inputs are in most of the tasks it was learned from (:func:`.usual_sizes`), against which
            new ones are held; empty where nobody says.
        common_classes: that each of the tasks it was learned from has, told by numbers alone, where heads are their
            own; 0 where they have none in common. A new task that counts fewer by chance has these. None, as of a prior
            saved before: the classes of ``head_mean``.
        dispersion: how unevenly its regressions vary around the noise (:mod:`~pyro_lift.models.dispersion`): a new
            task's predictions are as wide as its own rows say, against that. None, as of a prior saved before and where
            the noise was given, takes tasks for alike.
        value_heads: whether regressions of many more rows than its tasks, on the network's own output, have heads
            (:mod:`~pyro_lift.new_tasks.heads_beside_layer`); False of one saved before.
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
        around_rates: bool = True,
        tempered_rows: TemperedRows | None = None,
        head_mean: ClassHead | None = None,
        input_sizes: Mapping[str, InputSize] | None = None,
        common_classes: int | None = None,
        dispersion: Dispersion | None = None,
        value_heads: bool = True,
    ) -> None:
        self.adapter, self.mixture, self.settings = adapter, mixture, resolved(settings, adapter)
        self.matching_scale, self.rescales, self.rows = matching_scale, rescales, rows
        self.tasks, self.kinds, self.results = tuple(tasks), tuple(kinds), dict(results or {})
        self.prediction_temperature, self.tuning, self.classes = prediction_temperature, tuning, dict(classes or {})
        self.adapt_settings = adapt_settings or AdaptSettings()
        self.second_moment = second_moment or {}
        self.mcmc, self.seed, self.encoding, self.masks = mcmc, seed, encoding, masks
        self.value_heads = value_heads
        self.around_rates, self.tempered_rows, self.dispersion = around_rates, tempered_rows, dispersion
        self.head_mean, self.input_sizes, self.common_classes = head_mean, dict(input_sizes or {}), common_classes

    def __repr__(self) -> str:
        return f"LiFTPrior({self.mixture!r}, beta={one_width(self.settings.beta):.3g}, adapter={self.adapter!r})"

    @property
    def beta(self) -> float | Tensor:
        """Standard deviation of a task's weights around phi: one number, or ``[D]``."""
        return by_weight(self.adapter, self.settings.beta)

    def merge(self, *others: LiFTPrior) -> LiFTPrior:
        """Merge this prior with those of other chains, as if their draws were one chain's.

        Mixtures are merged by matching components. Preconditioners, temperatures of predictions and shares of draws
        that stay at the start of an adaptation are averaged.

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
                    "one model can be merged. Make one, adapter = pyro_lift.models.backbones.adapt_backbone(network, "
                    "peft_config), and give it to each LiFT(adapter, seed=...)."
                )
            for name in ("tasks", "settings"):
                if getattr(self, name) != getattr(other, name):
                    raise ValueError(f"the priors' {name} differ: only chains of one model can be merged.")
            if not are_alike(self.head_mean, other.head_mean):
                raise ValueError(
                    "the priors' heads of all tasks (head_mean) differ: they were learned from other rows or targets, "
                    "and only chains of one model can be merged."
                )
        mixture = self.mixture
        for other in others:
            mixture = mixture.merge(other.mixture)
        chains = [self, *others]
        moments = {
            k: torch.stack([p.second_moment[k].to(v) for p in chains]).mean(0) for k, v in self.second_moment.items()
        }
        shares = [p.adapt_settings.unmoved_few for p in chains]
        found = [share for share in shares if share is not None]
        share = sum(found) / len(found) if len(found) == len(chains) else shares[0]
        return LiFTPrior(
            self.adapter,
            mixture,
            self.settings,
            replace(self.adapt_settings, unmoved_few=share),
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
        did not see: its test or dev rows, else a third of its rows. One below 1 is fitted with care
        (:func:`~pyro_lift.inference.adaptation.temperature.careful_temperature`).

        Args:
            tasks: of the prior's kind; best are some that it was not learned from. Those that it was, by their names,
                need test or dev rows: a warning names the others, whose every row the prior has seen.
            seed: of the chains; None takes the prior's.
            most_rows: of a task, that the fit looks at.
            options: fields of :class:`AdaptSettings` to change.

        Returns:
            The temperature: above 1 where predictions were too sure. Of regressions it multiplies the variance.

        Raises:
            ValueError: no task, or regressions beside others.
        """
        check_tasks(tasks)
        seen = [task.name for task in tasks if task.name in set(self.tasks) and not has_unseen_rows(task)]
        if seen:
            log.warning(
                "calibrate: the prior was learned from %s, and has seen all their rows: predictions of them are better "
                "than a new task's will be, and the temperature is too low. Give new tasks, or rows to be judged by "
                "(test= or dev=).",
                some_names(seen),
            )
        adapt = partial(self.adapt_many, seed=seed, **options)
        self.prediction_temperature = fitted_on_held_out(tasks, adapt, most_rows)
        self.tempered_rows = tempered_rows(tasks)
        if self.prediction_temperature in (LOWEST, HIGHEST) and tasks[0].kind != "regression":
            log.warning(
                "calibrate: the temperature is %g, the bound of what is looked for: the rows are all right, all wrong, "
                "or of one class. More tasks or rows, or a longer adaptation, would tell better.",
                self.prediction_temperature,
            )  # fmt: skip
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
        adaptation, seed = self._adaptation(options), self.seed if seed is None else seed
        warn_of_adaptation(adaptation.how, self.settings, self.adapter, [task])
        return adapt_alone(adaptation, task, Source(seed), Shown(progress, callbacks, [task]))

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
        share the mean that its damping is relative to, and a chain's noise is that of its place in its block: the same
        tasks in another order, or in blocks of another size, have other draws of the same posterior.

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
        adaptation, seed = self._adaptation(options), self.seed if seed is None else seed
        warn_of_adaptation(adaptation.how, self.settings, self.adapter, tasks)
        return adapt_together(adaptation, tasks, block_size, seed, Shown(progress, callbacks, tasks))

    def _admitted(self, tasks: Sequence[Task]) -> Sequence[Task]:
        """Refuse tasks that are no new ones of this prior: the one door, before their heads are solved or they move."""
        check_kinds(tasks, self.kinds)
        shared = self.head_mean is not None and len(self.head_mean.head) > 0
        tasks = with_classes_of_prior(tasks, self._classes_of_tasks(), shared=shared)
        check_class_numbers(tasks, self.classes)  # none where they had heads of their own
        check_rows(self.adapter, tasks)  # what comes after takes them as admitted
        warn_of_tasks_of_other_sizes(tasks, self.input_sizes)
        # One in the making has no names, and these tasks are its own.
        if self.tasks:
            own_heads = new_head_scale(self.adapter, self.settings, tasks) is not None
            mean, noise = self.mixture.get().mean, self.settings.noise_sd
            warn_of_one_class(tasks)
            warn_of_what_is_given_away(tasks)
            warn_of_new_units(self.adapter, tasks, mean, noise, own_heads=own_heads)
        return tasks if self.masks else [undeclared(task) for task in tasks]

    def _classes_of_tasks(self) -> int:
        """Return the number of classes that each of its tasks has, 0 where there is none in common."""
        if self.common_classes is not None:
            return self.common_classes
        if self.head_mean is None or self.head_mean.labels or "classification" not in self.kinds:
            return 0
        return len(self.head_mean.head)

    def _adaptation(self, options: Mapping[str, Any]) -> Adaptation:
        """Make the adaptation of new tasks, with some of its settings changed."""
        return Adaptation(
            self.adapter,
            self.mixture,
            self.settings,
            inherited(self.adapt_settings, self.settings, options),
            self.second_moment,
            rows=self.rows,
            rescales=self.rescales,
            matching_scale=self.matching_scale,
            prediction_temperature=self.prediction_temperature,
            head_mean=self.head_mean,
            around_rates=self.around_rates,
            tempered_rows=self.tempered_rows,
            dispersion=self.dispersion,
            value_heads=self.value_heads,
        )

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
