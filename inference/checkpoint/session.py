"""Checkpoints of a chain: everything that its next transition depends on, so that a killed run goes on to the bit.

A checkpoint is a folder ``step-000001200`` with ``state.json`` (plain data, and the checksums of the other files) and
safetensors: the kernel's state and generators, the summaries of the draws, the tasks' weights, the stored gradients.
It is written under another name, flushed and renamed, so that there is never half a checkpoint; the last two are kept.
Draws go into files that are never written again: the next checkpoint links to them.

Global random streams (torch, NumPy, Python) are part of it, at two moments: now, and before the run was set up. A
resumed run is set up once more from the latter, so that whatever set-up draws or measures comes out the same.

Processes that share a chain write one checkpoint together, into a folder that all of them see: each the rows of its own
tasks, process 0 everything else. It counts when all of them are done, and any number of processes can go on from it.
"""

from __future__ import annotations

import logging
import shutil
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from pyro_lift.inference.checkpoint.beginning import check_folder, say_beginning
from pyro_lift.inference.checkpoint.folder import (
    DIGESTS,
    FORMAT,
    MANY,
    SavableRows,
    check_config,
    checkpoints_in,
    jsonable,
    link_or_copy,
    read_verified,
    write_rows,
)
from pyro_lift.inference.checkpoint.random_state import random_state, set_random_state
from pyro_lift.inference.checkpoint.signals import Handlers, RunStopped, handled, restore
from pyro_lift.inference.checkpoint.summaries import T, load_statistics, moved, statistics_state
from pyro_lift.support import distributed
from pyro_lift.support.archive import (
    DamagedError,
    new_folder,
    pack,
    read_tensors,
    reason_of_failure,
    sealed,
    unfinished,
    unpack,
    versions,
    write_json,
    write_tensors,
)
from pyro_lift.support.folder_lock import FolderInUseError, only_run_in
from pyro_lift.support.options import check_number, renamed_keywords

__all__ = ["Savable", "Session"]


log = logging.getLogger("pyro_lift")

KEEP = 2


