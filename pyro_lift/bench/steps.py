"""Steps that the benchmarks time: plain fine-tuning, LiFT, MAML, the mixture and the sampler alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_value
from torch import Tensor, nn

from pyro_lift.bench.records import Record
from pyro_lift.bench.shapes import ROWS
from pyro_lift.inference.baselines.episodes import Episode, Heads
from pyro_lift.inference.baselines.episodic import twice_differentiable
from pyro_lift.inference.baselines.maml import MAML
from pyro_lift.inference.baselines.protocol import Budget
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mixture.batch_em import Moments
from pyro_lift.inference.mixture.in_place import MixtureStream
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.hierarchical import AdapterHierarchy
from pyro_lift.models.task import Task
from pyro_lift.support.spans import Stopwatch, span

__all__ = [
    "BETA",
    "SIGMA",
    "STEP",
    "K",
    "TimedLiFT",
    "block_step",
    "maml",
    "mixture_at",
    "mixture_step",
    "plain",
    "sampler_alone",
]


K = 5


BETA, SIGMA = 0.03, 0.3


#: Draws that a mixture in mid-stream counts as.
SEEN = 100


#: A step that moves the weights by next to nothing, so that a long run of them stays where it is.
STEP = 1e-8


def plain(
    adapter: RandomAdapter, tasks: Sequence[Task], make: Callable[..., torch.optim.Optimizer], batch: int = ROWS
) -> Callable[[], None]:
    """Return a step of the usual loop: the PEFT model's own parameters, ``backward`` and ``torch.optim``."""
    named = dict(adapter.backbone.named_parameters())
    parameters = [named[entry.name] for entry in adapter.layout]
    optimiser = make(parameters, lr=STEP)
    count = iter(range(10**9))

    def step() -> None:
        for parameter in parameters:
            assert parameter is not None
            parameter.requires_grad_(True)
        task = tasks[next(count) % len(tasks)]
        rows = task.train.take(torch.randperm(len(task.train))[:batch].to(adapter.initial.device))
        optimiser.zero_grad()
        output = adapter.backbone(**rows.named)  # type: ignore[operator]
        logits = output.logits if hasattr(output, "logits") else output
        loss = nn.functional.cross_entropy(logits.flatten(0, -2).float(), rows.target.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        for parameter in parameters:
            assert parameter is not None
            parameter.requires_grad_(False)

    return step


class TimedLiFT:
    """A chain and its mixture with a negligible step size, so that it can be timed without drifting."""

    def __init__(
        self, adapter: RandomAdapter, tasks: Sequence[Task], components: int = K, batch: int = ROWS, **options: Any
    ) -> None:
        self.adapter = adapter
        self.kernel = SGLDGibbs(
            AdapterHierarchy(adapter, tasks, beta=BETA, sigma=SIGMA, batch_size=batch, prior_mean=adapter.initial),
            step_size=STEP,
            init_strategy=init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean),
            **options,
        )
        self.kernel.setup(0)
        self.mixture = mixture_at(adapter.initial, components)
        for _ in tasks:
            self.step()

    def step(self) -> None:
        """Make a visit, and put its draw through the mixture."""
        self.mixture.update(self.kernel.sample(self.kernel.state.phi)["phi"])

    def breakdown(self, repeats: int) -> Record:
        """Measure the processor seconds of a step by part; the parts add up to the step."""
        with Stopwatch() as watch:
            for _ in range(repeats):
                with span("pyro_lift.rest"):
                    self.step()
        seconds = {name.removeprefix("pyro_lift."): spent / repeats for name, spent in watch.seconds.items()}
        backbone = seconds["forward"] + seconds["backward"]
        return {"cpu_seconds": seconds, "cpu_ratio_to_backbone": sum(seconds.values()) / backbone}


