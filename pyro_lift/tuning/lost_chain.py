r"""A chain that has lost what it knew begins again, more slowly.

The default rates are a share of how large the network's weights are. Whether a step is stable also depends on the
likelihood: with the preconditioner P and the curvature H of a task's negative log likelihood, a step :math:`\eta` is
where the largest eigenvalue of :math:`\eta\, P^{1/2} H P^{1/2}` is below 4. Gradients that are small where the
curvature is not, as of regressions with little noise that joint training has fitted well, make P large: the median of
fourteen tasks lies between 4 and 18 there, and most chains bear it, because no step may be long
(:mod:`~pyro_lift.inference.gibbs.longest_move`). One that does not is told by its loss
(:mod:`~pyro_lift.inference.lost`). Where the rate was left open it begins again from the end of joint training at
:data:`SMALLER` of it, :data:`MOST` times at most. What was found before the chain stays as it is, and so does the rate
of adaptation; a rate of joint training that was left open goes down too where it was that part that lost itself.

Slower chains for everyone were measured, and are level: at rates for which that median is 2, twelve families of tanh
regressions had -0.09 to +0.13 nats a row, with either sign.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pyro_lift.inference.checkpoint.before import WorkBefore
from pyro_lift.inference.lost import ChainLostError
from pyro_lift.settings import LiFTSettings

__all__ = ["MOST", "SMALLER", "Slower", "advice_where", "once_slower", "slower_so_far"]

log = logging.getLogger("pyro_lift")

#: Factor on the rate of a chain that begins again, and how often it may.
SMALLER, MOST = 1.0 / 3.0, 3


class Slower(NamedTuple):
    """How often the parts of a run have been made slower.

    Attributes:
        chain: times that its rate was lowered.
        joint: times that joint training's was.
    """

    chain: int = 0
    joint: int = 0

    @property
    def factors(self) -> tuple[float, float]:
        """Factors on the rates of the chain and of joint training."""
        return SMALLER**self.chain, SMALLER**self.joint

    @property
    def may_go_on(self) -> bool:
        """Whether one more is allowed."""
        return self.chain < MOST


def advice_where(settings: LiFTSettings) -> str:
    """Return what to do where a chain has lost what it knew, by what is open already."""
    known = (settings.beta, settings.sigma, settings.temperature, settings.n_inflate)
    if any(value is not None for value in known):
        return (
            "Leave beta, sigma and temperature open, or lower the temperature (or raise n_inflate, which is the same)."
        )
    return (
        "Give a smaller learning_rate or lower the temperature, or let `lift.tune` choose them; and look at the tasks' "
        "data, the size of their inputs column by column."
    )


def slower_so_far(folder: Path | None, work: Callable[[], WorkBefore]) -> Slower:
    """Return what a run's folder says; nothing has been made slower where there is none.

    Args:
        folder: where that is kept.
        work: makes what is kept there, for which all data are read: only where there is something.
    """
    found = Slower()
    if folder is None or not (folder / _name(0)).is_dir():
        return found
    kept = work()
    while kept.has(name := _name(found.chain)):
        found = Slower(**kept.data(name, dict))
    return found


def once_slower(so_far: Slower, error: ChainLostError, kept: WorkBefore, *, in_joint: bool) -> Slower:
    """Return the next one, kept in the run's folder, and tell of it.

    Args:
        so_far: until now.
        error: that ended the chain.
        kept: of the run.
        in_joint: whether it was joint training that lost itself.
    """
    after = Slower(so_far.chain + 1, so_far.joint + in_joint)
    kept.data(_name(so_far.chain), after._asdict)
    log.warning(
        "the chain has lost after %d steps what it knew. It begins again at a third of its rate, which was left open, "
        "and nothing need be done.", error.step,
    )  # fmt: skip
    return after


def _name(times: int) -> str:
    return f"slower-{times + 1}"
