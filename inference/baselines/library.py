r"""A library of LoRAs, one for each meta-training task, and retrieval from it by what the tasks read.

All are trained from one common start: an average of adapters means something only in one gauge.

.. math:: \text{fusion:}\quad B = \sum_i w_i B_i,\; A = \sum_i w_i A_i, \qquad
          \text{mixture:}\quad \Delta W = \sum_i w_i B_i A_i

A mixture of K LoRAs of rank r is one of rank r K. It is brought back to rank r by the singular value decomposition of
each product, so that it can be a start: exact where the sum has rank r or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_lift.inference.baselines.episodes import check_tasks
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace, adaptation, multiples
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.features import features
from pyro_lift.models.task import Task
from pyro_lift.support.random_streams import stream_seed
from pyro_lift.watching.watch import tell

__all__ = ["TrainedLibrary", "library_space", "nearest", "task_key", "train_library"]

#: Inputs of a task that its key is the mean of, as LoRA-Retriever takes them.
EXAMPLES = 20


class TrainedLibrary(NamedTuple):
    """A library of LoRAs and the keys by which they are retrieved.

    Attributes:
        thetas: ``[N, D]``, one adapter a task.
        keys: ``[N, E]``, mean embeddings of the tasks' inputs.
        names: of the tasks.
        meta_steps: minibatches it took.
    """

    thetas: Tensor
    keys: Tensor
    names: tuple[str, ...]
    meta_steps: int


def train_library(
    adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, *, on_step: Callable[[], None] | None = None
) -> TrainedLibrary:
    """Fine-tune one LoRA for each task from the adapter's own start; its mean over the late iterates is kept.

    The minibatches of warm-up and visits together are shared out among the tasks; the rate is the meta-training one.
    """
    tasks = check_tasks(tasks, adapter.initial.device)
    steps = max((budget.warm_up + budget.visits) // len(tasks), 2)
    draws = min(budget.draws, steps // 2)
    share = replace(budget, steps=steps, draws=draws, learning_rate=budget.meta_learning_rate)
    thetas = []
    for number, task in enumerate(tasks):
        late = finetune(adapter, task, adapter.initial.clone(), share, seed=stream_seed(budget.seed, number))
        thetas.append(late.thetas.mean(0))
        tell(on_step, phase="library", tasks=(task.name,))
    keys = torch.stack([task_key(adapter, task) for task in tasks])
    return TrainedLibrary(torch.stack(thetas), keys, tuple(task.name for task in tasks), steps * len(tasks))


@torch.no_grad()
def task_key(adapter: RandomAdapter, task: Task, examples: int = EXAMPLES) -> Tensor:
    r"""Average the embeddings ``[E]`` of a task's first inputs, by the network without adaptation.

    .. math:: e_i = \tfrac1n \sum_{x \in D_i} f(x)

    References:
        LoraRetriever, Zhao et al., 2024, arXiv:2402.09997, whose keys are such means over a LoRA's own data.
    """
    rows = task.train.take(slice(0, examples)).to(adapter.initial.device)
    return features(adapter, rows, adapter.initial).mean(0)


def library_space(budget: Budget) -> SearchSpace:
    """What a method has to tune that begins with a library: the rate at which it is trained, and adaptation."""
    rates = multiples("meta_learning_rate", budget.meta_learning_rate, (0.03, 0.1, 0.3, 0.5, 2.0, 4.0, 10.0))
    return SearchSpace({"meta rate": rates}, adaptation(budget))


def nearest(keys: Tensor, key: Tensor, number: int | None) -> Tensor:
    r"""Find the indices of the keys with the highest cosine :math:`\cos(e_*, e_i)` to a key; all of them for None.

    References:
        LoraRetriever, Zhao et al., 2024, arXiv:2402.09997.
    """
    similarity = normalize(keys, dim=-1) @ normalize(key, dim=-1)
    return similarity.topk(len(keys) if number is None else min(number, len(keys))).indices
