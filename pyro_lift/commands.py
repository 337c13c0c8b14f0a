"""``pyro-lift train``, ``adapt`` and ``predict``: files in, files out.

A task is a folder or a file that :func:`pyro_lift.data.folder.read_task` reads: tensors, text or pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
import shutil
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from pyro_lift.config import RunConfig, read_config
from pyro_lift.data.layout import RECORD_FILES, TENSOR_FILES
from pyro_lift.data.new_rows import choice_rows, new_pictures, new_tensor_rows, new_text_rows, rows_file
from pyro_lift.data.text import TextForm, TextRow
from pyro_lift.generation.options import Writing
from pyro_lift.generation.predictions import text_measures, text_predictions, token_predictions
from pyro_lift.inference.adaptation.meta_testing import Untouched
from pyro_lift.lift import LiFT
from pyro_lift.metrics.predicted_rows import records_of_rows
from pyro_lift.metrics.task import scores
from pyro_lift.metrics.text import METRICS
from pyro_lift.models.architecture import architecture_of, changed_settings
from pyro_lift.models.conventions import base_of
from pyro_lift.models.digest import digest
from pyro_lift.models.task import Rows, Task
from pyro_lift.posterior import TaskPosterior
from pyro_lift.prior import LiFTPrior
from pyro_lift.saving.destination import check_destination
from pyro_lift.saving.names import CHOICE, PRIOR, RUN
from pyro_lift.saving.rescue import write_or_rescue
from pyro_lift.support import distributed
from pyro_lift.support.archive import read_json, reason_of_failure, write_file, write_json
from pyro_lift.support.folder_lock import only_run_in
from pyro_lift.support.moved import names_moved_from
from pyro_lift.tuning.search import Tuning
from pyro_lift.watching.named import named_callbacks
from pyro_lift.wiring import adapter_of, device_of, encoder_of, task_of, tasks_of

__all__ = ["Writing", "adapt", "adapter_of", "encoder_of", "predict", "task_of", "tasks_of", "train", "tune"]

log = logging.getLogger("pyro_lift")

#: Names of the files inside the folders that the commands write.
RECORD, PREDICTIONS, EARLIER = "adapt.json", "predictions.jsonl", "predictions.earlier.jsonl"


def train(
    path: Path,
    *,
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    log_to: Sequence[str] = (),
) -> LiFTPrior:
    """Meta-train as a TOML file says, and write the prior, with the file beside it.

    While it runs it saves itself in ``checkpoints`` inside the prior's folder; they go when the prior is written.

    Args:
        path: the TOML file.
        progress: whether to show a bar.
        resume: go on with a run that was stopped or killed.
        overwrite: replace a finished prior, and drop a run that was stopped.
        device: in place of the file's.
        log_to: where steps are written, beside what the file says under ``[log]``.

    Raises:
        ImportError: a tracker that is not installed; before any training.
        ValueError: anything wrong with the file or the tasks, a finished prior in the way, or another run at work in
            the folder; before any training.
        OSError: the output folder cannot be written; before any training. Where it cannot be afterwards, the prior is
            in another, which is named.
    """
    config, text = read_config(path), path.read_bytes()
    folder = Path(config.output.folder)
    check_destination(folder, "prior")
    with only_run_in(folder, shared=bool(config.sampler.ranks_block_size)):
        saved, every = folder / "checkpoints", config.output.checkpoint_every
        if (folder / PRIOR).exists() and not overwrite and not (resume and saved.is_dir()):
            raise ValueError(
                f"{folder} holds a finished prior. Give another output.folder, or --overwrite to train anew and "
                "replace it."
            )
        _check_apart(folder, config)
        _check_writable(folder)
        if overwrite and not resume and distributed.is_first():
            shutil.rmtree(saved, ignore_errors=True)
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
            resume_hint = f"pyro-lift train {shlex.quote(str(path))} --resume"
            session = lift.session(tasks.train, **where, checkpoint_every=every or 1000, resume_hint=resume_hint)
        with named_callbacks([*config.log.to, *log_to], config.log.every) as callbacks:
            shown: dict[str, Any] = {"progress": progress, "callbacks": callbacks}
            components = [config.sampler.components]
            (prior,) = lift.meta_train_many(tasks.train, components, session=session, crossed=True, **shown)
        if not distributed.is_first():
            return prior
        _write_prior(prior, folder, text)
        return prior


def tune(
    path: Path,
    budget: str | float = "10 min",
    *,
    progress: bool = True,
    resume: bool = False,
    overwrite: bool = False,
    device: str | None = None,
    log_to: Sequence[str] = (),
) -> LiFTPrior:
    """Choose settings on the tasks of a TOML file, held out in turn; then meta-train on all, and save the prior.

    The choice is kept in ``choice.json`` inside the prior's folder as soon as it is made. The meta-training after it
    saves itself beside it as :func:`train` does. Both go when the prior is written.

    Args:
        path: the TOML file; its sampler's settings are the first candidate.
        budget: of the choice; the meta-training after it takes its own time.
        progress: whether to show bars.
        resume: go on with a run that was stopped or killed: with its choice, where that was made, else from the start.
        overwrite: replace a finished prior, and drop a run that was stopped.
        device: in place of the file's.
        log_to: as of :func:`train`.

    Raises:
        ValueError: see :func:`train`; fewer than three tasks; a run that was stopped in the way; a choice of another
            file, other tasks or another network.
    """
    config, text = read_config(path), path.read_bytes()
    folder = Path(config.output.folder)
    check_destination(folder, "prior")
    with only_run_in(folder):
        saved, choice, every = folder / "checkpoints", folder / CHOICE, config.output.checkpoint_every
        begun = saved.is_dir() or choice.exists()
        if (folder / PRIOR).exists() and not overwrite and not (resume and begun):
            raise ValueError(
                f"{folder} holds a finished prior. Give another output.folder, or --overwrite to replace it."
            )
        if begun and not (resume or overwrite):
            raise ValueError(
                f"{folder} holds a run that was stopped. --resume to go on with it, --overwrite to begin anew."
            )
        _check_apart(folder, config)
        _check_writable(folder)
        if overwrite and not resume:
            shutil.rmtree(saved, ignore_errors=True)
            choice.unlink(missing_ok=True)
        if saved.is_dir() and not choice.exists():
            raise ValueError(f"{folder} holds a run of `train`, not of `tune`: there is no choice of settings in it.")
        tasks = tasks_of(config)
        print(tasks.summary())
        place, seed = device_of(device or config.output.device), config.output.seed
        lift = LiFT(adapter_of(config), settings=config.sampler, adapt=config.adapt, device=place, seed=seed)
        known = [*tasks.train, *tasks.dev]
        of = {"config": hashlib.sha256(text).hexdigest(), "digest": digest(lift.adapter, known)}
        architecture = architecture_of(base_of(lift.adapter.backbone))
        with named_callbacks([*config.log.to, *log_to], config.log.every) as callbacks:
            if choice.exists():
                tuning = _choice_of(choice, of, architecture)
                lift.follow(tuning)
            else:
                if resume:
                    log.warning("no choice of settings was made yet in %s: it begins.", folder)
                tuning = lift.tune(known, budget, progress=progress, callbacks=callbacks)
                _keep_choice(choice, {**of, "architecture": architecture, "tuning": tuning.to_dict()})
            print(f"{tuning.table()}\nchosen: {tuning.chosen}")
            where: dict[str, Any] = {"resume": saved} if saved.is_dir() else {"checkpoint": saved}
            hint = f"pyro-lift tune {shlex.quote(str(path))} --resume"
            session = lift.session(tasks.train, **where, checkpoint_every=every or 1000, resume_hint=hint)
            shown: dict[str, Any] = {"progress": progress, "callbacks": callbacks}
            (prior,) = lift.meta_train_many(tasks.train, [lift.settings.components], session=session, **shown)
        _write_prior(prior, folder, text)
        return prior


def _keep_choice(path: Path, choice: dict[str, Any]) -> None:
    """Write settings that took long to choose; where that fails, the run that has them goes on."""
    try:
        write_json(path, choice)
    except OSError as error:
        path.unlink(missing_ok=True)  # half of it
        reason = reason_of_failure(error)
        log.warning("%s: the choice could not be kept (%s): should this run be stopped, it begins anew.", path, reason)


def _choice_of(path: Path, of: dict[str, str], architecture: dict[str, Any]) -> Tuning:
    """Read the settings that a stopped run chose, and refuse them where they are of something else."""
    kept = read_json(path)
    changed = {"config": "file", "digest": "tasks or the network"}
    other = {name for name in of if kept[name] != of[name]}
    if changed_settings(kept.get("architecture") or {}, architecture):  # of before there is none
        other.add("digest")
    for name, what in changed.items():
        if name in other:
            raise ValueError(
                f"the settings in {path} were chosen before the {what} changed. --overwrite to choose anew, or give "
                "what they were chosen on."
            )
    return Tuning.from_dict(kept["tuning"])


def _write_prior(prior: LiFTPrior, folder: Path, text: bytes) -> None:
    """Write a finished prior with its file, and take away what a stopped run would have gone on with."""

    def write(place: Path) -> None:
        place.mkdir(parents=True, exist_ok=True)
        write_file(place / RUN, text)
        prior.save_pretrained(place)

    write_or_rescue(write, folder, "the prior")
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    (folder / CHOICE).unlink(missing_ok=True)
    print(f"prior written: {folder}")


def adapt(
    prior_folder: Path,
    task_folder: Path,
    out: Path,
    *,
    seed: int = 0,
    progress: bool = True,
    device: str | None = None,
    untrained: bool = False,
    log_to: Sequence[str] = (),
) -> TaskPosterior:
    """Adapt a prior to the task of a folder; write the posterior's folder and a record.

    The draws are written before they are scored, so that scores which cannot be computed cost nothing. A posterior that
    is in the folder already is replaced; its predictions there are put aside, for they are not the new one's.

    Args:
        prior_folder: what :func:`train` wrote.
        task_folder: of the task.
        out: folder of the posterior.
        seed: of the chain.
        progress: whether to show a bar.
        device: in place of the prior's.
        untrained: begin at the adapter as it was before meta-training, with its prior around there and all else the
            same, to compare with.

    Raises:
        ValueError: not a prior's folder; bad data, with file and line; another run at work in ``out``; scores that
            cannot be computed.
        OSError: ``out`` cannot be written; before the chain, or after it, where another place is named.
    """
    config = _config_of(prior_folder)
    check_destination(out, "posterior")
    if out.resolve() in (task_folder.resolve(), prior_folder.resolve()):
        raise ValueError(f"{out} holds the task, or the prior: give another folder for the posterior.")
    with only_run_in(out):
        _check_writable(out)
        adapter = adapter_of(config)
        adapter.to(device_of(device or config.output.device))
        prior = LiFTPrior.from_pretrained(prior_folder, adapter)
        if untrained:
            prior = _untrained(prior)
        task = task_of(config, task_folder)
        with named_callbacks(log_to, config.log.every) as callbacks:
            posterior = prior.adapt(task, seed=seed, progress=progress, callbacks=callbacks)
        record: dict[str, Any] = {
            "prior": str(prior_folder.resolve()),
            "task_folder": str(task_folder.resolve()),
            "task": task.name,
            "draws": len(posterior.thetas),
            "component": posterior.component,
            "seed": seed,
            **({"untrained": True} if untrained else {}),
            **posterior.results,
        }
        write_or_rescue(partial(_write_posterior, posterior, record), out, "the posterior")
        if task.test is not None:
            try:
                results = _score(posterior, task, task.test) | _text_scores(posterior, task_folder)
            except (ValueError, TypeError, RuntimeError, IndexError) as error:
                raise ValueError(f"{out}: the draws are saved, but scoring them failed: {error}") from error
            posterior.results |= results
            record |= results
            write_or_rescue(partial(_write_posterior, posterior, record), out, "the posterior with its scores")
        print(json.dumps(record))
        return posterior


def _write_posterior(posterior: TaskPosterior, record: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    _put_aside(folder)
    posterior.save_pretrained(folder)
    write_json(folder / RECORD, record)


def _put_aside(folder: Path) -> None:
    """Give predictions of the posterior that was in a folder another name."""
    if (predictions := folder / PREDICTIONS).exists():
        predictions.replace(folder / EARLIER)
        log.warning("%s holds predictions of the posterior that is replaced: they are now %s.", folder, EARLIER)


class _AtStart:
    """The mixture of a prior as if nothing had been learned: one component, as wide, at the adapter's own weights."""

    def __init__(self, prior: LiFTPrior) -> None:
        self.prior = prior

    def get(self) -> Any:
        """Return it as a distribution over phi."""
        return Untouched(self.prior.adapter.initial, 0.0).prior(self.prior.mixture.get())


