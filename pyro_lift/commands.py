"""What ``pyro-lift train``, ``adapt`` and ``predict`` do: files in, files out.

A task is a folder, of tensors with ``train.safetensors`` (:func:`read_tensor_task`), or of text or pictures as
:func:`pyro_lift.data.folder.read_task` reads them, or an NPZ file of pictures.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lift import data
from pyro_lift.config import RunConfig, read_config
from pyro_lift.data import encode
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.folder import read_task
from pyro_lift.data.images import ImageTask
from pyro_lift.data.records import RECORD_FILES
from pyro_lift.data.text import TextTask
from pyro_lift.lift import LiFT
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.readouts import LabelMatching
from pyro_lift.models.task import Rows, Task
from pyro_lift.posterior import TaskPosterior
from pyro_lift.prior import LiFTPrior
from pyro_lift.support import distributed
from pyro_lift.support.options import check_choice

__all__ = [
    "adapt",
    "adapter_of",
    "encoder_of",
    "predict",
    "read_tensor_task",
    "task_of",
    "tasks_of",
    "train",
]

log = logging.getLogger("pyro_lift")

#: Names of the files inside the folders that the commands write.
CONFIG, PRIOR = "run.toml", "prior.safetensors"
RECORD, PREDICTIONS = "adapt.json", "predictions.jsonl"
PARTS = ("train", "dev", "test")
TASK_FILES = (*RECORD_FILES, ".safetensors")


def train(path: Path, *, progress: bool = True, resume: bool = False) -> LiFTPrior:
    """Meta-train as a TOML file says, and write the prior, with the file beside it.

    While it runs it saves itself in ``checkpoints`` inside the prior's folder; they go when the prior is written.

    Args:
        path: the TOML file.
        progress: whether to show a bar.
        resume: go on with a run that was stopped or killed.

    Raises:
        ValueError: anything wrong with the file or the tasks; before any training.
    """
    config = read_config(path)
    folder = Path(config.output.folder)
    if config.sampler.share:
        distributed.join()
    adapter = adapter_of(config)
    tasks = tasks_of(config)
    if distributed.is_first():
        print(tasks.summary())
        print(f"{adapter.dim} adapter weights on {config.backbone.name}")
    device, seed = _device(config.output.device), config.output.seed
    lift = LiFT(adapter, settings=config.sampler, adapt=config.adapt, device=device, seed=seed)
    saved, every = folder / "checkpoints", config.output.checkpoint_every
    session = None
    if every or resume:
        where: dict[str, Any] = {"resume": saved} if resume else {"checkpoint": saved}
        way_on = f"pyro-lift train {path} --resume"
        session = lift.session(tasks.train, **where, checkpoint_every=every or 1000, way_on=way_on)
    prior = lift.meta_train_many(tasks.train, [config.sampler.components], progress=progress, session=session)[0]
    if not distributed.is_first():
        return prior
    prior.save_pretrained(folder)
    (folder / CONFIG).write_bytes(path.read_bytes())
    shutil.rmtree(saved, ignore_errors=True)
    print(f"prior written: {folder}")
    return prior


def adapt(prior_folder: Path, task_folder: Path, out: Path, *, seed: int = 0, progress: bool = True) -> TaskPosterior:
    """Adapt a prior to the task of a folder; write the posterior's folder and a record.

    Raises:
        ValueError: not a prior's folder; bad data, with file and line.
    """
    config = _config_of(prior_folder)
    adapter = adapter_of(config)
    adapter.to(_device(config.output.device))
    prior = LiFTPrior.from_pretrained(prior_folder, adapter)
    task = task_of(config, task_folder)
    posterior = prior.adapt(task, seed=seed, progress=progress)
    record: dict[str, Any] = {
        "prior": str(prior_folder.resolve()),
        "task_folder": str(task_folder.resolve()),
        "task": task.name,
        "draws": len(posterior.thetas),
        "component": posterior.component,
        "seed": seed,
    }
    scores = {} if task.test is None else _score(posterior, task, task.test)
    posterior.save_pretrained(out, results=scores)
    (out / RECORD).write_text(json.dumps({**record, **scores}, indent=1) + "\n")
    print(json.dumps({**record, **scores}))
    return posterior


def predict(folder: Path, task_folder: Path | None = None, out: Path | None = None) -> Path:
    """Predict the test rows of a task folder (train rows where there are no others); one JSON line a row.

    Args:
        folder: what :func:`adapt` wrote.
        task_folder: of the rows; None takes the one that was adapted to.
        out: of the predictions; None writes into ``folder``.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: no {RECORD} here. Give the folder that `pyro-lift adapt` wrote.")
    record = json.loads((folder / RECORD).read_text())
    config = _config_of(Path(record["prior"]))
    adapter = adapter_of(config)
    adapter.to(_device(config.output.device))
    task = task_of(config, task_folder or Path(record["task_folder"]))
    saved = TaskPosterior.from_pretrained(folder, adapter)
    posterior = TaskPosterior(adapter, task, saved.thetas, saved.heads, saved.component)
    rows = task.test or task.train
    out = out or folder / PREDICTIONS
    with out.open("w", encoding="utf-8") as file:
        for line in _predictions(task, posterior.predict(rows)):
            file.write(json.dumps(line) + "\n")
    print(f"{len(rows)} predictions written: {out}")
    return out


