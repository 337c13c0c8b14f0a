"""Trackers through their own interfaces: TensorBoard, Weights & Biases, trackio and MLflow. None is a dependency.

Curves are grouped by the run's title: ``meta-train/loss``, ``adapt/NAME/loss``.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pyro_lift.support.options import check_number
from pyro_lift.watching.steps import Callback, Run, Step

__all__ = ["MLflow", "TensorBoard", "Trackio", "WandB"]

#: Steps between two that a tracker is told of, unless said otherwise.
EVERY = 10


def _library(name: str, package: str) -> Any:
    """Import a tracker's library.

    Raises:
        ImportError: it is not installed; says how it is.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} cannot be imported ({error}): pip install {package}.") from error


class _Tracker(Callback):
    def __init__(self, every: int) -> None:
        check_number("every", every, least=1, open_below=False, whole=True)
        self.every = every

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"


def _settings(run: Run) -> dict[str, Any]:
    """Return a run's settings, each by the run's title, as values that every tracker takes."""
    plain = (str, int, float, bool)
    return {f"{run.title}/{k}": v if isinstance(v, plain) else str(v) for k, v in run.settings.items()}


class TensorBoard(_Tracker):
    """Event files for TensorBoard, through ``torch.utils.tensorboard``.

    A run that goes on from a checkpoint appends; the steps that it makes again are purged, as TensorBoard has it.

    Args:
        folder: of the event files.
        every: steps between two points of a curve.

    Raises:
        ImportError: tensorboard is not installed.
    """

    def __init__(self, folder: str | Path, every: int = EVERY) -> None:
        super().__init__(every)
        self.folder = Path(folder)
        self._library = _library("torch.utils.tensorboard", "tensorboard")
        self._writer: Any = None

    def begin(self, run: Run) -> None:
        """Open an event file, and write the run's settings as a text."""
        purge = {"purge_step": run.done + 1} if run.done else {}
        self._writer = self._library.SummaryWriter(str(self.folder), **purge)
        if run.settings:
            table = "\n".join(f"    {name} = {value}" for name, value in run.settings.items())
            self._writer.add_text(f"{run.title}/settings", table, run.done)

    def step(self, step: Step) -> None:
        """Write a point of every curve."""
        for name, value in step.measures().items():
            self._writer.add_scalar(f"{step.run.title}/{name}", value, step.step)

    def end(self, run: Run, error: BaseException | None) -> None:
        """Close the event file."""
        del run, error
        self.close()

    def close(self) -> None:
        """Close the event file."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class WandB(_Tracker):
    """A run of Weights & Biases; several runs of ours, such as a meta-training and adaptations, are one of its.

    Every curve has a step of its own (``meta-train/step``), since W&B's counts upwards only.

    Args:
        project: of W&B.
        every: steps between two points of a curve.
        options: of ``wandb.init``, such as ``name``, ``mode="offline"``, or ``id`` and ``resume`` to append.

    Raises:
        ImportError: wandb is not installed.
    """

    def __init__(self, project: str, every: int = EVERY, **options: Any) -> None:
        super().__init__(every)
        self.project, self.options = project, options
        self._library = _library("wandb", "wandb")
        self._run: Any = None
        self._defined: set[str] = set()

    def begin(self, run: Run) -> None:
        """Begin W&B's run, if it has not begun, and give it the settings."""
        if self._run is None:
            self._run = self._library.init(project=self.project, **self.options)
        self._run.config.update(_settings(run), allow_val_change=True)
        if run.title not in self._defined:
            self._defined.add(run.title)
            self._run.define_metric(f"{run.title}/*", step_metric=f"{run.title}/step")

    def step(self, step: Step) -> None:
        """Log the step's measures."""
        self._run.log(_with_step(step))

    def close(self) -> None:
        """Finish W&B's run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
            self._defined.clear()


class Trackio(_Tracker):
    """A run of trackio.

    Args:
        project: of trackio.
        every: steps between two points of a curve.
        options: of ``trackio.init``, such as ``name``, ``space_id``, or ``resume`` to append.

    Raises:
        ImportError: trackio is not installed.
    """

    def __init__(self, project: str, every: int = EVERY, **options: Any) -> None:
        super().__init__(every)
        self.project, self.options = project, options
        self._library = _library("trackio", "trackio")
        self._begun = False

    def begin(self, run: Run) -> None:
        """Begin trackio's run, with the settings of the first run of ours."""
        if not self._begun:
            self._library.init(project=self.project, **{"config": _settings(run), **self.options})
            self._begun = True

    def step(self, step: Step) -> None:
        """Log the step's measures."""
        self._library.log(_with_step(step))

    def close(self) -> None:
        """Finish trackio's run."""
        if self._begun:
            self._library.finish()
            self._begun = False


class MLflow(_Tracker):
    """A run of MLflow: the one that is active, or one that is begun for it.

    Args:
        every: steps between two points of a curve.
        options: of ``mlflow.start_run``, such as ``run_name``, ``experiment_id``, or ``run_id`` to append.

    Raises:
        ImportError: mlflow is not installed.
    """

    def __init__(self, every: int = EVERY, **options: Any) -> None:
        super().__init__(every)
        self.options = options
        self._library = _library("mlflow", "mlflow")
        self._begun = False

    def begin(self, run: Run) -> None:
        """Begin MLflow's run where none is active, and log the settings as its parameters."""
        if self._library.active_run() is None:
            self._library.start_run(**self.options)
            self._begun = True
        if run.settings and not run.done:  # MLflow's parameters are written once
            self._library.log_params({_mlflow_name(name): value for name, value in _settings(run).items()})

    def step(self, step: Step) -> None:
        """Log the step's measures."""
        measures = {_mlflow_name(f"{step.run.title}/{name}"): value for name, value in step.measures().items()}
        self._library.log_metrics(measures, step=step.step)

    def close(self) -> None:
        """End the run that was begun here; a caller's stays open."""
        if self._begun:
            self._library.end_run()
            self._begun = False


def _with_step(step: Step) -> Mapping[str, float]:
    title = step.run.title
    return {f"{title}/step": step.step, **{f"{title}/{name}": value for name, value in step.measures().items()}}


def _mlflow_name(name: str) -> str:
    """Replace what MLflow allows in no name: it has letters, digits and ``_-. /``."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)
