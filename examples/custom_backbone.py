"""A backbone of your own: any ``nn.Module`` with linear layers, here a small network for noisy sine waves.

Three steps. Train the network on what all tasks share (sine waves of phase 0). Attach LoRA to the layers you name, and
learn a prior over its weights from tasks with phases of their own. Adapt to new tasks from a few points each; the
error falls from that of the network alone to little more than the noise.

    python examples/custom_backbone.py
    python examples/custom_backbone.py --smoke
"""

from __future__ import annotations

import argparse
import math

import peft
import torch
from torch import Tensor, nn

from pyro_lift import LiFT, LiFTSettings, Task
from pyro_lift.models.backbones import recipe

NOISE = 0.1


class Wave(nn.Module):
    """Two hidden layers, one number in, one number out."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(1, width), nn.Linear(width, width), nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """``[n, 1]`` to ``[n, 1]``."""
        return torch.as_tensor(self.last(torch.tanh(self.second(torch.tanh(self.first(x))))))


def points(phase: float, rows: int) -> tuple[Tensor, Tensor]:
    """Noisy points of a sine wave with this phase."""
    x = torch.rand(rows, 1) * 6.0 - 3.0
    return x, (torch.sin(x + phase) + NOISE * torch.randn_like(x)).squeeze(-1)


def sine_task(name: str, rows: int) -> Task:
    """A wave with a phase between 45 and 135 degrees: ``rows`` points to learn from, 200 to be judged by."""
    phase = math.pi * (0.25 + 0.5 * float(torch.rand(())))
    return Task(name, points(phase, rows), "regression", test=points(phase, 200))


def pretrain(steps: int) -> Wave:
    """The network on what all tasks share."""
    network = Wave()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(steps):
        x, y = points(0.0, 64)
        loss = (network(x).squeeze(-1) - y).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def error(prediction: Tensor, target: Tensor) -> float:
    """Root mean square."""
    return float((prediction.squeeze(-1) - target).square().mean().sqrt())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="seconds; the numbers mean nothing")
    smoke = parser.parse_args().smoke
    torch.manual_seed(0)
    network = pretrain(20 if smoke else 500)
    train = [sine_task(f"train-{i}", 20) for i in range(4 if smoke else 20)]
    new = [sine_task(f"new-{i}", 5) for i in range(2 if smoke else 10)]

    config: peft.LoraConfig = recipe(network, rank=4, target_modules=["first", "second", "last"])
    settings = LiFTSettings(
        beta=0.1,
        noise_scale=NOISE,
        sgd_steps=10 if smoke else 600,
        burn_in=10 if smoke else 300,
        samples=20 if smoke else 600,
    )
    lift = LiFT(network, config, settings=settings, seed=0)
    prior = lift.meta_train(train)
    before, after = [], []
    for task in new:
        assert task.test is not None
        posterior = prior.adapt(task, steps=20 if smoke else 100)
        alone = lift.adapter(*task.test.positional, theta=lift.adapter.initial)
        before.append(error(alone, task.test.target))
        after.append(error(posterior.predict(task.test), task.test.target))
    print(f"test RMSE over {len(new)} new tasks of 5 points (noise {NOISE}):")
    print(f"  the network alone       {sum(before) / len(before):.3f}")
    print(f"  adapted under the prior {sum(after) / len(after):.3f}")


if __name__ == "__main__":
    main()
