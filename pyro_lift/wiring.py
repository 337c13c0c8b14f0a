"""What a configuration means: its backbone, adapter, encoder and tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from pyro_lift import data
from pyro_lift.config import RunConfig
from pyro_lift.data import encode
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.folder import read_task
from pyro_lift.data.images import ImageTask
from pyro_lift.data.records import RECORD_FILES
from pyro_lift.data.tensors import read_tensor_task
from pyro_lift.data.text import TextTask
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.readouts import LabelMatching
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_choice

__all__ = ["TASK_FILES", "adapter_of", "device_of", "encoder_of", "task_of", "tasks_of"]


TASK_FILES = (*RECORD_FILES, ".safetensors")


def adapter_of(config: RunConfig) -> RandomAdapter:
    """The backbone with its adapter; the adapter's initial weights are a function of the seed."""
    b, a = config.backbone, config.adapter
    if b.name == "digits":
        from pyro_lift.data.digits import digit_backbone

        backbone = digit_backbone()
    else:
        backbone = load_backbone(
            b.name, b.kind, dtype=b.dtype, gradient_checkpointing=b.gradient_checkpointing, compile=b.compile
        )
    options: dict[str, Any] = {}
    if a.alpha is not None:
        options["lora_alpha"] = a.alpha
    if a.target_modules is not None:
        options["target_modules"] = a.target_modules
    return adapt_backbone(
        backbone, recipe(backbone, a.rank, **options), seed=config.output.seed, readout=_matching(config, backbone)
    )


def _matching(config: RunConfig, backbone: torch.nn.Module) -> LabelMatching | None:
    """Label matching for an encoder, which pads as its backbone does; without label texts it is not used."""
    padding = getattr(getattr(backbone, "config", None), "pad_token_id", None)
    return LabelMatching(pad_token=padding or 0) if config.backbone.kind == "encoder" else None


def tasks_of(config: RunConfig) -> TaskCollection[Task]:
    """The tasks of a run, encoded for its backbone.

    Raises:
        ValueError: no task to train on; bad data, with file and line.
    """
    t = config.tasks
    if t.benchmark == "digits":
        from pyro_lift.data.digits import digit_family

        family = digit_family(config.output.seed)
        return TaskCollection("digits", tuple(family.train), tuple(family.dev), tuple(family.test))
    if t.benchmark == "folder" and t.split is None:
        return _folder_tasks(config, Path(t.root or "."))
    load: Any = getattr(data, "load_tasks", None)
    if load is None:
        raise ValueError(
            f"benchmark={t.benchmark!r} cannot be loaded by this version; give folders (benchmark='folder')."
        )
    encoded: TaskCollection[Task] = load(t.benchmark, t.split, t.root, **t.options).encode(encoder_of(config))
    if not encoded.train:
        raise ValueError(f"{encoded.name}: no task to train on.\n{encoded.summary()}")
    return encoded


def _folder_tasks(config: RunConfig, root: Path) -> TaskCollection[Task]:
    names = config.tasks.names
    found = {path.stem: path for path in sorted(root.glob("*.npz"))}
    found |= {path.parent.name: path.parent for end in ("", *TASK_FILES) for path in sorted(root.glob(f"*/train{end}"))}
    if not found:
        files = " or ".join(f"train{end}" for end in TASK_FILES)
        raise ValueError(f"{root}: no task here. A task is an NPZ file, or a folder with {files}, or pictures.")
    for name in names or ():
        check_choice(f"{root}: task", name, found)
    encoder = _Lazy(config)
    tasks = tuple(_encoded(found[name], encoder) for name in names or found)
    return TaskCollection(f"tasks of {root}", tasks, notes=encoder.notes)


def task_of(config: RunConfig, path: Path) -> Task:
    """The one task of a folder or of an NPZ file, encoded for a run's backbone."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder. A task is a folder with train.* and, to be judged by, test.*.")
    encoder = _Lazy(config)
    task = _encoded(path, encoder)
    for note in encoder.notes:
        print(f"note: {note}")
    return task


def _encoded(path: Path, encoder: _Lazy) -> Task:
    if (path / "train.safetensors").is_file():
        return read_tensor_task(path)
    return encoder(read_task(path))


class _Lazy:
    """The encoder of a run, made when the first task needs one: tasks of tensors need none."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self._encoder: Any = None

    def __call__(self, task: TextTask | ImageTask) -> Task:
        self._encoder = self._encoder or encoder_of(self.config)
        pictures = isinstance(task, ImageTask)
        if pictures != isinstance(self._encoder, encode.Pictures):
            kind = self.config.backbone.kind
            raise ValueError(
                f"task {task.name!r} is {'pictures' if pictures else 'text'}; a {kind!r} backbone takes the other."
            )
        encoded: Task = self._encoder(task)
        return encoded

    @property
    def notes(self) -> tuple[str, ...]:
        return tuple(self._encoder.notes) if self._encoder else ()


def encoder_of(config: RunConfig) -> Any:
    """From a task of strings or pictures to the tensors of a run's backbone.

    Raises:
        ValueError: a tokenizer that does not fit the model.
    """
    b, longest = config.backbone, config.tasks.max_length
    if b.kind == "vision":
        from transformers import AutoConfig, AutoImageProcessor

        prepared = AutoImageProcessor.from_pretrained(b.name, use_fast=False)
        size = AutoConfig.from_pretrained(b.name).image_size
        return encode.Pictures(size, prepared.image_mean, prepared.image_std)
    if b.kind == "timm":
        import timm

        data = timm.data.resolve_data_config({}, model=load_backbone(b.name, "timm"))
        return encode.Pictures(data["input_size"][-1], data["mean"], data["std"], keyword="")
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(b.name)
    model = AutoConfig.from_pretrained(b.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encode.check_tokenizer(tokenizer, model.vocab_size)
    if b.kind == "encoder":
        return encode.LabelMatching(tokenizer, longest)
    if b.kind == "causal":
        return encode.NextToken(tokenizer, longest)
    return encode.TextToText(tokenizer, model.decoder_start_token_id, longest)


def device_of(name: str | None) -> str:
    """Return the named device; without a name, CUDA where there is one."""
    return name or ("cuda" if torch.cuda.is_available() else "cpu")
