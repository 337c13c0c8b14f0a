"""``pyro-lift train``, ``adapt`` and ``predict``: files in, files out.

A task is a folder or a file that :func:`pyro_lift.data.folder.read_task` reads: tensors, text or pictures.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from pyro_lift.config import RunConfig, read_config
from pyro_lift.lift import LiFT
from pyro_lift.metrics.task import scores
from pyro_lift.models.task import Rows, Task
from pyro_lift.posterior import TaskPosterior
from pyro_lift.prior import LiFTPrior
from pyro_lift.support import distributed
from pyro_lift.support.archive import read_json, write_file, write_json
from pyro_lift.support.moved import names_moved_from
from pyro_lift.wiring import adapter_of, device_of, encoder_of, task_of, tasks_of

__all__ = ["adapt", "adapter_of", "encoder_of", "predict", "task_of", "tasks_of", "train", "tune"]

log = logging.getLogger("pyro_lift")

#: Names of the files inside the folders that the commands write.
CONFIG, PRIOR = "run.toml", "prior.safetensors"
RECORD, PREDICTIONS = "adapt.json", "predictions.jsonl"


def train(
    path: Path, *, progress: bool = True, resume: bool = False, overwrite: bool = False, device: str | None = None
) -> LiFTPrior:
    """Meta-train as a TOML file says, and write the prior, with the file beside it.

    While it runs it saves itself in ``checkpoints`` inside the prior's folder; they go when the prior is written.

    Args:
        path: the TOML file.
        progress: whether to show a bar.
        resume: go on with a run that was stopped or killed.
        overwrite: replace a finished prior, and drop a run that was stopped.
        device: in place of the file's.

    Raises:
        ValueError: anything wrong with the file or the tasks, or a finished prior in the way; before any training.
        OSError: the output folder cannot be written; before any training.
    """
    config, text = read_config(path), path.read_bytes()
    folder = Path(config.output.folder)
    saved, every = folder / "checkpoints", config.output.checkpoint_every
    if (folder / PRIOR).exists() and not overwrite and not (resume and saved.is_dir()):
        raise ValueError(
            f"{folder} holds a finished prior. Give another output.folder, or --overwrite to train anew and replace it."
        )
    _check_writable(folder)
    if overwrite and not resume and distributed.is_first():
        shutil.rmtree(saved, ignore_errors=True)
    if config.sampler.ranks_block_size:
        distributed.join()
    adapter = adapter_of(config)
    tasks = tasks_of(config)
    if distributed.is_first():
        print(tasks.summary())
        print(f"{adapter.dim} adapter weights on {config.backbone.name}")
    place, seed = device_of(device or config.output.device), config.output.seed
    lift = LiFT(adapter, settings=config.sampler, adapt=config.adapt, device=place, seed=seed)
    session = None
    if every or resume:
        where: dict[str, Any] = {"resume": saved} if resume else {"checkpoint": saved}
        resume_hint = f"pyro-lift train {path} --resume"
        session = lift.session(tasks.train, **where, checkpoint_every=every or 1000, resume_hint=resume_hint)
    prior = lift.meta_train_many(tasks.train, [config.sampler.components], progress=progress, session=session)[0]
    if not distributed.is_first():
        return prior
    write_file(folder / CONFIG, text)
    prior.save_pretrained(folder)
    shutil.rmtree(saved, ignore_errors=True)
    print(f"prior written: {folder}")
    return prior


def tune(
    path: Path,
    budget: str | float = "10 min",
    *,
    progress: bool = True,
    overwrite: bool = False,
    device: str | None = None,
) -> LiFTPrior:
    """Choose settings on the tasks of a TOML file, held out in turn; then meta-train on all, and save the prior.

    Args:
        path: the TOML file; its sampler's settings are the first candidate.
        budget: of the choice; the meta-training after it takes its own time.
        progress: whether to show bars.
        overwrite: replace a finished prior.
        device: in place of the file's.

    Raises:
        ValueError: see :func:`train`; fewer than three tasks.
    """
    config, text = read_config(path), path.read_bytes()
    folder = Path(config.output.folder)
    if (folder / PRIOR).exists() and not overwrite:
        raise ValueError(f"{folder} holds a finished prior. Give another output.folder, or --overwrite to replace it.")
    _check_writable(folder)
    tasks = tasks_of(config)
    print(tasks.summary())
    place, seed = device_of(device or config.output.device), config.output.seed
    lift = LiFT(adapter_of(config), settings=config.sampler, adapt=config.adapt, device=place, seed=seed)
    tuning = lift.tune([*tasks.train, *tasks.dev], budget, progress=progress)
    print(f"{tuning.table()}\nchosen: {tuning.chosen}")
    prior = lift.meta_train(tasks.train, progress=progress)
    write_file(folder / CONFIG, text)
    prior.save_pretrained(folder)
    print(f"prior written: {folder}")
    return prior


def adapt(
    prior_folder: Path,
    task_folder: Path,
    out: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
) -> TaskPosterior:
    """Adapt a prior to the task of a folder; write the posterior's folder and a record.

    The draws are written before they are scored, so that scores which cannot be computed cost nothing.

    Raises:
        ValueError: not a prior's folder; bad data, with file and line; scores that cannot be computed.
        OSError: ``out`` cannot be written; before the chain.
    """
    config = _config_of(prior_folder)
    _check_writable(out)
    adapter = adapter_of(config)
    adapter.to(device_of(device or config.output.device))
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
    posterior.save_pretrained(out)
    write_json(out / RECORD, record)
    if task.test is not None:
        try:
            results = _score(posterior, task, task.test)
        except (ValueError, TypeError, RuntimeError, IndexError) as error:
            raise ValueError(f"{out}: the draws are saved, but scoring them failed: {error}") from error
        posterior.save_pretrained(out, results=results)
        record |= results
        write_json(out / RECORD, record)
    print(json.dumps(record))
    return posterior


def predict(
    folder: Path, task_folder: Path | None = None, out: Path | None = None, *, device: str | None = None
) -> Path:
    """Predict the test rows of a task folder (train rows where there are no others); one JSON line a row.

    Args:
        folder: what :func:`adapt` wrote.
        task_folder: of the rows; None takes the one that was adapted to.
        out: of the predictions; None writes into ``folder``.
        device: in place of the prior's.

    Raises:
        ValueError: not an adapted folder, or one whose prior is gone; bad data, with file and line.
        OSError: ``out`` cannot be written.
    """
    if not (folder / RECORD).is_file():
        raise ValueError(f"{folder}: no {RECORD} here. Give the folder that `pyro-lift adapt` wrote.")
    record = read_json(folder / RECORD)
    for key in ("prior", "task_folder"):
        if not isinstance(record.get(key), str):
            raise ValueError(f"{folder / RECORD}: {key!r} is missing. Give the folder that `pyro-lift adapt` wrote.")
    out = out or folder / PREDICTIONS
    if out.is_dir():
        raise ValueError(f"{out} is a folder; --out is the JSONL file to write.")
    _check_writable(out.parent)
    try:
        config = _config_of(Path(record["prior"]))
    except ValueError as error:
        raise ValueError(f"{folder / RECORD}: the prior it was adapted from: {error}") from error
    adapter = adapter_of(config)
    adapter.to(device_of(device or config.output.device))
    task = task_of(config, task_folder or Path(record["task_folder"]))
    saved = TaskPosterior.from_pretrained(folder, adapter)
    posterior = TaskPosterior(
        adapter,
        task,
        saved.thetas,
        saved.heads,
        saved.component,
        prediction_temperature=saved.prediction_temperature,
    )
    rows = task.test or task.train
    # All lines before the first is written: a file of predictions is whole, or is not there.
    lines = [json.dumps(line) for line in _predictions(task, posterior.predict(rows))]
    write_file(out, "".join(f"{line}\n" for line in lines).encode())
    print(f"{len(rows)} predictions written: {out}")
    return out


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before anything is computed; makes it where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _config_of(prior_folder: Path) -> RunConfig:
    for name in (CONFIG, PRIOR):
        if not (prior_folder / name).is_file():
            raise ValueError(f"{prior_folder}: no {name} here. Give the folder that `pyro-lift train` wrote.")
    return read_config(prior_folder / CONFIG)


def _score(posterior: TaskPosterior, task: Task, rows: Rows) -> dict[str, float]:
    """Score the posterior's averaged probabilities on some rows."""
    return scores(posterior.predict(rows), rows, task)


def _predictions(task: Task, p: Tensor) -> Iterator[dict[str, Any]]:
    for number, probabilities in enumerate(p.cpu()):
        line: dict[str, Any] = {"row": number}
        if task.kind == "regression":
            line["mean"] = probabilities.tolist()
        elif task.kind == "tokens":
            line |= {"tokens": probabilities.argmax(-1).tolist(), "probabilities": probabilities.amax(-1).tolist()}
        else:
            best = int(probabilities.argmax())
            named = best < len(task.labels or ())  # a shared head may be wider than the task
            label = task.labels[best] if task.labels and named else best
            line |= {"label": label, "probabilities": probabilities.tolist()}
        yield line


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
