"""The public modules: those whose names the reference lists."""

from __future__ import annotations

import importlib
import pkgutil
from types import ModuleType

__all__ = ["PACKAGES", "modules_of", "public_names"]

#: Title and sentence of each part of the reference, and where its modules are.
PACKAGES = {
    "pyro_lift": ("The front door", "What most programs import: `from pyro_lift import LiFT, Task, SGLDGibbs, ...`."),
    "pyro_lift.models": ("models", "What is random: programs, adapters as random modules, likelihoods, priors, heads."),
    "pyro_lift.inference": ("inference", "What is done to a program: kernels, the mixture, adaptation, baselines."),
    "pyro_lift.data": ("data", "Tasks from files, strings and pictures, and the benchmarks."),
    "pyro_lift.methods": ("methods", "The registry of every method of the paper's tables."),
    "pyro_lift.metrics": ("metrics", "Scores of probabilities and of texts, and tests of their differences."),
    "pyro_lift.diagnostics": ("diagnostics", "What is asked of a finished run, and of a sampler."),
    "pyro_lift.generation": ("generation", "Text from a network under an adapter's weights."),
    "pyro_lift.tuning": ("tuning", "Settings that are chosen on tasks held out of meta-training."),
    "pyro_lift.watching": ("watching", "Callbacks of runs: JSON lines, TensorBoard, W&B, trackio, MLflow."),
    "pyro_lift.comparison": ("comparison", "Does meta-learning pay on these tasks?"),
    "pyro_lift.saving": ("saving", "Folders of priors, posteriors and libraries of LoRAs."),
}
#: Modules of the front door; what else stands at the root belongs to the command line.
FRONT = ("adapter_library", "config", "defaults", "lift", "posterior", "prior", "settings")


def modules_of(package: str) -> list[str]:
    """List the modules of a part that define public names."""
    if package == "pyro_lift":
        return [f"pyro_lift.{name}" for name in FRONT]
    root = importlib.import_module(package)
    names = sorted(info.name for info in pkgutil.walk_packages(root.__path__, f"{package}."))
    return [name for name in names if public_names(importlib.import_module(name))]


def public_names(module: ModuleType) -> list[str]:
    """List the names that a module defines and offers, in its own order; what it only hands on is not among them."""
    return [
        name
        for name in getattr(module, "__all__", [])
        if getattr(getattr(module, name), "__module__", module.__name__) == module.__name__
    ]
