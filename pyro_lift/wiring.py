"""From a run's configuration to the objects it names: backbone, adapter, encoder, tasks and device."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from pyro_lift.config import RunConfig
from pyro_lift.data import encode
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.folder import read_task
from pyro_lift.data.images import ImageTask
from pyro_lift.data.load import load_tasks
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.readouts import LabelMatching
from pyro_lift.models.task import Task
from pyro_lift.support.devices import check_device
from pyro_lift.support.hub_names import check_findable, not_found

__all__ = ["adapter_of", "device_of", "encode_tasks", "encoder_of", "task_of", "tasks_of"]

log = logging.getLogger("pyro_lift")

#: Model types whose tables of places begin after the padding token's number.
AFTER_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet", "xlm-roberta-xl", "data2vec-text")


def adapter_of(config: RunConfig) -> RandomAdapter:
    """Load the backbone and put its adapter on; the adapter's initial weights are a function of the seed."""
    b, a = config.backbone, config.adapter
    if b.name == "digits":
        from pyro_lift.data.digits import digit_backbone

        backbone = digit_backbone()
    else:
        backbone = load_backbone(
            b.name,
            b.kind,
            dtype=b.dtype,
            gradient_checkpointing=b.gradient_checkpointing,
            compile=b.compile,
            quantization=b.quantization,
        )
    options: dict[str, Any] = {}
    if a.alpha is not None:
        options["lora_alpha"] = a.alpha
    if a.target_modules is not None:
        options["target_modules"] = a.target_modules
    if a.layers is not None:
        options["layers_to_transform"] = a.layers
    return adapt_backbone(
        backbone,
        recipe(backbone, a.rank, **options),
        seed=config.output.seed,
        readout=_matching(config, backbone),
        frozen_prefix=a.frozen_prefix,
    )


def _matching(config: RunConfig, backbone: torch.nn.Module) -> LabelMatching | None:
    """Return label matching for an encoder, which pads as its backbone does; without label texts it is not used."""
    padding = getattr(getattr(backbone, "config", None), "pad_token_id", None)
    return LabelMatching(pad_token=padding or 0) if config.backbone.kind == "encoder" else None


def tasks_of(config: RunConfig) -> TaskCollection[Task]:
    """Load the tasks of a run, encoded for its backbone.

    Raises:
        ValueError: no task to train on; bad data, with file and line.
    """
    t = config.tasks
    if t.benchmark == "digits":
        from pyro_lift.data.digits import digit_family

        family = digit_family(config.output.seed)
        return TaskCollection("digits", tuple(family.train), tuple(family.dev), tuple(family.test))
    options = t.options if t.names is None else {**t.options, "names": t.names}
    root = "." if t.root is None and t.benchmark == "folder" else t.root
    encoded = encode_tasks(load_tasks(t.benchmark, t.split, root, **options), config)
    if not encoded.train:
        raise ValueError(f"{encoded.name}: no task to train on.\n{encoded.summary()}")
    return encoded


def task_of(config: RunConfig, path: Path) -> Task:
    """Load the one task of a folder or of an NPZ file, encoded for a run's backbone."""
    if not path.exists():
        raise ValueError(f"{path}: no such folder. A task is a folder with train.* and, to be judged by, test.*.")
    collection: TaskCollection[Any] = TaskCollection(str(path), (read_task(path),))
    encoded = encode_tasks(collection, config)
    for note in encoded.notes:
        print(f"note: {note}")
    return encoded.train[0]


def encode_tasks(tasks: TaskCollection[Any], config: RunConfig) -> TaskCollection[Task]:
    """Encode a collection for a run's backbone; one of tensors is as it must be, and needs no tokenizer.

    Raises:
        ValueError: pictures for a backbone of text, or text for one of pictures; a tokenizer that does not fit.
    """
    if all(isinstance(task, Task) for task in tasks):
        return tasks
    kind = config.backbone.kind
    for task in tasks:
        pictures = isinstance(task, ImageTask)
        if not isinstance(task, Task) and pictures != (kind in ("vision", "timm")):
            raise ValueError(
                f"task {task.name!r} is {'pictures' if pictures else 'text'}; a {kind!r} backbone takes the other."
            )
    return tasks.encode(encoder_of(config))


def encoder_of(config: RunConfig) -> Any:
    """Make the encoder that turns a task of strings or pictures into the tensors of a run's backbone.

    Raises:
        ValueError: a tokenizer that does not fit the model.
        OSError: no folder of the backbone here, and nothing of its name on the hub.
    """
    b, longest = config.backbone, config.tasks.max_length
    if b.name == "digits":
        from pyro_lift.data.digits import IMAGE_SIZE

        return encode.Pictures(IMAGE_SIZE, [0.0], [1.0], keyword="")
    if b.kind == "vision":
        from transformers import AutoConfig, AutoImageProcessor

        prepared = _pretrained(AutoImageProcessor, b.name, use_fast=False)
        size = _pretrained(AutoConfig, b.name).image_size
        return encode.Pictures(size, prepared.image_mean, prepared.image_std)
    if b.kind == "timm":
        import timm

        data = timm.data.resolve_data_config({}, model=load_backbone(b.name, "timm"))
        return encode.Pictures(data["input_size"][-1], data["mean"], data["std"], keyword="")
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = _pretrained(AutoTokenizer, b.name)
    model = _pretrained(AutoConfig, b.name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    encode.check_tokenizer(tokenizer, model.vocab_size)
    places = _places(model)
    if places is not None and longest > places:
        log.warning("max_length=%d: %s has places for %d tokens; longer texts are cut there.", longest, b.name, places)
        longest = places
    if b.kind == "encoder":
        return encode.LabelMatching(tokenizer, longest)
    if b.kind == "causal":
        return encode.NextToken(tokenizer, longest)
    return encode.TextToText(tokenizer, model.decoder_start_token_id, longest)


def _pretrained(loader: Any, name: str, **options: Any) -> Any:
    """Load what a backbone's folder, or its place on the hub, has beside the network.

    Raises:
        OSError: neither is there; or what is asked for is not in the folder.
    """
    check_findable(name)
    try:
        return loader.from_pretrained(name, **options)
    except OSError as error:
        if Path(name).is_dir():
            raise
        raise OSError(not_found(name, error)) from error


def _places(model: Any) -> int | None:
    """Return how many tokens a backbone of text has places for; None where its configuration does not say."""
    places = getattr(model, "max_position_embeddings", None)
    if places is None:
        return None
    # Of RoBERTa's kin the first places, up to that of the padding token, are never used.
    unused = (model.pad_token_id or 0) + 1 if model.model_type in AFTER_PADDING else 0
    return int(places) - unused


def device_of(name: str | None) -> str:
    """Return the named device; without a name, CUDA where there is one.

    Raises:
        ValueError: no device of that name, or none of that kind in this machine.
    """
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    check_device(name)
    return name
