"""Draws judged by a task's development rows: by its metric, of what they write where they write."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pyro_lift.generation.decode import generate
from pyro_lift.inference.adaptation.early_stopping import DrawWindows, Verdict
from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.metrics.task import scores
from pyro_lift.metrics.text import METRICS, score
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task
from pyro_lift.settings import AdaptSettings

__all__ = ["development_verdict", "windows_of"]

#: Development rows that are looked at, evenly over a task: each look at them costs a pass, or a text for each.
MOST_ROWS = 32


def development_verdict(
    adapter: RandomAdapter, task: Task, thetas: Tensor, heads: Tensor | None = None, *, noise_scale: float = 1.0
) -> Verdict:
    """Judge some draws by a task's development rows, 32 of them at most.

    A task of written answers with a metric of strings is judged by what the draws' mean writes, greedily and to twice
    the length of the longest development answer; other tasks by the metric of the averaged probabilities, or by the
    log likelihood alone where there is none.

    Args:
        adapter: the network as a function of theta.
        task: with development rows.
        thetas: draws ``[S, D]``.
        heads: of the task's own head ``[S, C, E + 1]``, or None.
        noise_scale: standard deviation of the noise in regression.

    Raises:
        ValueError: a task without development rows.
    """
    if task.dev is None:
        raise ValueError(f"task {task.name!r} has no development rows to be judged by.")
    count = len(task.dev)
    kept = torch.arange(min(count, MOST_ROWS)) * count // min(count, MOST_ROWS)
    rows = task.dev.take(kept.to(task.dev.target.device)).to(adapter.initial.device)
    measured = scores(predict(adapter, thetas, rows, task.kind, heads=heads, batch_size=32), rows, task)
    if task.kind == "regression":
        return Verdict(0.0, -measured["mse"] / (2.0 * noise_scale**2))
    likelihood = -measured["nll"]
    if task.kind == "tokens" and task.encoding is not None and task.metric in METRICS:
        return Verdict(_written(adapter, task, thetas, rows, kept.tolist()), likelihood)
    return Verdict(measured.get("score", 0.0), likelihood)


def windows_of(
    adapter: RandomAdapter,
    task: Task,
    a: AdaptSettings,
    solve: Callable[[Tensor], Tensor] | None = None,
    noise_scale: float = 1.0,
) -> DrawWindows | None:
    """Cut a task's chain into windows that its development rows judge; None where they are not looked at.

    Args:
        adapter: the network as a function of theta.
        task: with or without development rows.
        a: the settings of adaptation.
        solve: solves the task's own head at draws ``[S, D]``; None where there is none, or where it is drawn.
        noise_scale: standard deviation of the noise in regression.
    """
    if not a.dev_every or task.dev is None:
        return None

    def judge(window: dict[str, Tensor]) -> Verdict:
        heads = window.get("head") if solve is None else solve(window["theta"])
        return development_verdict(adapter, task, window["theta"], heads, noise_scale=noise_scale)

    return DrawWindows(a.steps, a.draws, a.dev_every, a.patience, judge)


def _written(adapter: RandomAdapter, task: Task, thetas: Tensor, rows: Rows, kept: list[int]) -> float:
    """Score what the mean of the draws writes against the accepted answers."""
    longest = int((rows.target != IGNORED).sum(-1).max())
    tokens = generate(adapter, thetas.mean(0, keepdim=True), rows, max_new_tokens=2 * longest)
    if task.dev_answers is not None:
        accepted = [list(task.dev_answers[k]) for k in kept]
    else:  # of tensors alone the learnt answer is known
        accepted = [[task.encoding.decode(row[row != IGNORED].unsqueeze(0))[0]] for row in rows.target]
    return score(task.metric or "EM", task.encoding.decode(tokens), accepted)
