"""The effective number of weights, against linear regressions in which it is known."""

from __future__ import annotations

import logging

import pytest
import torch

from pyro_lift import Task
from pyro_lift.inference.effective_weights import MOVED, effective_weights, warn_of_few, weights_moved


@pytest.mark.parametrize("power", [1.0, 7.0])
@pytest.mark.parametrize("batch_size", [4, 20])
def test_it_is_the_closed_form_of_a_linear_regression_with_orthogonal_inputs(power: float, batch_size: int) -> None:
    # y = x theta + noise, one input at a time: at the true theta a row's gradient is x xi / alpha.
    generator = torch.Generator().manual_seed(0)
    N, D, alpha, beta = 20, 6, 0.5, 0.3
    sizes = torch.linspace(0.01, 4.0, D)
    x = sizes * torch.randn(N, D, generator=generator).sign()
    noise = torch.randn(40_000, batch_size, generator=generator)
    picked = x[torch.randint(N, (40_000, batch_size), generator=generator)]
    batches = power * N / batch_size * (noise.unsqueeze(-1) * picked / alpha).sum(1)
    information = power * (x / alpha).square().sum(0)
    exact = float((information * beta**2 / (1.0 + information * beta**2)).sum())
    found = effective_weights(batches.square().mean(0), beta, rows=N, batch_size=batch_size, power=power)
    assert found == pytest.approx(exact, rel=0.01)


def test_wide_priors_leave_all_weights_to_the_data_and_narrow_ones_none() -> None:
    v = torch.rand(50) + 0.1
    assert effective_weights(v, 1e4, rows=10, batch_size=10) == pytest.approx(50.0, abs=1e-4)
    assert effective_weights(v, 1e-6, rows=10, batch_size=10) == pytest.approx(0.0, abs=1e-8)
    halves = effective_weights(v, torch.cat([torch.full((25,), 1e4), torch.full((25,), 1e-6)]), rows=10, batch_size=10)
    assert halves == pytest.approx(25.0, abs=1e-4)


def said(caplog: pytest.LogCaptureFixture, given: list[str]) -> str:
    task = Task("t", (torch.zeros(7, 2), torch.zeros(7).long()), num_classes=2)
    moved = weights_moved({"theta": torch.full((5,), 1e-4)}, 0.1, [task, task], batch_size=0, power=1.0)
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        warn_of_few(moved, 5, [task, task], power=1.0, temperature=0.1, given=given)
    return caplog.text


@pytest.mark.parametrize(
    ("given", "advised", "not_advised"),
    [
        (
            [],
            ["n_inflate=10, say, in place of 1, together with temperature=0.1", "more rows (7 on average", "probe"],
            ["beta", "lower", "noise_scale"],
        ),
        (["beta"], ["leave beta open", "more rows"], ["lower the temperature"]),
        (["temperature"], ["lower the temperature (0.1)", "n_inflate=10, say, in place of 1;"], ["beta"]),
        (["beta", "temperature", "n_inflate"], ["leave beta open", "lower the temperature"], ["together with"]),
    ],
)
def test_of_settings_only_what_was_chosen_is_advised_to_be_left_open(
    given: list[str], advised: list[str], not_advised: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = said(caplog, given)
    assert all(word in words for word in advised) and not any(word in words for word in not_advised), words


def test_regressions_are_advised_of_their_noise_too(caplog: pytest.LogCaptureFixture) -> None:
    task = Task("r", (torch.zeros(7, 2), torch.zeros(7)), "regression")
    moved = weights_moved({"theta": torch.full((5,), 1e-4)}, 0.1, [task], batch_size=0, power=1.0)
    with caplog.at_level(logging.WARNING, logger="pyro_lift"):
        warn_of_few(moved, 5, [task], power=1.0)
    assert "give noise_scale a smaller value" in caplog.text


@pytest.mark.parametrize("given", [(), ("n_inflate",)])
def test_who_raised_the_power_is_not_asked_for_a_larger_one_and_heads_may_be_all_there_is(
    given: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    rows = (torch.zeros(6, 2), torch.arange(6) % 2)
    warn_of_few({MOVED: 0.2}, 9, [Task("t", rows, num_classes=2)], power=10.0, given=given, heads=True)
    assert ("n_inflate=100" in caplog.text) == (not given)
    assert "need not be changed" in caplog.text and "may do as well" not in caplog.text
