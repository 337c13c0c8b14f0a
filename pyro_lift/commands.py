"""What ``pyro-lift train``, ``adapt`` and ``predict`` do: files in, files out.

A task as a folder is what ``load_tasks("folder")`` reads, or tensors: ``train.safetensors`` (and ``dev``, ``test``)
with the inputs by keyword of the backbone, and ``labels``.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pyro_lift.config import RunConfig, read_config
from pyro_lift.data.collection import TaskCollection
from pyro_lift.data.task import Rows, Task
from pyro_lift.inference.online_em import OnlineGaussianMixture
from pyro_lift.lift import LiFT, LiFTPrior, TaskPosterior
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, load_backbone, recipe
from pyro_lift.models.likelihoods import LabelMatching

__all__ = ["adapt", "adapter_of", "predict", "read_tensor_task", "tasks_of", "train"]

log = logging.getLogger("pyro_lift")

#: Names of the files inside the folders that the commands write.
CONFIG, PRIOR, DRAWS = "run.toml", "prior.safetensors", "draws.safetensors"
RECORD, PREDICTIONS = "adapt.json", "predictions.jsonl"
PARTS = ("train", "dev", "test")


def train(path: Path, *, progress: bool = True) -> LiFTPrior:
    """Meta-train as a TOML file says, and write the prior, with the file beside it.

    Raises:
        ValueError: anything wrong with the file or the tasks; before any training.
    """
    config = read_config(path)
    folder = Path(config.output.folder)
    adapter = adapter_of(config)
    tasks = tasks_of(config, adapter)
    print(tasks.summary())
    print(f"{adapter.dim} adapter weights on {config.backbone.name}")
    device, seed = _device(config.output.device), config.output.seed
    lift = LiFT(adapter, settings=config.sampler, adapt=config.adapt, device=device, seed=seed)
    prior = lift.meta_train(tasks.train, progress=progress)
    _write_prior(prior, folder)
    (folder / CONFIG).write_bytes(path.read_bytes())
    print(f"prior written: {folder}")
    return prior


def adapt(prior_folder: Path, task_folder: Path, out: Path, *, seed: int = 0, progress: bool = True) -> TaskPosterior:
    """Adapt a prior to the task of a folder; write the draws, a record, and a PEFT adapter of their mean.

    Raises:
        ValueError: not a prior's folder; bad data, with file and line.
    """
    config = _config_of(prior_folder)
    adapter = adapter_of(config)
    adapter.to(_device(config.output.device))
    prior = _read_prior(prior_folder, config, adapter)
    task = task_of(config, adapter, task_folder)
    posterior = prior.adapt(task, seed=seed, progress=progress)
    _write_draws(posterior, out)
    record: dict[str, Any] = {
        "prior": str(prior_folder.resolve()),
        "task_folder": str(task_folder.resolve()),
        "task": task.name,
        "draws": len(posterior.thetas),
        "component": posterior.component,
        "seed": seed,
    }
    if task.test is not None:
        record |= _score(posterior, task, task.test)
    (out / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    _write_peft(adapter, posterior.thetas.mean(0), out / "adapter")
    print(json.dumps(record))
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
    task = task_of(config, adapter, task_folder or Path(record["task_folder"]))
    thetas, heads = _read_draws(folder, adapter)
    posterior = TaskPosterior(adapter, task, thetas, heads, record["component"])
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


def tasks_of(config: RunConfig, adapter: RandomAdapter) -> TaskCollection[Task]:
    """The tasks of a run, encoded for its backbone.

    Raises:
        ValueError: no task to train on; bad data, with file and line.
    """
    t = config.tasks
    if t.benchmark == "digits":
        from pyro_lift.data.digits import digit_family

        family = digit_family(config.output.seed)
        return TaskCollection("digits", tuple(family.train), tuple(family.dev), tuple(family.test))
    root = Path(t.root or ".")
    if t.benchmark == "folder" and (tensors := sorted(root.glob("*/train.safetensors"))):
        return TaskCollection(f"tasks of {root}", tuple(read_tensor_task(path.parent) for path in tensors))
    raise ValueError(f"{root}: no folder here with train.safetensors; see `pyro-lift train --help`.")


def task_of(config: RunConfig, adapter: RandomAdapter, folder: Path) -> Task:
    """The one task of a folder, encoded for a run's backbone."""
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder. A task is a folder with train.* and, to be judged by, test.*.")
    if (folder / "train.safetensors").is_file():
        return read_tensor_task(folder)
    raise ValueError(f"{folder}: no train.safetensors here.")


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


def _write_prior(prior: LiFTPrior, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"mixture.{k}": x for k, x in prior.mixture.state_dict().items()}
    tensors |= {f"second_moment.{k}": x for k, x in prior.second_moment.items()}
    tensors["initial"] = prior.adapter.initial
    save_file({k: x.detach().cpu().contiguous().clone() for k, x in tensors.items()}, folder / PRIOR)


def _read_prior(folder: Path, config: RunConfig, adapter: RandomAdapter) -> LiFTPrior:
    from safetensors.torch import load_file

    tensors = load_file(folder / PRIOR, device=str(adapter.initial.device))
    # Averages over tasks mean something only in the gauge of one and the same start.
    if tensors["initial"].shape != adapter.initial.shape or not torch.allclose(tensors["initial"], adapter.initial):
        raise ValueError(f"{folder}: the prior belongs to an adapter with other initial weights; was {CONFIG} edited?")
    s = config.sampler
    mixture = OnlineGaussianMixture(s.components, s.covariance)

    def part(prefix: str) -> dict[str, Tensor]:
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    mixture.load_state_dict(part("mixture."))
    return LiFTPrior(adapter, mixture, s, config.adapt, part("second_moment."), seed=config.output.seed)


def _write_peft(adapter: RandomAdapter, theta: Tensor, folder: Path) -> None:
    """An ordinary PEFT folder with these weights, for ``peft.PeftModel.from_pretrained``."""
    with adapter.bound(theta):
        adapter.backbone.save_pretrained(str(folder))  # type: ignore[operator]


def _write_draws(posterior: TaskPosterior, folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    draws = {"theta": posterior.thetas} | ({} if posterior.heads is None else {"head": posterior.heads})
    save_file({name: x.detach().cpu().contiguous() for name, x in draws.items()}, folder / DRAWS)


def _read_draws(folder: Path, adapter: RandomAdapter) -> tuple[Tensor, Tensor | None]:
    from safetensors.torch import load_file

    draws = load_file(folder / DRAWS, device=str(adapter.initial.device))
    if draws["theta"].shape[-1] != adapter.dim:
        raise ValueError(
            f"{folder / DRAWS}: draws of {draws['theta'].shape[-1]} weights, the adapter has {adapter.dim}: "
            "they belong to different adapters."
        )
    return draws["theta"], draws.get("head")


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
