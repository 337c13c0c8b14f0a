"""Settings of meta-training and of adaptation: frozen dataclasses, checked when they are made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pyro_lift.support.options import check_choice, check_number, current_names, renamed_keywords

__all__ = [
    "KERNEL_OPTIONS",
    "AdaptSettings",
    "LiFTSettings",
    "complete_adapt_settings",
    "complete_settings",
    "upgraded_run",
]

#: The word for a beta that is unknown, and drawn.
LEARN = "learn"

#: What options of the kernel and of its run are called in :class:`LiFTSettings`; empty: there is no such setting.
KERNEL_OPTIONS = {
    "num_samples": "samples",
    "warmup_steps": "burn_in",
    "subsample_size": "block_size",
    "step_size": "learning_rate",
    "phi_step_size": "phi_step_fraction",
    "theta_update": "",
}


@dataclass(frozen=True)
class AdaptSettings:
    """Settings of the adaptation to a new task."""

    steps: int = field(default=100, metadata={"help": "SGLD steps on the new task"})
    learning_rate: float | None = field(
        default=None,
        metadata={
            "help": "move per step and weight; eta = 2 x this; none: that of meta-training where it was given, else "
            "0.1 of the size of the adapter's weights"
        },
    )
    temperature: float | None = field(
        default=None, metadata={"help": "variance of the noise; 0 switches it off; none: that of meta-training"}
    )
    n_inflate: float | None = field(
        default=None,
        metadata={
            "help": "power on the likelihood; none: that of meta-training, or what a default run finds to be better"
        },
    )
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch; 0: all of a task's, up to 256"})
    draws: int = field(default=10, metadata={"help": "draws kept, evenly spaced over the last half of the steps"})
    unmoved: float | None = field(
        default=None,
        metadata={
            "help": "share of the draws that stay at the start; none: where heads are solved half, or what a fifth of "
            "the rows says where there are 100 or more; else 0"
        },
    )
    unmoved_few: float | None = field(
        default=None,
        metadata={
            "help": "the same for tasks of fewer than 100 rows where unmoved is left open; none: what a default run "
            "finds on tasks of classes or tokens, else half where heads are solved, else 0"
        },
    )
    untouched: float = field(
        default=0.05,
        metadata={"help": "probability that a task is none of the kind: it then begins at the untouched adapter"},
    )

    many_rows: int | None = field(
        default=None,
        metadata={
            "help": "rows from which on a task of classes that the network has itself has heads of its own too, a "
            "regression on the network's own output a head in its place, and a noise by rows kept from a second chain, "
            "with a head from five eighths as many on; 0: never; none: twice what meta-training's tasks have"
        },
    )
    dev_every: int = field(
        default=0,
        metadata={"help": "steps between looks at a task's dev rows, the best look's draws being kept; 0: no looks"},
    )
    patience: int = field(default=3, metadata={"help": "looks without a better one that end an adaptation early"})

    def __post_init__(self) -> None:
        check_number("untouched", self.untouched, open_below=False)
        check_number("dev_every", self.dev_every, open_below=False, whole=True)
        if self.untouched >= 1.0:
            raise ValueError(f"untouched={self.untouched:g}: a probability below 1 is needed; 0 leaves that start out.")
        _check_numbers(self, positive=(), counts=("steps", "draws", "patience"))
        check_number("batch_size", self.batch_size, open_below=False, whole=True)
        if self.many_rows is not None:
            check_number("many_rows", self.many_rows, open_below=False, whole=True)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate)
        if self.n_inflate is not None:
            check_number("n_inflate", self.n_inflate)
        if self.temperature is not None:
            check_number("temperature", self.temperature, open_below=False)
        for name in ("unmoved", "unmoved_few"):
            if (share := getattr(self, name)) is not None:
                check_number(name, share, open_below=False)
                if share >= 1.0:
                    raise ValueError(f"{name}={share:g}: some draws have to move; give a share below 1.")
        if self.steps < 2 * self.draws:
            raise ValueError(f"steps={self.steps}: {self.draws} draws from the last half need {2 * self.draws} steps.")


@renamed_keywords(share="ranks_block_size", phi_step_share="phi_step_fraction", head_rate="head_lr_scale")
@dataclass(frozen=True)
class LiFTSettings:
    """Settings of meta-training; ``beta`` and ``sigma`` are standard deviations."""

    components: int = field(default=1, metadata={"help": "K, components of the mixture over phi"})
    covariance: Literal["diag", "spherical"] = field(default="diag", metadata={"help": "of each component"})
    beta: float | list[float] | str | None = field(
        default=None,
        metadata={
            "help": "standard deviation of a task's weights around phi, or one for each adapter tensor; none: by "
            'module, as wide as leaves the network working; "learn": drawn by tensor, beginning there'
        },
    )
    sigma: float | list[float] | None = field(
        default=None,
        metadata={
            "help": "standard deviation of phi around its prior mean, likewise; none: twice beta, or what joint "
            "training moves phi by where it helps and that is more"
        },
    )
    prior_mean: Literal["adapter", "zero"] = field(
        default="adapter", metadata={"help": "of phi: the adapter's initial weights, or zero (the paper's)"}
    )
    sgd_steps: int = field(default=1000, metadata={"help": "joint training steps before the chain"})
    sgd_learning_rate: float | None = field(
        default=None, metadata={"help": "of those, Adam; none: 0.05 of the size of the adapter's weights"}
    )
    sgd_weights: Literal["tasks", "rows"] | None = field(
        default=None, metadata={"help": "whether all tasks count alike in joint training, or all rows; none: tasks"}
    )
    sgd_includes_trial: bool = field(
        default=False, metadata={"help": "whether the steps of joint training's trial are among sgd_steps"}
    )
    burn_in: int = field(default=100, metadata={"help": "visits before the first draw"})
    samples: int = field(default=200, metadata={"help": "draws of phi"})
    thinning: int = field(default=1, metadata={"help": "visits per draw"})
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "move per visit and weight; eta = 2 x this; none: 0.05 of the size of the adapter's weights"},
    )
    task_steps: Literal["tasks", "rows"] | None = field(
        default=None,
        metadata={"help": "whether a visit moves all tasks alike, or those of more rows further; none: tasks"},
    )
    phi_update: Literal["gibbs", "langevin"] = field(
        default="gibbs", metadata={"help": "of phi: an exact draw, or the paper's Langevin step"}
    )
    accumulator: Literal["exact", "table", "single"] = field(
        default="table", metadata={"help": "of the Langevin step: J exact, the paper's table, or one task alone"}
    )
    phi_step_fraction: float = field(
        default=0.1, metadata={"help": "of the Langevin step: fraction of the largest stable one"}
    )
    translation: Literal["saga", "falling", "none"] | None = field(
        default=None,
        metadata={
            "help": "shift phi and all tasks' weights together, as joint training would; none: saga, where phi is "
            "drawn exactly, the chain comes to every task twice and none is far larger than the mean; else falling"
        },
    )
    translation_step_size: float | None = field(
        default=None, metadata={"help": "of the translation; none: eta over the number of tasks"}
    )
    temperature: float | None = field(
        default=None,
        metadata={"help": "variance of all noise; none: 0.1, or 1 where beta, sigma or n_inflate is given"},
    )
    n_inflate: float | None = field(
        default=None,
        metadata={"help": "power on the likelihood, the paper's name for 1 / temperature (docs/sampler.md); none: 1"},
    )
    batch_size: int = field(default=16, metadata={"help": "rows of a minibatch; 0: all of a task's, up to 256"})
    block_size: int = field(default=1, metadata={"help": "tasks of a visit; more than one go in one pass"})
    ranks_block_size: int = field(
        default=0, metadata={"help": "tasks of a visit that torchrun's processes share, in passes of block_size; 0: no"}
    )
    preconditioner: Literal["rms", "none"] = field(default="rms", metadata={"help": "scale of each weight's step"})
    max_move: float | None = field(
        default=None,
        metadata={"help": "learning rates that data move a weight by in a visit, at most; 0: no limit; none: 3"},
    )
    head_scale: float | None = field(
        default=None,
        metadata={"help": "sd of a task's own linear head; none: shared, unless the network ends in features"},
    )
    noise_scale: float | None = field(
        default=None, metadata={"help": "sd of the noise in regression; none: what the tasks' rows leave unexplained"}
    )
    head: Literal["solve", "laplace", "langevin", "shared"] = field(
        default="solve",
        metadata={
            "help": "a task's own head: solved on its rows, in adaptation drawn around that, or moved step by step; or "
            "shared: the network's own output is all tasks' classes, even where they have fewer, or value"
        },
    )
    head_lr_scale: float = field(default=10.0, metadata={"help": "a head's step size over the adapter's"})
    head_temperature: float = field(
        default=0.0, metadata={"help": "variance of the noise in a head; 0 moves it to its mode, as all methods do"}
    )

    stop_every: int = field(
        default=0,
        metadata={
            "help": "draws between two looks at a fifth of the tasks, held out: meta-training ends where they no "
            "longer gain; 0: it does not look"
        },
    )
    stop_patience: int = field(
        default=3, metadata={"help": "looks without a better one, after which it ends with the best"}
    )

    @property
    def noise_sd(self) -> float:
        """The noise of regressions as a number; 1 where it was left open and no task has filled it in."""
        return 1.0 if self.noise_scale is None else self.noise_scale

    @property
    def learns_beta(self) -> bool:
        """Whether beta is unknown, and drawn with all else."""
        return self.beta == LEARN

    def _check_learned(self) -> None:
        if self.beta != LEARN:
            raise ValueError(f'beta={self.beta!r}: expected a number, one for each adapter tensor, or "{LEARN}".')
        if self.temperature not in (None, 1.0):
            raise ValueError(
                f'temperature={self.temperature:g} with beta="{LEARN}": a cold law of an unknown width has no width '
                "but zero. Leave the temperature open; n_inflate=1/T is the same law at temperature 1."
            )
        if self.phi_update != "gibbs" or self.ranks_block_size:
            way = "ranks_block_size" if self.ranks_block_size else f'phi_update="{self.phi_update}"'
            raise ValueError(f'{way} with beta="{LEARN}": an unknown width is drawn with an exact phi, by one process.')

    def __post_init__(self) -> None:
        _check_numbers(
            self,
            positive=("head_lr_scale", "phi_step_fraction"),
            counts=("components", "samples", "thinning", "block_size", "stop_patience"),
        )
        if self.stop_every and self.ranks_block_size:
            raise ValueError(
                f"stop_every={self.stop_every} with ranks_block_size={self.ranks_block_size}: processes that share "
                "visits would each judge by themselves. Leave one of the two at 0."
            )
        if isinstance(self.beta, str):
            self._check_learned()
        for name in ("beta", "sigma", "learning_rate", "sgd_learning_rate", "n_inflate", "noise_scale"):
            value = getattr(self, name)
            if value is None or (name == "beta" and isinstance(value, str)):
                continue
            for number in value if isinstance(value, (list, tuple)) else [value]:
                check_number(name, number)
        if self.temperature is not None:
            check_number("temperature", self.temperature, open_below=False)
        check_number("head_temperature", self.head_temperature, open_below=False)
        if self.max_move is not None:
            check_number("max_move", self.max_move, open_below=False)
        if self.max_move and self.preconditioner == "none":
            raise ValueError(f'max_move={self.max_move:g} counts in steps of a preconditioner: leave it at "rms".')
        if not isinstance(self.sgd_includes_trial, bool):
            raise ValueError(f"sgd_includes_trial={self.sgd_includes_trial!r}: expected true or false.")
        for name in ("sgd_weights", "task_steps"):
            if getattr(self, name) is not None:
                check_choice(name, getattr(self, name), ["tasks", "rows"])
        for name in ("sgd_steps", "burn_in", "batch_size", "ranks_block_size", "stop_every"):
            check_number(name, getattr(self, name), open_below=False, whole=True)
        check_choice("covariance", self.covariance, ["diag", "spherical"])
        check_choice("phi_update", self.phi_update, ["gibbs", "langevin"])
        if self.translation is not None:
            check_choice("translation", self.translation, ["saga", "falling", "none"])
        if self.translation_step_size is not None:
            check_number("translation_step_size", self.translation_step_size)
            if self.translation == "none" or self.phi_update == "langevin":
                way = 'translation="none"' if self.translation == "none" else 'phi_update="langevin"'
                raise ValueError(
                    f"translation_step_size={self.translation_step_size:g} is of the translation, and {way} takes "
                    "none. Leave one of the two out."
                )
        check_choice("accumulator", self.accumulator, ["exact", "table", "single"])
        check_choice("prior_mean", self.prior_mean, ["adapter", "zero"])
        check_choice("preconditioner", self.preconditioner, ["rms", "none"])
        check_choice("head", self.head, ["solve", "laplace", "langevin", "shared"])
        if self.head_scale is not None and self.head == "shared":
            raise ValueError(f"head='shared' with head_scale={self.head_scale:g}: a head is shared or the task's own.")
        if self.head_scale is not None:
            check_number("head_scale", self.head_scale)


def complete_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Add the fields that older saved settings lack, with the values that reproduce what was done then.

    Heads of tasks' own took steps before they could be solved, and label matching had none. Nothing was shifted before
    there was a translation, no run stopped before its end, joint training counted all rows alike, and one step size was
    that of all tasks. The trial of joint training came on top of it, and no visit had a limit.
    """
    then = {"head": "langevin", "translation": "none", "stop_every": 0, "stop_patience": 3, "sgd_weights": "rows"}
    return {**then, "task_steps": "rows", "max_move": 0.0, "sgd_includes_trial": False, **saved}


def complete_adapt_settings(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Add the fields that older saved settings of adaptation lack: the untouched adapter was no candidate then."""
    return {"untouched": 0.0, **saved}


def _check_numbers(settings: Any, *, positive: Sequence[str], counts: Sequence[str]) -> None:
    for name in positive:
        check_number(name, getattr(settings, name))
    for name in counts:
        check_number(name, getattr(settings, name), least=1, open_below=False, whole=True)


def upgraded_run(config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved run's configuration with the settings' names of today, and those that are new."""
    settings = current_names(LiFTSettings, config.get("settings", {}), warn=False)
    if settings.get("head_scale") is None and all(kind != "matching" for _, kind, *_ in config.get("tasks", [])):
        settings = {"head": "solve", **settings}  # nobody has a head of their own: one word is as good as the other
    return {**config, "settings": complete_settings(settings)}
