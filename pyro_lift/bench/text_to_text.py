"""Text to text: a comparison's methods judged by what they write, as in the paper's tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from pyro_lift.data.text import TextRow
from pyro_lift.generation.decode import generate
from pyro_lift.generation.scoring import score_texts
from pyro_lift.inference.baselines.lora_tuned import TunedPosterior
from pyro_lift.metrics.text import METRICS, score
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_literal, check_number

__all__ = ["Answers", "WritingSettings", "written_scores"]

Answers = Literal["generate", "score"]


@dataclass(frozen=True)
class WritingSettings:
    """How answers are written and judged; the defaults are the paper's."""

    answers: Answers = field(
        default="generate", metadata={"help": "generate all answers, or score the options where there are some"}
    )
    which: Literal["mean", "draws"] = field(
        default="mean", metadata={"help": "the mean of the networks writes, or their averaged probabilities"}
    )
    beams: int = field(default=4, metadata={"help": "of the search; 1 is greedy"})
    max_new_tokens: int = field(default=64, metadata={"help": "longest answer"})
    batch_size: int = field(default=16, metadata={"help": "rows of one call"})

    def __post_init__(self) -> None:
        check_literal("answers", self.answers, Answers)
        check_literal("which", self.which, Literal["mean", "draws"])
        for name in ("beams", "max_new_tokens", "batch_size"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)


def written_scores(
    posterior: Any, task: Task, rows: Rows, texts: Sequence[TextRow], settings: WritingSettings
) -> dict[str, float]:
    """Score the strings that a method writes for some rows by the task's metric.

    Args:
        posterior: with ``adapter`` and ``thetas`` ``[S, D]``, or a tuned LoRA's, which has one inside.
        task: encoded for a model that writes.
        rows: to be judged by.
        texts: the same rows as strings, for their accepted answers and options.
        settings: how they are written.

    Returns:
        ``score`` by the task's metric, and ``empty``, the share of rows for which nothing was written.

    Raises:
        ValueError: a metric that compares no strings.
    """
    if task.metric not in METRICS:
        raise ValueError(f"task {task.name!r}: the metric {task.metric!r} compares no strings.")
    if isinstance(posterior, TunedPosterior):
        posterior = posterior.posterior
    thetas = posterior.thetas.mean(0, keepdim=True) if settings.which == "mean" else posterior.thetas
    labels = task.encoding.labels
    if settings.answers == "score" and all(row.options or labels for row in texts):
        predictions = [_best_option(posterior, thetas, task, row, row.options or labels) for row in texts]
    else:
        tokens = generate(
            posterior.adapter,
            thetas,
            rows,
            batch_size=settings.batch_size,
            num_beams=settings.beams,
            max_new_tokens=settings.max_new_tokens,
        )
        predictions = task.encoding.decode(tokens)
    empty = sum(not text for text in predictions) / len(predictions)
    return {"score": score(task.metric, predictions, [list(row.outputs) for row in texts]), "empty": empty}


def _best_option(posterior: Any, thetas: torch.Tensor, task: Task, row: TextRow, options: Sequence[str]) -> str:
    """Return the option whose text is most probable."""
    given = [row.input] * len(options)
    scores = score_texts(posterior.adapter, thetas, given, list(options), task.encoding)
    return options[int(scores.log_prob.argmax())]
