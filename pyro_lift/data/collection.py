"""What ``load_tasks`` returns: tasks to meta-train on, to tune on and to be judged by, and what could not be had."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from pyro_lift.data.images import ImageTask
from pyro_lift.data.text import TextTask
from pyro_lift.models.task import Task, check_task_names

__all__ = ["TaskCollection"]

T = TypeVar("T", bound=TextTask | ImageTask | Task)
U = TypeVar("U", bound=TextTask | ImageTask | Task)


@dataclass(frozen=True)
class TaskCollection(Generic[T]):
    """The tasks of one split of a benchmark.

    Attributes:
        name: of the benchmark and its split.
        train: to meta-train on.
        dev: to tune on; empty where the benchmark has none.
        test: to be judged by.
        missing: names that belong to the split and could not be had, by part; nothing is dropped in silence.
        notes: whatever else a reader of the results must know.

    Raises:
        ValueError: two tasks of one name in a part.
    """

    name: str
    train: tuple[T, ...] = ()
    dev: tuple[T, ...] = ()
    test: tuple[T, ...] = ()
    missing: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        # A task may be in two parts, as CrossFit's NLI has it; within one its name is all that tells it from others.
        for part, tasks in self.parts.items():
            check_task_names(tasks, f"{self.name}, {part}")

    def __iter__(self) -> Iterator[T]:
        """All tasks: train, dev, test."""
        return iter((*self.train, *self.dev, *self.test))

    @property
    def parts(self) -> dict[str, tuple[T, ...]]:
        """The tasks by the name of their part."""
        return {"train": self.train, "dev": self.dev, "test": self.test}

    def __getitem__(self, name: str) -> T:
        """A task by its name."""
        for task in self:
            if task.name == name:
                return task
        raise KeyError(f"{name!r} is not in {self.name}; it has {', '.join(task.name for task in self)}.")

    def encode(self, encoder: Callable[[T], U]) -> TaskCollection[U]:
        """Encode every task that is not of tensors, such as by :class:`pyro_lift.data.encode.LabelMatching`."""
        parts = {
            part: tuple(task if isinstance(task, Task) else encoder(task) for task in tasks)
            for part, tasks in self.parts.items()
        }
        notes = (*self.notes, *getattr(encoder, "notes", ()))
        return replace(self, **parts, notes=notes)  # type: ignore[return-value, arg-type]

    def summary(self) -> str:
        """One line a part, with what is missing by name, then the notes."""
        lines = [self.name]
        for part, tasks in self.parts.items():
            missing = self.missing.get(part, ())
            if not tasks and not missing:
                continue
            line = f"  {part:5s} {len(tasks)} of {len(tasks) + len(missing)} tasks"
            lines.append(line + (f"; missing: {', '.join(missing)}" if missing else ""))
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])
