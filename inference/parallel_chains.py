"""Chains in processes of their own: Pyro's sampler, with a start of its own for every chain, and no endless waiting.

Pyro puts every chain's start into one kernel before any process begins, so that all of them begin where the last one
should; here each chain has a kernel. A process that dies (killed for its memory, an error that cannot be sent) is
reported, and not waited for.
"""

from __future__ import annotations

import copy
import pickle
import queue
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pyro.infer.mcmc.api as api
import torch
from torch import Tensor

from pyro_lift.inference.kernel import Kernel

__all__ = ["ParallelChains", "checked_starts"]


class ParallelChains(api._MultiSampler):
    """Pyro's sampler of several chains at once, with a kernel and a start for each of them."""

    @classmethod
    def in_place_of(cls, sampler: Any) -> ParallelChains:
        """Make one that takes over the queues and the logging thread of Pyro's own sampler."""
        chains: ParallelChains = object.__new__(cls)
        chains.__dict__.update(sampler.__dict__)
        return chains

    def init_workers(self, *args: Any, **kwargs: Any) -> None:
        """Make the processes, each with a kernel of its own."""
        self.workers = []
        for number in range(self.num_chains):
            kernel = copy.copy(self.kernel)
            if isinstance(kernel, Kernel):
                kernel.chain_number = number
            start = None
            if self.initial_params is not None:
                start = {name: value[number].clone() for name, value in self.initial_params.items()}
            worker = api._Worker(
                number,
                self.result_queue,
                self.log_queue,
                self.events[number],
                kernel,
                self.num_samples,
                self.warmup_steps,
                initial_params=start,
                hook=self.hook,
            )
            process = self.ctx.Process(name=str(number), target=worker.run, args=args, kwargs=kwargs, daemon=True)
            self.workers.append(process)

    def run(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, int]]:
        """Yield what Pyro's own sampler yields: the structure, every draw, the diagnostics; with the chain's number.

        Raises:
            TypeError: something cannot be sent to another process.
            RuntimeError: a process ended without a word.
        """
        self.init_workers(*args, **kwargs)
        active, ended_well = set(range(self.num_chains)), False
        try:
            self._start()
            while active:
                try:
                    number, value = self.result_queue.get(timeout=2)
                except queue.Empty:
                    self._check_alive(active)
                    continue
                if isinstance(value, Exception):
                    raise value
                if value is None:
                    active.remove(number)
                    continue
                yield value, number
                self.events[number].set()
            ended_well = True
        finally:
            self.terminate(not ended_well)

    def _start(self) -> None:
        """Start the processes; a Ctrl-C is the first process's affair, which ends the others."""
        handler = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for process in self.workers:
                process.start()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(
                f"the chains cannot be sent to processes of their own: {error}. A started process needs a model, step "
                "sizes and a hook_fn that pickle: functions of a module, not lambdas or functions inside functions. "
                'Or take mp_context="fork" (Linux), or num_chains=1.'
            ) from error
        finally:
            if handler is not None:
                signal.signal(signal.SIGINT, handler)

    def _check_alive(self, active: set[int]) -> None:
        for number in sorted(active):
            code = self.workers[number].exitcode
            if code is not None and self.result_queue.empty():
                why = "killed, perhaps for its memory" if code in (-9, 137) else "its last words are above"
                raise RuntimeError(
                    f"the process of chain {number} ended with exit code {code} before its last draw: {why}."
                )


def checked_starts(initial_params: Mapping[str, Any] | None, num_chains: int) -> dict[str, Tensor] | None:
    """Return starting values as tensors; several chains have one each, along the leading dimension.

    Raises:
        TypeError: not a mapping, or a value that is no number.
        ValueError: a leading dimension that is not the number of chains.
    """
    if initial_params is None:
        return None
    if not isinstance(initial_params, Mapping):
        raise TypeError(f"initial_params is a {type(initial_params).__name__}; expected values by site name.")
    starts = {}
    for name, value in initial_params.items():
        try:
            start = value if isinstance(value, Tensor) else torch.as_tensor(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"initial_params[{name!r}] is a {type(value).__name__}; expected a tensor.") from error
        if num_chains > 1 and (start.dim() == 0 or len(start) != num_chains):
            raise ValueError(
                f"initial_params[{name!r}] has shape {list(start.shape)}; for num_chains={num_chains} its leading "
                "dimension is the number of chains."
            )
        starts[name] = start
    return starts