def _untrained(prior: LiFTPrior) -> LiFTPrior:
    """Return a prior without what meta-training has taught it; settings are the same."""
    return LiFTPrior(
        prior.adapter,
        cast(Any, _AtStart(prior)),
        prior.settings,
        prior.adapt_settings,
        seed=prior.seed,
        encoding=prior.encoding,
        kinds=prior.kinds,
        classes=prior.classes,
    )


def predict(
    folder: Path,
    task_folder: Path | None = None,
    out: Path | None = None,
    *,
    device: str | None = None,
    writing: Writing | None = None,
) -> Path:
    """Predict the rows of a task folder or a file, with or without labels; one JSON line a row.

    Of a folder these are its test rows, its train rows where there are no others. Where answers are written, a line has
    the text, its log probability and how sure the draws are of it
    (:func:`~pyro_lift.generation.predictions.text_predictions`). Where every row has its answer the scores are printed.

    Args:
        folder: what :func:`adapt` wrote.
        task_folder: of the rows, or a file of them; None takes the one that was adapted to.
        out: of the predictions; None writes into ``folder``.
        device: in place of the prior's.
        writing: how answers are written.

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
    posterior = TaskPosterior.from_pretrained(folder, adapter)
    # All lines before the first is written: a file of predictions is whole, or is not there.
    place = task_folder or Path(record["task_folder"])
    lines, measures = _predicted(posterior, config, place, writing or Writing())
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    write_or_rescue(lambda place: write_file(place / out.name, content), out.parent, "the predictions")
    for name, value in measures.items():
        print(f"{name} ({posterior.task.metric}): {value:.4f}" if name.startswith("score") else f"{name}: {value:.4f}")
    print(f"{len(lines)} predictions written: {out}")
    return out


def _predicted(
    posterior: TaskPosterior, config: RunConfig, place: Path, writing: Writing
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Predict the rows of a folder or a file, as records; and score them where every row has its answer."""
    task, encoding, file = posterior.task, posterior.encoding, rows_file(place)
    if file is not None and file.name.casefold().endswith(TENSOR_FILES):
        rows, labelled = new_tensor_rows(file, task)
        decoder = getattr(getattr(posterior.adapter.backbone, "config", None), "is_encoder_decoder", False)
        if task.kind == "tokens" and decoder and "decoder_input_ids" not in rows.inputs:
            return token_predictions(posterior, rows, writing.which, writing.options()), {}
        p = posterior.predict(rows)
        return records_of_rows(task, p), _scored(p, rows, task) if labelled else {}
    if file is None and task.kind == "classification" and encoding is None:
        pictures = new_pictures(place)
        rows = encoder_of(config).rows(task.name, pictures)
        paths = () if isinstance(pictures.pictures, Tensor) else pictures.pictures
        files = [{"file": str(path.relative_to(place) if place.is_dir() else path.name)} for path in paths]
        lines = records_of_rows(task, posterior.predict(rows))
        return [line | about for line, about in zip(lines, files or [{}] * len(rows), strict=True)], {}
    if encoding is None:  # of an earlier version, which has no tokenizer
        read = task_of(config, place)
        whole = TaskPosterior(
            posterior.adapter,
            read,
            posterior.thetas,
            posterior.heads,
            posterior.component,
            prediction_temperature=posterior.prediction_temperature,
            class_counts=posterior.class_counts,
        )
        return records_of_rows(read, whole.predict(read.test or read.train)), {}
    if file is None:
        there = "no rows to predict here" if place.exists() else "no such file or folder"
        raise ValueError(
            f"{place}: {there}. Expected a file of rows, or a folder with test.*, dev.* or train.*, each a "
            f"{', '.join(RECORD_FILES)}."
        )
    texts = new_text_rows(file, cast(TextForm, encoding.form), encoding.labels)
    if task.kind == "tokens":
        lines = text_predictions(posterior, texts, writing.which, writing.options())
        return lines, text_measures(lines, task.metric)
    rows = choice_rows(encoding, texts, encoding.labels)
    p = posterior.predict(rows)
    return records_of_rows(task, p, texts), _scored(p, rows, task, texts) if all(row.outputs for row in texts) else {}


