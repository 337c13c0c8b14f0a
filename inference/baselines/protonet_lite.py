r"""ProtoNet-LITE: prototypes of the *whole* support set, with a gradient through a few random rows of it.

With H of N support rows chosen at random, every row's features are computed, those of the chosen ones with a graph, and

.. math:: \tilde f_h = \mathrm{sg}(f_h) + \tfrac{N}{H}\,\bigl(f_h - \mathrm{sg}(f_h)\bigr), \qquad h \in H

(sg holds fixed). The value is exact; the gradient of anything linear in the support features is unbiased.

Cost: one minibatch's gradient, one for the H rows, and a pass without a graph over all support rows; memory of the
minibatch and of H rows, whatever the size of the support set.

Our choices: only the support path is rescaled (LITE's first code rescales nothing, ORBIT's rescales the query path
too); otherwise as :mod:`pyro_lift.inference.baselines.protonet`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.protonet import PrototypicalMethod, all_features
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.features import features
from pyro_lift.models.task import Rows
from pyro_lift.support.options import check_number

__all__ = ["ProtoNetLITE", "lite"]


@dataclass(frozen=True)
class ProtoNetLITE(PrototypicalMethod):
    """ProtoNet-LITE: prototypes of all support rows, with a gradient through a few of them.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings; an outer step draws ``2 * tasks_per_step`` of its minibatches.
        rows: H, support rows with a gradient (the authors: 40).
        temperature: as in ProtoNet.
        tasks_per_step: B.

    References:
        Memory efficient meta-learning with large images, Bronskill et al., 2021, arXiv:2107.01105.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    rows: int = 8
    temperature: float | None = None
    tasks_per_step: int = 4

    def __post_init__(self) -> None:
        for name in ("rows", "tasks_per_step"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @property
    def memory(self) -> None:
        """Peak memory: no more than that of two minibatches, whatever the support set; not checked."""
        return None

    def support(self, rows: Rows, generator: torch.Generator) -> Rows:
        """Return all rows."""
        del generator
        return rows

    def support_features(self, theta: Tensor, support: Rows, generator: torch.Generator) -> Tensor:
        """Compute the features of all support rows; the gradient goes through H of them."""
        fixed = all_features(self.adapter, support, theta.detach())
        order = torch.randperm(len(support), generator=generator).to(fixed.device)
        chosen = order[: self.rows]
        return lite(fixed, chosen, features(self.adapter, support.take(chosen), theta))


def lite(fixed: Tensor, chosen: Tensor, embedded: Tensor) -> Tensor:
    r"""Join all features at their exact values with N / H times the gradient of the chosen ones.

    .. math:: \tilde f_h = \mathrm{sg}(f_h) + \tfrac{N}{H}\,\bigl(f_h - \mathrm{sg}(f_h)\bigr)

    Args:
        fixed: features of all rows ``[N, E]``, without a graph.
        chosen: indices of H rows.
        embedded: features of those ``[H, E]``, with a graph.

    References:
        Memory efficient meta-learning with large images, Bronskill et al., 2021, arXiv:2107.01105.
    """
    scaled = fixed[chosen] + len(fixed) / len(chosen) * (embedded - embedded.detach())
    return fixed.index_copy(0, chosen, scaled)
