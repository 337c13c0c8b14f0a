"""What a callback is told: the run, and each of its steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import TracebackType
from typing import Any, Self

__all__ = ["Callback", "Run", "Step"]


@dataclass(frozen=True)
class Run:
    """A run that is watched.

    Attributes:
        kind: ``"meta-train"``, ``"adapt"``, ``"tune"``, ``"mcmc"``, or the name that :func:`~pyro_lift.watching.watch`
            was given.
        name: of the task that is adapted to; empty where there is none.
        total: steps in all; None where nobody knows.
        done: of these, made before, by the run that is gone on with.
        settings: plain values.
    """

    kind: str
    name: str = ""
    total: int | None = None
    done: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The kind, and the name where there is one: what a tracker's curves are grouped by."""
        return f"{self.kind}/{self.name}" if self.name else self.kind


@dataclass(frozen=True)
class Step:
    """One step of a run, in plain numbers; NaN for what a method does not have.

    Attributes:
        run: that it belongs to.
        step: steps made, those before a resume counted.
        phase: ``"sgd"`` (joint training), ``"burn-in"`` or ``"sample"`` of a chain; a method's own word otherwise.
        loss: mean of the visited rows, nats a row; of a chain over an unknown program NaN.
        log_likelihood: of the visited tasks' minibatches, scaled to their rows, summed.
        step_size: eta, or the rate.
        grad_norm: Euclidean norm of the gradient.
        clipped: whether the gradient was scaled down.
        acceptance: mean probability with which proposals were taken.
        seconds: since the run began, in this process.
        tasks: that were visited.
    """

    run: Run
    step: int
    phase: str = ""
    loss: float = math.nan
    log_likelihood: float = math.nan
    step_size: float = math.nan
    grad_norm: float = math.nan
    clipped: bool = False
    acceptance: float = math.nan
    seconds: float = math.nan
    tasks: tuple[str, ...] = ()

    def measures(self) -> dict[str, float]:
        """Return the finite numbers by name, for a tracker's curves; whether the gradient was clipped is 0 or 1."""
        values = {
            f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("run", "step", "phase", "tasks")
        }
        return {name: float(value) for name, value in values.items() if math.isfinite(value)}


class Callback:
    """The protocol of callbacks, each of whose methods does nothing until a subclass has one of its own.

    One callback may watch several runs, one after another. It is a context manager, which ends with :meth:`close`.

    Attributes:
        every: steps between two that :meth:`step` is told of; the last step of a run is always told. On an accelerator
            each look waits for the device.

    Example:
        >>> class Loss(Callback):
        ...     every = 100
        ...
        ...     def step(self, step: Step) -> None:
        ...         print(step.phase, step.loss)
    """

    every: int = 1

    def begin(self, run: Run) -> None:
        """Take note of a run that begins, or goes on: ``run.done`` is then above zero."""

    def step(self, step: Step) -> None:
        """Take note of a step."""

    def end(self, run: Run, error: BaseException | None) -> None:
        """Take note of a run's end.

        Args:
            run: that ends.
            error: that ended it; None where it came to its end.
        """

    def close(self) -> None:
        """Let go of files and connections; no run comes after."""

    def __enter__(self) -> Self:
        """Return the callback."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()
