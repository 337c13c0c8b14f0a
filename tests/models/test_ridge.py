"""Leaving one row out of a ridge regression: the closed form against n regressions, and its gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyro_lift.models.heads import BIAS_SD
from pyro_lift.models.ridge import leave_one_out_loss, leave_one_out_values


def by_hand(x: Tensor, y: Tensor, sd: float, noise: float) -> Tensor:
    z = (x - x.mean(0)) / x.std(0, unbiased=False)
    z = torch.cat([sd * z, torch.full((len(z), 1), BIAS_SD, dtype=z.dtype)], -1)
    values = []
    for i in range(len(z)):
        kept = torch.arange(len(z)) != i
        precision = z[kept].T @ z[kept] / noise**2 + torch.eye(z.shape[1], dtype=z.dtype)
        values.append(z[i] @ torch.linalg.solve(precision, z[kept].T @ y[kept] / noise**2))
    return torch.stack(values)


@pytest.mark.parametrize(("n", "features"), [(12, 3), (6, 20)])
def test_values_are_those_of_n_regressions(n: int, features: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x = 2.0 + torch.randn(2, n, features, generator=generator, dtype=torch.float64)
    y = torch.randn(2, n, 2, generator=generator, dtype=torch.float64)
    found = leave_one_out_values(x, y, prior_sd=0.4, noise_scale=0.7)
    for k in range(2):
        torch.testing.assert_close(found[k], by_hand(x[k], y[k], 0.4, 0.7))


def test_a_head_that_only_memorises_is_not_rewarded() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(20) % 2
    noise = torch.randn(20, 100, generator=generator, dtype=torch.float64)
    told = torch.cat([noise, 3.0 * y[:, None].double()], -1)
    loss = [float(leave_one_out_loss(x, y, 2, prior_sd=0.5, noise_scale=0.1, scale=5.0)) for x in (noise, told)]
    assert loss[0] > 0.69 > loss[1]


def test_the_gradient_in_the_features_is_that_of_differences() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 0, 1])
    assert torch.autograd.gradcheck(lambda f: leave_one_out_loss(f, y, 3, prior_sd=0.5, scale=3.0), x)
    constant = torch.cat([x.detach(), torch.ones(5, 1, dtype=torch.float64)], -1).requires_grad_()
    (gradient,) = torch.autograd.grad(leave_one_out_loss(constant, y, 3, prior_sd=0.5), constant)
    assert torch.isfinite(gradient).all() and float(gradient[:, :3].abs().max()) > 0


def test_one_row_cannot_be_left_out() -> None:
    with pytest.raises(ValueError, match="at least two"):
        leave_one_out_values(torch.zeros(1, 3), torch.zeros(1, 2), prior_sd=1.0)
