"""Tasks that differ in sort: the door says which one the network cannot read or answer, before any training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.features import all_features
from pyro_lift.models.likelihoods import LossKind
from pyro_lift.models.observation import check_width

CONFIG = peft.LoraConfig(r=1, target_modules=["0"])


def task_of(name: str, width: int = 4) -> Task:
    return Task(name, (torch.randn(6, width, generator=torch.Generator().manual_seed(width)), torch.arange(6) % 3))


def new_lift() -> LiFT:
    return LiFT(nn.Sequential(nn.Linear(4, 3)), CONFIG, sgd_steps=4, burn_in=4, samples=8, seed=0)


class Counting(nn.Module):
    """Reads rows of any length or of two inputs, and notes every call."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(1, 3)
        self.calls: list[Mapping[str, torch.Size]] = []

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.calls.append({"x": x.shape} if mask is None else {"x": x.shape, "mask": mask.shape})
        result: Tensor = self.out(x.mean(-1, keepdim=True))
        return result


def values(name: str) -> Task:
    return Task(name, (torch.randn(6, 4), torch.randn(6, 3)), "regression")


@pytest.fixture(scope="module")
def prior() -> LiFTPrior:
    return new_lift().meta_train([task_of(f"t{i}") for i in range(3)], progress=False)


def test_the_one_task_of_another_width_is_named() -> None:
    tasks = [*(task_of(f"t{i}") for i in range(3)), task_of("wide", 5)]
    with pytest.raises(ValueError, match=r"task 'wide': .*its first row \(inputs torch.float32 \[1, 5\]\)"):
        new_lift().meta_train(tasks, progress=False)


@pytest.mark.parametrize("labels", [[4, 0, 1, 2], [0, 1, 2, 4]], ids=["first", "last"])
def test_a_label_outside_the_head_is_refused_in_whichever_row_it_stands(labels: list[int]) -> None:
    with pytest.raises(ValueError, match=r"task 'high': labels up to 4 are outside"):
        new_lift().meta_train([Task("high", (torch.randn(4, 4), torch.tensor(labels)))], progress=False)


def test_the_network_is_called_once_for_each_sort_of_rows() -> None:
    net = Counting()
    adapter: RandomAdapter = adapt_backbone(
        net, peft.LoraConfig(r=1, target_modules=["out"], init_lora_weights=False), frozen_prefix="off"
    )
    both = {"x": torch.ones(6, 4), "mask": torch.ones(6, 4)}
    labels = torch.arange(6) % 3
    tasks = [task_of("a"), task_of("b"), task_of("c", 7), Task("d", (both, labels)), Task("e", (both, labels))]
    check_width(adapter, tasks, None)  # the first call looks for an effect of the weights too
    (inside,) = (module for module in adapter.backbone.modules() if isinstance(module, Counting))
    inside.calls.clear()
    assert check_width(adapter, tasks, None) == 3
    assert inside.calls == [{"x": (1, 4)}, {"x": (1, 7)}, {"x": (1, 4), "mask": (1, 4)}]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.ones(2, 5), r"\[2, 5\].*The rows of task 't0' are inputs torch.float32 \[1, 4\]"),
        (torch.ones(4), r"shape \[4\]; expected n rows of \[4\], as those of task 't0'. Give a single row as"),
        (torch.ones(2, 1, 4), r"shape \[2, 1, 4\]; expected n rows of \[4\]"),
    ],
    ids=["another width", "a single row", "a dimension too many"],
)
def test_predictions_say_which_rows_they_take(inputs: Tensor, message: str, prior: LiFTPrior) -> None:
    posterior = prior.adapt(task_of("t0"), steps=4, draws=2)
    with pytest.raises(ValueError, match=message):
        posterior.predict(inputs)
    assert posterior.predict(torch.ones(2, 4)).shape == (2, 3)


def test_regressions_beside_classes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"task 'r' is one of regression and task 't0' one of classification"):
        new_lift().meta_train([task_of("t0"), values("r"), task_of("t1")], progress=False)


