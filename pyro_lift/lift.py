"""The front door: tasks and a backbone in, a better start and calibrated predictions out."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyro
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from pyro.ops.streaming import StatsOfDict, StreamingStats
from torch import Tensor, nn

from pyro_lift.inference.accumulator import langevin_limit
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.conjugate import NormalPair
from pyro_lift.inference.kernels import MCMC, SGLD, SGLDGibbs, StreamingMCMC
from pyro_lift.inference.meta_test import best_start, best_starts, meta_test_program
from pyro_lift.inference.online_em import OnlineGaussianMixture
from pyro_lift.inference.predict import predict
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.trace import ProjectedTrace
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.flat import FlatBlock
from pyro_lift.models.hierarchical import AdapterHierarchy, agree
from pyro_lift.models.priors import broadened
from pyro_lift.models.task import Rows, Task, as_rows
from pyro_lift.support import distributed
from pyro_lift.support.options import check_choice, check_number

if TYPE_CHECKING:
    import peft

__all__ = ["AdaptSettings", "LiFT", "LiFTPrior", "LiFTSettings", "TaskPosterior"]

log = logging.getLogger("pyro_lift")


@dataclass(frozen=True)
class AdaptSettings:
    """How a new task is adapted to."""

    steps: int = field(default=100, metadata={"help": "SGLD steps on the new task"})
    learning_rate: float = field(default=2e-3, metadata={"help": "move per step and weight; eta = 2 x this"})
    temperature: float = field(default=1.0, metadata={"help": "variance of the noise; 0 switches it off"})
    n_inflate: float = field(default=1.0, metadata={"help": "power on the likelihood"})
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    draws: int = field(default=10, metadata={"help": "draws kept, evenly spaced over the last half of the steps"})

    def __post_init__(self) -> None:
        _check_numbers(self, positive=("learning_rate", "n_inflate"), counts=("steps", "batch_size", "draws"))
        check_number("temperature", self.temperature, open_below=False)
        if self.steps < 2 * self.draws:
            raise ValueError(f"steps={self.steps}: {self.draws} draws from the last half need {2 * self.draws} steps.")


@dataclass(frozen=True)
class LiFTSettings:
    """Everything that meta-training needs beside the tasks and the backbone; ``beta`` and ``sigma`` are sds."""

    components: int = field(default=1, metadata={"help": "K, components of the mixture over phi"})
    covariance: Literal["diag", "spherical"] = field(default="diag", metadata={"help": "of each component"})
    beta: float = field(default=0.03, metadata={"help": "standard deviation of a task's weights around phi"})
    sigma: float = field(default=0.3, metadata={"help": "standard deviation of phi around its prior mean"})
    prior_mean: Literal["adapter", "zero"] = field(
        default="adapter", metadata={"help": "of phi: the adapter's initial weights, or zero (the paper's)"}
    )
    sgd_steps: int = field(default=300, metadata={"help": "joint training steps before the chain"})
    sgd_learning_rate: float = field(default=3e-3, metadata={"help": "of those, Adam"})
    burn_in: int = field(default=300, metadata={"help": "visits before the first draw"})
    samples: int = field(default=600, metadata={"help": "draws of phi"})
    thinning: int = field(default=1, metadata={"help": "visits per draw"})
    learning_rate: float = field(default=2e-3, metadata={"help": "move per visit and weight; eta = 2 x this"})
    phi_update: Literal["gibbs", "langevin"] = field(
        default="gibbs", metadata={"help": "of phi: an exact draw, or the paper's Langevin step"}
    )
    accumulator: Literal["exact", "table", "single"] = field(
        default="table", metadata={"help": "of the Langevin step: J exact, the paper's table, or one task alone"}
    )
    phi_step_share: float = field(
        default=0.1, metadata={"help": "of the Langevin step: share of the largest stable one"}
    )
    temperature: float = field(default=1.0, metadata={"help": "variance of all noise in meta-training"})
    n_inflate: float = field(
        default=1.0,
        metadata={"help": "power on the likelihood; tune it, 10 to 1000 where rows are few (docs/sampler.md)"},
    )
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch"})
    block_size: int = field(default=1, metadata={"help": "tasks of a visit; more than one go in one pass"})
    share: int = field(
        default=0, metadata={"help": "tasks of a visit that torchrun's processes share, in passes of block_size; 0: no"}
    )
    preconditioner: Literal["rms", "none"] = field(default="rms", metadata={"help": "scale of each weight's step"})
    head_scale: float | None = field(
        default=None, metadata={"help": "sd of a task's own linear head; none for a head shared by all tasks"}
    )
    noise_scale: float = field(default=1.0, metadata={"help": "sd of the noise in regression"})
    head_rate: float = field(default=10.0, metadata={"help": "a head's step size over the adapter's"})
    head_temperature: float = field(
        default=0.0, metadata={"help": "variance of the noise in a head; 0 moves it to its mode, as all methods do"}
    )

    def __post_init__(self) -> None:
        _check_numbers(
            self,
            positive=(
                "beta",
                "sigma",
                "learning_rate",
                "sgd_learning_rate",
                "n_inflate",
                "noise_scale",
                "head_rate",
                "phi_step_share",
            ),
            counts=("components", "samples", "thinning", "batch_size", "block_size"),
        )
        check_number("temperature", self.temperature, open_below=False)
        check_number("head_temperature", self.head_temperature, open_below=False)
        for name in ("sgd_steps", "burn_in", "share"):
            check_number(name, getattr(self, name), open_below=False, whole=True)
        check_choice("covariance", self.covariance, ["diag", "spherical"])
        check_choice("phi_update", self.phi_update, ["gibbs", "langevin"])
        check_choice("accumulator", self.accumulator, ["exact", "table", "single"])
        check_choice("prior_mean", self.prior_mean, ["adapter", "zero"])
        check_choice("preconditioner", self.preconditioner, ["rms", "none"])
        if self.head_scale is not None:
            check_number("head_scale", self.head_scale)


def _check_numbers(settings: Any, *, positive: Sequence[str], counts: Sequence[str]) -> None:
    for name in positive:
        check_number(name, getattr(settings, name))
    for name in counts:
        check_number(name, getattr(settings, name), least=1, open_below=False, whole=True)


class LiFT:
    """Learn a prior over LoRA weights from many tasks.

    Args:
        backbone: a module, a PEFT model, or a :class:`~pyro_lift.models.adapters.RandomAdapter`.
        peft_config: the adapter to attach to a plain module.
        settings: a :class:`LiFTSettings`; or give its fields as keywords.
        adapt: how new tasks are adapted to; a :class:`AdaptSettings`.
        device: where to compute; None stays where the backbone is.
        seed: of everything random; None draws one from torch's global stream.

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
        known = [f.name for f in fields(LiFTSettings)]
        for name in options:
            check_choice("setting", name, known)
        self.settings = replace(settings or LiFTSettings(), **options)
        self.adapt_settings = adapt or AdaptSettings()
        self.adapter = backbone if isinstance(backbone, RandomAdapter) else adapt_backbone(backbone, peft_config)
        if device is not None:
            self.adapter.to(device)
        self.seed = seed

    def meta_train(
        self,
        tasks: Sequence[Task],
        *,
        progress: bool = True,
        checkpoint: str | Path | None = None,
        checkpoint_every: int = 1000,
        resume: str | Path | None = None,
        start: Tensor | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> LiFTPrior:
        """Run the chain over the tasks and summarise its draws of phi.

        Args:
            tasks: to learn from.
            progress: whether to show a bar.
            checkpoint: folder to save the run in as it goes; must not hold one yet.
            checkpoint_every: visits between two checkpoints. SIGTERM and Ctrl-C save one more.
            resume: folder to go on with; where it holds no checkpoint yet, the run begins and saves there.
            start: adapter weights ``[D]`` where phi begins, for example of one adapter trained on all tasks, which then
                needs few ``sgd_steps``; None begins at the adapter's own. The prior of phi stays where it is.
            on_step: called after each transition, for a bar of one's own.

        Raises:
            ValueError: no task, a task without data, labels outside the head's range, a start of another length;
                before any training.
            DivergedError: a loss that is not finite; names the task and the step.
            RunStopped: SIGTERM or Ctrl-C, where the run is saved.
        """
        session = self.session(tasks, checkpoint, resume, checkpoint_every)
        components = [self.settings.components]
        priors = self.meta_train_many(
            tasks, components, progress=progress, session=session, start=start, on_step=on_step
        )
        return priors[0]

    def session(
        self,
        tasks: Sequence[Task],
        checkpoint: str | Path | None = None,
        resume: str | Path | None = None,
        checkpoint_every: int = 1000,
        **options: Any,
    ) -> Session | None:
        """The folder of checkpoints of a run over these tasks; None without a folder. See :meth:`meta_train`."""
        if checkpoint is not None and resume is not None:
            raise ValueError("give checkpoint=folder for a new run, or resume=folder to go on with one, not both.")
        folder = checkpoint if resume is None else resume
        if folder is None:
            return None
        config = {
            "settings": asdict(self.settings),
            "seed": self.seed,
            "adapter": [[entry.name, list(entry.shape)] for entry in self.adapter.layout],
            "tasks": [[task.name, task.kind, len(task.train)] for task in tasks],
        }
        return Session(folder, every=checkpoint_every, resume=resume is not None, config=config, **options)

    def meta_train_many(
        self,
        tasks: Sequence[Task],
        components: Sequence[int],
        *,
        progress: bool = True,
        session: Session | None = None,
        start: Tensor | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> list[LiFTPrior]:
        """One chain, several mixtures: a prior for each number of components; saved in a :meth:`session`."""
        for k in components:
            check_number("components", k, least=1, open_below=False, whole=True)
        if start is not None and start.shape != self.adapter.initial.shape:
            raise ValueError(f"start has shape {tuple(start.shape)}; the adapter has {self.adapter.dim} weights.")
        s = self.settings
        if s.share:
            distributed.join()
        if self.seed is not None:
            pyro.set_rng_seed(self.seed)
        program = self.program(tasks)
        kernel = self.kernel(program)
        make = partial(_ChainSummary, tuple(components), s.covariance, self.adapter)
        warmup_steps = s.sgd_steps + s.burn_in
        done = 0 if session is None else session.transitions
        with chain_bar(warmup_steps + s.samples, "meta-train", progress, done, on_step) as hook:
            mcmc = StreamingMCMC(
                kernel,
                num_samples=s.samples,
                warmup_steps=warmup_steps,
                initial_params=None if start is None else {"phi": start.to(self.adapter.initial)},
                statistics=StatsOfDict(default=make),
                disable_progbar=True,
                hook_fn=hook,
            )
            mcmc.run(checkpoint=session)
        summary = mcmc._statistics.stats[(0, "phi")]
        moments = {k: v.reshape(-1) for k, v in kernel.state.second_moment.items() if k == "theta"}
        return [
            LiFTPrior(
                self.adapter,
                summary.mixtures[k],
                replace(s, components=k),
                self.adapt_settings,
                moments,
                mcmc,
                self.seed,
                tasks=[task.name for task in tasks],
            )
            for k in components
        ]

    def program(self, tasks: Sequence[Task]) -> AdapterHierarchy:
        """The Pyro program that :meth:`meta_train` samples."""
        s, device = self.settings, self.adapter.initial.device
        return AdapterHierarchy(
            self.adapter,
            [task.to(device) for task in tasks],
            beta=s.beta,
            sigma=s.sigma,
            batch_size=s.batch_size,
            prior_mean=self.adapter.initial if s.prior_mean == "adapter" else None,
            head_scale=s.head_scale,
            noise_scale=s.noise_scale,
            block_size=s.block_size,
        )

    def kernel(self, program: AdapterHierarchy) -> SGLDGibbs:
        """The kernel that :meth:`meta_train` runs."""
        s = self.settings
        return SGLDGibbs(
            program,
            step_size=2.0 * s.learning_rate,
            phi_update=s.phi_update,
            accumulator=s.accumulator if s.phi_update == "langevin" else "exact",
            phi_step_size=self._phi_step_size(len(program.tasks)),
            temperature=s.temperature,
            n_inflate=s.n_inflate,
            preconditioner="rms" if s.preconditioner == "rms" else None,
            sgd_steps=s.sgd_steps,
            sgd_step_size=s.sgd_learning_rate,
            thinning=s.thinning,
            share=s.share > 0,
            block_size=s.share or None,
            site_step_scale={"head": s.head_rate},
            site_temperature={"head": s.head_temperature},
            init_strategy=init_to_value(values={"phi": self.adapter.initial}, fallback=init_to_mean),
        )

    def _phi_step_size(self, num_tasks: int) -> float | None:
        """A share of the largest stable step of phi; None where phi has no step."""
        s = self.settings
        if s.phi_update == "gibbs":
            return None
        one = torch.ones(1)
        pair = NormalPair("phi", "theta", 0.0 * one, s.sigma**-2 * one, s.beta**2 * one)
        return s.phi_step_share * langevin_limit(s.accumulator, pair, num_tasks)


class _ChainSummary(StreamingStats):
    """What is kept of a chain over phi: a mixture for each K, and a trace of a few coordinates."""

    def __init__(self, components: tuple[int, ...], covariance: Any, adapter: RandomAdapter) -> None:
        self.mixtures = {k: OnlineGaussianMixture(k, covariance) for k in components}
        self.trace = ProjectedTrace(adapter=adapter)

    @property
    def parts(self) -> dict[str, StreamingStats]:
        """For :func:`pyro_lift.diagnostics.from_mcmc`."""
        return {"trace": self.trace}

    def update(self, sample: Tensor) -> None:
        """Feed one draw to every part."""
        self.trace.update(sample)
        for mixture in self.mixtures.values():
            mixture.update(sample)

    def merge(self, other: _ChainSummary) -> _ChainSummary:
        """Mixtures merged by matching components, traces one after the other."""
        merged = object.__new__(_ChainSummary)
        merged.mixtures = {k: m.merge(other.mixtures[k]) for k, m in self.mixtures.items()}
        merged.trace = self.trace.merge(other.trace)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Of every part."""
        return {"mixtures": {k: m.state_dict() for k, m in self.mixtures.items()}, "trace": self.trace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with every part."""
        for k, mixture in self.mixtures.items():
            mixture.load_state_dict(state["mixtures"][str(k)])
        self.trace.load_state_dict(state["trace"])

    def get(self) -> dict[str, Any]:
        """The mixtures by K, and the trace."""
        return {**{f"K={k}": m.get() for k, m in self.mixtures.items()}, "trace": self.trace.get()}


class LiFTPrior:
    """What the tasks share: a Gaussian mixture over phi, ready to adapt to a new task.

    Attributes:
        adapter: the network as a function of theta.
        mixture: the :class:`~pyro_lift.inference.online_em.OnlineGaussianMixture` over phi.
        settings: of meta-training.
        second_moment: the preconditioner that meta-training learned, by local family; adaptation begins with it.
        mcmc: the finished run, for :func:`pyro_lift.from_mcmc`; None for a prior that was loaded.
        tasks: names of the tasks it was learned from, in order.
        results: measures to be saved with it, by name.
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
    ) -> None:
        self.adapter, self.mixture, self.settings = adapter, mixture, settings
        self.tasks, self.results = tuple(tasks), dict(results or {})
        self.adapt_settings = adapt_settings or AdaptSettings()
        self.second_moment = second_moment or {}
        self.mcmc = mcmc
        self.seed = seed

    def __repr__(self) -> str:
        return f"LiFTPrior({self.mixture!r}, beta={self.settings.beta}, adapter={self.adapter!r})"

    def merge(self, *others: LiFTPrior) -> LiFTPrior:
        """This prior and those of other chains in one, as if their draws were one chain's.

        Mixtures are merged by matching components, preconditioners averaged.

        Args:
            others: of the same tasks, settings and adapter, with other seeds; one process each is enough.

        Raises:
            ValueError: another model; names what differs.
        """
        for other in others:
            for name in ("tasks", "settings"):
                if getattr(self, name) != getattr(other, name):
                    raise ValueError(f"the priors' {name} differ: only chains of one model can be merged.")
            if not torch.equal(self.adapter.initial, other.adapter.initial.to(self.adapter.initial.device)):
                raise ValueError(
                    "the priors' adapters begin at other weights, around which phi's own prior stands: only chains of "
                    "one model can be merged. Make one adapter and give it to each LiFT(adapter, seed=...)."
                )
        mixture = self.mixture
        for other in others:
            mixture = mixture.merge(other.mixture)
        chains = [self, *others]
        moments = {
            k: torch.stack([p.second_moment[k].to(v) for p in chains]).mean(0) for k, v in self.second_moment.items()
        }
        return LiFTPrior(
            self.adapter, mixture, self.settings, self.adapt_settings, moments, seed=self.seed, tasks=self.tasks
        )

    def adapt(self, task: Task, *, seed: int | None = None, progress: bool = False, **options: Any) -> TaskPosterior:
        """Draw from the posterior of a new task's weights (Eq. 15-18).

        Args:
            task: its training rows.
            seed: of this chain; None takes the prior's.
            progress: whether to show a bar.
            options: fields of :class:`AdaptSettings` to change for this task.

        Raises:
            ValueError: labels outside the head's range; before any training.
            DivergedError: a loss that is not finite.
        """
        a = self._adapt_settings(options)
        seed = self.seed if seed is None else seed
        if seed is not None:
            pyro.set_rng_seed(seed)
        s, task = self.settings, task.to(self.adapter.initial.device)
        mixture = self.mixture.get()
        program = meta_test_program(
            self.adapter,
            task,
            mixture,
            beta=s.beta,
            batch_size=a.batch_size,
            head_scale=s.head_scale,
            noise_scale=s.noise_scale,
        )
        start = best_start(program, mixture)
        mcmc = self._run(program, start.theta, a, f"adapt to {task.name}", progress)
        draws = mcmc.get_samples()
        return TaskPosterior(self.adapter, task, draws["theta"], draws.get("head"), start.component, mcmc)

    def adapt_many(
        self,
        tasks: Sequence[Task],
        *,
        block_size: int = 8,
        seed: int | None = None,
        progress: bool = False,
        **options: Any,
    ) -> list[TaskPosterior]:
        """:meth:`adapt` to several tasks; those of a block go through the network in one pass.

        The same task several times gives as many independent chains. With the RMS preconditioner a block's chains
        share the mean that its damping is relative to.

        Args:
            tasks: their training rows. Tasks that differ in kind, or with heads of their own in their number of
                classes, are adapted to one by one.
            block_size: tasks of one pass.
            seed: of all chains; None takes the prior's.
            progress: whether to show bars.
            options: fields of :class:`AdaptSettings` to change.
        """
        check_number("block_size", block_size, least=1, open_below=False, whole=True)
        if block_size == 1 or not agree(tasks, self.settings.head_scale):
            return [self.adapt(task, seed=seed, progress=progress, **options) for task in tasks]
        a = self._adapt_settings(options)
        seed = self.seed if seed is None else seed
        if seed is not None:
            pyro.set_rng_seed(seed)
        return [
            posterior
            for first in range(0, len(tasks), block_size)
            for posterior in self._adapt_block(tasks[first : first + block_size], a, progress)
        ]

    def _adapt_block(self, tasks: Sequence[Task], a: AdaptSettings, progress: bool) -> list[TaskPosterior]:
        s, mixture = self.settings, self.mixture.get()
        tasks = [task.to(self.adapter.initial.device) for task in tasks]
        program = FlatBlock(
            self.adapter,
            tasks,
            broadened(mixture, s.beta),
            batch_size=a.batch_size,
            head_scale=s.head_scale,
            noise_scale=s.noise_scale,
        )
        starts = best_starts(program, mixture)
        names = f"{tasks[0].name} .. {tasks[-1].name}"
        mcmc = self._run(program, torch.stack([start.theta for start in starts]), a, f"adapt to {names}", progress)
        theta, head = mcmc.get_samples()["theta"], mcmc.get_samples().get("head")
        return [
            TaskPosterior(self.adapter, task, theta[:, k], None if head is None else head[:, k], start.component, mcmc)
            for k, (task, start) in enumerate(zip(tasks, starts, strict=True))
        ]

    def _run(self, program: Any, start: Tensor, a: AdaptSettings, title: str, progress: bool) -> MCMC:
        """The chain of Eq. 18 from a start."""
        thinning = max(a.steps // 2 // a.draws, 1)
        kernel = SGLD(
            program,
            step_size=2.0 * a.learning_rate,
            temperature=a.temperature,
            n_inflate=a.n_inflate,
            integrator="exponential",
            preconditioner="rms" if self.settings.preconditioner == "rms" else None,
            second_moment=self.second_moment,
            thinning=thinning,
            site_step_scale={"head": self.settings.head_rate},
            site_temperature={"head": self.settings.head_temperature},
            init_strategy=init_to_value(values={"theta": start}, fallback=init_to_mean),
        )
        warmup_steps = a.steps - thinning * a.draws
        with chain_bar(warmup_steps + a.draws, title, progress) as hook:
            mcmc = MCMC(kernel, num_samples=a.draws, warmup_steps=warmup_steps, disable_progbar=True, hook_fn=hook)
            mcmc.run()
        return mcmc

    def _adapt_settings(self, options: Mapping[str, Any]) -> AdaptSettings:
        for name in options:
            check_choice("setting", name, [f.name for f in fields(AdaptSettings)])
        return replace(self.adapt_settings, **options)

    def theta(self, task: str) -> Tensor:
        """The latest weights ``[D]`` of a meta-training task; only while the run is at hand, they are not saved."""
        check_choice("task", task, self.tasks)
        if self.mcmc is None:
            raise ValueError(f"the prior was loaded, and the weights of its tasks are not saved: task={task!r}.")
        theta: Tensor = self.mcmc.kernel.theta(self.tasks.index(task))["theta"]
        return theta

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write a folder: the mixture, all that its use needs, a model card, a PEFT adapter of its heaviest mean.

        Args:
            folder: made if it is not there; files of the same names are replaced.
            results: measures by name, for the model card.
        """
        from pyro_lift import hub

        self.results |= dict(results or {})
        return hub.save_prior(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, source: str | Path, backbone: nn.Module, *, check_base: bool = True, **options: Any
    ) -> LiFTPrior:
        """A prior from its folder, or from a repository of the hub.

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
        from pyro_lift import hub

        return hub.load_prior(source, backbone, check=check_base, **options)

    @classmethod
    def from_adapters(cls, folders: Sequence[str | Path], backbone: nn.Module, **options: Any) -> LiFTPrior:
        """A prior from LoRAs that exist already, every one a PEFT folder; no training.

        Args:
            folders: at least two, of one rank, one set of layers, one scale, one base model and one initialisation.
            backbone: the base model.
            options: of :func:`pyro_lift.adapter_zoo.prior_from_adapters`: ``method="exact"``, ``"mixture"`` or
                ``"chain"``, ``components``, ``beta``, ``align``, ...

        Raises:
            ValueError: adapters that cannot share one space; names them.
        """
        from pyro_lift.adapter_zoo import prior_from_adapters

        return prior_from_adapters(folders, backbone, **options)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to the hub; returns the commit's address."""
        from pyro_lift import hub

        return hub.push(self, repo_id, private=private, **options)

    def to_peft(self, folder: str | Path, which: str | int = "phi") -> Path:
        """Write an ordinary PEFT adapter folder.

        Args:
            folder: for ``peft.PeftModel.from_pretrained``, which needs no pyro_lift.
            which: ``"phi"`` (the mixture's mean), a component's number, or the name of a meta-training task.
        """
        from pyro_lift import hub

        return hub.export_prior(self, Path(folder), which)

    def to_peft_zoo(self, folder: str | Path) -> list[Path]:
        """PEFT folders of phi, of every component and, after meta-training, of every task."""
        from pyro_lift import hub

        return hub.export_zoo(self, Path(folder))


class TaskPosterior:
    """Draws of one task's weights, and the predictions they average to.

    Attributes:
        thetas: draws ``[S, D]``.
        heads: draws of the task's own head ``[S, C, width + 1]``, or None.
        component: the mixture component the chain started from.
        results: measures to be saved with it, by name.
    """

    def __init__(
        self,
        adapter: RandomAdapter,
        task: Task,
        thetas: Tensor,
        heads: Tensor | None = None,
        component: int = 0,
        mcmc: Any = None,
    ) -> None:
        self.adapter, self.task, self.thetas, self.heads = adapter, task, thetas, heads
        self.component, self.mcmc = component, mcmc
        self.results: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"TaskPosterior(task={self.task.name!r}, draws={len(self.thetas)}, dim={self.adapter.dim})"

    def predict(self, inputs: Any) -> Tensor:
        """Probabilities ``[n, C]`` averaged over the draws (regression: means).

        Args:
            inputs: a tensor, a mapping of tensors by input name, or :class:`~pyro_lift.models.task.Rows`.
        """
        if isinstance(inputs, Rows):
            rows = inputs
        else:
            first = next(iter(inputs.values())) if isinstance(inputs, dict) else inputs
            rows = replace(as_rows((inputs, torch.zeros(len(first))), "inputs"), shared=self.task.train.shared)
        rows = rows.to(self.adapter.initial.device)
        return predict(self.adapter, self.thetas, rows, self.task.kind, heads=self.heads)

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write a folder: the draws, what predictions need, a model card, and a PEFT adapter of the mean."""
        from pyro_lift import hub

        self.results |= dict(results or {})
        return hub.save_posterior(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: nn.Module,
        task: Task | None = None,
        *,
        check_base: bool = True,
        **options: Any,
    ) -> TaskPosterior:
        """A posterior from its folder or the hub, as :meth:`LiFTPrior.from_pretrained`.

        Args:
            source: a folder, or ``"user/name"``.
            backbone: the base model.
            task: the task itself; None makes one without data, which is all that predictions need.
            check_base: whether another base model is refused.
            options: as of :meth:`LiFTPrior.from_pretrained`.
        """
        from pyro_lift import hub

        return hub.load_posterior(source, backbone, task, check=check_base, **options)

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to the hub; returns the commit's address."""
        from pyro_lift import hub

        return hub.push(self, repo_id, private=private, **options)

    def to_peft(self, folder: str | Path, which: str | int = "mean") -> Path:
        """Write an ordinary PEFT adapter folder: ``"mean"``, or a draw's number."""
        from pyro_lift import hub

        return hub.export_posterior(self, Path(folder), which)
