r"""What tasks of meta-training say of the heads that regressions of few rows have, at phi.

A prior that is right for the heads of twenty rows is not right for those of two: its width was chosen where rows leave
little of it, and what it leaves open of one row may be three times what targets vary by. And a head of all tasks that
is of no help to twenty rows may be all that two of them know. So tasks are asked with n of their rows which prior makes
the others the most likely, under the density by which they are predicted,

.. math:: \max_{s_n, t_n} \sum_i \sum_{m \notin M_i} \log \mathcal N\big(y_m \mid \hat h_{M_i}(x_m),\
          \tau^2 + \operatorname{Var} h_{M_i}(x_m)\big), \qquad |M_i| = n = 1, 2, 4, \dots, 16,

with the noise :math:`\tau` of the run, around a ridge over the rows of the half of the tasks that task i is not in. How
strong that ridge is the halves say of each other; where tasks have nothing in common it is their mean value. Features
that joint training has made for the tasks themselves would say too much of themselves: where there is one, tasks are
asked at the vector of the half that they are not in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import median_high
from typing import NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.few_values import FewValues, least_spread
from pyro_lift.models.head_problem import HeadModel, apply_head
from pyro_lift.models.heads import FewRows, UsualPrior
from pyro_lift.models.observation import head_features_of
from pyro_lift.models.task import Task
from pyro_lift.models.value_head import RATIO_WIDTHS, columns_of
from pyro_lift.models.value_spread import scaling_under
from pyro_lift.support.evenly import spread_evenly
from pyro_lift.support.small_problems import on_one_thread
from pyro_lift.tuning.halves import FEWEST_TASKS
from pyro_lift.tuning.head_mean import alike
from pyro_lift.tuning.held_out import dealt, drawn_rows

__all__ = ["said_by_unseen", "with_few_values"]

#: Standard deviations of a value, and of a bias, over what targets vary by within a task.
VALUES = (0.03, 0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0, 5.0)
BIASES = (0.03, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0, 16.0)
#: Rows that a task is asked with, at most; tasks that are asked, rows of theirs that are predicted, and rows of all.
MOST_FEW, ASKED, JUDGED, ROWS = 16, 32, 64, 20_000
#: How often rows are drawn of a task, and how many of them in all, at least.
DRAWS, DRAWN = 4, 16
#: Strengths of a ridge that are tried.
TRIED = 1 + len(RATIO_WIDTHS)


class _Read(NamedTuple):
    """Features ``[n, E]`` and values ``[n, M]`` of a task's rows, in float64."""

    x: Tensor
    y: Tensor


def with_few_values(
    mean: ClassHead | None,
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    theta: Tensor,
    noise_scale: float,
    known: FewRows = (),
) -> ClassHead | None:
    """Give a head of values what tasks say of heads of few rows at phi; one of classes stays as it is.

    Args:
        mean: the head.
        adapter: the network as a function of theta; its output is features.
        tasks: of meta-training.
        theta: phi, ``[D]``.
        noise_scale: standard deviation of the noise.
        known: what tasks have said of vectors that had not seen them (:func:`said_by_unseen`); none asks those of
            meta-training at phi.
    """
    if mean is None or mean.feature_sd is None:
        return mean
    one, other = _halves(adapter, tasks, theta)
    every = [*one, *other]
    sd = least_spread(torch.cat([read.x for read in every]).std(0))
    strength, priors = _asked([_Unseen(one, other, sd), _Unseen(other, one, sd)], noise_scale, known)
    found = FewValues(_ridges(every, sd)[strength], sd, priors) if priors else None
    return mean._replace(few_values=found)


def said_by_unseen(
    adapter: RandomAdapter, tasks: Sequence[Task], vectors: Sequence[Tensor], noise_scale: float
) -> FewRows:
    """Ask tasks what prior heads of few rows have at vectors that have not seen them.

    Args:
        adapter: the network as a function of theta; its output is features.
        tasks: of meta-training.
        vectors: for each of two halves of the tasks the theta ``[D]`` that was trained on the other.
        noise_scale: standard deviation of the noise.

    Returns:
        Numbers of rows, rising, with the standard deviations of a value and of a bias; none where fewer than four tasks
        have two rows, or targets do not vary.
    """
    parts = []
    for k, vector in enumerate(vectors):
        halves = _halves(adapter, tasks, vector)
        unseen, seen = halves[k], halves[1 - k]
        sd = least_spread(torch.cat([read.x for read in (*seen, *unseen)]).std(0))
        parts.append(_Unseen(seen, unseen, sd))
    return _asked(parts, noise_scale)[1]


class _Unseen(NamedTuple):
    """Tasks that have made a head, tasks that it has not seen, and what features vary by over the rows of all."""

    seen: Sequence[_Read]
    unseen: Sequence[_Read]
    sd: Tensor


