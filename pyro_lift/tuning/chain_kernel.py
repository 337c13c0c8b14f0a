"""The kernel that LiFT's settings call for."""

from __future__ import annotations

from collections.abc import Sequence

from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import Tensor

from pyro_lift.inference.gibbs.accumulator import langevin_step
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.models.hierarchical import VARIANCE, AdapterHierarchy
from pyro_lift.models.task import Task
from pyro_lift.settings import KERNEL_OPTIONS, LiFTSettings

__all__ = ["chain_kernel", "task_weights"]


def task_weights(tasks: Sequence[Task]) -> list[float] | None:
    r"""Return factors on the tasks' gradients with which all count alike, however many rows they have.

    A gradient is of a task's whole data, so it grows with its rows: those of a few large tasks would lead. With
    :math:`\bar n / n_i` it is that of the mean over rows, times the mean number of rows, which keeps the size that the
    chain's gradients have.

    Args:
        tasks: of meta-training.

    Returns:
        One factor a task; None where all have as many rows.
    """
    rows = [len(task.train) for task in tasks]
    return None if len(set(rows)) == 1 else [sum(rows) / len(rows) / n for n in rows]


def chain_kernel(program: AdapterHierarchy, settings: LiFTSettings, start: Tensor, seed: int | None) -> SGLDGibbs:
    """Make the kernel of a run.

    Args:
        program: that it samples.
        settings: filled in (:func:`~pyro_lift.defaults.resolved`).
        start: of phi, ``[D]``.
        seed: of everything random in the chain.
    """
    s = settings
    assert s.learning_rate is not None and s.sgd_learning_rate is not None
    assert s.temperature is not None and s.n_inflate is not None
    wide, weights = (program.beta, program.sigma, len(program.tasks)), task_weights(program.tasks)
    begin = {"phi": start}
    if program.learned is not None:
        begin[VARIANCE] = start.new_ones(int(program.learned.max()) + 1)
    kernel = SGLDGibbs(
        program,
        step_size=2.0 * s.learning_rate,
        phi_update=s.phi_update,
        accumulator=s.accumulator if s.phi_update == "langevin" else "exact",
        phi_step_size=None if s.phi_update == "gibbs" else langevin_step(s.phi_step_fraction, s.accumulator, *wide),
        temperature=s.temperature,
        n_inflate=s.n_inflate,
        preconditioner="rms" if s.preconditioner == "rms" else None,
        sgd_steps=s.sgd_steps,
        translation=s.translation or "none",
        translation_step_size=s.translation_step_size,
        sgd_step_size=s.sgd_learning_rate,
        sgd_weights=weights if s.sgd_weights == "tasks" else None,
        task_step_scale=weights if s.task_steps == "tasks" else None,
        max_move=s.max_move or None,
        thinning=s.thinning,
        distributed=s.ranks_block_size > 0,
        block_size=s.ranks_block_size or None,
        site_step_scale={"head": s.head_lr_scale},
        site_temperature={"head": s.head_temperature},
        init_strategy=init_to_value(values=begin, fallback=init_to_mean),
        seed=seed,
    )
    kernel.option_names = KERNEL_OPTIONS
    return kernel
