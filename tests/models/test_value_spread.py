"""How far a regression's head may be off: by scikit-learn's Gaussian process, by draws of heads, and who says it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct
from torch import Tensor

from pyro_lift import LiFT, Task, TaskPosterior
from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.heads import laplace_head, scaling_of, solve_head
from pyro_lift.models.value_head import choose_value_head
from pyro_lift.models.value_spread import ValueSpread, spread_of
from pyro_lift.saving.spread import saved_spread, spread_tensors
from pyro_lift.settings import AdaptSettings
from pyro_lift.support.archive import DamagedError

SHORT: dict[str, Any] = {"adapt": AdaptSettings(steps=20, draws=6), "sgd_steps": 0, "burn_in": 2, "samples": 6}


def rows(n: int, features: int = 5, values: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n)
    x = 3.0 * torch.randn(n, features, generator=generator).double() + 2.0
    slope = torch.randn(features, values, generator=generator).double()
    return x, (40.0 + x @ slope + torch.randn(n, values, generator=generator).double()).squeeze(-1)


@pytest.mark.parametrize("n", [1, 3, 12])  # fewer rows than features, and more
@pytest.mark.parametrize("noise_scale", [0.3, 2.0])
def test_it_is_the_gaussian_process_of_scikit_learn(n: int, noise_scale: float) -> None:
    x, y = rows(n)
    new = 4.0 * torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).double()
    choice = choose_value_head(x, y)
    assert isinstance(choice.model.bias_sd, float) and isinstance(choice.model.noise_scale, float)
    unit = noise_scale / choice.model.noise_scale
    scaling = choice.model.limited(scaling_of(x))
    bias = choice.model.bias_sd / choice.sd
    kernel = ConstantKernel((choice.sd * unit) ** 2, "fixed") * DotProduct(bias, "fixed")  # z . z + bias^2
    process = GaussianProcessRegressor(kernel, alpha=noise_scale**2, optimizer=None)
    process.fit(scaling.apply(x).numpy(), y.numpy())
    _, sd = process.predict(scaling.apply(new).numpy(), return_std=True)
    found = spread_of(x, choice, noise_scale).variance(new)
    torch.testing.assert_close(found, torch.from_numpy(sd).square(), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shared", [False, True])
def test_it_is_the_variance_of_draws_of_heads(shared: bool) -> None:
    x, y = rows(7)
    around = torch.linspace(-1.0, 1.0, 6).double().unsqueeze(0) if shared else None
    choice = choose_value_head(x, y, around=around)
    model, sd, _ = choice
    mode = solve_head(x, y, model, prior_sd=sd).head
    draws = laplace_head(x, y, model, mode, 4000, prior_sd=sd, generator=torch.Generator().manual_seed(0))
    new = rows(20)[0]
    by_draws = apply_head(new, draws).squeeze(-1).var(0)
    assert isinstance(model.noise_scale, float)
    found = spread_of(x, choice, model.noise_scale).variance(new)
    error = 2.0 / 4000  # variance of the logarithm of a variance by so many draws
    assert float(((by_draws / found).log().abs() / error**0.5).max()) < 4.0


def test_rows_leave_less_open_and_features_far_from_them_more() -> None:
    x, y = rows(40)
    few, many = (spread_of(x[:n], choose_value_head(x[:n], y[:n]), 1.0) for n in (3, 40))
    near, far = x[:1], x[:1] + 30.0
    assert float(many.variance(near)) < 0.3 < float(few.variance(far))
    assert float(many.variance(far)) > 10.0 * float(many.variance(near))


def test_features_of_half_precision_have_a_spread_in_single_precision() -> None:
    x, y = rows(6)
    exact = spread_of(x, choose_value_head(x, y), 1.0).variance(x)
    rounded = spread_of(x.bfloat16(), choose_value_head(x, y), 1.0)
    assert all(part.dtype == torch.float32 for part in rounded)
    torch.testing.assert_close(rounded.variance(x), exact, rtol=0.1, atol=1e-3)


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8))


def tasks(number: int, n: int, values: int, seed: int) -> list[Task]:
    generator = torch.Generator().manual_seed(seed)
    made = []
    for k in range(number):
        x = torch.randn(n + 200, 6, generator=generator)
        with torch.no_grad():
            y = network()(x) @ torch.randn(8, max(values, 1), generator=generator)
        y = y + 0.3 * torch.randn(y.shape, generator=generator)
        y = y if values else y.squeeze(-1)
        made.append(Task(f"t{seed}-{k}", (x[:n], y[:n]), "regression", test=(x[n:], y[n:])))
    return made


def lift(**settings: Any) -> LiFT:
    return LiFT(network(), peft.LoraConfig(r=2, target_modules=["0", "2"]), seed=0, **SHORT, **settings)


@pytest.mark.parametrize("values", [0, 2])
def test_a_posterior_adds_it_to_its_widths_and_keeps_it_when_saved(values: int, tmp_path: Path) -> None:
    made = tasks(6, 12, values, 1)
    prior = lift(noise_scale=0.3).meta_train(made[:4], progress=False)
    alone, (together, _) = prior.adapt(made[4], seed=0), prior.adapt_many(made[4:], seed=0)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    for posterior in (alone, together):
        assert posterior.head_spread is not None
        features = posterior.adapter(x, theta=posterior.thetas[-1]).detach()
        added = posterior.head_spread.variance(features)
        wide = posterior.predict_sd(x, calibrated=False)
        posterior.head_spread, spread = None, posterior.head_spread
        narrow = posterior.predict_sd(x, calibrated=False)
        posterior.head_spread = spread
        expected = narrow.square() + added.float().view(-1, *[1] * (narrow.dim() - 1))
        torch.testing.assert_close(wide.square(), expected)
    alone.save_pretrained(tmp_path / "posterior")
    loaded = TaskPosterior.from_pretrained(tmp_path / "posterior", network())
    assert torch.equal(loaded.predict_sd(x), alone.predict_sd(x))


def test_tasks_of_two_rows_know_that_they_know_little() -> None:
    prior = lift().meta_train(tasks(10, 12, 0, 1), progress=False)
    squares = {}
    for n in (2, 12):
        made = tasks(12, n, 0, 5)
        each = []
        for task, posterior in zip(made, prior.adapt_many(made, seed=0), strict=True):
            assert task.test is not None
            missed = posterior.predict(task.test) - task.test.target
            each.append((missed / posterior.predict_sd(task.test)).square().mean())
        squares[n] = float(torch.stack(each).mean())
    assert 0.5 < squares[12] < 2.0  # on the rows it was made for
    assert squares[2] < 4.0  # over 20 where only the noise tells


@pytest.mark.parametrize("head", [{"head": "laplace"}, {"head": "langevin", "head_scale": 1.0}])
def test_heads_that_are_drawn_say_it_themselves(head: dict[str, Any]) -> None:
    made = tasks(5, 12, 0, 1)
    prior = lift(noise_scale=0.3, **head).meta_train(made[:4], progress=False)
    assert prior.adapt(made[4]).head_spread is None


def test_a_damaged_spread_is_refused() -> None:
    x, y = rows(4)
    spread = spread_of(x, HeadChoice(*choose_value_head(x, y)), 1.0)
    tensors = spread_tensors(spread)
    found = saved_spread(Path("file"), tensors)
    assert found is not None and all(torch.equal(a, b) for a, b in zip(found, spread, strict=True))
    assert saved_spread(Path("file"), {}) is None and spread_tensors(None) == {}
    with pytest.raises(DamagedError, match=r"file: no tensor 'head_spread\.left'\."):
        saved_spread(Path("file"), {name: x for name, x in tensors.items() if not name.endswith("left")})
    short = ValueSpread(spread.basis[:, 1:], *spread[1:])
    with pytest.raises(DamagedError, match=r"do not go together: head_spread\.basis \(4, 5\), "):
        saved_spread(Path("file"), spread_tensors(short))