def mixture_at(place: Tensor, components: int, fused: bool | None = None) -> OnlineGaussianMixture:
    """Make a mixture in mid-stream whose means stand around ``place`` as draws of phi do."""
    return OnlineGaussianMixture.from_moments(_moments_at(place, components), SEEN, fused=fused)


def _moments_at(place: Tensor, components: int) -> Moments:
    spread = (1.0 / SIGMA**2 + 3.0 / BETA**2) ** -0.5
    mean = place + spread * torch.randn(components, len(place), device=place.device)
    weight = torch.full((components,), 1.0 / components, device=place.device)
    return Moments(weight, mean, torch.full_like(mean, spread**2))


def maml(adapter: RandomAdapter, tasks: Sequence[Task], batch: int = ROWS) -> Callable[[], None]:
    """Return one inner step and its query, second order, on one task: two minibatches."""
    method = MAML(adapter, Budget(), tasks_per_step=1)
    heads, generator = Heads(adapter, tasks, Budget(), 1e-3), torch.Generator().manual_seed(0)
    phi, count = adapter.initial.clone(), iter(range(10**9))

    def step() -> None:
        number = next(count) % len(tasks)
        rows = tasks[number].train
        order = torch.randperm(len(rows)).to(phi.device)
        episode = Episode(number, tasks[number], rows.take(order[:batch]), rows.take(order[batch:]))
        with twice_differentiable(True):
            phi.sub_(method.gradient(phi, episode, heads, generator), alpha=STEP)

    return step


def mixture_step(
    size: int, components: int, device: str, fused: bool | None = None
) -> tuple[Callable[[], None], MixtureStream]:
    """Return one draw through a mixture of a given size, and the mixture's stream."""
    moments = _moments_at(torch.zeros(size, device=device), components)
    power = 1.0 if components == 1 else 0.7  # as the schedules of OnlineGaussianMixture
    floor = 1e-6 * float(moments.variance.min())
    stream = MixtureStream(moments, moments, SEEN, SEEN, 0.0, "diag", power=power, floor=floor, fused=fused)
    x = moments.mean[0].clone()
    return lambda: stream.update(x), stream


class _Free(torch.autograd.Function):
    """A likelihood whose gradient costs nothing: what remains is the sampler."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: Tensor) -> Tensor:
        ctx.gradient = gradient
        return x.new_zeros(())

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.gradient, None


def sampler_alone(size: int, num_tasks: int, device: str) -> Callable[[], Any]:
    """Return a visit without a backbone."""
    prior_mean, gradient = torch.zeros(size, device=device), torch.full((size,), 1e-3, device=device)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(prior_mean, SIGMA, validate_args=False).to_event(1))
        for i in pyro.plate("tasks", num_tasks, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, BETA, validate_args=False).to_event(1))
            pyro.factor(f"obs_{i}", _Free.apply(theta, gradient))  # type: ignore[no-untyped-call]

    kernel = SGLDGibbs(model, step_size=STEP)
    kernel.setup(0)
    visited = min(num_tasks, 3)

    def step() -> None:
        # Round and round among the first few tasks, whose rows are written already.
        if kernel.state.step >= visited:
            kernel.state = kernel.state._replace(step=0)
        kernel.sample(kernel.state.phi)

    for _ in range(visited):
        step()
    return step


def block_step(adapter: RandomAdapter, tasks: Sequence[Task], B: int) -> Callable[[], None]:
    """Return one visit of a chain to a block of B tasks."""
    hierarchy = AdapterHierarchy(
        adapter, tasks, beta=BETA, sigma=SIGMA, batch_size=ROWS, prior_mean=adapter.initial, block_size=B
    )
    start = init_to_value(values={"phi": adapter.initial}, fallback=init_to_mean)
    kernel = SGLDGibbs(hierarchy, step_size=STEP, init_strategy=start)
    kernel.setup(0)

    def step() -> None:
        kernel.state = kernel.state._replace(step=0)  # the first block, whose rows are written already
        kernel.sample(kernel.state.phi)

    step()
    return step
