"""The chain of a new task (Eq. 18): SGLD from a start, with draws spread over its last half."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import Tensor

from pyro_lift.inference.adaptation.early_stopping import DrawWindows
from pyro_lift.inference.adaptation.failures import named_adaptation
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.inference.progress import chain_bar
from pyro_lift.inference.sgld_kernel import SGLD
from pyro_lift.models.task import Task
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

__all__ = ["Shown", "Source", "moments_for", "rows_of_moments", "run_chain", "run_watched", "times_before"]


class Source(NamedTuple):
    """The source of a chain's randomness: a seed, or None for torch's global stream, and the number of its block."""

    seed: int | None
    number: int = 0


class Shown(NamedTuple):
    """How chains are shown: whether by a bar, and to which callbacks; and as whose.

    Attributes:
        bar: whether there is one.
        callbacks: of :mod:`pyro_lift.watching`.
        tasks: of the chain.
    """

    bar: bool = False
    callbacks: Any = ()
    tasks: Sequence[Task] = ()

    @property
    def name(self) -> str:
        """The task's name, or the first and the last one's."""
        names = [task.name for task in self.tasks]
        return names[0] if len(names) == 1 else f"{names[0]} .. {names[-1]}"

    def watchers(self, steps: int) -> Watchers:
        """Make what tells the callbacks of the chain's steps."""
        run = Run("adapt", self.name, settings={"steps": steps})
        return Watchers(self.callbacks, run, [len(task.train) for task in self.tasks], [t.name for t in self.tasks])


def times_before(tasks: Sequence[Task]) -> list[int]:
    """Return for each task how often one of its name came before it: the number of the stream that sets it apart."""
    seen: Counter[str] = Counter()
    numbers = []
    for task in tasks:
        numbers.append(seen[task.name])
        seen[task.name] += 1
    return numbers


def rows_of_moments(tasks: Sequence[Task], *, alike: bool) -> float:
    """Return the rows of the task that a preconditioner's mean squares are of, after meta-training.

    Args:
        tasks: of meta-training.
        alike: whether each task's gradients were brought to those of the mean number of rows: then it is that number,
            else the root mean square of their numbers of rows.
    """
    rows = [len(task.train) for task in tasks]
    return sum(rows) / len(rows) if alike else math.sqrt(sum(n**2 for n in rows) / len(rows))


def moments_for(
    moments: Mapping[str, Tensor], tasks: Sequence[Task], *, power: float, rows: float | None, block: bool
) -> dict[str, Tensor]:
    r"""Bring the mean squares of a preconditioner, which meta-training left, to new tasks.

    A gradient is of the power times the total loss of n rows, and n differs between tasks: after one task of many rows
    the steps of a task of few would be short. With n rows and N, those of the moments (:func:`rows_of_moments`),

    .. math:: V_* = V \,(\kappa_* / \kappa)^2\,\min(1, n / N)^2

    A task of more rows keeps its longer steps: shorter ones predicted a little worse.

    Args:
        moments: by site, without a dimension of tasks.
        tasks: the new ones.
        power: theirs over meta-training's, :math:`\kappa_* / \kappa`.
        rows: N; None leaves the number of rows out.
        block: whether the tasks share a chain, whose positions have a leading dimension of tasks.
    """
    if rows is None:
        return {name: moment * power**2 for name, moment in moments.items()}
    factors = torch.tensor([power * min(len(task.train) / rows, 1.0) for task in tasks]).square()
    if not block:
        return {name: moment * float(factors[0]) for name, moment in moments.items()}
    return {name: moment * factors.to(moment).view(-1, *(1,) * moment.dim()) for name, moment in moments.items()}


def run_chain(
    program: Any, start: Tensor, steps: int, draws: int, source: Source, shown: Shown | None = None, **options: Any
) -> MCMC:
    """Run the chain from a start and keep some of its draws.

    Args:
        program: of a new task, or of a block of them.
        start: of theta, ``[D]`` or ``[B, D]``.
        steps: in all.
        draws: kept, evenly spaced over the last half.
        source: of minibatches and noise.
        shown: bar and callbacks; None shows nothing.
        options: of :class:`~pyro_lift.inference.sgld_kernel.SGLD`.

    Raises:
        DivergedError: a loss that is not finite, or a step past its limit; names the tasks.
    """
    thinning = max(steps // 2 // draws, 1)
    kernel = SGLD(
        program,
        integrator="exponential",
        thinning=thinning,
        init_strategy=init_to_value(values={"theta": start}, fallback=init_to_mean),
        seed=source.seed,
        **options,
    )
    kernel.chain_number = source.number
    warmup_steps = steps - thinning * draws
    with _named(shown, options), _bar(warmup_steps + draws, steps, shown) as hook:
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=warmup_steps, disable_progbar=True, hook_fn=hook)
        mcmc.run()
    mcmc.sampler.hook = None  # the bar's, which no pickle of a posterior could take
    return mcmc


def run_watched(
    program: Any, start: Tensor, windows: DrawWindows, source: Source, shown: Shown | None = None, **options: Any
) -> DrawWindows:
    """Run the chain from a start under early stopping, and return its windows.

    The preconditioner goes on adapting to the end: nobody knows before where that is.

    Args:
        program: of a new task.
        start: of theta, ``[D]``.
        windows: that are judged; they know the steps.
        source: of minibatches and noise.
        shown: bar and callbacks; None shows nothing.
        options: of :class:`~pyro_lift.inference.sgld_kernel.SGLD`.

    Raises:
        DivergedError: a loss that is not finite, or a step past its limit; names the tasks.
    """
    kernel = SGLD(
        program,
        integrator="exponential",
        init_strategy=init_to_value(values={"theta": start}, fallback=init_to_mean),
        seed=source.seed,
        **options,
    )
    kernel.chain_number = source.number
    with _named(shown, options):
        kernel.setup(windows.steps)
    weights = kernel.initial_params
    with _named(shown, options), _bar(windows.steps, windows.steps, shown) as hook:
        for step in range(1, windows.steps + 1):
            weights = kernel.sample(weights)
            hook(kernel, weights, "Warmup", step - 1)
            if windows.see(step, weights):
                break
    kernel.cleanup()
    return windows


def _named(shown: Shown | None, options: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Let an error of the chain name its tasks, where it is known whose it is."""
    if shown is None or not shown.tasks:
        return nullcontext()
    return named_adaptation(shown.tasks, 0.5 * options["step_size"], options.get("n_inflate", 1.0))


def _bar(total: int, steps: int, shown: Shown | None) -> AbstractContextManager[Callable[..., None]]:
    if shown is None or not shown.tasks:
        return chain_bar(total, "", show=False)
    return chain_bar(total, f"adapt to {shown.name}", shown.bar, on_step=shown.watchers(steps))
