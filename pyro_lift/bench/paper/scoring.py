"""Scores of a cell's predictions: the task's metric, likelihood and calibration, with bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyro_lift.data.text import TextRow
from pyro_lift.inference.adaptation.predict import predict
from pyro_lift.inference.adaptation.temperature import tempered
from pyro_lift.inference.baselines.lora_tuned import TunedPosterior
from pyro_lift.metrics.probabilities import expected_calibration_error, nll, reliability
from pyro_lift.metrics.task import scores
from pyro_lift.models.likelihoods import IGNORED
from pyro_lift.models.task import Rows, Task

__all__ = ["brier", "calibration", "intervals", "judged_rows", "predicted", "scored"]

#: Rows of a prediction's pass: a CPU likes few at a time, and token probabilities are large.
PASS_ROWS = 32
#: Draws of rows that an interval is made of, and the share of them that it holds.
RESAMPLED, HELD = 200, 0.95
#: Bins of a reliability diagram.
BINS = 15


def judged_rows(task: Task, texts: Sequence[TextRow] | None, most: int) -> tuple[Rows, Sequence[TextRow] | None]:
    """Return the rows that a task is judged by, drawn with a fixed seed where there are many; and as strings.

    Raises:
        ValueError: a task without test rows.
    """
    if task.test is None:
        raise ValueError(f"task {task.name!r} has no test rows to be judged by.")
    order = torch.randperm(len(task.test), generator=torch.Generator().manual_seed(0))
    kept = order[:most].sort().values
    return task.test.take(kept), None if texts is None else [texts[k] for k in kept.tolist()]


def predicted(posterior: Any, task: Task, rows: Rows) -> Tensor:
    """Average the predictions over the draws, a draw and a few rows at a time; on the host."""
    if isinstance(posterior, TunedPosterior):
        posterior = posterior.posterior
    if not (hasattr(posterior, "thetas") and hasattr(posterior, "heads")):  # a probe, a ProtoNet
        parts = [posterior.predict(rows.take(slice(k, k + PASS_ROWS))) for k in range(0, len(rows), PASS_ROWS)]
        return torch.cat(parts).cpu()
    size = min(len(rows), PASS_ROWS)
    return predict(posterior.adapter, posterior.thetas, rows, task.kind, heads=posterior.heads, batch_size=size).cpu()


def scored(probabilities: Tensor, rows: Rows, task: Task, texts: Sequence[TextRow] | None) -> dict[str, Any]:
    """Score predictions: what :func:`~pyro_lift.metrics.task.scores` has, pooled ECE, Brier, and a diagram's bins.

    A regression has ``unexplained``, the squared error over the variance around the mean of the task's own rows.
    Classes have ``uniform_nll``, the NLL of the same probability for each of them.
    """
    common: dict[str, Any] = scores(probabilities, rows, task, texts)
    y = rows.target.cpu()
    if task.kind == "regression":
        known = task.train.target.cpu().double()
        spread = (y.double() - known.mean(0)).square().mean()
        return {**common, "unexplained": common["mse"] / float(spread.clamp_min(1e-12))}
    if probabilities.dim() == 2:
        common["uniform_nll"] = math.log(probabilities.shape[-1])
    return {**common, **calibration(*counted(probabilities, y))}


def counted(probabilities: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the predictions that count ``[n, C]`` and their targets ``[n]``: of tokens those that are not padding."""
    p, y = probabilities.cpu(), target.cpu()
    return (p[y != IGNORED], y[y != IGNORED]) if p.dim() == 3 else (p, y)


def calibration(p: Tensor, y: Tensor) -> dict[str, Any]:
    """Compute pooled ECE (BayesDLL's, which the paper cites), Brier, and the bins of a diagram of the top class."""
    cases, confidence, right = reliability(p, y, BINS)
    return {
        # Pooled over a vocabulary nearly all cases are words of no probability: it says nothing there.
        "ece_pooled": expected_calibration_error(p, y, BINS, pooled=True) if p.shape[-1] < 1000 else None,
        "brier": brier(p, y),
        "bins": {
            "cases": [round(x) for x in cases.tolist()],
            "confidence": [round(x, 4) for x in confidence.tolist()],
            "right": [round(x, 4) for x in right.tolist()],
        },
    }


def brier(p: Tensor, y: Tensor) -> float:
    r"""Compute the mean of :math:`\sum_c (p_c - [c = y])^2`, between 0 and 2, for ``[n, C]`` and ``[n]``.

    Written without the one-hot rows, which of a vocabulary would be as large again as the probabilities.
    """
    p = p.double()
    chosen = p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    return float((p.square().sum(-1) - 2.0 * chosen + 1.0).mean())


def intervals(p: Tensor, y: Tensor, seed: int = 0) -> dict[str, list[float]]:
    """Bootstrap 95 % intervals of NLL, both ECEs and Brier over rows, by percentiles.

    Args:
        p: ``[n, C]``.
        y: ``[n]``.
        seed: of the draws of rows; the same for all methods, so that their intervals are of the same rows.
    """
    n = len(y)
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(n, (RESAMPLED, n), generator=generator)
    # How often each row is in each resample: every score is then a product of this with something of the rows.
    share = torch.zeros(RESAMPLED, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones(drawn.shape).double()) / n
    p = p.double()
    chosen = p.gather(-1, y.unsqueeze(-1)).squeeze(-1)
    top, right = p.max(-1)
    every = torch.nn.functional.one_hot(y, p.shape[-1]).double() - p
    found = {
        "nll": share @ -chosen.clamp_min(torch.finfo(torch.float64).tiny).log(),
        "brier": share @ (p.square().sum(-1) - 2.0 * chosen + 1.0),
        "ece": (share @ _gaps(((right == y).double() - top).unsqueeze(-1), top.unsqueeze(-1), up=True)).abs().sum(-1),
        "ece_pooled": (share @ _gaps(every, p, up=False)).abs().sum(-1) / p.shape[-1],
    }
    ends = torch.tensor([0.5 - HELD / 2, 0.5 + HELD / 2], dtype=torch.float64)
    return {name: [round(x, 5) for x in values.quantile(ends).tolist()] for name, values in found.items()}


def _gaps(gap: Tensor, confidence: Tensor, *, up: bool) -> Tensor:
    r"""Sum right minus confidence over a row's cases, by bin: ``[n, bins]``.

    :math:`\sum_b \tfrac{n_b}{n} |\mathrm{acc}_b - \mathrm{conf}_b| = \tfrac1n \sum_b |\sum_{i \in b} (r_i - c_i)|`, so
    these sums are all that a resample's ECE needs.

    Args:
        gap: ``[n, C]``, right (0 or 1) minus confidence.
        confidence: ``[n, C]``.
        up: whether a bin holds its upper end (Guo's) or its lower (BayesDLL's).
    """
    place = (confidence.clamp(0.0, 1.0) * BINS).ceil() - 1.0 if up else (confidence.clamp(0.0, 1.0) * BINS).floor()
    place = place.long().clamp(0, BINS - 1)
    return torch.zeros(len(gap), BINS, dtype=torch.float64).scatter_add_(1, place, gap)


def at_temperature(p: Tensor, y: Tensor, temperature: float) -> dict[str, float]:
    """Score class probabilities at a temperature: NLL, both ECEs and Brier, each with ``_t`` behind its name."""
    q = tempered(p, temperature)
    return {
        "nll_t": nll(q, y),
        "ece_t": expected_calibration_error(q, y, BINS),
        "ece_pooled_t": expected_calibration_error(q, y, BINS, pooled=True),
        "brier_t": brier(q, y),
    }
