"""Timing that means something on a machine that others use too: paired, interleaved, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

__all__ = ["Stopwatch", "Times", "copy_seconds", "interleaved", "quartiles"]


class Times(NamedTuple):
    """Seconds of each repeat, on the wall and of the processor; equal places belong to one round."""

    wall: list[float]
    cpu: list[float]

    def ratios(self, other: Times) -> tuple[list[float], list[float]]:
        """Round by round over another's, wall and processor."""
        wall = [a / b for a, b in zip(self.wall, other.wall, strict=False)]
        return wall, [a / b for a, b in zip(self.cpu, other.cpu, strict=False)]


def interleaved(steps: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: int = 1) -> dict[str, Times]:
    """Each step once per round; every round begins at another step, so that none always follows the same one."""
    names = list(steps)
    found = {name: Times([], []) for name in names}
    for repeat in range(-warm_up, repeats):
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            _synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            _synchronise()
            if repeat >= 0:
                found[name].wall.append(time.perf_counter() - wall)
                found[name].cpu.append(time.process_time() - cpu)
    return found


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def copy_seconds(numbers: int, device: str) -> Callable[[], None]:
    """A step that copies float32 numbers from one place to another: 8 bytes of traffic each."""
    source, target = torch.randn(numbers, device=device), torch.empty(numbers, device=device)
    return lambda: (target.copy_(source), None)[1]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Stopwatch:
    """Seconds spent in some functions, those of inner ones taken out of outer ones."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._inside: list[float] = []

    @contextmanager
    def watching(self, places: Mapping[str, tuple[Any, str]]) -> Iterator[None]:
        """For the length of a context, time ``owner.attribute`` under each name."""
        own = {name: getattr(owner, attribute) for name, (owner, attribute) in places.items()}
        for name, (owner, attribute) in places.items():
            setattr(owner, attribute, self._timed(name, own[name]))
        try:
            yield
        finally:
            for name, (owner, attribute) in places.items():
                setattr(owner, attribute, own[name])

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._inside.append(0.0)
            begin = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent, inner = time.process_time() - begin, self._inside.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + spent - inner
                if self._inside:
                    self._inside[-1] += spent

        return call
