r"""One task under a fixed prior: the program of meta-test (Eq. 15-17), and of the non-hierarchical models.

.. math:: \theta_* \sim \sum_j \alpha_j\,\mathcal N(\mu_j, V_j + \beta^2 I), \qquad D_* \mid \theta_*
"""

from __future__ import annotations

from collections.abc import Sequence

import pyro
import torch
from torch import Tensor
from torch.distributions import Distribution

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.block_likelihood import block_log_likelihood, stack_rows
from pyro_lift.models.factors import factor
from pyro_lift.models.likelihoods import log_likelihood
from pyro_lift.models.observation import batch_of, check_width, observe, outputs, sample_head, zero_head
from pyro_lift.models.rows import some_rows
from pyro_lift.models.solved_heads import SolvedHeads
from pyro_lift.models.task import Task

__all__ = ["FlatAdapter", "FlatBlock"]


class FlatAdapter:
    """The program of one task. Sites: ``theta`` ``[D]``, ``head`` where the task has one of its own, ``obs``.

    Args:
        adapter: the network as a function of theta.
        task: the new task.
        prior: over ``[D]``.
        batch_size: rows of a minibatch; None takes all rows.
        head_scale: as in :class:`~pyro_lift.models.hierarchical.AdapterHierarchy`.
        noise_scale: likewise.
        solved: the task's head, where it is solved on the way and no site.
        admitted: whether the rows have come through :func:`~pyro_lift.models.door.check_rows` already.
    """

    uses_index = True  # see AdapterHierarchy

    def __init__(
        self,
        adapter: RandomAdapter,
        task: Task,
        prior: Distribution,
        *,
        batch_size: int | None = None,
        head_scale: float | None = None,
        noise_scale: float = 1.0,
        solved: SolvedHeads | None = None,
        admitted: bool = False,
    ) -> None:
        if prior.event_shape != torch.Size([adapter.dim]):
            raise ValueError(
                f"the prior is over {tuple(prior.event_shape)}, the adapter has {adapter.dim} weights: "
                "they belong to different adapters."
            )
        self.adapter, self.task, self.prior = adapter, task, prior
        self.batch_size = batch_size
        self.head_scale, self.noise_scale = head_scale, noise_scale
        self.width = check_width(adapter, [task], head_scale, admitted=admitted)
        self.solved = solved

    def __call__(self) -> None:
        """Run the program."""
        theta = pyro.sample("theta", self.prior)
        if self.solved is not None:
            count = self.solved.rows(self.task, self.batch_size)
            with pyro.plate("data", len(self.task.train), subsample_size=count) as rows:
                factor("obs", self.solved.log_prob_at(0, self.task.train.take(rows), theta))
            return
        head = sample_head("head", self.task, self.width, self.head_scale, like=theta)
        with pyro.plate("data", len(self.task.train), subsample_size=batch_of(self.task, self.batch_size)) as rows:
            observe("obs", self.adapter, self.task, self.task.train.take(rows), theta, head, self.noise_scale)

    def log_likelihood(self, theta: Tensor, head: Tensor | None = None, *, most: int | None = None) -> Tensor:
        """Compute the log likelihood of the task's training rows at one theta; of ``most`` of them, scaled to all.

        A head of the task's own is one of zeros where none is given.
        """
        rows = some_rows(self.task.train, most)
        head = zero_head(self.task, self.width, self.head_scale, theta) if head is None else head
        output = outputs(self.adapter, rows, theta, head)
        total = log_likelihood(self.task.kind, output, rows.target, self.noise_scale).sum()
        return total * (len(self.task.train) / len(rows))


class FlatBlock:
    """Several new tasks, independent of each other, whose rows go through the network in one pass.

    Sites, all in the plate ``tasks``: ``theta`` ``[B, D]``, ``head`` ``[B, C, width + 1]`` where the tasks have heads
    of their own, ``obs``.

    Args:
        adapter: the network as a function of theta.
        tasks: of one kind and, with heads of their own, one number of classes.
        prior: over ``[D]``, of each task alike.
        batch_size: rows of a minibatch of each task; None takes all rows.
        head_scale: as in :class:`~pyro_lift.models.hierarchical.AdapterHierarchy`.
        noise_scale: likewise.
        solved: the tasks' heads in their order, where they are solved on the way and no site.
        admitted: likewise.
    """

    uses_index = True  # see AdapterHierarchy

    def __init__(
        self,
        adapter: RandomAdapter,
        tasks: Sequence[Task],
        prior: Distribution,
        *,
        batch_size: int | None = None,
        head_scale: float | None = None,
        noise_scale: float = 1.0,
        solved: SolvedHeads | None = None,
        admitted: bool = False,
    ) -> None:
        self.adapter, self.tasks, self.prior = adapter, list(tasks), prior
        self.batch_size = batch_size
        self.head_scale, self.noise_scale = head_scale, noise_scale
        self.width = check_width(adapter, self.tasks, head_scale, admitted=admitted)
        self.solved = solved

    def __call__(self) -> None:
        """Run the program."""
        kind = self.tasks[0].kind
        with pyro.plate("tasks", len(self.tasks)):
            theta = pyro.sample("theta", self.prior)
            head = None
            if self.solved is None:
                head = sample_head("head", self.tasks[0], self.width, self.head_scale, like=theta)
            batches = []
            for k, task in enumerate(self.tasks):
                count = batch_of(task, self.batch_size)
                if self.solved is not None:
                    count = self.solved.rows(task, self.batch_size)
                # No site stands in these plates: they draw each task's rows.
                with pyro.plate(f"data_{k}", len(task.train), subsample_size=count) as rows:
                    batches.append(task.train.take(rows))
            block = stack_rows(batches, [len(task.train) for task in self.tasks], kind)
            if self.solved is not None:
                factor("obs", self.solved.block_log_likelihood(range(len(self.tasks)), block, theta))
                return
            factor("obs", block_log_likelihood(self.adapter, kind, block, theta, head, self.noise_scale))

    def log_likelihood(self, theta: Tensor, *, most: int | None = None) -> Tensor:
        """Compute the log likelihood ``[B]`` of each task's training rows at one theta ``[D]``, own heads being zero.

        With ``most``, of as many of a task's rows, scaled to all.
        """
        rows = [some_rows(task.train, most) for task in self.tasks]
        block = stack_rows(rows, [len(task.train) for task in self.tasks], self.tasks[0].kind)
        each = theta.expand(len(rows), -1)
        head = zero_head(self.tasks[0], self.width, self.head_scale, theta)
        heads = None if head is None else head.expand(len(rows), -1, -1)
        return block_log_likelihood(self.adapter, self.tasks[0].kind, block, each, heads, self.noise_scale)
