"""What a user asks of a chain's set-up, and how many tasks a visit takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pyro_lift.inference.program import Evaluation
from pyro_lift.inference.stores.store import ThetaStore
from pyro_lift.support import distributed

__all__ = ["Request", "Scan", "block_size_of", "is_small", "size_hint"]

Scan = Literal["round_robin", "random"]
#: Most coordinates of all sites, and numbers observed, of a program that is evaluated whole without being asked to.
MOST_COORDINATES, MOST_OBSERVED = 200_000, 2_000_000


@dataclass(frozen=True)
class Request:
    """Options of the kernel that concern its set-up alone; see :class:`pyro_lift.inference.gibbs.kernel.SGLDGibbs`.

    ``says``: whether warnings are given; a second look at a program, and later chains, repeat none. ``plate_named``:
    whether the user named the plate, so that no other is taken for it. ``resumed_block_size``: of the run that is gone
    on with, where the block is left to us.
    """

    plate: str
    block_size: int | None
    scan: Scan
    distributed: bool
    sgd_steps: int
    store: str | ThetaStore
    check_stability: bool
    warmup_steps: int = 0
    says: bool = True
    plate_named: bool = True
    resumed_block_size: int | None = None


def block_size_of(request: Request, peeked: Evaluation, *, subsampled: bool, sequential: bool) -> int:
    """Return B, the tasks of a visit: what the user says, in the plate or as an option, or all, where that is cheap.

    A vectorised program that never asked for a subsample may hold the data of all tasks, so it is one block. One that
    iterates over its plate takes any indices; all tasks at a visit cost as much as a visit to each, and move phi and
    every theta by what all of them say, where visits to one take N draws for it. Programs that are too large to be
    seen whole are visited one task at a time.

    Args:
        request: of the user.
        peeked: a run of the program as it stands.
        subsampled: whether the plate has a ``subsample_size``.
        sequential: whether the program iterates over it.

    Raises:
        ValueError: a block size that the plate contradicts.
    """
    plate, block_size = request.plate, request.block_size
    num_tasks, declared = peeked.plates[plate]
    if request.distributed:
        return block_size or declared * distributed.process()[1]
    if subsampled:
        if block_size not in (None, declared):
            raise ValueError(
                f"block_size={block_size}, but the program takes subsample_size={declared} of the plate "
                f"{plate!r}. Give the plate subsample_size={block_size}, or leave block_size out."
            )
        return declared
    if block_size is not None:
        if block_size > num_tasks:
            raise ValueError(f"block_size={block_size} is more than the plate's {num_tasks} tasks.")
        return block_size
    if not sequential:
        return num_tasks
    return request.resumed_block_size or (num_tasks if is_small(peeked) else 1)


def is_small(run: Evaluation) -> bool:
    """Whether a program may be evaluated whole, many times a visit, without being asked to; of a run of all of it."""
    coordinates, observed = _size(run)
    return coordinates <= MOST_COORDINATES and observed <= MOST_OBSERVED


def size_hint(run: Evaluation) -> str:
    """Return the sentences about a program too large to be moved whole without being asked to, and what is left."""
    coordinates, observed = _size(run)
    return (
        f"It is not taken by itself, for the program is large ({coordinates:,} coordinates and {observed:,} numbers "
        f"observed; up to {MOST_COORDINATES:,} and {MOST_OBSERVED:,} it is): ask for it with "
        'SGLDGibbs(pyro_lift.whole(model), phi_update="nuts"), if dozens of runs over all data a draw are no matter. '
        "Or write an upper level that has exact draws, theta ~ Normal(phi, tau) with tau a site, in the place of a "
        "Student-t, gamma or other one."
    )


def _size(run: Evaluation) -> tuple[int, int]:
    """Coordinates of all sites, and numbers observed."""
    coordinates = sum(site.leaf.numel() for site in run.latents.values())
    return coordinates, sum(site.value.numel() for site in run.observed)
