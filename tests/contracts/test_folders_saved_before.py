"""Folders that commit e640932 saved load, predict what they predicted, and go on.

``saved_by_e640932/make.py`` wrote them, and ``expected.json`` beside them: what that commit predicted from the objects
that it saved. Weights and data are formulas of whole numbers, exact in every precision, so that the backbone is the
same network on every machine. Only public names stand here: where they live may change, what they read may not.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.ops.streaming import CountMeanVarianceStats, StatsOfDict
from safetensors.torch import save_file
from torch import Tensor, nn
from typer.testing import CliRunner

from pyro_lift import (
    MCMC,
    AdaptSettings,
    LiFT,
    LiFTPrior,
    OnlineGaussianMixture,
    RandomAdapter,
    SGLDGibbs,
    StreamingMCMC,
    Task,
    TaskPosterior,
)
from pyro_lift.cli import app

SAVED = Path(__file__).parent / "saved_by_e640932"
#: Float32 arithmetic in another order; what is loaded is the same to the bit.
CLOSE = 1e-6
CLASSES, INPUTS = 3, 4


# ---------------------------------------------------------------------------------------------------- the same problem


def numbers(*shape: int, salt: int = 0) -> Tensor:
    """Multiples of 1/16 in [-1/2, 1/2] that look random."""
    count = torch.arange(1, 1 + torch.Size(shape).numel())
    return (((count * count * 7 + count * 5 + salt * 3) % 17 - 8).to(torch.float32) / 16.0).reshape(shape)


def backbone() -> nn.Sequential:
    """The frozen network."""
    net = nn.Sequential(nn.Linear(INPUTS, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    with torch.no_grad():
        for salt, parameter in enumerate(net.parameters()):
            parameter.copy_(2.0 * numbers(*parameter.shape, salt=salt))
    return net


def adapted_backbone() -> peft.PeftModel:
    """The network with a LoRA whose start is a formula too."""
    model = peft.get_peft_model(backbone(), peft.LoraConfig(r=2, target_modules=["0", "2"]))
    with torch.no_grad():
        for salt, (name, parameter) in enumerate(model.named_parameters()):
            if "lora_" in name:
                parameter.copy_(0.5 * numbers(*parameter.shape, salt=20 + salt))
    return model


def task(number: int, rows: int = 6) -> Task:
    """Two kinds of tasks, by the parity of their number: what one calls the first class is the other's second."""
    x = 2.0 * numbers(rows, INPUTS, salt=40 + number)
    y = (x[:, :CLASSES] + numbers(rows, CLASSES, salt=90 + number) / 4.0).argmax(-1)
    return Task(f"t{number}", (x, (y + number % 2) % CLASSES), num_classes=CLASSES)


TASKS = [task(number) for number in range(4)]
NEW = task(5)
ROWS = 2.0 * numbers(7, INPUTS, salt=70)

#: How the priors were trained; ``head_scale`` beside it where tasks have heads of their own.
SETTINGS: dict[str, Any] = {
    "components": 2,
    "beta": 0.1,
    "sgd_steps": 20,
    "sgd_learning_rate": 0.03,
    "burn_in": 20,
    "samples": 240,
    "learning_rate": 0.01,
    "n_inflate": 4.0,
}
HEADS = {"shared_head": None, "own_heads": 1.0}
#: No noise and no minibatch: adaptation is then a function of the prior alone.
STILL: dict[str, Any] = {"steps": 20, "draws": 2, "temperature": 0.0, "batch_size": 6}