def test_a_prior_knows_the_kind_of_its_tasks_when_it_is_loaded_and_merged_too(prior: LiFTPrior, tmp_path: Path) -> None:
    prior.save_pretrained(tmp_path)
    loaded = LiFTPrior.from_pretrained(tmp_path, prior.adapter)
    of_values = new_lift().meta_train([values(f"r{i}") for i in range(2)], progress=False)
    refused = r"task '.*' is one of {}, and the prior was learned from tasks of {}"
    for each in (prior, loaded, prior.merge(loaded)):
        assert each.kinds == ("classification",)
        with pytest.raises(ValueError, match=refused.format("regression", "classification")):
            each.adapt(values("r"), steps=4, draws=2)
        with pytest.raises(ValueError, match=refused.format("regression", "classification")):
            each.adapt_many([task_of("t0"), values("r")], steps=4, draws=2)
    with pytest.raises(ValueError, match=refused.format("classification", "regression")):
        of_values.adapt(task_of("t0"), steps=4, draws=2)
    unknown = LiFTPrior(prior.adapter, prior.mixture, prior.settings)  # nobody says what it was learned from
    assert len(unknown.adapt_many([task_of("t0"), values("r")], steps=4, draws=2, seed=0)) == 2


def test_a_single_class_is_said_where_it_was_guessed(caplog: pytest.LogCaptureFixture) -> None:
    rows = (torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    said = Task("said", rows, num_classes=3)
    named = Task("named", rows, labels=["no", "yes"])
    task_of("several")
    assert said.to("cpu").num_classes == 3 and named.num_classes == 2 and not caplog.messages
    guessed = Task("guessed", rows)
    assert guessed.to("cpu").num_classes == 1
    (message,) = caplog.messages
    assert message.startswith("task 'guessed', train data: every label is 0") and "num_classes=" in message


def test_a_head_of_a_single_class_is_refused() -> None:
    alone = Task("alone", (torch.randn(6, 4), torch.zeros(6, dtype=torch.long)), num_classes=1)
    lift = LiFT(nn.Sequential(nn.Linear(4, 3)), CONFIG, head_scale=0.5, sgd_steps=4, burn_in=4, samples=8, seed=0)
    with pytest.raises(ValueError, match=r"task 'alone' has one class, of which a head of its own is certain"):
        lift.meta_train([task_of("t0"), alone], progress=False)


@pytest.mark.parametrize("kind", ["classification", "regression"])
def test_inputs_of_every_precision_teach_the_same(kind: LossKind) -> None:
    given = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0)).half().float()  # exact in all of them
    target = torch.arange(6) % 3 if kind == "classification" else given[0, :, :3]
    adapter = adapt_backbone(nn.Sequential(nn.Linear(4, 3)), CONFIG, seed=0)
    forms: dict[str, Callable[[Tensor], Any]] = {
        "float32": lambda x: x,
        "float64": Tensor.double,
        "float16": Tensor.half,
        "a float64 array": lambda x: x.double().numpy(),
    }
    told = {}
    for name, convert in forms.items():
        tasks = [Task(f"t{k}", (convert(x), target), kind) for k, x in enumerate(given)]
        lift = LiFT(adapter, sgd_steps=4, burn_in=4, samples=8, seed=0)
        posterior = lift.meta_train(tasks, progress=False).adapt(tasks[0], steps=4, draws=2)
        told[name] = posterior.predict(convert(given[1]))
        assert all_features(adapter, tasks[0].train, adapter.initial).dtype == torch.float32  # what probes stand on
    for name, values_of in told.items():
        torch.testing.assert_close(values_of, told["float32"], msg=name)


def test_a_network_in_float64_reads_arrays() -> None:
    adapter = adapt_backbone(nn.Sequential(nn.Linear(4, 3)).double(), CONFIG, seed=0)
    task = Task("t", (torch.randn(6, 4).double().numpy(), torch.arange(6) % 3))
    assert check_width(adapter, [task], None) == 3
