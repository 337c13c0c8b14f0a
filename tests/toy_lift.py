"""The toy of Appendix A by LiFT's front door."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pyro_lift import LiFT, RandomAdapter, Task
from pyro_lift.models.linear_gaussian import LinearGaussian


class Line(nn.Module):
    """x -> x @ w: with w for an adapter, the front door samples the toy of Appendix A, whose posterior is known."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.frozen = nn.Parameter(torch.zeros(1, dtype=torch.float64), requires_grad=False)
        self.w = nn.Parameter(torch.full((dim, 1), 0.1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w + self.frozen


def toy_tasks(toy: LinearGaussian) -> list[Task]:
    pairs = zip(toy.x, toy.y, strict=True)
    return [Task(f"t{i}", (x, y.unsqueeze(-1)), kind="regression") for i, (x, y) in enumerate(pairs)]


def toy_lift(toy: LinearGaussian, **options: object) -> LiFT:
    settings: dict[str, object] = {
        "beta": toy.beta,
        "sigma": toy.sigma,
        "noise_scale": toy.alpha,
        "prior_mean": "zero",
        "preconditioner": "none",
        "learning_rate": 0.0025,
        "batch_size": toy.num_data,
        "sgd_steps": 0,
        "burn_in": 200,
        "samples": 4_000,
    }
    return LiFT(RandomAdapter(Line(toy.dim)), seed=0, **{**settings, **options})  # type: ignore[arg-type]