class Lines:
    """Linear regression in tasks of unequal sizes, in float64; ``rows`` of each in a minibatch."""

    def __init__(self, rows: int | None = None) -> None:
        self.rows = rows
        self.x = [2.0 * numbers(5 + i, 3, salt=110 + i).double() for i in range(4)]
        self.y = [x.sum(1) + numbers(len(x), salt=150 + i).double() for i, x in enumerate(self.x)]

    def __call__(self) -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(3, dtype=torch.float64), 1.0).to_event(1))
        for i in pyro.plate("tasks", len(self.x), subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
            with pyro.plate(f"data_{i}", len(self.x[i]), subsample_size=self.rows or len(self.x[i])) as rows:
                pyro.sample(f"y_{i}", dist.Normal(self.x[i][rows] @ theta, 0.5), obs=self.y[i][rows])


WARMUP, DRAWS, SAVED_DRAWS = 8, 12, 6
#: Of a chain without noise the next transition is a function of the state that was saved.
NOISELESS: dict[str, Any] = {
    "step_size": 0.02,
    "temperature": 0.0,
    "preconditioner": "rms",
    "sgd_steps": 3,
    "thinning": 2,
}
TABLE: dict[str, Any] = {
    "step_size": 0.02,
    "phi_update": "langevin",
    "accumulator": "table",
    "phi_step_size": 0.002,
    "scan": "random",
}


def noiseless_chain(**options: Any) -> MCMC:
    """Draws of phi, exact given the tasks' theta."""
    return MCMC(SGLDGibbs(Lines(), **NOISELESS), DRAWS, warmup_steps=WARMUP, disable_progbar=True, **options)


def noisy_chain(draws: int, **options: Any) -> MCMC:
    """Minibatches, tasks in random order, a table of gradients: all that a checkpoint holds."""
    return MCMC(SGLDGibbs(Lines(rows=3), **TABLE), draws, warmup_steps=WARMUP, disable_progbar=True, **options)


def streaming_chain(statistics: Any, **options: Any) -> StreamingMCMC:
    """Summaries of the draws in place of the draws."""
    kernel, stats = SGLDGibbs(Lines(), **NOISELESS), StatsOfDict(default=statistics)
    return StreamingMCMC(kernel, DRAWS, WARMUP, statistics=stats, disable_progbar=True, **options)


def noisy_state(mcmc: MCMC) -> dict[str, Any]:
    """Draws of phi, and where the tasks' theta are."""
    thetas = [mcmc.kernel.theta(i)["theta"].tolist() for i in range(4)]
    return {"phi": mcmc.get_samples()["phi"].tolist(), "thetas": thetas}


STATISTICS: dict[str, Any] = {
    "moments": CountMeanVarianceStats,
    "mixture": lambda: OnlineGaussianMixture(2, buffer_size=6),
}


def meta_training(**changes: Any) -> LiFT:
    """A run of the front door, short, without noise in chain or data."""
    still = {"temperature": 0.0, "batch_size": 6, "sgd_steps": 4, "burn_in": 4, "samples": 16}
    return LiFT(adapted_backbone(), seed=0, **{**SETTINGS, **still, **changes})


def write_task(folder: Path) -> None:
    """A task of pictures for the embedded network, as the command line reads it."""
    folder.mkdir(parents=True)
    for part, rows in (("train", 10), ("test", 5)):
        images = 0.5 + numbers(rows, 1, 16, 16, salt=180 + rows)
        save_file({"x": images, "labels": torch.arange(rows) % 10}, folder / f"{part}.safetensors")


def summary(prior: LiFTPrior) -> dict[str, Any]:
    """What a prior predicts: by phi, by each component, by a task adapted to without noise; and its density."""
    mixture = prior.mixture.get()
    parts = mixture.component_distribution
    still = prior.adapt(NEW, seed=0, **STILL)
    starts = [TaskPosterior(prior.adapter, NEW, mean[None].float()) for mean in [mixture.mean, *parts.mean]]
    points = numbers(3, prior.adapter.dim, salt=170).to(mixture.mean)
    by_means = [] if prior.settings.head_scale else [each.predict(ROWS).tolist() for each in starts]
    return {
        "by_means": by_means,
        "weights": mixture.mixture_distribution.probs.tolist(),
        "means": parts.mean.tolist(),
        "sds": parts.variance.sqrt().tolist(),
        "log_prob": (mixture.log_prob(mixture.mean + points / 8.0) / prior.adapter.dim).tolist(),
        "adapted": still.predict(ROWS).tolist(),
        "component": still.component,
    }


def summarised(mcmc: StreamingMCMC, kind: str) -> dict[str, Any]:
    """Both moments of phi, of either statistic."""
    got = mcmc._statistics.stats[(0, "phi")].get()
    if kind == "moments":
        return {name: torch.as_tensor(value).tolist() for name, value in got.items()}
    return {"mean": got.mean.tolist(), "variance": got.variance.tolist()}


# ----------------------------------------------------------------------------------------------------------- the tests


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((SAVED / "expected.json").read_text())
    return loaded


def same(found: Any, wanted: Any) -> None:
    """Nested numbers, within :data:`CLOSE`."""
    assert type(found) is type(wanted)
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for name in wanted:
            same(found[name], wanted[name])
    else:
        as_tensor = [torch.tensor(value, dtype=torch.float64) for value in (found, wanted)]
        torch.testing.assert_close(*as_tensor, rtol=0.0, atol=CLOSE)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("network", [backbone, adapted_backbone])
def test_a_prior_saved_before_predicts_what_it_did(heads: str, network: Any, expected: dict[str, Any]) -> None:
    prior = LiFTPrior.from_pretrained(SAVED / f"prior_{heads}", network())
    assert prior.tasks == ("t0", "t1", "t2", "t3") and prior.results == {"accuracy": 0.5}
    as_then = {
        "head_scale": None if HEADS[heads] is None else 1.0,
        "head": "langevin",
        "sgd_weights": "rows",
        "task_steps": "rows",
        "max_move": 0.0,
        "sgd_includes_trial": False,
        "noise_scale": 1.0,
    }
    assert (
        prior.settings
        == meta_training(**SETTINGS, sigma=0.3, temperature=1.0, batch_size=16, translation="none", **as_then).settings
    )
    assert prior.mixture.components == 2 and prior.mixture.seen == SETTINGS["samples"]
    assert torch.equal(prior.adapter.initial, RandomAdapter(adapted_backbone()).initial)
    same(summary(prior), expected[f"prior_{heads}"])


@pytest.mark.parametrize("heads", HEADS)
def test_a_posterior_saved_before_predicts_what_it_did(heads: str, expected: dict[str, Any]) -> None:
    posterior = TaskPosterior.from_pretrained(SAVED / f"posterior_{heads}", backbone())
    assert posterior.task.name == "t5" and (posterior.heads is None) == (heads == "shared_head")
    wanted = expected[f"posterior_{heads}"]
    same({"predictions": posterior.predict(ROWS).tolist(), "component": posterior.component}, wanted)
    given = TaskPosterior.from_pretrained(SAVED / f"posterior_{heads}", backbone(), NEW)
    same(given.predict(ROWS).tolist(), wanted["predictions"])


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A copy of a saved run: going on writes into the folder."""
    return Path(shutil.copytree(SAVED / request.param, tmp_path / "run"))


class Counted:
    """A hook of Pyro's MCMC that counts transitions."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> None:
        self.calls += 1


@pytest.mark.parametrize("run", ["chain_without_noise"], indirect=True)
def test_a_chain_saved_before_goes_on_where_it_would_have_gone(run: Path, expected: dict[str, Any]) -> None:
    counted = Counted()
    mcmc = noiseless_chain(hook_fn=counted)
    mcmc.run(resume=run)
    assert counted.calls == DRAWS - SAVED_DRAWS
    same(mcmc.get_samples()["phi"].tolist(), expected["chain_without_noise"])


@pytest.mark.parametrize("run", ["chain"], indirect=True)
def test_a_noisy_chain_saved_before_keeps_its_draws_and_goes_on(run: Path, expected: dict[str, Any]) -> None:
    finished = noisy_chain(SAVED_DRAWS)
    finished.run(resume=run)
    same(noisy_state(finished), expected["chain"])
    counted = Counted()
    longer = noisy_chain(DRAWS, hook_fn=counted)
    longer.run(resume=run)
    draws = longer.get_samples()["phi"]
    assert counted.calls == DRAWS - SAVED_DRAWS and len(draws) == DRAWS
    same(draws[:SAVED_DRAWS].tolist(), expected["chain"]["phi"])
    assert bool((draws.diff(dim=0).norm(dim=-1) > 0.0).all())


@pytest.mark.parametrize("run", STATISTICS, indirect=True)
def test_summaries_saved_before_go_on(run: Path, request: pytest.FixtureRequest, expected: dict[str, Any]) -> None:
    kind, counted = request.node.callspec.params["run"], Counted()
    mcmc = streaming_chain(STATISTICS[kind], hook_fn=counted)
    mcmc.run(resume=run)
    assert counted.calls == DRAWS - SAVED_DRAWS
    same(summarised(mcmc, kind), expected[kind])


@pytest.mark.parametrize("run", ["meta_training"], indirect=True)
def test_meta_training_saved_before_goes_on_to_the_same_prior(run: Path, expected: dict[str, Any]) -> None:
    counted = Counted()
    # Adaptation had a rate and a power of its own then, where none was given; it inherits meta-training's now.
    adapt = AdaptSettings(temperature=1.0, n_inflate=1.0, learning_rate=2e-3)
    prior = meta_training(adapt=adapt).meta_train(TASKS, progress=False, resume=run, on_step=counted)
    assert counted.calls == 8
    prior.rescales = False  # nor did it bring the preconditioner to its own power
    same(summary(prior), expected["meta_training"])


def test_folders_of_the_command_line_saved_before_predict(tmp_path: Path, expected: dict[str, Any]) -> None:
    work = Path(shutil.copytree(SAVED / "command_line", tmp_path / "work"))
    write_task(work / "task")
    record = json.loads((work / "adapted" / "adapt.json").read_text())
    record |= {
        "prior": str(work / "prior"),
        "task_folder": str(work / "task"),
    }  # the paths of the machine that wrote it
    (work / "adapted" / "adapt.json").write_text(json.dumps(record))
    result = CliRunner().invoke(app, ["predict", str(work / "adapted")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    lines = (work / "adapted" / "predictions.jsonl").read_text().splitlines()
    same([json.loads(line)["probabilities"] for line in lines], expected["command_line"])
    result = CliRunner().invoke(
        app,
        ["adapt", str(work / "prior"), "--task", str(work / "task"), "--out", str(work / "again")],
        catch_exceptions=False,
    )
    assert result.exit_code == 0, result.output
    again = json.loads((work / "again" / "adapt.json").read_text())
    assert again.keys() >= record.keys() and again["component"] == record["component"]
