"""Modules under the names that they had before the house was built, so that scripts written for it still run."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

__all__ = ["MOVED", "SPLIT", "MovedFinder", "install", "names_moved_from"]

#: Old and new names, without ``pyro_lift.``.
MOVED = {
    "adapter_zoo": "adapter_library",
    "archive": "support.archive",
    "base_model": "saving.base_model",
    "checkpoint": "inference.checkpoint.session",
    "demo": "bench.demo",
    "figures": "bench.figures",
    "hub": "saving.folders",
    "inference.accumulator": "inference.gibbs.accumulator",
    "inference.chain": "inference.mcmc",
    "inference.conjugate": "inference.gibbs.conjugate",
    "inference.flat_visit": "inference.gibbs.long_vectors",
    "inference.fused_mixture": "inference.mixture.compiled",
    "inference.many_processes": "inference.gibbs.shared_visit",
    "inference.meta_test": "inference.adaptation.meta_testing",
    "inference.mixture_stream": "inference.mixture.in_place",
    "inference.offline_em": "inference.mixture.batch_em",
    "inference.online_em": "inference.mixture.online_em",
    "inference.predict": "inference.adaptation.predict",
    "inference.trace": "inference.projections",
    "model_card": "saving.model_card",
    "models.checkpointing": "models.activation_checkpointing",
    "models.stacked": "models.block_likelihood",
    "options": "support.options",
    "peft_folder": "saving.peft_folder",
    "processes": "support.distributed",
    "progress": "inference.progress",
    "report": "bench.report",
    "schedules": "inference.schedules",
    "sweep": "bench.sweep",
    "text_metrics": "metrics.text",
}


#: Modules whose names live in several others now; those in the second group still exist.
SPLIT = {
    "inference.adapt": ("inference.adaptation.inner_loop", "inference.adaptation.gradients"),
    "inference.baselines.fixed_theta": ("methods.fixed_theta", "inference.fixed_theta"),
    "inference.baselines.lift": ("methods.lift",),
    "inference.baselines.memory": ("inference.baselines.peak_memory", "support.memory"),
    "inference.baselines.zoo": ("inference.baselines.library", "models.lora_factors"),
    "inference.disk_store": ("inference.stores.disk", "inference.stores.memory"),
    "inference.kernels": (
        "inference.gibbs.kernel",
        "inference.sgld_kernel",
        "inference.mcmc",
        "inference.kernel",
        "inference.gibbs.plan",
    ),
    "inference.row_list": ("inference.stores.memory",),
    "inference.rules": ("inference.adaptation.update_rules",),
    "inference.sgld_gibbs": (
        "inference.gibbs.visit",
        "inference.gibbs.state",
        "inference.gibbs.rows",
        "inference.gibbs.warmup",
    ),
    "inference.store": ("inference.stores.store", "inference.stores.memory", "inference.stores.disk", "support.memory"),
    "bench.choices": ("bench.grids", "bench.tuner"),
    "bench.problems": ("bench.experiments",),
    "bench.scores": ("metrics.task",),
    "bench.unseen": ("bench.comparison", "bench.example_arguments"),
    # -- these still exist, and ask for the names that left them
    "commands": ("wiring", "data.tensors"),
    "config": ("support.schema",),
    "inference.baselines": ("methods.registry", "inference.baselines.protocol", "inference.adaptation.predict"),
    "inference.baselines.protocol": (
        "inference.adaptation.predict",
        "inference.baselines.finetune",
        "inference.baselines.episodes",
    ),
    "lift": ("settings", "prior", "posterior"),
    "models.likelihoods": ("models.readouts",),
}


def names_moved_from(module: str) -> Callable[[str], Any]:
    """Return a ``__getattr__`` for a module that finds the names which left it where they are now, and says so."""
    homes = SPLIT[module.removeprefix("pyro_lift.")]

    def find(name: str) -> Any:
        if not name.startswith("__"):
            for home in homes:
                value = vars(importlib.import_module(f"pyro_lift.{home}")).get(name)
                if value is not None:
                    message = f"{module}.{name} is now pyro_lift.{home}.{name}; the old name will go."
                    warnings.warn(message, DeprecationWarning, stacklevel=2)
                    return value
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that answers an old name with the module under its new one, and says so once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer an old name of ours, and no other."""
        del path, target
        package, _, name = fullname.partition(".")
        if package != "pyro_lift" or name not in MOVED.keys() | SPLIT.keys():
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module under its new name."""
        old = spec.name.partition(".")[2]
        self._spec = spec
        if old in SPLIT:
            split = ModuleType(spec.name, f"Names that live elsewhere now: {', '.join(SPLIT[old])}.")
            split.__getattr__ = names_moved_from(spec.name)  # type: ignore[method-assign]
            return split
        new = f"pyro_lift.{MOVED[old]}"
        warnings.warn(f"{spec.name} is now {new}; the old name will go.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__ or spec
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is: it has run, and keeps the name that it runs under."""
        module.__spec__ = self._spec


def install() -> None:
    """Add the importer, behind those that find files."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
