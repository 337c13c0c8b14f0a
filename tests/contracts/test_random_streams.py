"""Random streams: no seed of ours touches the caller's, a seed makes a run repeatable, and streams come from a hash."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.mcmc.api import mp
from torch import Tensor, nn

from pyro_lift import MCMC, SGLD, LiFT, LiFTPrior, SGLDGibbs, StreamingMCMC, Task
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.gibbs.shared_visit import generator_of
from pyro_lift.methods.registry import BASELINES
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.support.random_streams import generator, own_global_stream, stream_seed


def tasks() -> list[Task]:
    x = torch.linspace(-1.0, 1.0, 32).view(8, 4)
    return [Task(f"t{i}", (x + i, torch.arange(8) % 3), num_classes=3) for i in range(3)]


def lift(seed: int | None = 0) -> LiFT:
    net = nn.Sequential(nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(12.0).view(3, 4) / 12.0)  # type: ignore[operator]
    return LiFT(net, peft.LoraConfig(r=1, target_modules=["0"]), sgd_steps=3, burn_in=3, samples=12, seed=seed)


def trained() -> LiFTPrior:
    return lift().meta_train(tasks(), progress=False)


def model() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    for i in pyro.plate("tasks", 4, subsample_size=1):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5).to_event(1))
        pyro.sample(f"y_{i}", dist.Normal(theta, 1.0).to_event(1), obs=torch.ones(2))


def run(kernel: Any, **options: Any) -> dict[str, Tensor]:
    mcmc = MCMC(kernel, 20, warmup_steps=4, disable_progbar=True, **options)
    mcmc.run()
    samples: dict[str, Tensor] = mcmc.get_samples(group_by_chain=True)
    return samples


def streams() -> tuple[Any, ...]:
    """The states of the three global streams."""
    kind, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), (kind, list(keys), position), random.getstate()


def untouched(work: Callable[[], Any]) -> Any:
    """The result of some work that leaves every global stream where it was."""
    before = streams()
    result = work()
    assert streams() == before
    return result


def test_meta_training_and_adaptation_with_a_seed_leave_the_callers_streams_alone() -> None:
    learner = lift()
    prior = untouched(lambda: learner.meta_train(tasks(), progress=False))
    task, *others = tasks()
    untouched(lambda: prior.adapt(task, steps=10, draws=2).predict(task.train.inputs[""]))
    untouched(lambda: prior.adapt_many([task, *others], block_size=2, steps=10, draws=2))
    untouched(lambda: prior.adapt(task, seed=7, steps=10, draws=2))


@pytest.mark.parametrize(
    "kernel",
    [
        lambda seed: SGLDGibbs(model, step_size=0.1, seed=seed),
        lambda seed: SGLDGibbs(model, step_size=0.1, seed=seed, init_strategy=pyro.infer.autoguide.init_to_sample),
        lambda seed: SGLDGibbs(model, step_size=0.1, seed=seed, scan="random", preconditioner="rms", sgd_steps=2),
        lambda seed: SGLD(flat, 0.01, seed=seed),
        lambda seed: SGLD(flat, 0.01, seed=seed, init_strategy=pyro.infer.autoguide.init_to_sample),
    ],
)
def test_a_kernel_with_a_seed_repeats_itself_and_leaves_the_callers_streams_alone(kernel: Any) -> None:
    first = untouched(lambda: run(kernel(3)))
    torch.rand(5)
    second, other = run(kernel(3)), run(kernel(4))
    for name in first:
        assert torch.equal(first[name], second[name])
        assert not torch.equal(first[name], other[name])


def flat() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    with pyro.plate("rows", 8, subsample_size=2) as index:
        pyro.sample("y", dist.Normal(phi.sum(), 1.0), obs=torch.arange(8.0)[index])


def test_a_run_with_a_seed_can_be_repeated_with_the_same_kernel() -> None:
    kernel = SGLDGibbs(model, step_size=0.1, seed=3)
    mcmc = MCMC(kernel, 20, warmup_steps=4, disable_progbar=True)
    mcmc.run()
    first = mcmc.get_samples()["phi"]
    mcmc.run()
    assert torch.equal(first, mcmc.get_samples()["phi"])


def in_a_process(out: Any) -> None:
    """Run one chain where nobody has seeded anything, as a pool's worker does."""
    torch.manual_seed(99)
    out.put(run(SGLDGibbs(model, step_size=0.1, seed=3))["phi"].tolist())


def test_a_chain_with_a_seed_is_the_same_chain_in_a_process_of_a_pool() -> None:
    context = multiprocessing.get_context("fork")
    out = context.SimpleQueue()
    worker = context.Process(target=in_a_process, args=(out,))
    worker.start()
    draws = torch.tensor(out.get())
    worker.join()
    torch.testing.assert_close(draws, run(SGLDGibbs(model, step_size=0.1, seed=3))["phi"])


