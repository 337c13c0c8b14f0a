r"""A library of LoRAs: one for each meta-training task, what each task reads, and how LoRAs are put together.

All are trained from one common start: an average of adapters means something only in one gauge.

.. math:: \text{fusion:}\quad B = \sum_i w_i B_i,\; A = \sum_i w_i A_i, \qquad
          \text{mixture:}\quad \Delta W = \sum_i w_i B_i A_i

A mixture of K LoRAs of rank r is one of rank r K. It is brought back to rank r by the singular value decomposition of
each product, so that it can be a start: exact where the sum has rank r or less.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_lift.inference.baselines.protocol import Budget, check_tasks, finetuned
from pyro_lift.models.adapters import AdapterTensor, RandomAdapter
from pyro_lift.models.features import features
from pyro_lift.models.task import Task

__all__ = ["Zoo", "fusion", "lora_pairs", "mixture", "nearest", "task_key", "train_zoo"]

#: Inputs of a task that its key is the mean of, as LoRA-Retriever takes them.
EXAMPLES = 20


class Zoo(NamedTuple):
    """The library.

    Attributes:
        thetas: ``[N, D]``, one adapter a task.
        keys: ``[N, E]``, what the tasks read.
        names: of the tasks.
        meta_steps: minibatches it took.
    """

    thetas: Tensor
    keys: Tensor
    names: tuple[str, ...]
    meta_steps: int


def train_zoo(
    adapter: RandomAdapter, tasks: Sequence[Task], budget: Budget, *, on_step: Callable[[], None] | None = None
) -> Zoo:
    """Fine-tune one LoRA for each task from the adapter's own start; its mean over the late iterates is kept.

    The minibatches of warm-up and visits together are shared out among the tasks; the rate is the meta-training one.
    """
    tasks = check_tasks(tasks, adapter.initial.device)
    steps = max((budget.warm_up + budget.visits) // len(tasks), 2)
    thetas = []
    for number, task in enumerate(tasks):
        found = finetuned(
            adapter,
            task,
            adapter.initial.clone(),
            budget,
            budget.seed + number,
            steps=steps,
            draws=min(budget.draws, steps // 2),
            learning_rate=budget.meta_learning_rate,
        )
        thetas.append(found.thetas.mean(0))
        if on_step is not None:
            on_step()
    keys = torch.stack([task_key(adapter, task) for task in tasks])
    return Zoo(torch.stack(thetas), keys, tuple(task.name for task in tasks), steps * len(tasks))


@torch.no_grad()
def task_key(adapter: RandomAdapter, task: Task, examples: int = EXAMPLES) -> Tensor:
    """Mean embedding ``[E]`` of a task's first inputs, by the network without adaptation."""
    rows = task.train.take(slice(0, examples)).to(adapter.initial.device)
    return features(adapter, rows, adapter.initial).mean(0)


def nearest(keys: Tensor, key: Tensor, number: int | None) -> Tensor:
    """Indices of the keys with the highest cosine to a key; all of them for None."""
    similarity = normalize(keys, dim=-1) @ normalize(key, dim=-1)
    return similarity.topk(len(keys) if number is None else min(number, len(keys))).indices


def fusion(thetas: Tensor, weights: Tensor) -> Tensor:
    """The weighted mean of every tensor, A and B apart: ``[K, D]`` and ``[K]`` to ``[D]``."""
    return weights.to(thetas) @ thetas


def mixture(adapter: RandomAdapter, thetas: Tensor, weights: Tensor) -> Tensor:
    r"""The weighted mean of the products B A, brought back to the adapter's rank: ``[K, D]`` and ``[K]`` to ``[D]``.

    Singular values are shared out evenly, B gets :math:`U \sqrt s` and A :math:`\sqrt s V^\top`. Where a singular
    value is zero, A takes its row from the weighted mean and B stays at zero: with both at zero there would be no
    gradient to leave by. Tensors that are no LoRA factors are averaged.
    """
    result = fusion(thetas, weights)
    for a, b in lora_pairs(adapter):
        A = thetas[:, a.part].view(-1, *a.shape)
        B = thetas[:, b.part].view(-1, *b.shape)
        left = (weights.to(thetas).view(-1, 1, 1) * B).transpose(0, 1).flatten(1)  # [out, K r]
        factors = _truncated(left, A.flatten(0, 1), a.shape[0], result[a.part].view(a.shape))
        result[b.part], result[a.part] = factors[0].reshape(-1), factors[1].reshape(-1)
    return result


def _truncated(left: Tensor, right: Tensor, rank: int, spare: Tensor) -> tuple[Tensor, Tensor]:
    """Best factors of ``left @ right`` of a rank, by a decomposition no larger than the inner dimension."""
    q_left, r_left = torch.linalg.qr(left)
    q_right, r_right = torch.linalg.qr(right.T)
    U, s, V = torch.linalg.svd(r_left @ r_right.T, full_matrices=False)
    U, s, V = U[:, :rank], s[:rank], V[:rank]
    alive = s > s.max() * torch.finfo(s.dtype).eps * max(left.shape)
    B = torch.zeros(left.shape[0], rank, dtype=left.dtype, device=left.device)
    A = spare.clone()
    count = int(alive.sum())
    root = s[:count].sqrt()
    B[:, :count] = (q_left @ U[:, :count]) * root
    A[:count] = root.unsqueeze(-1) * (V[:count] @ q_right.T)
    return B, A


def lora_pairs(adapter: RandomAdapter) -> list[tuple[AdapterTensor, AdapterTensor]]:
    """The factors A ``[r, in]`` and B ``[out, r]`` of every adapted layer.

    Raises:
        ValueError: an adapter without matrix LoRA factors: its products cannot be mixed.
    """
    named = {entry.name: entry for entry in adapter.layout}
    pairs = [
        (a, named[name.replace("lora_A", "lora_B")])
        for name, a in named.items()
        if "lora_A" in name and len(a.shape) == 2
    ]
    if not pairs:
        raise ValueError(
            f"no LoRA factors among {', '.join(list(named)[:3])}, ...: only LoRA's products can be mixed. "
            'Use composition="fusion", which averages any adapter.'
        )
    return pairs
