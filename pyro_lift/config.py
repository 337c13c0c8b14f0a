"""A run as a TOML file: frozen dataclasses, made from it with every key checked.

::

    [backbone]
    name = "backbones/bart-novels"
    kind = "seq2seq"

    [adapter]
    rank = 4

    [tasks]
    benchmark = "shakespeare"
    split = "random-80/10/10"
    root = "data"

    [sampler]
    samples = 600

    [output]
    folder = "prior"
"""

from __future__ import annotations

import dataclasses
import json
import tomllib
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pyro_lift.models.backbones import BackboneKind, DType
from pyro_lift.models.prefix import PrefixMode
from pyro_lift.models.quantised import Quantisation
from pyro_lift.settings import AdaptSettings, LiFTSettings
from pyro_lift.support.moved import names_moved_from
from pyro_lift.support.options import check_choice, check_literal, check_number
from pyro_lift.support.schema import from_dict
from pyro_lift.watching.named import check_log

__all__ = [
    "AdapterConfig",
    "BackboneConfig",
    "LogConfig",
    "OutputConfig",
    "RunConfig",
    "TasksConfig",
    "read_config",
    "reference",
]


@dataclass(frozen=True)
class BackboneConfig:
    """The frozen network."""

    name: str = field(metadata={"help": "folder, or name on the hub"})
    kind: BackboneKind = field(metadata={"help": "how it is loaded"})
    dtype: DType = field(default="float32", metadata={"help": "of the frozen weights"})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "compute activations again, keep none"})
    compile: bool = field(default=False, metadata={"help": "compile the forward pass"})
    quantization: Quantisation | None = field(
        default=None, metadata={"help": "4bit or 8bit, of the frozen weights; none takes them as they are"}
    )

    def __post_init__(self) -> None:
        check_literal("kind", self.kind, BackboneKind)
        check_literal("dtype", self.dtype, DType)
        if self.quantization is not None:
            check_literal("quantization", self.quantization, Quantisation)


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter: LoRA by the family's recipe unless said otherwise."""

    rank: int = field(default=4, metadata={"help": "of every product"})
    alpha: float | None = field(default=None, metadata={"help": "scale; none takes 2 rank"})
    target_modules: str | list[str] | None = field(
        default=None, metadata={"help": "layer names or a pattern; none takes the recipe's"}
    )
    layers: list[int] | None = field(
        default=None, metadata={"help": "numbers of the layers that are adapted, from 0; none takes all"}
    )
    frozen_prefix: PrefixMode = field(
        default="auto", metadata={"help": "compute layers below the adapter once a row: auto, on (or an error), off"}
    )

    def __post_init__(self) -> None:
        check_number("rank", self.rank, least=1, open_below=False, whole=True)
        if self.alpha is not None:
            check_number("alpha", self.alpha)
        check_literal("frozen_prefix", self.frozen_prefix, PrefixMode)


@dataclass(frozen=True)
class TasksConfig:
    """The tasks to learn from, and their form before the backbone."""

    benchmark: str = field(
        default="folder", metadata={"help": "crossfit, vtab, shakespeare, novels, shifts, folder or digits"}
    )
    split: str | None = field(default=None, metadata={"help": "of the benchmark; none takes its first"})
    root: str | None = field(default=None, metadata={"help": "where the data lies"})
    names: list[str] | None = field(default=None, metadata={"help": "of a folder, only these tasks"})
    max_length: int = field(default=128, metadata={"help": "longest text in tokens; longer ones are cut and counted"})
    options: dict[str, Any] = field(default_factory=dict, metadata={"help": "further ones of the loader"})

    def __post_init__(self) -> None:
        check_choice(
            "benchmark", self.benchmark, ["crossfit", "vtab", "shakespeare", "novels", "shifts", "folder", "digits"]
        )
        check_number("max_length", self.max_length, least=2, open_below=False, whole=True)


@dataclass(frozen=True)
class OutputConfig:
    """The prior's folder, the seed and the device."""

    folder: str = field(default="prior", metadata={"help": "of the prior"})
    seed: int = field(default=0, metadata={"help": "of everything random"})
    device: str | None = field(default=None, metadata={"help": "cpu or cuda; none takes cuda where there is one"})
    checkpoint_every: int = field(default=1000, metadata={"help": "visits between two checkpoints; 0 for none"})

    def __post_init__(self) -> None:
        check_number("checkpoint_every", self.checkpoint_every, open_below=False, whole=True)
        check_number("seed", self.seed, open_below=False, whole=True)


@dataclass(frozen=True)
class LogConfig:
    """Where the run's steps are written as it goes."""

    to: list[str] = field(
        default_factory=list,
        metadata={"help": "run.jsonl, tensorboard:FOLDER, wandb:PROJECT, trackio:PROJECT, mlflow"},
    )
    every: int | None = field(default=None, metadata={"help": "steps between two; none takes 1 for JSON, else 10"})

    def __post_init__(self) -> None:
        for name in self.to:
            check_log(name)
        if self.every is not None:
            check_number("every", self.every, least=1, open_below=False, whole=True)


@dataclass(frozen=True)
class RunConfig:
    """A whole run."""

    backbone: BackboneConfig
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    sampler: LiFTSettings = field(default_factory=LiFTSettings)
    adapt: AdaptSettings = field(default_factory=AdaptSettings)
    output: OutputConfig = field(default_factory=OutputConfig)
    log: LogConfig = field(default_factory=LogConfig)


def read_config(path: Path) -> RunConfig:
    """Read a run from a TOML file.

    Raises:
        ValueError: not TOML (with the line), an unknown key (with the nearest known one), a value of another type or
            out of range; the message begins with the file and the key.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{path}: not TOML: {error}") from error
    return from_dict(RunConfig, data, str(path))


def reference(cls: type[Any] = RunConfig) -> str:
    """Format every key with its default and its meaning, as a TOML file."""
    lines = []
    for f in fields(cls):
        hint = typing.get_type_hints(cls)[f.name]
        if dataclasses.is_dataclass(hint):
            lines += [f"\n[{f.name}]", reference(typing.cast(type[Any], hint))]
            continue
        missing = f.default is dataclasses.MISSING
        default = f.default_factory() if missing and f.default_factory is not dataclasses.MISSING else f.default
        shown = "none" if default is None else "required" if default is dataclasses.MISSING else json.dumps(default)
        lines.append(f"# {f.name} = {shown}".ljust(44) + f"# {f.metadata.get('help', '')}")
    return "\n".join(lines).lstrip("\n")


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