@pytest.mark.filterwarnings("ignore:num_chains")
def test_pyros_own_mcmc_gives_each_of_its_processes_the_stream_of_its_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mp, "cpu_count", lambda: 8)  # Pyro runs as many chains at once as it sees cores to spare
    kernel = SGLDGibbs(model, step_size=0.1, seed=3)
    mcmc = pyro.infer.MCMC(kernel, 20, warmup_steps=4, num_chains=2, mp_context="fork", disable_progbar=True)
    mcmc.run()
    torch.testing.assert_close(
        mcmc.get_samples(group_by_chain=True)["phi"], run(SGLDGibbs(model, step_size=0.1, seed=3), num_chains=2)["phi"]
    )


@pytest.mark.filterwarnings("ignore:num_chains")
def test_chains_of_one_run_have_streams_of_their_own() -> None:
    both = run(SGLDGibbs(model, step_size=0.1, seed=3), num_chains=2)["phi"]
    assert not torch.equal(both[0], both[1])
    assert torch.equal(both[:1], run(SGLDGibbs(model, step_size=0.1, seed=3))["phi"])


@pytest.mark.filterwarnings("ignore:num_chains")
def test_streaming_chains_of_one_run_differ_too() -> None:
    kernel = SGLDGibbs(model, step_size=0.1, seed=3)
    mcmc = StreamingMCMC(kernel, num_samples=20, warmup_steps=4, num_chains=2, disable_progbar=True)
    mcmc.run()
    means = [statistics["mean"] for statistics in mcmc.get_statistics(group_by_chain=True).values()]
    assert len({tuple(mean.tolist()) for mean in means}) == len(means)


def test_without_a_seed_the_callers_stream_governs_the_chain() -> None:
    pyro.set_rng_seed(5)
    first = run(SGLDGibbs(model, step_size=0.1))["phi"]
    pyro.set_rng_seed(5)
    assert torch.equal(first, run(SGLDGibbs(model, step_size=0.1))["phi"])
    assert not torch.equal(first, run(SGLDGibbs(model, step_size=0.1))["phi"])


@pytest.mark.parametrize("name", ["no-meta-train", "union-train", "reptile", "retriever-fusion-k5", "lift"])
def test_a_method_leaves_the_callers_streams_alone(name: str) -> None:
    net = nn.Sequential(nn.Linear(4, 3))
    adapter = adapt_backbone(net, peft.LoraConfig(r=1, target_modules=["0"]))
    method = BASELINES[name](adapter, Budget(warm_up=6, visits=24, steps=20, draws=5))
    state = untouched(lambda: method.meta_train(tasks()))
    untouched(lambda: method.adapt(state, tasks()[0]))


def test_a_callers_loop_that_makes_a_task_and_adapts_to_it_makes_another_each_time() -> None:
    prior = trained()
    torch.manual_seed(99)
    drawn = []
    for _ in range(2):
        task = Task("new", (torch.randn(8, 4), torch.arange(8) % 3), num_classes=3)
        prior.adapt(task, steps=10, draws=2)
        drawn.append(task.train.inputs[""])
    assert not torch.equal(*drawn)


def test_streams_of_neighbouring_keys_and_seeds_have_nothing_in_common() -> None:
    keys = [(seed, visit, task) for seed in range(6) for visit in range(20) for task in range(20)]
    seeds = {stream_seed(*key) for key in keys}
    assert len(seeds) == len(keys) and max(seeds) < 2**63
    # Not linear: the difference of neighbours is another one everywhere.
    steps = {stream_seed(0, visit + 1, 3) - stream_seed(0, visit, 3) for visit in range(50)}
    assert len(steps) == 50
    assert stream_seed(1, 2) != stream_seed(2, 1) != stream_seed(1, 2, 0)


def test_a_pass_of_a_shared_visit_has_a_stream_that_no_other_seed_repeats() -> None:
    """Linear seeds did: (seed, visit, task) = (5, 11, 3) and (26, 10, 131) drew the same noise."""
    first, second = (torch.randn(4, generator=generator_of(*key)) for key in ((5, 11, 3), (26, 10, 131)))
    assert not torch.equal(first, second)
    again = torch.randn(4, generator=generator_of(5, 11, 3))
    assert torch.equal(first, again)


def test_a_global_stream_of_ours_ends_with_its_context() -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    with own_global_stream(7):
        own = torch.rand(2)
    assert torch.equal(torch.rand(2), expected) and not torch.equal(own, expected)
    with own_global_stream(None):
        assert not torch.equal(torch.rand(2), expected)
    assert torch.equal(torch.rand(2, generator=generator(1, 2)), torch.rand(2, generator=generator(1, 2)))
