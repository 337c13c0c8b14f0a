"""Classes that a network has itself choose the power on the likelihood in adaptation, by rows that were left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTPrior, Task
from pyro_lift.before_chain import ChainSetup
from pyro_lift.inference.adaptation.temperature import Predicted
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.metrics.probabilities import nll
from pyro_lift.models.rows import Rows
from pyro_lift.tuning.class_power import POWERS, at_best_power
from pyro_lift.tuning.whose_heads import RULES, run_config

CLASSES = 3


class Sure:
    """A posterior that gives the right class a logit, and each so manieth row a wrong one."""

    def __init__(self, logit: float, wrong: int) -> None:
        self.logit, self.wrong = logit, wrong

    def predicted(self, rows: Rows) -> Predicted:
        each = torch.arange(len(rows))
        logits = torch.zeros(len(rows), CLASSES, dtype=torch.float64)
        logits[each, (rows.target + (each % self.wrong == 0)) % CLASSES] = self.logit
        return Predicted(logits.softmax(-1), rows.target)


def adapted(wrong: int, sure: float = 1.0) -> list[tuple[Any, Task]]:
    rows = (torch.zeros(60, 2), torch.arange(60) % CLASSES)
    tasks = [Task(f"t{k}", rows, test=rows, num_classes=CLASSES) for k in range(4)]
    return [(Sure(sure * (2.0 + 0.1 * k), wrong), task) for k, task in enumerate(tasks)]


#: Each so manieth row is wrong.
GOOD, FAIR, BAD = 10, 5, 3


@pytest.mark.parametrize(
    ("at", "power"),
    [
        ({1.0: (BAD,), 10.0: (FAIR,), 100.0: (GOOD,)}, 100.0),
        ({1.0: (FAIR,), 10.0: (GOOD,), 100.0: (BAD,)}, 10.0),
        ({1.0: (FAIR,), 10.0: (BAD,), 100.0: (GOOD,)}, 1.0),
        ({1.0: (FAIR,), 10.0: (FAIR, 2.0), 100.0: (GOOD,)}, 1.0),  # only surer, which a temperature can be
    ],
)
def test_the_largest_is_taken_up_to_which_each_is_better(at: dict[float, tuple[Any, ...]], power: float) -> None:
    best = at_best_power(lambda power: adapted(*at[power]), POWERS, None)
    assert best.power == power and best.share is None
    those = [posterior.predicted(task.test).probabilities for posterior, task in adapted(*at[power])]
    assert torch.equal(torch.stack([one.probabilities for one in best.predictions]), torch.stack(those))


def test_a_power_at_which_tasks_are_lost_is_not_taken() -> None:
    def adapt(power: float) -> list[tuple[Any, Task]]:
        if power > 1.0:
            raise DivergedError("far away", 3)
        return adapted(BAD)

    assert at_best_power(adapt, POWERS, None).power == 1.0
    assert (
        at_best_power(
            lambda power: adapted(GOOD if power > 1.0 else BAD)[: 4 if power == 1.0 else 3], POWERS, None
        ).power
        == 1.0
    )
    assert at_best_power(lambda power: [], POWERS, None).predictions == []
    assert at_best_power(lambda power: adapted(GOOD), (), None).power == 1.0


def tasks(number: int, rows: int, seed: int, far: float) -> list[Task]:
    """Tasks of one map, whose inputs are distorted by a map of their own."""
    generator, found = torch.Generator().manual_seed(seed), []
    for k in range(number):
        x, own = (torch.randn(n, WIDTH, generator=generator) for n in (rows + 100, WIDTH))
        y = (x @ MAP).argmax(-1)
        x = x + far * x @ own / WIDTH**0.5
        found.append(Task(f"t{k}", (x[:rows], y[:rows]), test=(x[rows:], y[rows:]), num_classes=CLASSES))
    return found


WIDTH = 20
MAP = torch.randn(WIDTH, CLASSES, generator=torch.Generator().manual_seed(3))


def network() -> nn.Module:
    """A network that knows the classes of inputs that are not distorted."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    x = torch.randn(2000, WIDTH)
    optimiser = torch.optim.Adam(net.parameters(), 3e-3)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(net(x), (x @ MAP).argmax(-1)).backward()
        optimiser.step()
    return net


def lift(**options: Any) -> LiFT:
    settings: dict[str, Any] = {"sgd_steps": 100, "burn_in": 10, "samples": 20, "head": "shared", "seed": 0}
    return LiFT(network(), peft.LoraConfig(r=4, target_modules=["0", "2", "4"]), **{**settings, **options})


def losses(prior: LiFTPrior, new: list[Task], **options: Any) -> Tensor:
    pairs = zip(prior.adapt_many(new, seed=0, progress=False, **options), new, strict=True)
    return torch.tensor([float(nll(one.predict(task.test), task.test.target)) for one, task in pairs])  # type: ignore[union-attr]


def test_tasks_that_are_far_away_ask_for_more_and_new_ones_gain_by_it() -> None:
    prior = lift().meta_train(tasks(12, 24, seed=1, far=1.5), progress=False)
    power = prior.adapt_settings.n_inflate
    assert power is not None and power in POWERS
    assert prior.results["power in adaptation, over meta-training's"] == power
    new = tasks(10, 60, seed=2, far=1.5)
    gain = losses(prior, new, n_inflate=1.0) - losses(prior, new)
    assert gain.mean() > 2.0 * gain.std() / len(gain) ** 0.5
    near = lift().meta_train(tasks(12, 24, seed=1, far=0.1), progress=False)
    assert near.adapt_settings.n_inflate is None
    given = lift(n_inflate=3.0).meta_train(tasks(12, 24, seed=1, far=1.5), progress=False)
    assert given.adapt_settings.n_inflate in (None, 3.0)


def test_a_run_of_before_goes_on_with_power_1(tmp_path: Path) -> None:
    one, made, found = lift(), tasks(12, 24, seed=1, far=1.5), []
    for name, rules in (("then", {k: v for k, v in RULES.items() if k != "power of classes"}), ("now", RULES)):
        config = run_config(one.settings, one.seed, one.adapter, made, rules=rules)
        session = Session(tmp_path / name, config=config)
        (prior,) = one.meta_train_many(made, (1,), session=session, crossed=True, progress=False)
        found.append(prior.adapt_settings.n_inflate is None)
    assert found == [True, False]


def test_the_chains_of_the_halves_run_once_for_all_powers(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, asked = [], []
    chain, adapt = ChainSetup._half_chain, LiFTPrior.adapt_many

    def half_chain(self: ChainSetup, *args: Any, **kwargs: Any) -> Any:
        begun.append(args)
        return chain(self, *args, **kwargs)

    def adapt_many(self: LiFTPrior, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs.get("n_inflate", 1.0))
        return adapt(self, *args, **kwargs)

    monkeypatch.setattr(ChainSetup, "_half_chain", half_chain)
    monkeypatch.setattr(LiFTPrior, "adapt_many", adapt_many)
    lift().meta_train(tasks(12, 24, seed=1, far=1.5), progress=False)
    assert asked == [1.0, 1.0, 10.0, 10.0, 100.0, 100.0] and len(begun) == 2
