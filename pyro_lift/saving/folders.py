"""Priors and posteriors as folders of the Hugging Face ecosystem: config.json, safetensors, a model card, PEFT.

The folder itself is an ordinary PEFT adapter (a prior's heaviest component, a posterior's mean), so that it is of use
without pyro_lift. What is ours is ``prior.safetensors`` or ``posterior.safetensors``, described by ``config.json``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.heads import scale_of
from pyro_lift.models.networks import plain_network
from pyro_lift.models.peft_layers import default_name, peft_layers
from pyro_lift.models.task import Rows, Task, undeclared
from pyro_lift.saving.base_model import check_base, describe_base
from pyro_lift.saving.before_head import described_reading, read_as_saved
from pyro_lift.saving.choices import described_choices, head_tensors, saved_choices, saved_input_sizes
from pyro_lift.saving.copies import digests_of_copies, warn_of_copies
from pyro_lift.saving.destination import check_destination
from pyro_lift.saving.hub import local_folder
from pyro_lift.saving.model_card import posterior_card, prior_card
from pyro_lift.saving.names import CARD, CONFIG, HEAD, POSTERIOR, PRIOR
from pyro_lift.saving.parts import PosteriorParts, PriorParts, SavablePosterior, SavablePrior
from pyro_lift.saving.peft_folder import PEFT_CONFIG, adapter_config, config_from_dict, config_to_dict, write_peft
from pyro_lift.saving.row_forms import forms_of, row_of_zeros, target_of_zeros
from pyro_lift.saving.spread import saved_spread, spread_tensors
from pyro_lift.saving.sureness import described_sureness, saved_sureness
from pyro_lift.saving.text_encoding import TOKENIZER_FILES, load_encoding, save_encoding
from pyro_lift.settings import AdaptSettings, LiFTSettings, complete_adapt_settings, complete_settings
from pyro_lift.support.archive import (
    DamagedError,
    check_format,
    check_sealed,
    new_files,
    read_json,
    read_tensors,
    sealed,
    versions,
    write_file,
    write_json,
    write_tensors,
)
from pyro_lift.support.schema import from_dict

__all__ = [
    "chosen_weights",
    "export_library",
    "export_posterior",
    "export_prior",
    "library_exports",
    "load_posterior",
    "load_prior",
    "save_posterior",
    "save_prior",
]

#: Newest format that is read; written is always the newest.
PRIOR_FORMAT = POSTERIOR_FORMAT = 1
MIXTURE_OPTIONS = ("components", "covariance", "schedule", "power", "count", "buffer_size", "variance_floor", "seed")
#: Of a PEFT configuration, what does not change what the adapter's tensors do: names, the start, and which layers have
#: tensors, which the tensors tell.
NO_PART_OF_THE_FUNCTION = frozenset(
    {
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "target_parameters",
        "layers_to_transform",
        "layers_pattern",
        "modules_to_save",
        "bias",
        "save_projection",
        "init_lora_weights",
        "init_weights",
        "init_ia3_weights",
        "d_initial",
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
        "runtime_config",
        "megatron_config",
        "megatron_core",
        "lora_dropout",
        "module_dropout",
        "rank_dropout",
        "vera_dropout",
        "ensure_weight_tying",
    }
)
_ADAPTER_KEYS: dict[str, type] = {"adapter": dict, "peft": dict, "base_model": dict, "files": dict}
_PRIOR_KEYS = {**_ADAPTER_KEYS, "settings": dict, "adapt": dict, "mixture": dict, "tasks": list, "results": dict}
_POSTERIOR_KEYS = {**_ADAPTER_KEYS, "task": dict, "component": int}


# ------------------------------------------------------------------------------------------------------------- priors


def save_prior(prior: SavablePrior, folder: Path) -> Path:
    """Write a prior's folder; files of an older one are replaced when all of the new ones are on the disk.

    Raises:
        FileExistsError: the folder holds something else (:func:`~pyro_lift.saving.destination.check_destination`).
    """
    adapter, mixture = prior.adapter, prior.mixture
    if mixture.seen == 0:
        raise ValueError("the prior has seen no draw yet: there is nothing to save.")
    check_destination(folder, "prior")
    tensors = {f"mixture.{k}": x for k, x in mixture.state_dict().items()}
    tensors |= {f"second_moment.{k}": x for k, x in prior.second_moment.items()}
    tensors |= {"initial": adapter.initial, **head_tensors(prior.head_mean)}
    with new_files(folder, CONFIG, stale=(POSTERIOR, HEAD, *TOKENIZER_FILES)) as new:
        write_peft(adapter, _component(prior, _heaviest(prior)), new)
        config = {
            "format": "pyro_lift.prior",
            "format_version": PRIOR_FORMAT,
            "versions": versions(),
            **_described(adapter),
            "settings": dataclasses.asdict(prior.settings),
            "adapt": dataclasses.asdict(prior.adapt_settings),
            "mixture": {name: getattr(mixture, name) for name in MIXTURE_OPTIONS},
            "seed": prior.seed,
            "tasks": list(prior.tasks),
            "results": dict(prior.results),
            "encoding": save_encoding(prior.encoding, new),
            **described_choices(prior),
            "files": {PRIOR: write_tensors(new / PRIOR, tensors)},
            "copies": digests_of_copies(new),
        }
        write_json(new / CONFIG, sealed(config))
        write_file(new / CARD, prior_card(prior, config).encode())
    return folder


def load_prior(
    source: str | Path,
    backbone: nn.Module,
    *,
    check: bool = True,
    options: Mapping[str, Any] | None = None,
    **download: Any,
) -> PriorParts:
    """Load a prior from its folder, or from a repository of the hub.

    Args:
        source: a folder, or ``"user/name"``.
        backbone: the base model, plain, as a PEFT model or as a RandomAdapter; a plain one gets its adapter here.
        check: whether to compare the base model's weights with those the prior was learned on.
        options: of :class:`~pyro_lift.models.adapters.RandomAdapter`, such as a readout, for a backbone that is not
            one yet.
        download: of ``huggingface_hub.snapshot_download``.

    Raises:
        ValueError: anything that is not as it was written; names the file and the tensor.
    """
    folder = local_folder(source, download)
    path = folder / CONFIG
    config = read_json(path)
    check_format(path, config, "pyro_lift.prior", PRIOR_FORMAT, _PRIOR_KEYS)
    warn_of_copies(folder, config)
    settings = from_dict(LiFTSettings, complete_settings(config["settings"]), f"{path}: settings")
    adapt_settings = from_dict(AdaptSettings, complete_adapt_settings(config["adapt"]), f"{path}: adapt")
    mixture = _mixture(path, config["mixture"])
    adapter = _adapter(path, config, backbone, check, options or {})
    file = folder / PRIOR
    shapes = {"initial": (adapter.dim,)}
    tensors = read_tensors(file, config["files"].get(PRIOR), adapter.initial.device, shapes)
    _check_values(file, tensors)
    _load_mixture(file, mixture, _part(tensors, "mixture."), adapter.dim)
    moments = _part(tensors, "second_moment.")
    for name, x in moments.items():
        if name == "theta" and x.shape != adapter.initial.shape:
            raise DamagedError(
                f"{file}: tensor 'second_moment.theta' has shape {tuple(x.shape)}, not ({adapter.dim},)."
            )
    adapter = adapter.beginning_at(tensors["initial"])  # the caller's may be another prior's
    tasks = tuple(map(str, config["tasks"]))
    encoding, seed, results = load_encoding(config.get("encoding"), path), config.get("seed"), dict(config["results"])
    choices = {"encoding": encoding, **saved_choices(path, config, tensors)}
    return PriorParts(adapter, mixture, settings, adapt_settings, moments, seed, tasks, results, **choices)


def _mixture(path: Path, options: dict[str, Any]) -> OnlineGaussianMixture:
    for name in MIXTURE_OPTIONS:
        if name not in options:
            raise DamagedError(f"{path}: mixture: key {name!r} is missing.")
    values = {name: options[name] for name in MIXTURE_OPTIONS if name not in ("components", "covariance")}
    try:
        return OnlineGaussianMixture(options["components"], options["covariance"], **values)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: mixture: {error}") from error


def _load_mixture(file: Path, mixture: OnlineGaussianMixture, tensors: dict[str, Tensor], dim: int) -> None:
    K = mixture.components
    if "buffer" not in tensors:
        width = {"diag": (dim,), "spherical": (1,), "full": (dim, dim)}[mixture.covariance]
        for part in ("moments", "average"):
            shapes = {"weight": (K,), "mean": (K, dim), "variance": (K, *width)}
            for name, shape in shapes.items():
                _check_tensor(file, f"mixture.{part}.{name}", tensors.get(f"{part}.{name}"), shape)
            if not bool((tensors[f"{part}.variance"] >= 0.0).all() and (tensors[f"{part}.weight"] >= 0.0).all()):
                raise DamagedError(f"{file}: tensor 'mixture.{part}.variance' or its weights hold negative values.")
    elif tensors["buffer"].dim() != 2 or tensors["buffer"].shape[-1] != dim:
        raise DamagedError(
            f"{file}: tensor 'mixture.buffer' has shape {tuple(tensors['buffer'].shape)}, not (n, {dim})."
        )
    try:
        mixture.load_state_dict(tensors)
    except ValueError as error:
        raise DamagedError(f"{file}: {error}") from error


def _check_tensor(file: Path, name: str, x: Tensor | None, shape: tuple[int, ...]) -> None:
    if x is None:
        raise DamagedError(f"{file}: tensor {name!r} is missing.")
    if tuple(x.shape) != shape:
        raise DamagedError(f"{file}: tensor {name!r} has shape {tuple(x.shape)}, not {shape}.")


# --------------------------------------------------------------------------------------------------------- posteriors


def save_posterior(posterior: SavablePosterior, folder: Path) -> Path:
    """Write a posterior's folder: its draws, what is needed to predict with them, and a PEFT adapter of their mean.

    Raises:
        FileExistsError: the folder holds something else (:func:`~pyro_lift.saving.destination.check_destination`).
    """
    check_destination(folder, "posterior")
    task = posterior.task
    tensors = {"theta": posterior.thetas} | ({} if posterior.heads is None else {"head": posterior.heads})
    tensors |= {f"label_texts.{name}": x for name, x in (task.label_texts or {}).items()}
    tensors |= spread_tensors(posterior.head_spread)
    with new_files(folder, CONFIG, stale=(PRIOR, HEAD, *TOKENIZER_FILES)) as new:
        _write_draw(posterior, new, "mean")
        config = {
            "format": "pyro_lift.posterior",
            "format_version": POSTERIOR_FORMAT,
            "versions": versions(),
            **_described(posterior.adapter),
            "task": {
                "name": task.name,
                "kind": task.kind,
                "num_classes": task.num_classes,
                "labels": None if task.labels is None else list(task.labels),
                "metric": task.metric,
                "rows": len(task.train),
                "inputs": forms_of(task.train),
                "target": list(task.train.target.shape[1:]),
            },
            "component": posterior.component,
            "results": dict(posterior.results),
            "encoding": save_encoding(posterior.encoding, new),
            **described_sureness(posterior),
            "declares_classes": task.train.classes is not None,
            "input_sizes": {name: list(size) for name, size in posterior.input_sizes.items()},
            "files": {POSTERIOR: write_tensors(new / POSTERIOR, tensors)},
            "copies": digests_of_copies(new),
        }
        write_json(new / CONFIG, sealed(config))
        write_file(new / CARD, posterior_card(posterior, config).encode())
    return folder


def load_posterior(
    source: str | Path,
    backbone: nn.Module,
    task: Task | None = None,
    *,
    check: bool = True,
    options: Mapping[str, Any] | None = None,
    **download: Any,
) -> PosteriorParts:
    """Load a posterior from its folder or from the hub; see :func:`load_prior`.

    Args:
        source: a folder, or ``"user/name"``.
        backbone: the base model.
        task: the task itself; None makes one of its name, kind and labels, with one row of zeros for data (rows are
            not saved), which is all that predictions need.
        check: whether to compare the base model's weights.
        options: of the adapter.
        download: of ``huggingface_hub.snapshot_download``.
    """
    folder = local_folder(source, download)
    path = folder / CONFIG
    config = read_json(path)
    check_format(path, config, "pyro_lift.posterior", POSTERIOR_FORMAT, _POSTERIOR_KEYS)
    warn_of_copies(folder, config)
    adapter = _adapter(path, config, backbone, check, options or {})
    file = folder / POSTERIOR
    tensors = read_tensors(file, config["files"].get(POSTERIOR), adapter.initial.device, {"theta": (-1, adapter.dim)})
    _check_values(file, tensors)
    heads = tensors.get("head")
    if heads is not None and len(heads) != len(tensors["theta"]):
        raise DamagedError(f"{file}: tensor 'head' has {len(heads)} draws, 'theta' {len(tensors['theta'])}.")
    sizes = None
    if task is None:
        sizes = saved_input_sizes(path, config)
        task = _task_without_rows(path, config["task"], _part(tensors, "label_texts."))
    elif task.name != config["task"].get("name"):
        raise ValueError(f"{path}: draws for the task {config['task'].get('name')!r}, not {task.name!r}.")
    if config.get("declares_classes") is not True:
        task = undeclared(task)
    results, encoding = dict(config.get("results") or {}), load_encoding(config.get("encoding"), path)
    told = {"head_spread": saved_spread(file, tensors), "input_sizes": sizes, **saved_sureness(path, config)}
    return PosteriorParts(adapter, task, tensors["theta"], heads, config["component"], results, encoding, **told)


def _task_without_rows(path: Path, about: dict[str, Any], texts: dict[str, Tensor]) -> Task:
    for name in ("name", "kind", "num_classes", "labels"):
        if name not in about:
            raise DamagedError(f"{path}: task: key {name!r} is missing.")
    classes = about["num_classes"]
    target = target_of_zeros(about["kind"], about.get("target"), f"{path}: task")
    inputs = row_of_zeros(about.get("inputs"), f"{path}: task: inputs")
    if about["kind"] == "matching" and not (texts or inputs):  # options by row
        inputs = {f"option_{name}": torch.zeros(1, classes, 1).long() for name in ("input_ids", "attention_mask")}
    options = {"labels": about["labels"], "metric": about.get("metric"), "label_texts": texts or None}
    try:
        return Task(about["name"], Rows(inputs, target), about["kind"], classes, **options)
    except (TypeError, ValueError) as error:
        raise DamagedError(f"{path}: task: {error}") from error


# ------------------------------------------------------------------------------------------------------- PEFT exports


def export_prior(prior: SavablePrior, folder: Path, which: str | int = "phi") -> Path:
    """One PEFT folder: ``"phi"`` (the mixture's mean), a component's number, or a meta-training task's name."""
    theta = chosen_weights(prior, which)
    with new_files(folder, PEFT_CONFIG, stale=(HEAD,)) as new:
        write_peft(prior.adapter, theta, new)
    return folder


def export_library(prior: SavablePrior, folder: Path) -> list[Path]:
    """Write PEFT folders ``phi``, ``component-0`` ..., and ``task-NAME`` of every task that meta-training holds."""
    return [export_prior(prior, folder / name, which) for name, which in library_exports(prior).items()]


def library_exports(prior: SavablePrior) -> dict[str, str | int]:
    """Name what there is to export, and what :func:`export_prior` calls it."""
    exports: dict[str, str | int] = {"phi": "phi"}
    exports |= {f"component-{k}": k for k in range(prior.mixture.components)}
    if prior.mcmc is not None:
        exports |= {f"task-{name}": name for name in prior.tasks}
    return exports


def export_posterior(posterior: SavablePosterior, folder: Path, which: str | int = "mean") -> Path:
    """One PEFT folder: ``"mean"``, or a draw's number; a head of the task's own is ``head.safetensors`` beside it."""
    with new_files(folder, PEFT_CONFIG, stale=(HEAD,)) as new:
        _write_draw(posterior, new, which)
    return folder


def _write_draw(posterior: SavablePosterior, folder: Path, which: str | int) -> None:
    draws = len(posterior.thetas)
    if which == "mean":
        theta, head = posterior.thetas.mean(0), None if posterior.heads is None else posterior.heads.mean(0)
    elif isinstance(which, int) and not isinstance(which, bool) and 0 <= which < draws:
        theta, head = posterior.thetas[which], None if posterior.heads is None else posterior.heads[which]
    else:
        raise ValueError(f"which={which!r}: expected 'mean' or a draw's number, 0 .. {draws - 1}.")
    write_peft(posterior.adapter, theta, folder)
    if head is not None:
        write_tensors(folder / HEAD, _head_tensors(head, posterior.task))


def _head_tensors(head: Tensor, task: Task) -> dict[str, Tensor]:
    """Name the parts of a head: on similarities to label texts their scale stands beside the linear part."""
    if task.kind != "matching":
        return {"weight": head[:, :-1], "bias": head[:, -1]}
    return {"weight": head[:, : -len(head) - 1], "bias": head[:, -1], "similarity_scale": scale_of(head)}


def chosen_weights(prior: SavablePrior, which: str | int) -> Tensor:
    """Return the weights ``[D]`` of ``"phi"``, a component's number, or a meta-training task's name.

    Raises:
        ValueError: a component or a task that there is not.
    """
    K = prior.mixture.components
    if isinstance(which, int) and not isinstance(which, bool):
        if not 0 <= which < K:
            raise ValueError(f"which={which}: the prior's components are 0 .. {K - 1}.")
        return _component(prior, which)
    if which == "phi":
        weight, mean, _ = prior.mixture.moments
        return (weight.unsqueeze(-1) * mean).sum(0)
    return prior.theta(str(which))


def _component(prior: SavablePrior, k: int) -> Tensor:
    return prior.mixture.moments.mean[k]


def _heaviest(prior: SavablePrior) -> int:
    return int(prior.mixture.moments.weight.argmax())


# ------------------------------------------------------------------------------------------------------------ adapter


def _described(adapter: RandomAdapter) -> dict[str, Any]:
    layers = peft_layers(adapter.backbone)
    table = [[default_name(entry.name, layers), list(entry.shape)] for entry in adapter.layout]
    return {
        "adapter": {"dim": adapter.dim, "tensors": table, **described_reading(adapter)},
        "peft": config_to_dict(adapter_config(adapter)),
        "base_model": describe_base(adapter),
    }


def _adapter(
    path: Path, config: dict[str, Any], backbone: nn.Module, check: bool, options: Mapping[str, Any]
) -> RandomAdapter:
    """Put the adapter that was saved on the backbone, every tensor of it in its place."""
    from peft import PeftModel

    backbone = plain_network(backbone)
    if isinstance(backbone, RandomAdapter):
        adapter = backbone
    elif isinstance(backbone, PeftModel):
        adapter = adapt_backbone(backbone, **options)
    else:
        # The fresh start is replaced by the saved one; with a seed, the caller's random stream does not notice it.
        try:
            adapter = adapt_backbone(backbone, config_from_dict(config["peft"], path), seed=0, **options)
        except ValueError as error:
            raise ValueError(f"{path}: the adapter does not fit {type(backbone).__name__}: {error}") from error
    _check_layout(path, adapter, config["adapter"])
    _check_scaling(path, adapter, config["peft"])
    if check:
        check_base(adapter, config["base_model"], path)
    check_sealed(path, config)
    return read_as_saved(adapter, config["adapter"], path)


def _check_layout(path: Path, adapter: RandomAdapter, saved: dict[str, Any]) -> None:
    table = saved.get("tensors")
    if not isinstance(table, list) or not all(isinstance(row, list) and len(row) == 2 for row in table):
        raise DamagedError(f"{path}: adapter: 'tensors' is not a list of names and shapes.")
    old = {name: tuple(shape) for name, shape in table}
    layers = peft_layers(adapter.backbone)
    new = {default_name(entry.name, layers): tuple(entry.shape) for entry in adapter.layout}
    for name, shape in old.items():
        if name not in new:
            raise ValueError(f"{path}: adapter tensor {name!r} has no place in this backbone. Another base or adapter?")
        if new[name] != shape:
            raise ValueError(
                f"{path}: adapter tensor {name!r} has shape {new[name]} in this backbone, {shape} in the file."
            )
    if extra := [name for name in new if name not in old]:
        raise ValueError(
            f"{path}: this backbone's adapter tensor {extra[0]!r} is not in the file. Other target modules?"
        )
    if list(old) != list(new) or sum(map(math.prod, old.values())) != saved.get("dim"):
        raise DamagedError(f"{path}: adapter: tensors out of order, or their sizes do not add up to dim.")


def _check_scaling(path: Path, adapter: RandomAdapter, saved: dict[str, Any]) -> None:
    """The same tensors mean another network under another scale, another block size, another projection's key."""
    present = config_to_dict(adapter_config(adapter))
    for name in saved.keys() & present.keys() - NO_PART_OF_THE_FUNCTION:
        was, now = saved[name], present[name]
        if was != now:
            raise ValueError(f"{path}: the adapter was made with {name}={was!r}; this backbone's has {now!r}.")


def _check_values(file: Path, tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.is_floating_point() and not bool(torch.isfinite(x).all()):
            raise DamagedError(f"{file}: tensor {name!r} holds values that are not finite.")


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
