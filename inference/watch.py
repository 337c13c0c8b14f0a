"""The health of a chain whose values are on an accelerator: looked at every so often, kept there in between.

On a CPU every visit ends with a look at its loss, its gradient and what it moved, and a visit that fails changes
nothing. On an accelerator each look would make the host wait until everything before it is computed, and the device
then waits for the host. So the verdict stays on the device as one number,

.. math:: a_t = a_{t-1} \\wedge \\text{(loss, gradient and moved values of visit } t \\text{ are finite)},

and every change of visit t is taken only where :math:`a_t` holds: from the first visit that fails, the chain stands at
its last good state, whatever is computed. The host reads the verdicts of :data:`LOOK_EVERY` visits at once, and before
anything is handed out that lasts (a checkpoint, diagnostics, a task's weights); its error names the step and the tasks
of the visit that failed, as on a CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LOOK_EVERY", "Failure", "Watch", "watch_on"]

#: Visits whose verdicts are read at once.
LOOK_EVERY = 50


class Failure(NamedTuple):
    """The first visit that failed.

    Attributes:
        step: transitions before it.
        tasks: of its block.
        log_likelihood: that it found.
        grad_norm: that it found; both are finite where a moved value is not.
        sites: that left the finite numbers.
    """

    step: int
    tasks: tuple[int, ...]
    log_likelihood: float
    grad_norm: float
    sites: tuple[str, ...]


class _Verdict(NamedTuple):
    step: int
    tasks: tuple[int, ...]
    alive: Tensor
    log_likelihood: Tensor
    grad_norm: Tensor
    sites: dict[str, Tensor]


class Watch:
    """The verdicts of the visits since the last look.

    Laws. :meth:`see` and :meth:`see_moved` belong to one visit, which :meth:`kept` ends; none of them waits for the
    device. :meth:`look` does, once.

    Args:
        every: visits until a look is due.
    """

    def __init__(self, every: int = LOOK_EVERY) -> None:
        self.every = every
        self._verdicts: list[_Verdict] = []
        self._alive: Tensor | None = None

    @property
    def due(self) -> bool:
        """Whether so many visits have been made that it is time for a look."""
        return len(self._verdicts) >= self.every

    def see(self, step: int, tasks: tuple[int, ...], log_likelihood: Tensor, grad_norm: Tensor) -> None:
        """Take note of a visit's loss and gradient; several times in one visit, if it makes several steps."""
        good = torch.isfinite(grad_norm + log_likelihood)
        alive = good if self._alive is None else self._alive & good
        self._verdicts.append(_Verdict(step, tasks, alive, log_likelihood, grad_norm, {}))
        self._alive = alive

    def see_moved(self, values: Mapping[str, Tensor]) -> None:
        """Take note of the values that the visit has moved, by site."""
        verdict = self._verdicts[-1]
        for name, value in values.items():
            verdict.sites[name] = torch.isfinite(value).all()
        alive = torch.stack([verdict.alive, *verdict.sites.values()]).all()
        self._verdicts[-1] = verdict._replace(alive=alive)
        self._alive = alive

    def kept(self, new: Tensor, old: Tensor) -> Tensor:
        """Return the new value where every visit so far is good, else the old one."""
        assert self._alive is not None
        return torch.where(self._alive, new, old)

    def kept_all(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Apply :meth:`kept` by name; what is new in the mapping is zero where a visit has failed."""
        return {name: self.kept(value, old.get(name, torch.zeros_like(value))) for name, value in new.items()}

    def look(self) -> Failure | None:
        """Wait for the device and return the first visit that failed since the last look; None where none did."""
        verdicts, self._verdicts = self._verdicts, []
        if not verdicts or bool(verdicts[-1].alive):
            return None
        alive = torch.stack([verdict.alive for verdict in verdicts]).tolist()
        first = verdicts[alive.index(False)]
        sites = tuple(name for name, good in first.sites.items() if not bool(good))
        self._alive = None
        return Failure(first.step, first.tasks, float(first.log_likelihood), float(first.grad_norm), sites)


def watch_on(device: torch.device) -> Watch | None:
    """Return the watch of a chain on a device; None on the CPU, where a look costs nothing."""
    return None if device.type == "cpu" else Watch()
