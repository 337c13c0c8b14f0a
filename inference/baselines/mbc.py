r"""Model-based clustering: group tasks by their LoRAs, train one LoRA a group, start from the mean of these (MBC-mu).

.. math:: \text{sparsify} \to \text{SVD} \to \text{unit rows } Z \to \text{k-means on the rows of } Z Z^\top
          \to \theta_k \text{ on the tasks of cluster } k \to \phi = \tfrac1K \sum_k \theta_k

Cost: the library's minibatches, and as many again for the clusters: twice the others', as the method is.

Our choices: LoRAs enter as differences from their common start (the authors' have no start in common, and with ours the
start would be most of every cosine); the decomposition has at most N - 1 dimensions; cluster LoRAs share the second
pass's minibatches in proportion to their tasks, one row of tasks after the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.library import TrainedLibrary, library_space, train_library
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace
from pyro_lift.inference.baselines.union_train import union_train
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_number, renamed_keywords

__all__ = ["MBC", "MBCState", "cluster"]


class MBCState(NamedTuple):
    """The clusters' LoRAs ``[K, D]``, the cluster of each task, and minibatches used."""

    thetas: Tensor
    clusters: tuple[int, ...]
    meta_steps: int

    @property
    def phi(self) -> Tensor:
        """Mean of the clusters' LoRAs ``[D]``, the start of adaptation."""
        return self.thetas.mean(0)


@renamed_keywords(zoo="library")
@dataclass(frozen=True)
class MBC:
    """Model-based clustering (MBC-mu): tasks are clustered by their LoRAs, with one LoRA for each cluster.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings.
        components: K, at most the number of tasks; the paper has 5 and 10.
        sparsity: share of each LoRA's smallest weights that are left out of the comparison (the authors: 0.8).
        dimensions: of the decomposition, at most (the authors: 64).
        library: a library that is trained already; None trains one.

    References:
        Towards modular LLMs by building and reusing a library of LoRAs, Ostapenko et al., 2024, arXiv:2405.11157.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    components: int = 5
    sparsity: float = 0.8
    dimensions: int = 64
    library: TrainedLibrary | None = None

    def __post_init__(self) -> None:
        check_number("sparsity", self.sparsity, open_below=False)
        if self.sparsity >= 1.0:
            raise ValueError(f"sparsity={self.sparsity}: nothing would be left to compare; take a number below 1.")
        for name in ("components", "dimensions"):
            check_number(name, getattr(self, name), least=1, open_below=False, whole=True)

    @property
    def space(self) -> SearchSpace:
        """The rate at which the library is trained, and adaptation."""
        return library_space(self.budget)

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> MBCState:
        """Train the library, cluster it, and train one LoRA a cluster."""
        library = self.library or train_library(self.adapter, tasks, self.budget, on_step=on_step)
        labels = self.cluster(library)
        total = self.budget.warm_up + self.budget.visits
        thetas = []
        for k in range(max(labels) + 1):
            members = [task for task, label in zip(tasks, labels, strict=True) if label == k]
            steps = max(total * len(members) // len(tasks), 1)
            thetas.append(self._train(members, steps, on_step))
        return MBCState(torch.stack(thetas), labels, library.meta_steps + total)

    def cluster(self, library: TrainedLibrary) -> tuple[int, ...]:
        """Assign each task to a cluster."""
        changes = library.thetas - self.adapter.initial
        return cluster(changes, self.components, self.sparsity, self.dimensions, self.budget.seed)

    def _train(self, tasks: Sequence[Task], steps: int, on_step: Callable[[], None] | None) -> Tensor:
        b = self.budget
        return union_train(
            self.adapter,
            tasks,
            b,
            steps=steps,
            learning_rate=b.meta_learning_rate,
            on_step=on_step,
        )

    @at_top_level()
    def adapt(self, state: MBCState, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the mean of the clusters' LoRAs."""
        return finetune(self.adapter, task, state.phi, self.budget, seed=seed)


def cluster(thetas: Tensor, components: int, sparsity: float, dimensions: int, seed: int) -> tuple[int, ...]:
    r"""Cluster adapters ``[N, D]`` by their cosines; numbers without gaps, at most ``components`` of them.

    .. math:: \text{sparsify} \to U S V^\top \to Z = \text{unit rows of } U_{:d} S_{:d}
              \to \text{k-means on the rows of } Z Z^\top

    Args:
        thetas: ``[N, D]``, differences from a common start.
        components: K.
        sparsity: share of each adapter's smallest weights that are set to zero.
        dimensions: d, at most N - 1 are used.
        seed: of k-means.

    References:
        Towards modular LLMs by building and reusing a library of LoRAs, Ostapenko et al., 2024, arXiv:2405.11157.
    """
    from sklearn.cluster import KMeans

    sparse = thetas.double().cpu()
    sparse = sparse * (sparse.abs() >= sparse.abs().quantile(sparsity, dim=-1, keepdim=True))
    U, s, _ = torch.linalg.svd(sparse, full_matrices=False)
    number = max(min(dimensions, len(thetas) - 1), 1)
    Z = normalize(U[:, :number] * s[:number], dim=-1)
    cosines = Z @ Z.T
    distinct = len(torch.unique(cosines.round(decimals=10), dim=0))
    labels = KMeans(min(components, distinct), n_init=10, random_state=seed).fit(cosines.numpy()).labels_
    order = {int(label): rank for rank, label in enumerate(dict.fromkeys(labels.tolist()))}
    return tuple(order[int(label)] for label in labels)
