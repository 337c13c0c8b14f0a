"""Networks that end in a softmax, and networks that mix the rows of a batch, are warned of in meta-training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from pyro_lift import LiFT, Task
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.row_outputs import are_probabilities, mixing_of, note_alone
from pyro_lift.settings import AdaptSettings


class Network(nn.Module):
    """Two layers with something between them, and something behind."""

    def __init__(
        self, between: Callable[[Tensor], Tensor] = torch.tanh, behind: Callable[[Tensor], Tensor] = lambda x: x
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.between, self.behind = between, behind

    def forward(self, x: Tensor) -> Tensor:
        return self.behind(self.last(self.between(self.first(x))))


CONFIG = peft.LoraConfig(r=1, target_modules=["first", "last"])
FEW = AdaptSettings(steps=4, draws=2)  # by which the noise of regressions is found
SHORT: dict[str, Any] = {"adapt": FEW, "sgd_steps": 4, "sgd_learning_rate": 1e-3, "burn_in": 2, "samples": 4, "seed": 0}


def tasks(kind: str = "classification", classes: int = 3) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for k in range(3):
        x = torch.randn(16, 4, generator=generator)
        y = x[:, :3] if kind == "regression" else x[:, :classes].argmax(1)
        made.append(Task(f"t{k}", (x, y), kind, num_classes=None if kind == "regression" else classes))  # type: ignore[arg-type]
    return made


def said(network: nn.Module | RandomAdapter, given: list[Task], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    config = None if isinstance(network, RandomAdapter) else CONFIG
    LiFT(network, config, **SHORT).meta_train(given, progress=False)
    known = ("are probabilities", "mixes the rows")
    return [r.getMessage() for r in caplog.records if any(words in r.getMessage() for words in known)]


def test_a_network_that_ends_in_a_softmax_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    softmax = Network(behind=lambda x: x.softmax(-1))
    (words,) = said(softmax, tasks(), caplog)
    assert "Take the softmax off" in words and "postprocess=lambda p: p.clamp_min(1e-9).log()" in words
    mended = adapt_backbone(softmax, CONFIG, seed=0, postprocess=lambda p: p.clamp_min(1e-9).log())
    assert said(mended, tasks(), caplog) == []


@pytest.mark.parametrize("behind", [lambda x: x, lambda x: x.log_softmax(-1), torch.relu, torch.sigmoid])
def test_scores_and_log_probabilities_are_not(
    behind: Callable[[Tensor], Tensor], caplog: pytest.LogCaptureFixture
) -> None:
    assert said(Network(behind=behind), tasks(), caplog) == []


def test_a_regression_may_be_of_shares_and_features_that_are_shares_are_told(caplog: pytest.LogCaptureFixture) -> None:
    softmax = Network(behind=lambda x: x.softmax(-1))
    assert said(softmax, tasks("regression"), caplog) == []
    assert len(said(softmax, tasks(classes=2), caplog)) == 1  # heads of their own, on probabilities


MIXING: dict[str, Callable[[Tensor], Tensor]] = {
    "centred over the batch": lambda x: x - x.mean(0),
    "attention across rows": lambda x: (x @ x.T).softmax(-1) @ x,
    "the largest of the batch": lambda x: x / x.abs().max(),
}


def test_rows_that_mix_are_told_where_a_task_has_fewer_classes_than_the_shared_head(
    caplog: pytest.LogCaptureFixture,
) -> None:
    wide, narrow = tasks(), tasks(classes=2)
    assert len(said(Network(MIXING["centred over the batch"]), [narrow[0], *wide[1:]], caplog)) == 1
    assert said(Network(), [narrow[0], *wide[1:]], caplog) == []


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("kind", ["classification", "regression", "own heads"])
def test_a_network_that_mixes_rows_is_warned_of(name: str, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    given = tasks(classes=2) if kind == "own heads" else tasks(kind)
    (words,) = said(Network(MIXING[name]), given, caplog)
    assert "off by" in words and "track_running_stats=False" in words


def test_batch_norm_that_goes_by_the_batch_is_warned_of_and_one_by_its_statistics_is_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    by_batch = nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (4, 2)), nn.BatchNorm1d(4, track_running_stats=False))
    by_batch += nn.Sequential(nn.Flatten(), nn.Linear(8, 3))
    settled = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Flatten(), nn.Linear(8, 3))
    for network, layers, differ in ((by_batch, ["0", "4"], True), (settled, ["0", "3"], False)):
        adapter = adapt_backbone(network, peft.LoraConfig(r=1, target_modules=layers), seed=0)
        assert len(said(adapter, tasks(), caplog)) == differ


def test_batch_norm_that_cannot_read_a_row_alone_is_refused() -> None:
    by_batch = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 3))
    lift = LiFT(by_batch, peft.LoraConfig(r=1, target_modules=["0", "2"]), **SHORT)
    with pytest.raises(ValueError, match=r"task 't0': .* mixes the rows of a batch.*Take out .*track_running_stats"):
        lift.meta_train(tasks(), progress=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_is_no_mixing(dtype: torch.dtype, caplog: pytest.LogCaptureFixture) -> None:
    given = [Task(t.name, (t.train.inputs[""].to(dtype), t.train.target), num_classes=3) for t in tasks()]
    assert said(Network().to(dtype), given, caplog) == []


def test_what_is_looked_at_is_what_was_looked_at_already() -> None:
    calls = []
    network = Network(lambda x: calls.append(len(x)) or torch.tanh(x))  # type: ignore[func-returns-value]
    lift = LiFT(network, CONFIG, **SHORT)
    program = lift.program(tasks())
    calls.clear()
    lift._fitted(program)
    assert calls == [16] * 3 * 3  # each task at the centre and at two draws


def test_by_hand() -> None:
    p = torch.rand(8, 5).softmax(-1)
    assert are_probabilities(p) and not are_probabilities(p[:2]) and not are_probabilities(p.log())
    assert not are_probabilities(torch.full((8, 1), 1.0)) and not are_probabilities(p + 1e-3)
    adapter = adapt_backbone(Network(), CONFIG, seed=0)
    rows = tasks()[0].train
    output = one_hot(rows.target, 3).float()
    assert mixing_of(adapter, rows, output) == 0.0
    note_alone(adapter, rows, 0.5 * output[:1])
    assert mixing_of(adapter, rows, output) == pytest.approx(0.5)
    assert mixing_of(adapter, tasks()[0].train, output) == 0.0
