r"""Which way to read a network unseen tasks are predicted better with: as it stands, or before its own last layer.

Where that is in doubt (:mod:`~pyro_lift.tuning.class_layer`, :mod:`~pyro_lift.tuning.value_layer`), everything that
comes before the chain is done both ways, and tasks that neither joint training has seen are adapted to and predicted
(:mod:`~pyro_lift.tuning.cross_fit`), by the loss of rows that were left out.

Of classes it is the mean negative log probability, and the way with the lower mean goes on. Of regressions it is half
the logarithm of the mean square error, the same but for a constant under the variance that is best for each task.
There the network stays as it stands only where that is better by the one-sided test at 5 %: new tasks of more rows than
these have are predicted better with heads whichever way it is, on fourteen families that were tried
(docs/results/defaults.md).
"""

from __future__ import annotations

import logging

import torch

from pyro_lift.tuning.cross_fit import CrossFit
from pyro_lift.tuning.halves import is_above_zero

__all__ = ["loses_to"]

log = logging.getLogger("pyro_lift")


def loses_to(heads: CrossFit | None, layer: CrossFit | None) -> bool:
    """Whether unseen tasks are predicted worse with heads on features than with the network as it stands.

    Where nothing is known, of classes the heads stay, which know more of them at the start; of regressions the network.

    Args:
        heads: what unseen tasks said where each has a head of its own on the features before the network's last layer.
        layer: the same of the network with that layer.
    """
    values = layer is not None and layer.noise is not None
    if heads is None or layer is None or not heads.losses or len(heads.losses) != len(layer.losses):
        return values
    with_heads, with_layer = (torch.tensor(found.losses, dtype=torch.float64) for found in (heads, layer))
    more = with_heads - with_layer
    kept = is_above_zero(more) if values else float(more.mean()) > 0.0
    log.info(
        "the network was tried as it stands too, its %s: unseen tasks then have %.3g nats a row%s, with heads of their "
        'own on the features before its last layer %.3g. %s head="shared" leaves the network as it is.',
        "output the value" if values else "scores the tasks' classes",
        float(with_layer.mean()),
        " (half the logarithm of the mean square error of rows left out)" if values else "",
        float(with_heads.mean()),
        "It stays as it stands." if kept else "The heads stay.",
    )
    return kept
