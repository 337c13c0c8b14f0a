"""pyro_lift: learning to fine-tune by Bayesian meta-learning of LoRA adapters, on Pyro.

Names are imported when they are first used: ``import pyro_lift`` loads neither transformers, timm, peft and datasets
nor ArviZ and matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pyro_lift.support import moved

if TYPE_CHECKING:
    from pyro_lift.comparison.run import compare as compare
    from pyro_lift.diagnostics import compare_with_nuts as compare_with_nuts
    from pyro_lift.diagnostics import from_mcmc as from_mcmc
    from pyro_lift.diagnostics import posterior_check as posterior_check
    from pyro_lift.diagnostics import prior_check as prior_check
    from pyro_lift.diagnostics import sbc as sbc
    from pyro_lift.diagnostics import summarise as summarise
    from pyro_lift.inference.gibbs.kernel import SGLDGibbs as SGLDGibbs
    from pyro_lift.inference.lost import ChainLostError as ChainLostError
    from pyro_lift.inference.mcmc import MCMC as MCMC
    from pyro_lift.inference.mcmc import StreamingMCMC as StreamingMCMC
    from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture as OnlineGaussianMixture
    from pyro_lift.inference.sgld import DivergedError as DivergedError
    from pyro_lift.inference.sgld_kernel import SGLD as SGLD
    from pyro_lift.inference.whole import whole as whole
    from pyro_lift.lift import LiFT as LiFT
    from pyro_lift.models.adapters import RandomAdapter as RandomAdapter
    from pyro_lift.models.task import Task as Task
    from pyro_lift.posterior import TaskPosterior as TaskPosterior
    from pyro_lift.prior import LiFTPrior as LiFTPrior
    from pyro_lift.settings import AdaptSettings as AdaptSettings
    from pyro_lift.settings import LiFTSettings as LiFTSettings

__version__ = "0.1.0"

_HOME = {
    "AdaptSettings": "settings",
    "ChainLostError": "inference.lost",
    "DivergedError": "inference.sgld",
    "LiFT": "lift",
    "LiFTPrior": "prior",
    "LiFTSettings": "settings",
    "MCMC": "inference.mcmc",
    "OnlineGaussianMixture": "inference.mixture.online_em",
    "RandomAdapter": "models.adapters",
    "SGLD": "inference.sgld_kernel",
    "SGLDGibbs": "inference.gibbs.kernel",
    "StreamingMCMC": "inference.mcmc",
    "Task": "models.task",
    "TaskPosterior": "posterior",
    "compare": "comparison.run",
    "compare_with_nuts": "diagnostics",
    "from_mcmc": "diagnostics",
    "posterior_check": "diagnostics",
    "prior_check": "diagnostics",
    "sbc": "diagnostics",
    "summarise": "diagnostics",
    "whole": "inference.whole",
}

__all__ = ["__version__", *sorted(_HOME)]

moved.install()


if not TYPE_CHECKING:  # mypy takes a module that has __getattr__ to have every name, misspelt ones too

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'pyro_lift' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}.")
        return getattr(importlib.import_module(f"pyro_lift.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