def _scored(p: Tensor, rows: Rows, task: Task, texts: Sequence[TextRow] | None = None) -> dict[str, float]:
    """Score predictions of rows that have answers; of answers that no prediction could give, say so."""
    try:
        return scores(p, rows, task, texts)
    except (ValueError, TypeError, RuntimeError, IndexError) as error:
        log.warning("the predictions are not scored: %s", error)
        return {}


def _check_apart(folder: Path, config: RunConfig) -> None:
    """Refuse to write among the tasks: the folder of them all, or one task's."""
    root = None if config.tasks.root is None else Path(config.tasks.root).resolve()
    if root is not None and (
        folder.resolve() == root or (folder.resolve().parent == root and any(folder.glob("train.*")))
    ):
        raise ValueError(f"output.folder={str(folder)!r} holds tasks: give another folder for the prior.")


def _check_writable(folder: Path) -> None:
    """Refuse a folder that cannot be written, before anything is computed; makes it where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
        pass


def _config_of(prior_folder: Path) -> RunConfig:
    for name in (RUN, PRIOR):
        if not (prior_folder / name).is_file():
            raise ValueError(f"{prior_folder}: no {name} here. Give the folder that `pyro-lift train` wrote.")
    return read_config(prior_folder / RUN)


def _score(posterior: TaskPosterior, task: Task, rows: Rows) -> dict[str, float]:
    """Score the posterior's averaged probabilities on some rows."""
    return scores(posterior.predict(rows), rows, task)


def _text_scores(posterior: TaskPosterior, place: Path) -> dict[str, float]:
    """Score what is written for a task's test rows by its metric; nothing where answers are not written."""
    encoding, file = posterior.encoding, rows_file(place, RECORD_FILES)
    if posterior.task.kind != "tokens" or encoding is None or file is None or posterior.task.metric not in METRICS:
        return {}
    rows = new_text_rows(file, cast(TextForm, encoding.form), encoding.labels)
    return text_measures(text_predictions(posterior, rows), posterior.task.metric)


if not TYPE_CHECKING:
    __getattr__ = names_moved_from(__name__)
