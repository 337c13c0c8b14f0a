"""Nothing of the caller's changes by any call of ours, and no mode of the caller's changes what a call returns."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import callers_world
import peft
import pyro
import pyro.distributions as dist
import pytest
import sklearn.linear_model  # noqa: F401  (its first import sets variables and draws from `random`)
import torch
from pyro import poutine
from torch import Tensor, nn

from pyro_lift import MCMC, SGLD, LiFT, LiFTPrior, OnlineGaussianMixture, SGLDGibbs, StreamingMCMC, Task, TaskPosterior
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.backbones import adapt_backbone

CONFIG = {"r": 1, "target_modules": ["0", "2"]}


class World:
    """What the caller owns: a network, data, tasks made of them."""

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.folder = self.out = folder
        self.net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3)).train()
        self.data = [(torch.randn(8, 4) + i, torch.arange(8) % 3) for i in range(3)]
        self.tasks = [Task(f"t{i}", pair, num_classes=3, test=pair) for i, pair in enumerate(self.data)]
        # What later steps need was made before the photograph.
        self.adapter = adapt_backbone(self.net, peft.LoraConfig(**CONFIG))
        self.prior = LiFT(self.adapter, sgd_steps=3, burn_in=3, samples=12, seed=0).meta_train(
            self.tasks, progress=False
        )
        self.posterior = self.prior.adapt(self.tasks[0], steps=6, draws=2)
        self.prior.save_pretrained(folder / "prior")
        self.posterior.save_pretrained(folder / "posterior")
        self.start = torch.full((2,), 0.25)

    def photograph(self) -> dict[str, Any]:
        own = [x for pair in self.data for x in pair]
        rows = [x for task in self.tasks for x in (*task.train.inputs.values(), task.train.target)]
        kept = [self.adapter.initial, self.posterior.thetas, self.start, *self.prior.mixture.moments]
        return {
            **callers_world.settings(),
            "network": callers_world.module(self.net),
            "data": callers_world.tensors(own),
            "tasks": callers_world.tensors(rows),
            "results": [x.tolist() for x in kept],
        }


def hierarchy() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("tasks", 4, subsample_size=1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
        pyro.sample("y", dist.Normal(theta, 1.0).to_event(1), obs=torch.arange(8.0).view(4, 2)[index])


def flat() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(phi.sum(), 1.0), obs=torch.tensor(1.0))


def meta_train(w: World) -> Tensor:
    return (
        LiFT(w.adapter, sgd_steps=3, burn_in=3, samples=12, seed=1)
        .meta_train(w.tasks, progress=False)
        .mixture.moments.mean
    )


def run(kernel: Any, **options: Any) -> Tensor:
    mcmc = MCMC(kernel, 5, warmup_steps=2, disable_progbar=True, **options)
    mcmc.run()
    draws: Tensor = mcmc.get_samples()["phi"]
    return draws


def stream(w: World) -> Tensor:
    statistics = pyro.ops.streaming.StatsOfDict(default=pyro.ops.streaming.CountMeanVarianceStats)
    mcmc = StreamingMCMC(SGLD(flat, 0.1, seed=0), num_samples=5, statistics=statistics, disable_progbar=True)
    mcmc.run()
    mean: Tensor = mcmc.get_statistics()[0, "phi"]["mean"]
    return mean


def mixture(w: World) -> Tensor:
    summary = OnlineGaussianMixture(2)
    shifts = torch.arange(24.0, dtype=w.posterior.thetas.dtype)  # the same draws in every mode
    for x in w.posterior.thetas.repeat(12, 1) + shifts.unsqueeze(1):
        summary.update(x)
    return summary.moments.mean


def saved(w: World) -> None:
    w.prior.save_pretrained(w.out / "again")
    w.posterior.save_pretrained(w.out / "again2")
    w.posterior.to_peft(w.out / "again3")


def loaded(w: World) -> Tensor:
    with torch.random.fork_rng(), torch.inference_mode(False):
        net = nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.3), nn.Linear(5, 3)).float()
    net.load_state_dict(w.net.state_dict())
    prior = LiFTPrior.from_pretrained(w.folder / "prior", net)
    posterior = TaskPosterior.from_pretrained(w.folder / "posterior", prior.adapter)
    return posterior.predict(w.data[0][0])


def method(name: str) -> Callable[[World], Tensor]:
    def work(w: World) -> Tensor:
        learner = BASELINES[name](w.adapter, Budget(warm_up=4, visits=24, steps=10, draws=5, batch_size=4))
        state = learner.meta_train(w.tasks)
        result: Tensor = learner.adapt(state, w.tasks[0]).predict(w.data[0][0])
        return result

    return work


def trained_with_checkpoints(w: World) -> Tensor:
    learner = LiFT(w.adapter, sgd_steps=3, burn_in=3, samples=12, seed=1)
    prior = learner.meta_train(w.tasks, progress=False, checkpoint=w.out / "checkpoints", checkpoint_every=5)
    return prior.mixture.moments.mean


#: Other settings of a method that is there already.
VARIANTS = [name for name in BASELINES if name[-1].isdigit() or name.endswith(("-all", "-x", "-table", "-single"))]
CALLS: dict[str, Callable[[World], Any]] = {
    "Task": lambda w: Task("new", w.data[0], test=w.data[1]).train.target,
    "LiFT": lambda w: LiFT(w.net, peft.LoraConfig(**CONFIG), seed=0).adapter.initial,
    "meta_train": meta_train,
    "meta_train with checkpoints": trained_with_checkpoints,
    "adapt": lambda w: w.prior.adapt(w.tasks[1], steps=6, draws=2, seed=3).thetas,
    "adapt_many": lambda w: torch.stack([p.thetas for p in w.prior.adapt_many(w.tasks, steps=6, draws=2, seed=3)]),
    "predict": lambda w: w.posterior.predict(w.data[0][0]),
    "save": saved,
    "load": loaded,
    "SGLDGibbs": lambda w: run(SGLDGibbs(hierarchy, seed=0), initial_params={"phi": w.start}),
    "SGLDGibbs on the disk": lambda w: run(SGLDGibbs(hierarchy, seed=0, store="disk", preconditioner="rms")),
    "SGLD": lambda w: run(SGLD(flat, 0.1, seed=0), initial_params={"phi": w.start}),
    "StreamingMCMC": stream,
    "mixture": mixture,
    **{f"method {name}": method(name) for name in BASELINES if name not in VARIANTS},
}
SOME = ["meta_train", "adapt", "adapt_many", "predict", "load", "SGLDGibbs", "SGLD", "mixture"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> World:
    """One world for all tests: none of them may change it."""
    return World(tmp_path_factory.mktemp("kept"))


@pytest.fixture
def world(made: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.chdir(tmp_path)
    made.out = made.folder / tmp_path.name
    return made


@contextmanager
def unlike_the_default() -> Iterator[None]:
    """A world whose every setting is another than at the start, so that one put back to its default shows."""
    with ExitStack() as stack:
        handler = logging.NullHandler()
        logger = logging.getLogger("pyro.infer.mcmc")
        before = logger.handlers, logger.level, logger.propagate
        stack.callback(lambda: (setattr(logger, "handlers", before[0]), logger.setLevel(before[1])))
        stack.callback(setattr, logger, "propagate", before[2])
        logger.handlers, logger.propagate = [handler], True
        logger.setLevel(logging.ERROR)
        threads = torch.get_num_threads()
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        stack.callback(torch.use_deterministic_algorithms, False)
        torch.use_deterministic_algorithms(True, warn_only=True)
        stack.enter_context(pyro.validation_enabled(False))
        stack.callback(pyro.clear_param_store)
        pyro.param("mine", torch.ones(2))
        yield


@pytest.mark.parametrize("name", CALLS)
def test_nothing_of_the_callers_changes(name: str, world: World) -> None:
    with unlike_the_default():
        before = world.photograph()
        CALLS[name](world)
        after = world.photograph()
    for what, value in before.items():
        assert after[what] == value, what


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64 by default": lambda: default_dtype(torch.float64),
    "deterministic": deterministic,
    "validation": lambda: pyro.validation_enabled(True),
    "no validation": lambda: pyro.validation_enabled(False),
    "anomalies": lambda: torch.autograd.set_detect_anomaly(True),
    "a plate": lambda: pyro.plate("outer", 7),
    "a plate of the same name": lambda: pyro.plate("tasks", 7, dim=-1),
    "a scale": lambda: poutine.scale(scale=0.5),
    "a mask": lambda: poutine.mask(mask=False),
    "a trace": poutine.trace,
    "a condition": lambda: poutine.condition(data={"phi": torch.zeros(2), "theta": torch.zeros(2)}),
    "a block": poutine.block,
    "a seed": lambda: poutine.seed(rng_seed=3),
}


#: A program that makes its own tensors makes them in the caller's default type, as it should.
SKIPPED = {("SGLDGibbs", "float64 by default"), ("SGLD", "float64 by default")}
EVERY = [(name, mode) for name in SOME for mode in MODES if (name, mode) not in SKIPPED]
EVERY += [(name, mode) for name in CALLS if name[:6] == "method" for mode in ("no_grad", "inference_mode", "a plate")]


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize(("name", "mode"), EVERY)
def test_no_mode_of_the_callers_changes_what_is_returned(name: str, mode: str, world: World) -> None:
    expected = CALLS[name](world)
    with MODES[mode]():
        got = CALLS[name](world)
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=1e-5)
    assert got.dtype == expected.dtype


def test_tensors_made_in_inference_mode_can_be_learned_from(made: World) -> None:
    with torch.inference_mode():
        pair = made.data[0][0].clone(), made.data[0][1].clone()
        task = Task("new", pair, num_classes=3)
        arrays = Task("new", (pair[0].numpy(), pair[1].numpy()), num_classes=3)
    expected = made.prior.adapt(Task("new", made.data[0], num_classes=3), steps=6, draws=2, seed=3).thetas
    for one in (task, arrays):
        assert torch.equal(made.prior.adapt(one, steps=6, draws=2, seed=3).thetas, expected)


def test_a_network_made_in_inference_mode_is_refused_by_name() -> None:
    with torch.inference_mode():
        net = nn.Sequential(nn.Linear(4, 3))
    with pytest.raises(ValueError, match=r"'0.weight' was made under torch.inference_mode\(\)"):
        LiFT(net, peft.LoraConfig(r=1, target_modules=["0"]))


def test_a_chain_under_no_grad_sees_the_data() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        pyro.sample("y", dist.Normal(phi, 0.1), obs=torch.tensor(3.0))

    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            mcmc = MCMC(SGLD(model, 0.001, seed=0), 300, warmup_steps=200, disable_progbar=True)
            mcmc.run()
        assert float(mcmc.get_samples()["phi"].mean()) == pytest.approx(3.0 / 1.01, abs=0.1)
