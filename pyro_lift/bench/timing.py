"""Timing that means something on a machine that others use too: paired, interleaved, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

__all__ = ["Times", "copy_seconds", "interleaved", "quartiles"]


class Times(NamedTuple):
    """Seconds of each repeat, on the wall and of the processor; equal places belong to one round."""

    wall: list[float]
    cpu: list[float]

    def ratios(self, other: Times) -> tuple[list[float], list[float]]:
        """Divide round by round by another's times, wall and processor."""
        wall = [a / b for a, b in zip(self.wall, other.wall, strict=False)]
        return wall, [a / b for a, b in zip(self.cpu, other.cpu, strict=False)]


def interleaved(steps: Mapping[str, Callable[[], Any]], repeats: int, *, warm_up: int = 1) -> dict[str, Times]:
    """Time each step once per round; every round begins at another step, so that none always follows the same one."""
    names = list(steps)
    times = {name: Times([], []) for name in names}
    for repeat in range(-warm_up, repeats):
        for k in range(len(names)):
            name = names[(k + repeat) % len(names)]
            _synchronise()
            wall, cpu = time.perf_counter(), time.process_time()
            steps[name]()
            _synchronise()
            if repeat >= 0:
                times[name].wall.append(time.perf_counter() - wall)
                times[name].cpu.append(time.process_time() - cpu)
    return times


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the lower quartile, the median and the upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def copy_seconds(numbers: int, device: str) -> Callable[[], None]:
    """Return a step that copies float32 numbers from one place to another: 8 bytes of traffic each."""
    source, target = torch.randn(numbers, device=device), torch.empty(numbers, device=device)
    return lambda: (target.copy_(source), None)[1]


def _synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
