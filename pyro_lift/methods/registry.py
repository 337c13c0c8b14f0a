"""The registry of methods: every row of the paper's tables by name.

Example:
    >>> import peft, torch
    >>> from pyro_lift.inference.baselines.protocol import Budget
    >>> from pyro_lift.models.backbones import adapt_backbone
    >>> from pyro_lift.models.task import Task
    >>> adapter = adapt_backbone(torch.nn.Sequential(torch.nn.Linear(4, 3)), peft.LoraConfig(r=1, target_modules=["0"]))
    >>> tasks = [Task(f"t{i}", (torch.randn(8, 4), torch.arange(8) % 3)) for i in range(3)]
    >>> method = BASELINES["reptile"](adapter, Budget(warm_up=6, visits=40, steps=20, draws=5), inner_steps=2)
    >>> state = method.meta_train(tasks)
    >>> method.adapt(state, tasks[0]).predict(torch.randn(2, 4)).shape
    torch.Size([2, 3])
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pyro_lift.inference.baselines.abml import ABML
from pyro_lift.inference.baselines.bmaml import BMAML
from pyro_lift.inference.baselines.bootstrapped_maml import BootstrappedMAML
from pyro_lift.inference.baselines.imaml import ImplicitMAML
from pyro_lift.inference.baselines.linear_probe import LinearProbe
from pyro_lift.inference.baselines.lora_tuned import LoRATuned
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.maml_mix import MAMLMix
from pyro_lift.inference.baselines.mbc import MBC
from pyro_lift.inference.baselines.no_meta_train import NoMetaTrain
from pyro_lift.inference.baselines.pooled_probe import PooledProbe
from pyro_lift.inference.baselines.protocol import Baseline
from pyro_lift.inference.baselines.protonet import ProtoNet
from pyro_lift.inference.baselines.protonet_lite import ProtoNetLITE
from pyro_lift.inference.baselines.reptile import Reptile
from pyro_lift.inference.baselines.retriever import LoRARetriever
from pyro_lift.inference.baselines.shared_peft import SharedPEFT
from pyro_lift.inference.baselines.taskwise_peft import TaskwisePEFT
from pyro_lift.inference.baselines.union_train import UnionTrain
from pyro_lift.methods.fixed_theta import FixedTheta
from pyro_lift.methods.lift import LiFTMethod
from pyro_lift.settings import LiFTSettings

__all__ = ["BASELINES", "CHOOSING"]


#: Methods that choose for themselves, on rows or tasks that they leave out, so that there is nothing to tune.
CHOOSING = ("linear-probe", "pooled-probe", "lora-tuned")
#: Every row of the paper's tables: called with the adapter, a
#: :class:`~pyro_lift.inference.baselines.protocol.Budget` and the method's own settings.
BASELINES: dict[str, Callable[..., Baseline[Any]]] = {
    "linear-probe": LinearProbe,
    "pooled-probe": PooledProbe,
    "lora-tuned": LoRATuned,
    "no-meta-train": NoMetaTrain,
    "union-train": UnionTrain,
    "maml": MAML,
    "maml-2": partial(MAML, inner_steps=2),
    "maml-3": partial(MAML, inner_steps=3),
    "maml-5": partial(MAML, inner_steps=5),
    "fo-maml": partial(MAML, first_order=True),
    "imaml": ImplicitMAML,
    "imaml-neumann": partial(ImplicitMAML, solver="neumann"),
    "reptile": Reptile,
    "boot-maml": BootstrappedMAML,
    "bmaml": BMAML,
    "bmaml-m1": partial(BMAML, particles=1),
    "bmaml-m3": partial(BMAML, particles=3),
    "abml": ABML,
    "maml-mix-k5": MAMLMix,
    "imaml-mix-k5": partial(MAMLMix, base=ImplicitMAML),
    "retriever-mixture-k5": LoRARetriever,
    "retriever-mixture-all": partial(LoRARetriever, components=None),
    "retriever-fusion-k5": partial(LoRARetriever, composition="fusion"),
    "retriever-fusion-all": partial(LoRARetriever, composition="fusion", components=None),
    "mbc-k5": MBC,
    "mbc-k10": partial(MBC, components=10),
    "fixed-theta": FixedTheta,
    "fixed-theta-k5": partial(FixedTheta, settings=LiFTSettings(components=5)),
    "protonet": ProtoNet,
    "protonet-lite": ProtoNetLITE,
    "shared-peft": SharedPEFT,
    "taskwise-peft": TaskwisePEFT,
    "lift": LiFTMethod,
    "lift-k3": partial(LiFTMethod, settings=LiFTSettings(components=3)),
    "lift-k5": partial(LiFTMethod, settings=LiFTSettings(components=5)),
    "lift-single": partial(LiFTMethod, settings=LiFTSettings(phi_update="langevin", accumulator="single")),
    "lift-table": partial(LiFTMethod, settings=LiFTSettings(phi_update="langevin", accumulator="table")),
    "lift-reg-x": partial(LiFTMethod, ablation="reg"),
    "lift-noise-x": partial(LiFTMethod, ablation="noise"),
}