class SavableKernel(Protocol):
    """A kernel that can be saved."""

    @property
    def distributed(self) -> bool:
        """Whether several processes share the chain."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, nested."""
        ...

    def load_state_dict(self, tree: dict[str, Any]) -> None:
        """The inverse, after set-up."""
        ...

    def rows(self) -> dict[str, SavableRows]:
        """What is too large for the state, by name."""
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Plain data that must be the same for the chain to be the same."""
        ...


class Savable(Protocol):
    """What follows a chain, and is saved with it."""

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain data, nested."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        ...


@renamed_keywords(way_on="resume_hint")
class Session:
    """One run and its folder of checkpoints.

    Args:
        folder: of the checkpoints.
        every: transitions between two of them; one more is written at the end and at a stop.
        resume: go on with the newest intact checkpoint, or begin where there is none. Without it, a folder that holds
            checkpoints is refused.
        config: plain data that must be the same when the run goes on.
        upgrade: brings such data of an earlier version up to date before it is compared.
        resume_hint: the command or call that goes on with the run, told to the user when it stops.

    Attributes:
        transitions: made so far.
        draws: of those, after the warm-up.
        beside: what follows the chain, by name: saved with it, and brought back to where it was with it. What a run of
            before this was did not save begins anew.

    Raises:
        ValueError: a folder that holds another run, or nothing but damaged checkpoints, or is a checkpoint itself.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every: int = 1000,
        resume: bool = False,
        config: Mapping[str, Any] | None = None,
        resume_hint: str | None = None,
        upgrade: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ) -> None:
        check_number("checkpoint_every", every, least=1, open_below=False, whole=True)
        self.folder, self.every = Path(folder), every
        self.config, self._upgrade = jsonable(dict(config or {})), upgrade
        self.resume_hint = resume_hint or f"run(resume={str(self.folder)!r})"
        self.transitions = self.draws = 0
        self.beside: dict[str, Savable] = {}
        self._start: dict[str, Any] = {}
        self._found: tuple[Path, dict[str, Any]] | None = None
        self._old_draws: dict[str, Any] = {}
        self._previous: Path | None = None
        self._signal: int | None = None
        self._shared = False
        check_folder(self.folder)
        checkpoints = checkpoints_in(self.folder)
        self._newest = checkpoints[-1] if checkpoints else None
        self._holders = 0
        if checkpoints and not resume:
            raise ValueError(
                f"{self.folder}: holds a run already, saved at {checkpoints[-1].name}. Go on with {self.resume_hint}, "
                "or give another folder."
            )
        if resume:
            self._find(checkpoints)

    def _find(self, checkpoints: list[Path]) -> None:
        for path in reversed(checkpoints):
            try:
                state = read_verified(path)
            except DamagedError as error:
                log.warning("%s; trying the checkpoint before it", error)
                damage = error
                continue
            self._found, self._previous = (path, state), path
            self.transitions, self.draws = state["transitions"], state["draws"]
            saved = state["config"] if self._upgrade is None else self._upgrade(state["config"])
            for name in DIGESTS:
                if name not in saved:  # nor is it in what was kept of the run beside its chain
                    self.config.pop(name, None)
            check_config(path / "state.json", saved, self.config)
            log.info("going on with %s", path)
            return
        if checkpoints:
            raise DamagedError(
                f"{self.folder}: none of its {len(checkpoints)} checkpoints is intact. The oldest: {damage}"
            )
        if distributed.is_first():
            say_beginning(self.folder)

    def begin_again(self) -> None:
        """Forget the chain so far, its checkpoints too; what was found before it stays."""
        for path in checkpoints_in(self.folder):
            shutil.rmtree(path)
        self.transitions = self.draws = 0
        self._start, self._old_draws, self._found = {}, {}, None
        self._newest = self._previous = None

    @contextmanager
    def alone(self, *, shared: bool = False) -> Iterator[None]:
        """Keep other runs out of the folder; a part of the same run may enter again.

        Args:
            shared: whether several processes share the run; see :func:`~pyro_lift.support.folder_lock.only_run_in`.

        Raises:
            FolderInUseError: another run works in the folder, or has since this one looked into it.
        """
        with only_run_in(self.folder, shared=shared) if self._holders == 0 else nullcontext():
            if self._holders == 0 and not (shared and not distributed.is_first()):
                newest = next(reversed(checkpoints_in(self.folder)), None)
                if newest != self._newest:
                    raise FolderInUseError(
                        f"{self.folder}: another run has saved itself here in the meantime"
                        f"{'' if newest is None else f', as {newest.name}'}. Go on with {self.resume_hint}, or give "
                        "another folder."
                    )
            self._holders += 1
            try:
                yield
            finally:
                self._holders -= 1

    # -------------------------------------------------------------------------------------------- setting up

    def before_setup(self) -> None:
        """Put the global random streams where they were before the run was first set up, or note where they are."""
        if self._found is None:
            self._start = random_state()
            return
        self._start = self._tree()["random_start"]
        set_random_state(self._start)

    @property
    def saved_fingerprint(self) -> dict[str, Any]:
        """What the saved run was; empty where the run begins."""
        return {} if self._found is None else dict(self._tree()["fingerprint"])

    def after_setup(self, kernel: SavableKernel, statistics: Any, device: torch.device) -> None:
        """Load the checkpoint into a kernel that has been set up, and into the statistics.

        Raises:
            ValueError: the run is another than the one that was saved; names the difference.
        """
        self._shared = kernel.distributed
        if self._shared and len(set(transitions := distributed.collected(self.transitions))) > 1:
            raise ValueError(
                f"{self.folder}: the processes of this run found it saved at transitions {transitions}. Give all of "
                "them one folder that all of them see."
            )
        if self._found is None:
            return
        path, state = self._found
        tree = self._tree()
        check_config(path / "state.json", tree["fingerprint"], jsonable(kernel.fingerprint()))
        kernel.load_state_dict(tree["kernel"])
        for name, rows in kernel.rows().items():
            for file, record in state["files"].items():
                if file.startswith(f"{name}-"):
                    tensors = read_tensors(path / file, record, device)
                    rows.write([int(task) for task in tensors], list(tensors.values()))
        if statistics is not None:
            load_statistics(statistics, moved(tree["statistics"], device))
        for name, saved in tree.get("beside", {}).items():
            if name in self.beside:
                self.beside[name].load_state_dict(saved)
        self._old_draws = {file: record for file, record in state["files"].items() if file.startswith("draws-")}
        set_random_state(tree["random"])

    def _tree(self) -> dict[str, Any]:
        assert self._found is not None
        path, state = self._found
        tensors = read_tensors(path / "state.safetensors", state["files"].get("state.safetensors"))
        try:
            tree: dict[str, Any] = unpack(state["tree"], tensors)
        except KeyError as error:
            raise DamagedError(f"{path / 'state.safetensors'}: tensor {error} is missing.") from error
        return tree

    def stored_draws(self) -> list[Tensor]:
        """The draws that the checkpoint holds, in order."""
        if self._found is None:
            return []
        path = self._found[0]
        parts = [read_tensors(path / file, record)["draws"] for file, record in sorted(self._old_draws.items())]
        return list(torch.cat(parts)) if parts else []

    # ------------------------------------------------------------------------------------------------ saving

    def after(self, kernel: SavableKernel, statistics: Any, draws: list[Tensor], *, drawn: bool, last: bool) -> None:
        """Count a transition; save where one is due, and at the end; stop where a signal asked for it.

        Args:
            kernel: after the transition.
            statistics: with the draw in them, or None.
            draws: flat draws since the last checkpoint; emptied when they are saved.
            drawn: whether the transition was a draw.
            last: whether it was the last one.

        Raises:
            OSError: a full disk; the last checkpoint is intact. Not after the last transition: the run is complete.
            RunStopped: after a signal.
        """
        self.transitions += 1
        self.draws += int(drawn)
        if self._shared:  # a signal to one process stops all of them
            self._signal = max(distributed.collected(self._signal or 0)) or None
        if last:
            self._save_last(kernel, statistics, draws)
        elif self._signal is not None or self.transitions % self.every == 0:
            self.save(kernel, statistics, draws)
        if self._signal is not None and not last:
            name = signal.Signals(self._signal).name
            raise RunStopped(
                f"stopped by {name} after {self.transitions} transitions; saved in {self.folder}. "
                f"Go on with {self.resume_hint}.",
                self._signal,
            )

    def _save_last(self, kernel: SavableKernel, statistics: Any, draws: list[Tensor]) -> None:
        """Write the checkpoint of a run that is complete; that it cannot be written takes nothing from the result."""
        try:
            self.save(kernel, statistics, draws)
        except OSError as error:
            log.warning(
                "%s: the checkpoint after the last transition could not be written (%s). The run is complete, and its "
                "result in memory.", self.folder, reason_of_failure(error),
            )  # fmt: skip

    def save(self, kernel: SavableKernel, statistics: Any, draws: list[Tensor]) -> None:
        """Write a checkpoint now."""
        path = self.folder / f"step-{self.transitions:09d}"
        if path.exists():
            return
        try:
            held = self._write(path, kernel, statistics, draws)
        except OSError as error:
            kept = self._previous.name if self._previous else "none yet"
            if isinstance(error, FileNotFoundError) and (self._previous is None or not self._previous.exists()):
                raise OSError(
                    error.errno,
                    f"{self.folder}: the folder was taken away while the run wrote into it, as another run of the same "
                    "folder does that has finished. Look there for its prior, and begin anew in another folder",
                ) from error
            raise OSError(
                error.errno,
                f"{self.folder}: the checkpoint at transition {self.transitions} could not be written "
                f"({error.strerror or error}). The last one is intact: {kept}. Make room, then go on with "
                f"{self.resume_hint}",
            ) from error
        draws.clear()
        self._previous, self._newest, self._old_draws = path, path, held
        for old in checkpoints_in(self.folder)[:-KEEP] if self._is_first else []:
            shutil.rmtree(old, ignore_errors=True)

    @property
    def _is_first(self) -> bool:
        return not self._shared or distributed.is_first()

    def _in_step(self, work: Callable[[], T]) -> list[T]:
        return distributed.in_step(work) if self._shared else [work()]

    def _write(self, path: Path, kernel: SavableKernel, statistics: Any, draws: list[Tensor]) -> dict[str, Any]:
        """Write every file; returns the records of those that hold draws."""
        new = unfinished(path)
        tensors: dict[str, Tensor] = {}
        tree = pack(
            {
                "kernel": kernel.state_dict(),
                "fingerprint": jsonable(kernel.fingerprint()),
                "statistics": None if statistics is None else statistics_state(statistics),
                "random": random_state(),
                "random_start": self._start,
                "beside": {name: one.state_dict() for name, one in self.beside.items()},
            },
            tensors,
        )

        def begin() -> None:
            if self._is_first:
                self.folder.mkdir(parents=True, exist_ok=True)
                for stale in self.folder.glob(".step-*.new"):  # of a run that was killed while it wrote
                    shutil.rmtree(stale, ignore_errors=True)
                stack.enter_context(new_folder(path))

        def fill() -> dict[str, Any]:
            files = {}
            if self._is_first:
                files["state.safetensors"] = write_tensors(new / "state.safetensors", tensors)
            number = distributed.process()[0] if self._shared else 0
            for name, rows in kernel.rows().items():
                files |= write_rows(new, f"{name}-{number:03d}" if number else name, rows)
            return files | (self._write_draws(new, draws) if self._is_first else {})

        def finish() -> None:
            if self._is_first:
                state = {
                    "format": "pyro_lift.checkpoint",
                    "format_version": FORMAT,
                    "versions": versions(),
                    "transitions": self.transitions,
                    "draws": self.draws,
                    "config": self.config,
                    "tree": tree,
                    "files": files,
                }
                write_json(new / "state.json", sealed(state))
                stack.close()

        with ExitStack() as stack:
            self._in_step(begin)
            files = {file: record for part in self._in_step(fill) for file, record in part.items()}
            self._in_step(finish)
        return {file: record for file, record in files.items() if file.startswith("draws-")}

    def _write_draws(self, new: Path, draws: list[Tensor]) -> dict[str, Any]:
        old = dict(self._old_draws)
        if len(old) >= MANY:
            assert self._previous is not None
            parts = [read_tensors(self._previous / file, record)["draws"] for file, record in sorted(old.items())]
            first = min(old)
            old = {first: write_tensors(new / first, {"draws": torch.cat(parts)})}
        else:
            for file in old:
                assert self._previous is not None
                link_or_copy(self._previous / file, new / file)
        if draws:
            file = f"draws-{self.draws - len(draws):09d}.safetensors"
            old[file] = write_tensors(new / file, {"draws": torch.stack(draws)})
        return old

    # ----------------------------------------------------------------------------------------------- signals

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Let SIGTERM and Ctrl-C wait for the end of the transition; the second one does not wait."""

        def note(number: int, before: Handlers) -> None:
            self._signal = number
            log.warning("%s: finishing the transition and saving", signal.Signals(number).name)
            restore(before)

        with handled(note):
            yield

    @property
    def _holds_something(self) -> bool:
        """Whether the folder has a checkpoint, or a finished piece of what a run does before its chain."""
        return bool(checkpoints_in(self.folder)) or any(self.folder.glob("*/work.json"))

    def signals_around_chain(self) -> AbstractContextManager[None]:
        """Let SIGTERM and Ctrl-C end the work around the chain at once; pieces of it that were finished are kept.

        Raises:
            RunStopped: after a signal.
        """

        def stop(number: int, before: Handlers) -> None:
            del before
            kept = f"what was finished is kept in {self.folder}. Go on with {self.resume_hint}."
            if not self._holds_something:
                kept = f"nothing was finished, and nothing is kept. Begin anew, with {self.resume_hint} if you like."
            when = "" if checkpoints_in(self.folder) else " before the chain began"
            raise RunStopped(f"stopped by {signal.Signals(number).name}{when}; {kept}", number)

        return handled(stop)
