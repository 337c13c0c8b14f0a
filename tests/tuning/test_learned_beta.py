"""Beta learned with all else: its exact posterior where everything is Gaussian, and what comes of it in LiFT."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, LiFT, LiFTPrior, LiFTSettings, SGLDGibbs, Task
from pyro_lift.defaults import resolved
from pyro_lift.inference.chain_summary import LogMean
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.backbones import adapt_backbone
from pyro_lift.models.hierarchical import VARIANCE, VARIANCE_SHAPE, AdapterHierarchy
from pyro_lift.models.weight_scales import groups_of_weights
from pyro_lift.tuning.learned_beta import learned_beta, with_rounds_to_learn

NOISE, BETA, SIGMA = 0.5, 0.6, 1.0


class Bias(torch.nn.Module):
    """An adapter of two weights that a network adds to its output."""

    def __init__(self) -> None:
        super().__init__()
        self.network = torch.nn.Parameter(torch.eye(2), requires_grad=False)
        self.shift = torch.nn.Parameter(torch.zeros(2))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.network + self.shift


def linear_tasks(number: int, spread: float) -> list[Task]:
    generator = torch.Generator().manual_seed(0)
    made = []
    for k in range(number):
        theta = spread * torch.randn(2, generator=generator)
        y = theta + NOISE * torch.randn(4, 2, generator=generator)
        made.append(Task(f"t{k}", (torch.zeros(4, 2), y), "regression"))
    return made


def exact_log_mean(tasks: list[Task]) -> tuple[float, float]:
    """Mean and standard deviation of log v given all rows, by a sum over a grid; theta and phi are integrated out.

    The task means are normal around phi with variance :math:`\\beta^2 v + \\tau^2 / n`, each weight by itself.
    """
    means = torch.stack([task.train.target.double().mean(0) for task in tasks])
    log_v = torch.linspace(-6.0, 4.0, 4001, dtype=torch.float64)
    variance = BETA**2 * log_v.exp() + NOISE**2 / 4
    N = len(tasks)
    density = torch.distributions.InverseGamma(VARIANCE_SHAPE, VARIANCE_SHAPE).log_prob(log_v.exp()) + log_v
    for d in range(2):
        y = means[:, d]
        precision = N / variance + 1.0 / SIGMA**2  # of phi given v
        density = density - 0.5 * N * variance.log() - 0.5 * precision.log()
        density = density - 0.5 * (y.square().sum() / variance - (y.sum() / variance).square() / precision)
    weight = (density - density.max()).exp()
    weight = weight / weight.sum()
    mean = float((weight * log_v).sum())
    return mean, math.sqrt(float((weight * (log_v - mean).square()).sum()))


def linear_adapter() -> RandomAdapter:
    return RandomAdapter(Bias())


def test_the_chain_has_the_exact_posterior_of_an_unknown_beta() -> None:
    tasks, adapter = linear_tasks(8, 1.2), linear_adapter()
    program = AdapterHierarchy(
        adapter, tasks, beta=BETA, sigma=SIGMA, noise_scale=NOISE, learned=groups_of_weights(adapter), block_size=8
    )
    kernel = SGLDGibbs(program, step_size=0.02, theta_update="sgld", phi_update="gibbs", seed=0)
    mcmc = MCMC(kernel, num_samples=1_200, warmup_steps=240, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()[VARIANCE].double().log().reshape(-1)
    mean, sd = exact_log_mean(tasks)
    batches = draws.reshape(40, -1).mean(1)
    error = float(batches.std() / 40**0.5)
    assert abs(float(draws.mean()) - mean) < 4.0 * error + 0.02 * sd  # the step's own bias
    assert float(draws.std()) == pytest.approx(sd, rel=0.15)
    assert error < 0.3 * sd


def test_settings_of_a_learned_beta_are_one_law_with_the_default_at_temperature_one() -> None:
    adapter = adapt_backbone(
        torch.nn.Sequential(torch.nn.Linear(4, 3)), peft.LoraConfig(r=1, target_modules=["0"]), seed=0
    )
    plain, learned = resolved(LiFTSettings(), adapter), resolved(LiFTSettings(beta="learn"), adapter)
    assert learned.temperature == 1.0 and learned.n_inflate == pytest.approx(1.0 / plain.temperature)  # type: ignore[operator]
    for width in ("beta", "sigma"):
        warm = [x * plain.temperature**0.5 for x in as_list(getattr(plain, width))]  # type: ignore[operator]
        assert as_list(getattr(learned, width)) == pytest.approx(warm)
    assert learned.learning_rate == plain.learning_rate


def as_list(width: Any) -> list[float]:
    return list(width) if isinstance(width, (list, tuple)) else [width]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "lern"}, "beta='lern': expected a number, one for each adapter tensor, or \"learn\""),
        ({"beta": "learn", "temperature": 0.1}, "n_inflate=1/T is the same law"),
        ({"beta": "learn", "phi_update": "langevin"}, "drawn with an exact phi"),
        ({"beta": "learn", "ranks_block_size": 2}, "by one process"),
    ],
)
def test_what_a_learned_beta_does_not_go_with_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiFTSettings(**options)


def test_a_burn_in_that_is_too_short_to_learn_in_is_lengthened() -> None:
    assert with_rounds_to_learn(LiFTSettings(beta="learn"), 24).burn_in == 480
    assert with_rounds_to_learn(LiFTSettings(beta="learn", block_size=8), 24).burn_in == 100
    assert with_rounds_to_learn(LiFTSettings(beta="learn", burn_in=900), 24).burn_in == 900


def test_the_geometric_mean_of_the_draws_is_kept_over_merges_and_checkpoints() -> None:
    draws = torch.tensor([[1.0, 4.0], [4.0, 16.0], [2.0, 1.0]])
    whole, first, second = LogMean(), LogMean(), LogMean()
    for k, draw in enumerate(draws):
        whole.update(draw)
        (first if k < 2 else second).update(draw)
    expected = draws.double().log().mean(0).exp()
    torch.testing.assert_close(whole.get(), expected)
    torch.testing.assert_close(first.merge(second).get(), expected)
    again = LogMean()
    again.load_state_dict(first.state_dict())
    again.update(draws[2])
    torch.testing.assert_close(again.get(), expected)
    assert learned_beta(0.5, whole) == pytest.approx([0.5 * float(x) ** 0.5 for x in expected])
    assert learned_beta([0.5, 2.0], LogMean()) == [0.5, 2.0]


def curved_tasks() -> tuple[torch.nn.Module, list[Task]]:
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    made = []
    for k in range(4):
        x = torch.randn(20, 4, generator=generator)
        made.append(Task(f"t{k}", (x, (x[:, k % 2] > 0).long()), num_classes=2))
    return net, made


def test_lift_keeps_what_it_has_learned_of_beta_and_a_run_goes_on_with_it(tmp_path: Path) -> None:
    net, tasks = curved_tasks()
    adapter = adapt_backbone(net, peft.LoraConfig(r=1, target_modules=["0", "2"]), seed=0)
    lengths: dict[str, Any] = {"sgd_steps": 20, "burn_in": 10, "samples": 30, "seed": 0, "beta": "learn"}
    lift = LiFT(adapter, **lengths)
    prior = lift.meta_train(tasks, progress=False, checkpoint=tmp_path / "run", checkpoint_every=25)
    assert lift.settings.beta == "learn" and isinstance(prior.settings.beta, list)
    assert len(prior.settings.beta) == len(adapter.layout) and prior.settings.temperature == 1.0
    again = LiFTPrior.from_pretrained(prior.save_pretrained(tmp_path / "prior"), net)
    assert again.settings.beta == pytest.approx(prior.settings.beta)
    assert prior.adapt(tasks[0], steps=10, draws=2, seed=0).thetas.isfinite().all()

    class StopError(Exception):
        pass

    def stop_at(transition: int) -> Any:
        count = iter(range(10_000))

        def on_step() -> None:
            if next(count) == transition:
                raise StopError

        return on_step

    with pytest.raises(StopError):
        LiFT(adapter, **lengths).meta_train(
            tasks, progress=False, checkpoint=tmp_path / "cut", checkpoint_every=25, on_step=stop_at(110)
        )
    resumed = LiFT(adapter, **lengths).meta_train(tasks, progress=False, resume=tmp_path / "cut")
    assert resumed.settings.beta == prior.settings.beta
