"""A chain that ends where held-out tasks no longer gain: looks at them every so many draws, and the best one kept.

At every look each held-out task is adapted to on its training rows, under the prior as it stands, and scored by the
mean log probability of rows that it did not see: the score of all tuning here. A look that is better than all before it
is kept, and after some looks without a better one the chain ends. What it leaves is what was kept, not where it ended.

A run that is stopped and gone on with has its looks in its folder: it makes none of them twice, and ends where it would
have ended.
"""

from __future__ import annotations

import copy
import logging
import shutil
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from pyro_lift.inference.baselines.protocol import Posterior
from pyro_lift.inference.checkpoint.folder import ARCHITECTURE, jsonable
from pyro_lift.inference.checkpoint.session import Savable, Session
from pyro_lift.models.task import Task
from pyro_lift.support.archive import (
    DamagedError,
    check_sealed,
    new_folder,
    pack,
    read_json,
    read_tensors,
    sealed,
    unpack,
    write_json,
    write_tensors,
)
from pyro_lift.tuning.held_out import dealt, judged, that_can_be_judged
from pyro_lift.tuning.search import MOST_ROWS, PARTS, scored

__all__ = ["HeldOutLooks", "Look", "mean_loss", "with_held_out"]

log = logging.getLogger("pyro_lift")

#: What a chain has seen so far, and can be brought back to.
S = TypeVar("S", bound=Savable)


class Look(NamedTuple):
    """A look at the held-out tasks: the draws made before it, and their mean loss."""

    draws: int
    loss: float


def with_held_out(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Return the tasks that a chain learns from, and the fifth that it is judged by, dealt evenly over the list.

    Raises:
        ValueError: fewer than three tasks.
    """
    fit = that_can_be_judged(tasks, "learned from, and not held out")
    if len(fit) < 3:
        raise ValueError(
            f"{len(fit)} tasks: to stop where held-out tasks no longer gain takes three or more. Leave stop_every at 0."
        )
    held_out = dealt(fit, min(PARTS, len(fit)))[0]
    names = {task.name for task in held_out}
    return [task for task in tasks if task.name not in names], [judged(task, MOST_ROWS) for task in held_out]


def mean_loss(posteriors: Sequence[Posterior], tasks: Sequence[Task]) -> float:
    """Average the tasks' loss on the rows that adaptation did not see: NLL in nats, or the mean squared error."""
    return statistics.fmean(scored(post, task)[0]["nll"] for post, task in zip(posteriors, tasks, strict=True))


#: What is kept of a chain: its summary, and what adaptation needs beside it.
Seen = tuple[S, dict[str, Tensor]]


class HeldOutLooks(Generic[S]):
    """The looks of one chain.

    Args:
        seen: summary and moments of the chain as it goes, asked for at every look.
        loss: of the held-out tasks under such a summary and moments.
        every: draws between two looks; 0: none is made.
        patience: looks without a better one, after which the chain ends.
        session: of a run that is saved as it goes, whose folder the looks are kept in; those of another run are not
            taken for its own.
    """

    def __init__(
        self,
        seen: Callable[[], Seen[S]],
        loss: Callable[[S, dict[str, Tensor]], float],
        *,
        every: int,
        patience: int,
        session: Session | None = None,
    ) -> None:
        self._seen, self._loss, self.every, self.patience = seen, loss, every, patience
        self.folder = None if session is None or not every else session.folder
        told = {} if session is None else session.config
        # A network's description may have more or fewer names under another version of a library; the session compares.
        self._config = jsonable({name: value for name, value in told.items() if name != ARCHITECTURE})
        self.looks: list[Look] = []
        self.best: Seen[S] | None = None
        self._kept: dict[str, Any] | None = self._read()
        if self._kept is not None:
            self.looks = [Look(int(draws), float(loss)) for draws, loss in self._kept["looks"]]

    def ends(self, draws: int) -> bool:
        """Look where it is time to, and tell whether the chain ends after so many draws."""
        if draws % self.every:
            return False
        if draws not in {look.draws for look in self.looks}:
            self._look(draws)
        since = [look for look in self.looks if look.draws <= draws]
        best = min(range(len(since)), key=lambda k: since[k].loss)
        return len(since) - 1 - best >= self.patience

    @property
    def best_look(self) -> Look | None:
        """The look with the lowest loss, the earlier of equals; None before the first."""
        return min(self.looks, key=lambda look: look.loss) if self.looks else None

    def results(self) -> dict[str, float]:
        """Return the best look, for the record; nothing where none was made."""
        best = self.best_look
        return {} if best is None else {"draws": float(best.draws), "held-out loss": best.loss}

    def kept(self) -> Seen[S] | None:
        """Return the summary and the moments at the best look; None where there was none."""
        if self.best is None and self._kept is not None:
            summary, moments = self._seen()
            summary = copy.deepcopy(summary)
            summary.load_state_dict(self._kept["summary"])
            self.best = summary, {name: self._kept["moments"][name].to(value) for name, value in moments.items()}
        return self.best

    def _look(self, draws: int) -> None:
        summary, moments = self._seen()
        summary, moments = copy.deepcopy(summary), {name: value.clone() for name, value in moments.items()}
        before = self.best_look
        look = Look(draws, self._loss(summary, moments))
        self.looks.append(look)
        log.info("after %d draws held-out tasks have a loss of %.4f", *look)
        if before is None or look.loss < before.loss:
            self.best = summary, moments
        self._write()

    def _write(self) -> None:
        if self.folder is None:
            return
        place, best = self.folder / "looks", self.kept()
        assert best is not None
        tensors: dict[str, Tensor] = {}
        tree = pack({"summary": best[0].state_dict(), "moments": best[1]}, tensors)
        self.folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(place, ignore_errors=True)
        with new_folder(place) as new:
            record = write_tensors(new / "best.safetensors", tensors)
            data = {"config": self._config, "looks": [list(look) for look in self.looks], "file": record, "tree": tree}
            write_json(new / "looks.json", sealed(jsonable(data)))

    def _read(self) -> dict[str, Any] | None:
        path = None if self.folder is None else self.folder / "looks" / "looks.json"
        if path is None or not path.is_file():
            return None
        try:
            data = read_json(path)
            check_sealed(path, data)
            if data["config"] != self._config:
                return None
            tensors = read_tensors(path.with_name("best.safetensors"), data["file"])
            return {"looks": data["looks"], **unpack(data["tree"], tensors)}
        except DamagedError as error:
            log.warning("%s; held-out tasks are looked at anew", error)
            return None
