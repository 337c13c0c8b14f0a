"""What is kept of LiFT's chain: of phi mixtures and a trace of a few coordinates, of unknown variances their mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.projections import ProjectedTrace
from pyro_lift.models.adapters import RandomAdapter

__all__ = ["ChainSummary", "LogMean", "SummaryMaker"]


class ChainSummary(StreamingStats):
    """What is kept of a chain over phi: a mixture for each K, and a trace of a few coordinates."""

    def __init__(self, components: tuple[int, ...], covariance: Any, adapter: RandomAdapter) -> None:
        self.mixtures = {k: OnlineGaussianMixture(k, covariance) for k in components}
        self.trace = ProjectedTrace(adapter=adapter)

    @property
    def parts(self) -> dict[str, StreamingStats]:
        """For :func:`pyro_lift.diagnostics.from_mcmc`."""
        return {"trace": self.trace}

    def update(self, sample: Tensor) -> None:
        """Feed one draw to every part."""
        self.trace.update(sample)
        for mixture in self.mixtures.values():
            mixture.update(sample)

    def merge(self, other: ChainSummary) -> ChainSummary:
        """Mixtures merged by matching components, traces one after the other."""
        merged = object.__new__(ChainSummary)
        merged.mixtures = {k: m.merge(other.mixtures[k]) for k, m in self.mixtures.items()}
        merged.trace = self.trace.merge(other.trace)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Of every part."""
        return {"mixtures": {k: m.state_dict() for k, m in self.mixtures.items()}, "trace": self.trace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with every part."""
        for k, mixture in self.mixtures.items():
            mixture.load_state_dict(state["mixtures"][str(k)])
        self.trace.load_state_dict(state["trace"])

    def get(self) -> dict[str, Any]:
        """The mixtures by K, and the trace."""
        return {**{f"K={k}": m.get() for k, m in self.mixtures.items()}, "trace": self.trace.get()}


@dataclass(frozen=True)
class SummaryMaker:
    """Makes a :class:`ChainSummary`; a copy of it refers to the same network.

    Pyro copies a chain's statistics before it runs, and this with them: some networks cannot be copied, and none has
    to be.
    """

    components: tuple[int, ...]
    covariance: Any
    adapter: RandomAdapter

    def __call__(self) -> ChainSummary:
        """Make one that has seen no draw."""
        return ChainSummary(self.components, self.covariance, self.adapter)

    def __deepcopy__(self, memo: dict[int, Any]) -> SummaryMaker:
        return self


class LogMean(StreamingStats):
    """The mean logarithm of a positive site's draws, in float64; ``get`` gives the geometric mean."""

    def __init__(self) -> None:
        self.count, self.total = 0, torch.zeros((), dtype=torch.float64)

    def update(self, sample: Tensor) -> None:
        """Take one draw."""
        self.count += 1
        self.total = self.total.to(sample.device) + sample.detach().double().log()

    def merge(self, other: LogMean) -> LogMean:
        """Take both as one chain's."""
        merged = LogMean()
        merged.count, merged.total = self.count + other.count, self.total + other.total.to(self.total.device)
        return merged

    def state_dict(self) -> dict[str, Any]:
        """Count and sum."""
        return {"count": self.count, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with these."""
        self.count, self.total = state["count"], state["total"]

    def get(self) -> Tensor:
        """The geometric mean of all draws; ones before the first."""
        return (self.total / max(self.count, 1)).exp()
