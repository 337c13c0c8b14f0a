"""Modules under the names that they had before the house was built, so that scripts written for it still run."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Sequence
from types import ModuleType

__all__ = ["MOVED", "MovedFinder", "install"]

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
    "inference.disk_store": "inference.stores.disk",
    "inference.flat_visit": "inference.gibbs.long_vectors",
    "inference.fused_mixture": "inference.mixture.compiled",
    "inference.kernels": "inference.gibbs.kernel",
    "inference.many_processes": "inference.gibbs.shared_visit",
    "inference.meta_test": "inference.adaptation.meta_testing",
    "inference.mixture_stream": "inference.mixture.in_place",
    "inference.offline_em": "inference.mixture.batch_em",
    "inference.online_em": "inference.mixture.online_em",
    "inference.predict": "inference.adaptation.predict",
    "inference.store": "inference.stores.store",
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


class MovedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An importer that answers an old name with the module under its new one, and says so once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer an old name of ours, and no other."""
        del path, target
        package, _, name = fullname.partition(".")
        if package != "pyro_lift" or name not in MOVED:
            return None
        return importlib.machinery.ModuleSpec(fullname, self)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Import the module under its new name."""
        new = f"pyro_lift.{MOVED[spec.name.partition('.')[2]]}"
        warnings.warn(f"{spec.name} is now {new}; the old name will go.", DeprecationWarning, stacklevel=2)
        module = importlib.import_module(new)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Leave the module as it is: it has run, and keeps the name that it runs under."""
        module.__spec__ = self._spec


def install() -> None:
    """Add the importer, behind those that find files."""
    if not any(isinstance(finder, MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(MovedFinder())
