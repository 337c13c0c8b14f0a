"""The whole path on a device: nothing is mixed, and a visit makes the host wait for nothing.

The device is pretended (:mod:`pretended_cuda`); the last tests, marked ``gpu``, ask a real one for the same.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pyro
import pyro.distributions as dist
import pytest
import torch
from pretended_cuda import CUDA, MixedDevicesError, OnCuda, PretendedCUDA, pretended_cuda
from programs import Model, data, vectorised
from pyro.ops.streaming import StatsOfDict
from tiny_backbones import FAMILIES
from tiny_methods import SMALL, tiny_adapter, tiny_tasks
from torch import Tensor, nn

from pyro_lift import MCMC, SGLD, LiFT, SGLDGibbs, StreamingMCMC, Task, TaskPosterior, from_mcmc
from pyro_lift.inference import kernel as base_kernel
from pyro_lift.inference.mixture import compiled
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.mixture.in_place import MixtureStream
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.projections import ProjectedTrace
from pyro_lift.inference.sgld import DivergedError
from pyro_lift.inference.watch import LOOK_EVERY, Watch
from pyro_lift.methods.registry import BASELINES
from pyro_lift.metrics.task import scores
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone, recipe
from pyro_lift.models.door import check_rows
from pyro_lift.models.heads import HeadModel
from pyro_lift.models.solved_heads import held_out_log_prob

N = 6
#: One of each kind of algorithm, those that differ from it by a few lines or take longest are slow tests.
METHODS = [
    "linear-probe", "no-meta-train", "union-train", "maml", "imaml", "bmaml-m3", "maml-mix-k5",
    "retriever-mixture-k5", "mbc-k5", "protonet", "shared-peft", "lift",
]  # fmt: skip
ALIKE = sorted(set(BASELINES) - set(METHODS) - {name for name in BASELINES if name.startswith("lift-")})


@pytest.fixture
def cuda() -> Iterator[PretendedCUDA]:
    with pretended_cuda() as device:
        yield device


def on_device(block: int | None = 1, device: Any = CUDA, fault: Callable[[Tensor, int], Tensor] | None = None) -> Model:
    """``programs.vectorised`` as a program for a device is written: no number or index comes from the host."""
    y = data(N, device="cpu").to(device)
    zero = torch.zeros(2, dtype=torch.float64, device=device)
    wide, narrow, unit = (zero.new_full((), sd) for sd in (2.0, 0.5, 1.0))
    normal = partial(dist.Normal, validate_args=False)
    runs = iter(range(10**9))

    def model() -> None:
        phi = pyro.sample("phi", normal(zero, wide).to_event(1))
        with pyro.plate("tasks", N, subsample_size=block, device=device) as index:
            theta = pyro.sample("theta", normal(phi, narrow).to_event(1))
            if fault is not None:
                theta = fault(theta, next(runs))
            pyro.sample("y", normal(theta.unsqueeze(-2), unit).to_event(2), obs=y[index])

    return model


langevin: dict[str, Any] = {"phi_update": "langevin", "phi_step_size": 1e-3}
KERNELS: dict[str, tuple[type[Any], int | None, dict[str, Any]]] = {
    "sgld": (SGLD, None, {}),
    "sgld, rms, exponential": (SGLD, None, {"preconditioner": "rms", "integrator": "exponential"}),
    "gibbs": (SGLDGibbs, 1, {}),
    "gibbs, euler, inflated": (SGLDGibbs, 1, {"integrator": "euler", "n_inflate": 2}),
    "gibbs, block": (SGLDGibbs, 3, {}),
    "gibbs, all tasks": (SGLDGibbs, None, {}),
    "gibbs, random scan": (SGLDGibbs, 2, {"scan": "random"}),
    "gibbs, rms": (SGLDGibbs, 2, {"preconditioner": "rms", "theta_steps_per_visit": 2}),
    "gibbs, joint training": (SGLDGibbs, 2, {"sgd_steps": 8, "sgd_step_size": 0.01}),
    "gibbs, clipped": (SGLDGibbs, 1, {"max_grad_norm": 1.0}),
    "gibbs, host store": (SGLDGibbs, 2, {"store": "host"}),
    "gibbs, disk store": (SGLDGibbs, 2, {"store": "disk"}),
    "gibbs, saga": (SGLDGibbs, 2, {"translation": "saga", "preconditioner": "rms", "store": "host"}),
    "gibbs, falling": (SGLDGibbs, 1, {"translation": "falling", "translation_step_size": 1e-3}),
    "gibbs, mala": (SGLDGibbs, 2, {"theta_update": "mala"}),
    "gibbs, hmc": (SGLDGibbs, 1, {"theta_update": "hmc", "leapfrog_steps": 2}),
    "langevin, exact": (SGLDGibbs, 1, langevin),
    "langevin, table": (SGLDGibbs, 2, {**langevin, "accumulator": "table"}),
    "langevin, single": (SGLDGibbs, 1, {**langevin, "accumulator": "single"}),
}
WARMUP = 12


def kernel_on(name: str, device: Any, fault: Any = None, **more: Any) -> Any:
    make, block, options = KERNELS[name]
    return make(on_device(block, device, fault), step_size=0.02, seed=3, **options, **more)


def visits(kernel: Any, count: int) -> None:
    for _ in range(count):
        kernel.sample(kernel.initial_params)


def after_first_visits(kernel: Any) -> Any:
    """Set a kernel up and let it visit every task, which is where it learns them."""
    kernel.setup(WARMUP)
    while isinstance(kernel, SGLDGibbs) and len(list(kernel.store.tasks())) < N:  # type: ignore[union-attr]
        visits(kernel, 1)
    kernel.look()
    return kernel


def test_an_exact_draw_of_theta_runs_where_the_values_are(cuda: PretendedCUDA) -> None:
    kernel = SGLDGibbs(on_device(None, "cuda"), theta_update="exact", seed=3)
    kernel.setup(2)
    visits(kernel, 4)
    assert kernel.state.phi["phi"].device == CUDA and kernel.theta(1)["theta"].device == CUDA
    assert bool(torch.isfinite(kernel.state.phi["phi"].cpu()).all())


# --------------------------------------------------------------------------------------- the pretended device


def test_the_pretended_device_refuses_what_cuda_refuses(cuda: PretendedCUDA) -> None:
    there, here = torch.ones(3, device="cuda"), torch.ones(3)
    assert there.device == CUDA and there.is_cuda and torch.zeros_like(there).device == CUDA
    with pytest.raises(MixedDevicesError, match="same device"):
        there + here
    with pytest.raises(MixedDevicesError, match="same device"):
        here[torch.tensor([0], device="cuda")]
    with pytest.raises(MixedDevicesError, match="generator"):
        torch.randn(3, device="cuda", generator=torch.Generator())
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    assert (there + torch.tensor(1.0)).device == CUDA  # a number on the host goes along, as on CUDA
    torch.testing.assert_close((2.0 * there).cpu(), torch.full((3,), 2.0))


def test_the_pretended_device_counts_what_cuda_waits_for(cuda: PretendedCUDA) -> None:
    x, index = torch.arange(4.0, device="cuda"), torch.tensor([1, 2])
    quiet: list[Callable[[], Any]] = [
        lambda: x.sum() + 1.0,
        lambda: index.to("cuda", non_blocking=True),
        lambda: torch.where(x > 1.0, x, 0.0),
        lambda: torch.zeros(3, device="cuda"),
    ]
    for call in quiet:
        with cuda.counting() as waits:
            call()
        assert waits == []
    loud: list[Callable[[], Any]] = [
        lambda: x.sum().item(),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.to("cpu"),
        lambda: x.nonzero(),
        lambda: x[x > 1.0],
        lambda: x[index],
        lambda: torch.equal(x, x),
        lambda: index.to("cuda"),
        lambda: torch.tensor(2.0, device="cuda"),
        lambda: torch.empty(4).copy_(x),
    ]
    for number, call in enumerate(loud):
        with cuda.counting() as waits:
            call()
        assert len(waits) == 1, f"call {number}: {waits}"
        assert waits[0].startswith("contracts/test_on_a_device.py:")


def test_a_look_at_pinned_memory_before_the_copy_has_arrived_is_a_race(cuda: PretendedCUDA) -> None:
    x, place = torch.ones(3, device="cuda"), torch.empty(3, pin_memory=True)
    with cuda.counting() as waits:
        place.copy_(x, non_blocking=True)
    assert waits == []
    with pytest.raises(MixedDevicesError, match="on its way"):
        place + 1.0
    torch.cuda.current_stream()
    event = torch.cuda.Event()
    event.record()
    event.synchronize()
    torch.testing.assert_close(place + 1.0, torch.full((3,), 2.0))


def test_a_planted_look_at_a_value_is_found(cuda: PretendedCUDA) -> None:
    def look(theta: Tensor, run: int) -> Tensor:
        return theta * (2.0 if theta.sum().item() > 1e9 else 1.0)

    kernel = after_first_visits(kernel_on("gibbs", CUDA, look))
    with cuda.counting() as waits:
        visits(kernel, 5)
    assert len(waits) == 5
    assert all("test_on_a_device.py" in wait and "_local_scalar_dense" in wait for wait in waits)


def test_a_planted_mix_of_devices_is_found(cuda: PretendedCUDA) -> None:
    kernel = kernel_on("gibbs", CUDA, lambda theta, run: theta + torch.zeros(2, dtype=torch.float64))
    with pytest.raises(MixedDevicesError, match="same device"):
        kernel.setup(WARMUP)


# ------------------------------------------------------------------------------------------------- the chains


@pytest.mark.parametrize("name", KERNELS)
def test_a_visit_waits_for_nothing(name: str, cuda: PretendedCUDA) -> None:
    kernel = after_first_visits(kernel_on(name, CUDA))
    if name == "gibbs, joint training":
        with cuda.counting() as waits:
            visits(kernel, 3)
        assert kernel.phase == "sgd" and waits == []
        visits(kernel, 4)
    with cuda.counting() as waits:
        visits(kernel, 20)
    assert waits == []
    assert all(value.device == CUDA for value in kernel.initial_params.values())


def test_the_visits_are_looked_at_every_so_often(cuda: PretendedCUDA) -> None:
    kernel = after_first_visits(kernel_on("gibbs", CUDA))
    with cuda.counting() as waits:
        visits(kernel, 3 * LOOK_EVERY)
    assert len(waits) == 3 and all("watch.py" in wait for wait in waits)


#: The noise on a device has a stream of its own: these draw by it at any temperature.
RANDOM = {"gibbs, random scan", "gibbs, mala", "gibbs, hmc"}


@pytest.mark.parametrize("name", [name for name in KERNELS if name not in RANDOM])
def test_a_chain_on_the_device_has_the_numbers_of_one_on_the_host(name: str, cuda: PretendedCUDA) -> None:
    draws = {}
    for device in (torch.device("cpu"), CUDA):
        mcmc = MCMC(kernel_on(name, device, temperature=0.0), num_samples=8, warmup_steps=WARMUP, disable_progbar=True)
        mcmc.run()
        draws[device.type] = {site: value.cpu() for site, value in mcmc.get_samples().items()}
        stats = mcmc.kernel.diagnostics()["sample_stats"]
        assert all(len(column) == 8 and type(column[0]) in (float, bool, int) for column in stats.values())
    for site, value in draws["cpu"].items():
        torch.testing.assert_close(draws["cuda"][site], value, rtol=1e-12, atol=1e-12)


def test_a_program_that_was_not_written_for_a_device_runs_there_too(cuda: PretendedCUDA) -> None:
    kernel = SGLDGibbs(vectorised(2, device="cuda"), step_size=0.02, seed=0)
    kernel.setup(0)
    visits(kernel, 4)
    assert kernel.initial_params["phi"].device == CUDA


# -------------------------------------------------------------------------------------- divergence, seen later


def explode(at: int) -> Callable[[Tensor, int], Tensor]:
    """A likelihood that is no number from one run of the program on."""
    return lambda theta, run: theta * (float("nan") if run >= at else 1.0)


def diverged(device: Any, name: str, at: int, draws: int = 40) -> tuple[DivergedError, Any]:
    kernel = kernel_on(name, device, explode(at), temperature=0.0)
    with pytest.raises(DivergedError) as caught:
        MCMC(kernel, num_samples=draws, warmup_steps=WARMUP, disable_progbar=True).run()
    return caught.value, kernel


@pytest.mark.parametrize(
    "name", ["gibbs", "gibbs, rms", "gibbs, joint training", "langevin, table", "gibbs, host store", "gibbs, saga"]
)
def test_a_diverged_chain_is_refused_with_its_step_and_task_and_stands_at_its_last_good_state(
    name: str, cuda: PretendedCUDA
) -> None:
    at = 40 if name == "gibbs, rms" else 29
    there, device_kernel = diverged(CUDA, name, at)
    here, host_kernel = diverged(torch.device("cpu"), name, at)
    assert (there.step, there.tasks) == (here.step, here.tasks)
    assert str(there) == str(here)
    assert device_kernel.state.step == host_kernel.state.step == here.step
    for field in ("phi", "sums", "J", "second_moment", "offset", "gradients"):
        ours, theirs = getattr(device_kernel.state, field), getattr(host_kernel.state, field)
        assert ours.keys() == theirs.keys()
        for site, value in theirs.items():
            torch.testing.assert_close(ours[site].cpu(), value, rtol=1e-12, atol=1e-12)
    for task in range(N):
        torch.testing.assert_close(
            device_kernel.theta(task)["theta"].cpu(), host_kernel.theta(task)["theta"], rtol=1e-12, atol=1e-12
        )


def test_sgld_is_refused_at_the_same_step(cuda: PretendedCUDA) -> None:
    there, device_kernel = diverged(CUDA, "sgld, rms, exponential", 20)
    here, host_kernel = diverged(torch.device("cpu"), "sgld, rms, exponential", 20)
    assert str(there) == str(here) and device_kernel.state.step == host_kernel.state.step
    for site, value in host_kernel.state.position.items():
        torch.testing.assert_close(device_kernel.state.position[site].cpu(), value)


@pytest.mark.parametrize(
    "name", ["gibbs", "gibbs, rms", "gibbs, clipped", "langevin, table", "gibbs, joint training", "sgld"]
)
def test_looking_later_changes_no_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draws = []
    for watch in (None, Watch(every=7)):
        monkeypatch.setattr(base_kernel, "watch_on", lambda device, watch=watch: watch)
        mcmc = MCMC(kernel_on(name, "cpu"), num_samples=10, warmup_steps=WARMUP, disable_progbar=True)
        mcmc.run()
        draws.append(mcmc.get_samples())
    for site, value in draws[0].items():
        assert torch.equal(draws[1][site], value)


# ------------------------------------------------------------------------------------------ adapters and LiFT


def lift_on(cuda: PretendedCUDA, name: str, block: int = 1, **options: Any) -> tuple[LiFT, list[Task]]:
    torch.manual_seed(0)
    family = FAMILIES[name]
    backbone, tasks = family.make(), [family.task(f"t{i}") for i in range(4)]
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2)).to("cuda")
    defaults: dict[str, Any] = {"sgd_steps": 4, "burn_in": 8, "samples": 12, "batch_size": 4, "seed": 0}
    head = {"head_scale": family.head_scale, "head": "langevin"}
    return LiFT(adapter, block_size=block, **{**defaults, **head, **options}), tasks


def plain_waits(cuda: PretendedCUDA, adapter: RandomAdapter, task: Task) -> int:
    """What the network alone waits for, in one pass over some rows."""
    rows = task.to("cuda").train.take(slice(0, 4))
    theta = adapter.initial.clone().requires_grad_()
    with cuda.counting() as waits:
        torch.autograd.grad(adapter(*rows.positional, theta=theta, **rows.named).sum(), theta)
    return len(waits)


@pytest.mark.parametrize(
    ("name", "block"),
    [("timm", 1), ("timm", 4), ("vit", 1), ("vit", 2), ("bart", 1), ("t5", 1), ("gpt2", 1), ("bert", 1)],
)
def test_a_visit_of_lift_waits_for_no_more_than_the_network_alone(name: str, block: int, cuda: PretendedCUDA) -> None:
    lift, tasks = lift_on(cuda, name, block, preconditioner="rms")
    kernel = lift.kernel(lift.program(tasks))
    kernel.setup(12)
    visits(kernel, 4)
    kernel.look()
    alone = plain_waits(cuda, lift.adapter, tasks[0])
    assert name not in ("timm", "vit") or alone == 0
    with cuda.counting() as waits:
        visits(kernel, 12)
    assert len(waits) <= 12 * alone
    assert not [wait for wait in waits if not wait.startswith("models/")]


@pytest.mark.parametrize("block", [1, 4])
def test_long_vectors_wait_for_nothing_either(block: int, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.inference.gibbs.long_vectors.FLAT_FROM", 1)
    lift, tasks = lift_on(cuda, "timm", block, preconditioner="rms", beta=0.05, sigma=0.5)
    kernel = lift.kernel(lift.program(tasks))
    kernel.setup(12)
    assert kernel.structure is not None and bool(kernel.structure.long) == (block == 1)
    visits(kernel, 6)
    kernel.look()
    with cuda.counting() as waits:
        visits(kernel, 12)
    assert waits == []


def test_from_meta_training_to_predictions_nothing_is_mixed(cuda: PretendedCUDA) -> None:
    lift, tasks = lift_on(cuda, "vit", 2)
    prior = lift.meta_train(tasks, progress=False)
    assert prior.mixture.get().component_distribution.mean.device == CUDA
    trace = from_mcmc(prior.mcmc)
    assert trace.posterior.sizes["draw"] == 12
    posterior = prior.adapt(tasks[0], steps=20, draws=5)
    probabilities = posterior.predict(tasks[1].train)
    assert probabilities.device == CUDA
    assert 0.0 <= scores(probabilities, tasks[1].train, tasks[1])["accuracy"] <= 1.0
    several = prior.adapt_many(tasks, steps=20, draws=5, block_size=2)
    assert [p.thetas.device for p in several] == [CUDA] * 4


def test_meta_training_waits_for_its_draws_and_the_looks_at_it(cuda: PretendedCUDA) -> None:
    counts = []
    for samples in (10, 10 + LOOK_EVERY):
        lift, tasks = lift_on(cuda, "timm", samples=samples)
        with cuda.counting() as waits:
            lift.meta_train(tasks, progress=False)
        counts.append(len(waits))
    # Of each further draw the mixture; of fifty visits the look at them, the log, and two looks at the loss.
    assert counts[1] - counts[0] <= 2 * LOOK_EVERY + 4


def test_a_step_of_adaptation_waits_for_nothing(cuda: PretendedCUDA) -> None:
    lift, tasks = lift_on(cuda, "timm")
    prior = lift.meta_train(tasks, progress=False)
    counts = []
    for steps in (20, 20 + LOOK_EVERY):
        with cuda.counting() as waits:
            prior.adapt(tasks[0], steps=steps, draws=5)
        counts.append(len(waits))
    assert counts[1] <= counts[0] + 2  # the look at the visits, and the log's
    counts = []
    for draws in (5, 20):
        posterior = prior.adapt(tasks[0], steps=40, draws=draws)
        posterior.predict(tasks[1].train)  # the first pass of several draws is held against single ones
        with cuda.counting() as waits:
            posterior.predict(tasks[1].train)
        counts.append(len(waits))
    assert counts[0] == counts[1]  # nothing waits for a draw


def test_heads_are_solved_on_the_device_to_the_same_numbers(cuda: PretendedCUDA) -> None:
    torch.manual_seed(0)
    features, target = torch.randn(12, 3, dtype=torch.float64), torch.arange(12) % 3
    heads = []
    for device in ("cpu", "cuda"):
        x = features.to(device).requires_grad_()
        log_prob = held_out_log_prob(x, target.to(device), HeadModel(3), 0.5)
        heads.append((log_prob.detach().cpu(), torch.autograd.grad(log_prob.sum(), x)[0].cpu()))
    torch.testing.assert_close(heads[1], heads[0], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["bart", "gpt2", "bert"])
def test_the_door_looks_once_at_the_rows_of_a_task(name: str, cuda: PretendedCUDA) -> None:
    torch.manual_seed(0)
    family = FAMILIES[name]
    backbone: Any = family.make()
    config = peft.LoraConfig(r=2, target_modules=["query"]) if name == "bert" else recipe(backbone, rank=2)
    adapter = adapt_backbone(backbone, config).to("cuda")
    tasks = []
    for key in "abc":
        train = family.task(key)
        tasks.append(replace(train, test=train.train, dev=train.train).to("cuda"))
    with cuda.counting() as waits:
        check_rows(adapter, tasks)
    assert len(waits) == len(tasks)


@pytest.mark.parametrize("which", [0, "mean", "draws"])
@pytest.mark.parametrize("name", ["bart", "gpt2"])
def test_text_is_written_on_the_device_as_on_the_host(
    name: str, which: Any, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A pretended device has no stream of its own to put back; without sampling nothing is drawn from it.
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: torch.empty(0))
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda seed: None)
    torch.manual_seed(0)
    family = FAMILIES[name]
    backbone, task = family.make(), family.task("t")
    adapter = adapt_backbone(backbone, recipe(backbone, rank=2))
    thetas = adapter.initial + 0.5 * torch.randn(3, adapter.dim)
    prompts = {key: task.train.inputs[key][:3] for key in ("input_ids", "attention_mask")}
    options: dict[str, Any] = {"which": which, "max_new_tokens": 5, "num_beams": 2}
    expected = TaskPosterior(adapter, task, thetas).generate(prompts, **options)
    posterior = TaskPosterior(adapter.to("cuda"), task.to("cuda"), thetas.to("cuda"))
    got = posterior.generate({key: x.to("cuda") for key, x in prompts.items()}, **options)
    assert torch.equal(got.to("cpu"), expected)


@pytest.mark.parametrize("name", [*METHODS, *(pytest.param(name, marks=pytest.mark.slow) for name in ALIKE)])
def test_every_method_runs_on_the_device(name: str, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro_lift.inference.baselines.peak_memory.graph_bytes", lambda *given: 0)  # looks at pointers
    adapter, tasks = tiny_adapter().to("cuda"), [task.to("cuda") for task in tiny_tasks(3)]
    method = BASELINES[name](adapter, replace(SMALL, warm_up=2, visits=4, steps=4))
    predictions = method.adapt(method.meta_train(tasks), tasks[0]).predict(tasks[1].train)
    assert torch.isfinite(predictions.cpu()).all()


# -------------------------------------------------------------------------------------------------- the draws


def feed(cuda: PretendedCUDA, statistic: Any, draws: Tensor) -> int:
    """Give a statistic draws of the device, and return how often that waited."""
    with cuda.counting() as waits:
        for draw in draws:
            statistic.update(draw)
    return len(waits)


@pytest.mark.parametrize("covariance", ["diag", "spherical", "full"])
def test_a_short_draw_waits_twice_and_once_more_for_a_factor(covariance: Any, cuda: PretendedCUDA) -> None:
    draws = torch.randn(60, 5, device="cuda")
    mixture = OnlineGaussianMixture(2, covariance, buffer_size=20)
    for draw in draws[:20]:
        mixture.update(draw)
    assert feed(cuda, mixture, draws[20:]) <= (3 if covariance == "full" else 2) * 40
    assert mixture.moments.mean.device == CUDA


@pytest.mark.parametrize(("covariance", "fused"), [("diag", True), ("diag", False), ("spherical", False)])
def test_a_long_draw_waits_twice_at_most(
    covariance: Any, fused: bool, cuda: PretendedCUDA, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is compiled needs the device's own compiler; its functions are the same without.
    monkeypatch.setattr(compiled, "_compiled", lambda function: function)
    monkeypatch.setattr("pyro_lift.inference.mixture.in_place.compiles", lambda device: True)
    D = 10_000
    mean = torch.randn(3, D, device="cuda")
    variance = torch.ones(3, D if covariance == "diag" else 1, device="cuda")
    moments = Moments(torch.full((3,), 1 / 3, device="cuda"), mean, variance)
    stream = MixtureStream(moments, moments, 10.0, 10, 0.0, covariance, power=0.7, floor=1e-6, fused=fused)
    assert (stream.fused is not None) == fused
    assert feed(cuda, stream, mean.repeat(4, 1) + 0.1) <= 2 * 12
    assert stream.average.mean.device == CUDA


def test_the_compiled_steps_keep_to_their_device_as_fake_tensors_do() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as fake:
        rows = [torch.empty(8, compiled.ROW, device="cuda") for _ in range(12)]
        number = torch.empty((), device="cuda")
        assert compiled.quadratics(rows[0], rows[1:4], rows[4:7]).shape == (3, 8)
        assert compiled.quadratics(rows[0], rows[1:4], rows[4:7]).device.type == "cuda"
        moved = compiled.move(rows[:4], rows[4:8], rows[8:], number, number, number)
        assert moved.shape == (8,) and moved.device.type == "cuda"
        pooled = compiled.pool_and_move(
            rows[:2], rows[2:4], rows[4:6], rows[6:8], rows[8:10], number, number, number, number
        )
        assert pooled.shape == (8,) and pooled.device.type == "cuda"
        with pytest.raises(Exception, match="device"):
            compiled.quadratics(torch.empty(8, compiled.ROW), rows[1:4], rows[4:7])
    assert fake is not None


def test_a_trace_waits_for_nothing(cuda: PretendedCUDA) -> None:
    trace = ProjectedTrace(4)
    trace.update(torch.randn(50, device="cuda"))
    assert feed(cuda, trace, torch.randn(20, 50, device="cuda")) == 0
    assert trace.get()["projection"].shape == (21, 4)


# --------------------------------------------------------------------------------------------- saved and resumed


def statistics() -> StatsOfDict:
    return StatsOfDict(default=partial(OnlineGaussianMixture, 2, buffer_size=8))


def saved_run(device: Any, samples: int, folder: Path, **how: Any) -> Any:
    kernel = kernel_on("gibbs, rms", device, temperature=0.0)
    mcmc = StreamingMCMC(kernel, samples, WARMUP, statistics=statistics(), disable_progbar=True)
    mcmc.run(**how)
    return mcmc


@pytest.mark.parametrize(("begin", "end"), [("cuda", "cuda"), ("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_is_resumed_on_either_device(begin: str, end: str, tmp_path: Path, cuda: PretendedCUDA) -> None:
    whole = saved_run("cpu", 24, tmp_path, checkpoint=tmp_path / "whole").kernel
    devices = {"cpu": torch.device("cpu"), "cuda": CUDA}
    saved_run(devices[begin], 8, tmp_path, checkpoint=tmp_path / "run")
    for samples in (16, 24):  # the second time what was saved holds draws of both devices
        resumed = saved_run(devices[end], samples, tmp_path, resume=tmp_path / "run").kernel
    for site, value in whole.state.phi.items():
        torch.testing.assert_close(resumed.state.phi[site].cpu(), value, rtol=1e-12, atol=1e-12)
    assert len(resumed.diagnostics()["sample_stats"]["grad_norm"]) == 24


def test_a_checkpoint_is_not_written_of_a_chain_that_has_diverged(tmp_path: Path, cuda: PretendedCUDA) -> None:
    kernel = kernel_on("gibbs", CUDA, explode(20))
    mcmc = MCMC(kernel, num_samples=30, warmup_steps=5, disable_progbar=True)
    with pytest.raises(DivergedError):
        mcmc.run(checkpoint=tmp_path / "run", checkpoint_every=4)
    last = max((tmp_path / "run").glob("step-*"))
    assert json.loads((last / "state.json").read_text())["transitions"] <= kernel.state.step


# ---------------------------------------------------------------------------------------------- a real device


@pytest.fixture
def strict() -> Iterator[None]:
    """Let CUDA itself refuse to be waited for."""
    refuse_waiting(False)
    yield
    refuse_waiting(False)


def refuse_waiting(refuse: bool) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error" if refuse else "default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", [name for name in KERNELS if name != "gibbs, disk store"])
def test_a_visit_waits_for_nothing_on_cuda(name: str, strict: None) -> None:
    kernel = after_first_visits(kernel_on(name, torch.device("cuda")))
    visits(kernel, 8)
    kernel.look()
    refuse_waiting(True)
    visits(kernel, 20)


@pytest.mark.gpu
def test_a_visit_of_lift_waits_for_nothing_on_cuda(strict: None) -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
    import peft

    tasks = [Task(f"t{i}", (torch.randn(12, 4), torch.arange(12) % 3)) for i in range(4)]
    adapter = adapt_backbone(net, peft.LoraConfig(r=2, target_modules=["0", "2"])).to("cuda")
    lift = LiFT(adapter, sgd_steps=4, burn_in=8, samples=12, batch_size=4, seed=0)
    kernel = lift.kernel(lift.program(tasks))
    kernel.setup(12)
    visits(kernel, 6)
    kernel.look()
    refuse_waiting(True)
    visits(kernel, 20)


def test_nothing_of_the_pretended_device_is_left_behind() -> None:
    with pretended_cuda():
        x = torch.ones(2, device="cuda")
        assert isinstance(x, OnCuda)
    assert torch.Generator().device.type == "cpu" and type(torch.Generator()) is torch.Generator
    with pytest.raises(RuntimeError, match="outlived"):
        x + 1.0