# ------------------------------------------------------------------------------------------ what a configuration means


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
    with torch.random.fork_rng():
        torch.manual_seed(config.output.seed)
        return adapt_backbone(backbone, recipe(backbone, a.rank, **options), readout=_matching(config, backbone))


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


def read_tensor_task(folder: Path) -> Task:
    """A task from ``train.safetensors`` (``dev``, ``test``): inputs by keyword of the backbone, and ``labels``.

    The kind of the likelihood is the files' metadata ``kind``; without it, whole-number labels ``[n]`` are classes,
    ``[n, L]`` tokens, and other numbers are regressed on. Label texts of a matching task are ``label_input_ids`` and
    ``label_attention_mask`` of the training file.

    Raises:
        ValueError: a file that is not safetensors, or without labels; names the file.
    """
    from safetensors import SafetensorError, safe_open

    parts: dict[str, dict[str, Tensor]] = {}
    kind: Any = None
    for part in PARTS:
        path = folder / f"{part}.safetensors"
        if not path.is_file():
            continue
        try:
            with safe_open(path, "pt") as file:
                parts[part] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                kind = (file.metadata() or {}).get("kind", kind)
        except SafetensorError as error:
            raise ValueError(f"{path}: not a safetensors file ({error}).") from error
        if "labels" not in parts[part]:
            raise ValueError(f"{path}: no tensor 'labels' among {', '.join(sorted(parts[part]))}.")
    texts: dict[str, Tensor] = {}
    for part, tensors in parts.items():
        found = {name.removeprefix("label_"): tensors.pop(name) for name in list(tensors) if name.startswith("label_")}
        texts = found if part == "train" else texts
    target = parts["train"]["labels"]
    kind = kind or ("regression" if target.is_floating_point() else "classification" if target.dim() == 1 else "tokens")
    try:
        return Task(
            folder.name, parts["train"], kind, test=parts.get("test"), dev=parts.get("dev"), label_texts=texts or None
        )
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error


def _config_of(prior_folder: Path) -> RunConfig:
    for name in (CONFIG, PRIOR):
        if not (prior_folder / name).is_file():
            raise ValueError(f"{prior_folder}: no {name} here. Give the folder that `pyro-lift train` wrote.")
    return read_config(prior_folder / CONFIG)


def _device(name: str | None) -> str:
    return name or ("cuda" if torch.cuda.is_available() else "cpu")


# ------------------------------------------------------------------------------------------------- draws, predictions


def _score(posterior: TaskPosterior, task: Task, rows: Rows) -> dict[str, float]:
    """Test scores by the posterior's averaged probabilities."""
    p, target = posterior.predict(rows).cpu(), rows.target.cpu()
    if task.kind == "regression":
        return {"mse": float((p.squeeze(-1) - target).square().mean())}
    if task.kind == "tokens":
        counts = target >= 0
        chosen = p.flatten(0, -2).gather(1, target.clamp_min(0).flatten()[:, None]).view(target.shape)
        nll = -chosen[counts].log().double().mean()
        return {"nll": float(nll), "perplexity": float(nll.exp())}
    chosen = p.gather(1, target[:, None])
    return {"accuracy": float((p.argmax(-1) == target).double().mean()), "nll": float(-chosen.log().double().mean())}


def _predictions(task: Task, p: Tensor) -> Iterator[dict[str, Any]]:
    for row, one in enumerate(p.cpu()):
        line: dict[str, Any] = {"row": row}
        if task.kind == "regression":
            line["mean"] = one.tolist()
        elif task.kind == "tokens":
            line |= {"tokens": one.argmax(-1).tolist(), "probabilities": one.amax(-1).tolist()}
        else:
            best = int(one.argmax())
            line |= {"label": task.labels[best] if task.labels else best, "probabilities": one.tolist()}
        yield line
