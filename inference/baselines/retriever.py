r"""LoRA-Retriever: put together the LoRAs of the tasks that read alike, and fine-tune from there.

.. math:: S = \text{top-}K_i\, \cos(e_*, e_i), \qquad
          \Delta W = \tfrac1K \sum_{i \in S} B_i A_i \ \text{(mixture)}, \qquad
          B = \tfrac1K \sum_{i \in S} B_i,\ A = \tfrac1K \sum_{i \in S} A_i \ \text{(fusion)}

Cost: one LoRA a task, all minibatches of the budget together; a new task costs K merges and its adaptation.

Our choices: the authors retrieve for each input with a sentence encoder trained for it; here a new task has data to
adapt to, so retrieval is by task, the mean embedding of up to 20 inputs by the frozen backbone, and the composition is
the start of the fine-tuning that all methods have (the paper's numbers, at the level of No Meta Train, say as much).
Mixtures are brought back to the adapter's rank, see :mod:`pyro_lift.inference.baselines.library`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from pyro_lift.inference.adaptation.predict import Ensemble
from pyro_lift.inference.baselines.finetune import finetune
from pyro_lift.inference.baselines.library import TrainedLibrary, library_space, nearest, task_key, train_library
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.baselines.search_space import SearchSpace
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.lora_factors import fusion, mixture
from pyro_lift.models.task import Task
from pyro_lift.support.options import check_literal, check_number, renamed_keywords

__all__ = ["LoRARetriever"]

Composition = Literal["mixture", "fusion"]


@renamed_keywords(zoo="library")
@dataclass(frozen=True)
class LoRARetriever:
    """LoRA-Retriever: the LoRAs of the tasks with the most similar inputs, combined and fine-tuned.

    Args:
        adapter: the network as a function of theta.
        budget: shared settings.
        composition: ``"mixture"`` or ``"fusion"``.
        components: K; None takes all, each with the same weight.
        library: a library that is trained already; None trains one.

    References:
        LoraRetriever: input-aware LoRA retrieval and composition for mixed tasks in the wild, Zhao et al., 2024,
        arXiv:2402.09997.
    """

    adapter: RandomAdapter
    budget: Budget = field(default_factory=Budget)
    composition: Composition = "mixture"
    components: int | None = 5
    library: TrainedLibrary | None = None

    def __post_init__(self) -> None:
        check_literal("composition", self.composition, Composition)
        if self.components is not None:
            check_number("components", self.components, least=1, open_below=False, whole=True)

    @property
    def space(self) -> SearchSpace:
        """The rate at which the library is trained, and adaptation."""
        return library_space(self.budget)

    @at_top_level()
    def meta_train(self, tasks: Sequence[Task], *, on_step: Callable[[], None] | None = None) -> TrainedLibrary:
        """Train the library, one LoRA a task."""
        return self.library or train_library(self.adapter, tasks, self.budget, on_step=on_step)

    def compose(self, state: TrainedLibrary, task: Task) -> Tensor:
        """Compose the start for a task ``[D]`` from the LoRAs of the tasks that read alike."""
        chosen = nearest(state.keys, task_key(self.adapter, task), self.components)
        weights = torch.full((len(chosen),), 1.0 / len(chosen), dtype=state.thetas.dtype, device=state.thetas.device)
        if self.composition == "fusion":
            return fusion(state.thetas[chosen], weights)
        return mixture(self.adapter, state.thetas[chosen], weights)

    @at_top_level()
    def adapt(self, state: TrainedLibrary, task: Task, *, seed: int | None = None) -> Ensemble:
        """Fine-tune from the composition."""
        return finetune(self.adapter, task, self.compose(state, task), self.budget, seed=seed)
