r"""The hierarchical model of Eq. 1-3 over adapters, as a Pyro program.

.. math:: \phi \sim \mathcal N(m_0, \sigma^2 I),\qquad \theta_i \mid \phi \sim \mathcal N(\phi, \beta^2 I),\qquad
          p(D_i \mid \theta_i) = \prod_{(x, y) \in D_i} p(y \mid x, \theta_i)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.block_likelihood import block_log_likelihood, stack_rows
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.factors import factor, normal
from pyro_lift.models.observation import batch_of, check_width, observe, sample_head
from pyro_lift.models.solved_heads import has_solved_head, solved_heads
from pyro_lift.models.task import Task, check_to_learn_from, head_outputs
from pyro_lift.support.options import check_number

__all__ = ["VARIANCE", "AdapterHierarchy", "can_share_pass"]

#: Site of the unknown variances, over the square of the given beta; a and b of their inverse gamma prior.
VARIANCE, VARIANCE_SHAPE = "beta_variance", 2.0


class AdapterHierarchy:
    r"""The program of a family of tasks, which may differ in size and in the width of their heads.

    With ``learned`` beta is one number for each group of weights, times what is given, and unknown:

    .. math:: v_g \sim \mathrm{InverseGamma}(2, 2), \qquad \theta_i \mid \phi, v \sim
              \mathcal N\big(\phi, \beta^2\,\mathrm{diag}(v_{g(d)})\big)

    Sites: ``phi`` ``[D]``; ``beta_variance`` ``[G]`` where beta is learned; for each task i, inside the plate
    ``tasks``: ``theta_i`` ``[D]``, ``head_i`` where the task has a head of its own, ``obs_i`` in the minibatch plate
    ``data_i``.

    In blocks of B tasks that agree in kind, and with heads of their own in their number of classes, the plate is
    vectorised: ``theta`` ``[B, D]``, ``head`` ``[B, C, width + 1]``, and one pass of the network for all of them. It is
    the same density. Tasks that do not agree go one after the other, in blocks too.

    Args:
        adapter: the network as a function of theta.
        tasks: at least one.
        beta: standard deviation of a task's weights around phi; one number, or ``[D]``.
        sigma: standard deviation of phi around its prior mean, likewise.
        batch_size: rows of a minibatch; None takes all rows of a task.
        prior_mean: of phi, ``[D]``; None is zero, the paper's.
        head_scale: standard deviation of a task's own linear head on the network's output; None for a network that
            ends in a head shared by all tasks.
        noise_scale: standard deviation of the noise in regression.
        block_size: B, tasks that one run of the program takes.
        learned: g, ``[D]``, the group of each weight, whose variance is unknown; None takes beta as it is given.
        head: whether a task's own head is a site, ``"sample"``, or solved on the way, ``"solve"``
            (:mod:`~pyro_lift.models.solved_heads`), which gives one to tasks of label matching too.
        head_mean: the head that solved ones have their prior around; None is zero.

    Raises:
        ValueError: no task; two tasks of one name; a shared head that does not fit a task's targets; more tasks in a
            block than there are.

    Attributes:
        one_pass: whether a block goes through the network in one pass.
        uses_index: each run takes the data of the tasks that it shows, which no kernel need find out.
    """

    uses_index = True

    def __init__(
        self,
        adapter: RandomAdapter,
        tasks: Sequence[Task],
        *,
        beta: float | Tensor,
        sigma: float | Tensor,
        batch_size: int | None = None,
        prior_mean: Tensor | None = None,
        head_scale: float | None = None,
        noise_scale: float = 1.0,
        block_size: int = 1,
        learned: Tensor | None = None,
        head: Literal["sample", "solve"] = "sample",
        head_mean: ClassHead | None = None,
    ) -> None:
        check_width_of_prior("beta", beta, adapter.dim)
        check_width_of_prior("sigma", sigma, adapter.dim)
        check_to_learn_from(tasks)
        self.adapter = adapter
        self.tasks = list(tasks)
        self.beta, self.sigma, self.learned = beta, sigma, learned
        self.batch_size = batch_size
        self.prior_mean = torch.zeros_like(adapter.initial) if prior_mean is None else prior_mean
        self.head_scale = head_scale
        self.width = check_width(adapter, self.tasks, head_scale)
        check_number("block_size", block_size, least=1, open_below=False, whole=True)
        if block_size > len(tasks):
            raise ValueError(f"block_size={block_size} is more than the {len(tasks)} tasks there are.")
        self.block_size = block_size
        self.solved = solved_heads(head, adapter, self.tasks, head_scale, adapter.initial, head_mean)
        self.noise_scale = noise_scale
        self.one_pass = block_size > 1 and can_share_pass(self.tasks, head_scale, self.solved is not None)

    @property
    def noise_scale(self) -> float:
        """Standard deviation of the noise in regression; it may be set, where it is found."""
        return self._noise_scale

    @noise_scale.setter
    def noise_scale(self, noise_scale: float) -> None:
        self._noise_scale = noise_scale
        if self.solved is not None:
            self.solved.noise_scale = noise_scale

    def __call__(self) -> None:
        """Run the program."""
        phi = pyro.sample("phi", normal(self.prior_mean, self.sigma).to_event(1))
        beta = self.beta if self.learned is None else self._learned_beta(self.learned)
        if self.one_pass:
            return self._block(phi, beta)
        for i in pyro.plate("tasks", len(self.tasks), subsample_size=self.block_size):
            theta = pyro.sample(f"theta_{i}", normal(phi, beta).to_event(1))
            task = self.tasks[i]
            if self.solved is not None and has_solved_head(self.adapter, task, self.head_scale):
                with pyro.plate(
                    f"data_{i}", len(task.train), subsample_size=self.solved.rows(task, self.batch_size)
                ) as rows:
                    factor(f"obs_{i}", self.solved.log_prob_at(i, task.train.take(rows), theta))
                continue
            head = sample_head(f"head_{i}", task, self.width, self.head_scale, like=theta)
            with pyro.plate(f"data_{i}", len(task.train), subsample_size=batch_of(task, self.batch_size)) as rows:
                observe(f"obs_{i}", self.adapter, task, task.train.take(rows), theta, head, self.noise_scale)
        return None

    def _learned_beta(self, groups: Tensor) -> Tensor:
        shape = self.adapter.initial.new_full((int(groups.max()) + 1,), VARIANCE_SHAPE)
        variance: Tensor = pyro.sample(VARIANCE, dist.InverseGamma(shape, shape).to_event(1))
        return self.beta * variance.sqrt()[groups]

    def _block(self, phi: Tensor, beta: float | Tensor) -> None:
        with pyro.plate("tasks", len(self.tasks), subsample_size=self.block_size) as index:
            theta = pyro.sample("theta", normal(phi, beta).to_event(1))
            tasks = [self.tasks[i] for i in index.tolist()]
            solved = self.solved if has_solved_head(self.adapter, tasks[0], self.head_scale) else None
            head = None
            if solved is None:
                head = sample_head("head", tasks[0], self.width, self.head_scale, like=theta)
            batches = []
            for k, task in enumerate(tasks):
                count = batch_of(task, self.batch_size) if solved is None else solved.rows(task, self.batch_size)
                # No site stands in these plates: they let the kernel draw each task's rows.
                with pyro.plate(f"data_{k}", len(task.train), subsample_size=count) as rows:
                    batches.append(task.train.take(rows))
            block = stack_rows(batches, [len(task.train) for task in tasks], tasks[0].kind)
            if solved is not None:
                factor("obs", solved.block_log_likelihood(index.tolist(), block, theta))
                return
            value = block_log_likelihood(self.adapter, tasks[0].kind, block, theta, head, self.noise_scale)
            factor("obs", value)


def check_width_of_prior(name: str, width: float | Tensor, dim: int) -> None:
    """Refuse a standard deviation that is not positive and finite, or not one number or one a weight."""
    if not isinstance(width, Tensor):
        return check_number(name, width)
    if width.shape != (dim,):
        raise ValueError(
            f"{name} has shape {tuple(width.shape)}; expected one number, or one for each of {dim} weights."
        )
    for number in (float(width.min()), float(width.max())):
        check_number(name, number)
    return None


def can_share_pass(tasks: Sequence[Task], head_scale: float | None, solved: bool = False) -> bool:
    """Check that the tasks are of one kind and, with heads of their own, have as many classes.

    Args:
        tasks: at least one.
        head_scale: standard deviation of their heads; None where they share one.
        solved: whether heads are solved: then label matching has heads too, of which options by row are another sort.
    """
    shapes = set()
    for task in tasks:
        own = head_scale is not None or (solved and task.kind == "matching")
        by_row = own and task.kind == "matching" and task.label_texts is None
        shapes.add((task.kind, head_outputs(task) if own else None, by_row))
    return len(shapes) == 1