def _halves(adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor) -> list[list[_Read]]:
    """Read some rows of each half of the tasks, but for those whose targets are in another unit than most."""
    names = {task.name for task in alike(tasks)}
    halves = [[task for task in half if task.name in names] for half in dealt(tasks, 2)]
    return [_read(adapter, half, theta, ROWS // len(tasks)) for half in halves]


@torch.no_grad()
def _read(adapter: RandomAdapter, tasks: Sequence[Task], theta: Tensor, most: int) -> list[_Read]:
    rows = [drawn_rows(task.train, max(most, 1)) for task in tasks]
    found = [head_features_of(adapter, task, each, theta) for task, each in zip(tasks, rows, strict=True)]
    return [_Read(x.double(), columns_of(each.target)) for x, each in zip(found, rows, strict=True)]


@on_one_thread
@torch.no_grad()
def _asked(parts: Sequence[_Unseen], noise: float, known: FewRows = ()) -> tuple[int, FewRows]:
    """Find the strength of the ridge that is best for unseen tasks, and their priors around it if none are known."""
    every = [read for part in parts for read in part.unseen]
    several = [read for read in every if len(read.x) > 1]
    spread = math.sqrt(sum(float(read.y.var(0).mean()) for read in several) / max(len(several), 1))
    if len(several) < FEWEST_TASKS or not spread > 0.0 or not all(part.seen for part in parts):
        return 0, known
    heads = [_ridges(part.seen, part.sd) for part in parts]
    missed = [sum(_missed(each[k], part.unseen) for each, part in zip(heads, parts, strict=True)) for k in range(TRIED)]
    best = missed.index(min(missed))
    if known:
        return best, known
    asked = [
        (read, each[best], part.sd) for each, part in zip(heads, parts, strict=True) for read in part.unseen
        if len(read.x) > 1
    ]  # fmt: skip
    asked = spread_evenly(asked, ASKED)
    most = min(MOST_FEW, median_high(len(read.x) for read, *_ in asked) // 2)
    found: list[tuple[int, UsualPrior]] = []
    for number in sorted({*(n for n in (1, 2, 4, 8, 16) if n <= most), most}):
        able = [(seed, *each) for seed, each in enumerate(asked) if len(each[0].x) >= 2 * number]
        if len(able) >= FEWEST_TASKS:
            told = [_told(read, head, number, sd, (spread, noise), seed) for seed, read, head, sd in able]
            value, bias = divmod(int(torch.stack(told).mean(0).argmax()), len(BIASES))
            found.append((number, UsualPrior(spread * VALUES[value], spread * BIASES[bias])))
    return best, tuple(found)


def _ridges(reads: Sequence[_Read], sd: Tensor) -> list[Tensor]:
    """Solve a head ``[M, E + 1]`` on all rows for each of several strengths, the strongest without slopes."""
    x, y = (torch.cat(parts) for parts in zip(*reads, strict=True))
    mean, level = x.mean(0), y.mean(0)
    z = (x - mean) / sd
    size, basis = torch.linalg.eigh(z.mT @ z)
    image = basis.mT @ (z.mT @ (y - level))
    heads = []
    for width in (0.0, *RATIO_WIDTHS):
        kept = (size.clamp_min(0.0) + x.shape[-1] / width**2).reciprocal() if width else torch.zeros_like(size)
        slope = (basis @ (kept.unsqueeze(-1) * image)).mT / sd
        heads.append(torch.cat([slope, (level - slope @ mean).unsqueeze(-1)], -1))
    return heads


def _missed(head: Tensor, reads: Sequence[_Read]) -> float:
    """Sum the mean square error of a head over some tasks."""
    return sum(float((apply_head(read.x, head) - read.y).square().mean()) for read in reads)


def _told(read: _Read, head: Tensor, number: int, sd: Tensor, sizes: tuple[float, float], seed: int) -> Tensor:
    """Return the log density of a task's other rows, a value, for each prior ``[len(VALUES) * len(BIASES)]``."""
    generator = torch.Generator().manual_seed(seed)
    missed = read.y - apply_head(read.x, head)
    draws = max(DRAWS, DRAWN // number)
    return torch.stack([_drawn(read.x, missed, number, sd, sizes, generator) for _ in range(draws)]).mean(0)


def _drawn(
    x: Tensor, missed: Tensor, number: int, sd: Tensor, sizes: tuple[float, float], generator: torch.Generator
) -> Tensor:
    spread, noise = sizes
    order = torch.randperm(len(x), generator=generator).to(x.device)
    own, other = order[:number], order[number : number + JUDGED]
    scaling = scaling_under(HeadModel(1, "regression", least_spread=sd, level_spread=True), x[own])
    z, q = (scaling.apply(x[rows]) / math.sqrt(x.shape[-1]) for rows in (own, other))
    slopes = (spread / noise * torch.tensor(VALUES).to(x)).square()[:, None, None, None]
    biases = (spread / noise * torch.tensor(BIASES).to(x)).square()[:, None, None]
    within = slopes * (z @ z.mT) + biases + torch.eye(number).to(x)
    across = slopes * (q @ z.mT) + biases
    gain = torch.linalg.solve(within, across.mT).mT
    variance = noise**2 * (1.0 + slopes[..., 0] * q.square().sum(-1) + biases[..., 0] - (gain * across).sum(-1))
    error = gain @ missed[own] - missed[other]
    density: Tensor = -0.5 * (variance.log().unsqueeze(-1) + error.square() / variance.unsqueeze(-1))
    return density.mean((-2, -1)).flatten().cpu()
