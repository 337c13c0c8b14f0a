"""The front door against closed forms, and what it refuses."""

from __future__ import annotations

import pickle
from functools import partial

import peft
import pyro
import pytest
import torch
from torch import nn
from toy_lift import toy_lift, toy_tasks

from pyro_lift import DivergedError, LiFT, LiFTSettings, RandomAdapter, Task
from pyro_lift.models.linear_gaussian import Gaussian, LinearGaussian, fit, gaussian_kl
from pyro_lift.models.observation import WHOLE, batch_of


def test_meta_training_finds_the_exact_posterior_of_the_toy() -> None:
    toy = LinearGaussian(10, seed=0)
    with pyro.validation_enabled(False):  # a third of the time; the draws are the same
        prior = toy_lift(toy).meta_train(toy_tasks(toy), progress=False)
    exact, found = toy.posterior(), prior.mixture.get()
    mean, variance = found.component_distribution.mean[0], found.component_distribution.variance[0]
    # The kernel alone reaches 0.004 at this length; the mixture's covariance is diagonal, as the toy's nearly is.
    assert gaussian_kl(Gaussian(mean, torch.diag(variance)), exact) < 0.04


def test_a_batch_size_of_zero_takes_tasks_whole() -> None:
    toy = LinearGaussian(3, seed=0)
    means = []
    for batch_size in (0, toy.num_data):
        lift = toy_lift(toy, batch_size=batch_size, burn_in=2, samples=5)
        prior = lift.meta_train(toy_tasks(toy), progress=False)
        thetas = prior.adapt(toy_tasks(toy)[0], steps=6, draws=3, learning_rate=1e-3, batch_size=batch_size).thetas
        means.append((prior.mixture.get().mean, thetas))
    for got, expected in zip(*means, strict=True):
        assert torch.equal(got, expected)
    long = Task("long", (torch.zeros(WHOLE + 5, 2), torch.zeros(WHOLE + 5, 1)), kind="regression")
    assert batch_of(long, 0) == WHOLE


def test_adaptation_draws_from_the_exact_posterior_of_the_new_task() -> None:
    toy = LinearGaussian(11, seed=1)
    tasks = toy_tasks(toy)
    with pyro.validation_enabled(False):
        prior = toy_lift(toy, samples=500).meta_train(tasks[:10], progress=False)
    component = prior.mixture.get().component_distribution
    x, y = toy.x[10], toy.y[10]
    spread = component.variance[0] + toy.beta**2
    precision = x.T @ x / toy.alpha**2 + torch.diag(1.0 / spread)
    mean = torch.linalg.solve(precision, x.T @ y / toy.alpha**2 + component.mean[0] / spread)
    with pyro.validation_enabled(False):
        posterior = prior.adapt(tasks[10], steps=4_000, draws=2_000, learning_rate=1e-3, batch_size=toy.num_data)
    assert gaussian_kl(fit(posterior.thetas), Gaussian(mean, torch.linalg.inv(precision))) < 0.05
    # Predictions are averages over draws, so a linear model predicts at the mean of its draws.
    torch.testing.assert_close(posterior.predict(x).squeeze(-1), x @ posterior.thetas.mean(0))


def test_a_translation_brings_phi_to_its_posterior_without_joint_training() -> None:
    """Weak data: a theta follows its data by little, and phi the mean of all theta; the shift goes straight there."""
    toy = LinearGaussian(20, alpha=6.0, seed=4)
    exact = toy.posterior()
    spread = exact.covariance.diagonal().sqrt()
    away = {}
    for kind in ("saga", "falling", "none"):
        lift = toy_lift(toy, translation=kind, burn_in=100, samples=150, temperature=0.0, n_inflate=1.0)
        with pyro.validation_enabled(False):
            prior = lift.meta_train(toy_tasks(toy), progress=False, start=torch.full((2,), -3.0).double())
        away[kind] = float(((prior.mixture.get().mean - exact.mean) / spread).abs().max())
    assert max(away["saga"], away["falling"]) < 0.5 < 5.0 < away["none"], away


def test_a_seed_fixes_everything() -> None:
    toy = LinearGaussian(5, seed=0)
    first, again = (toy_lift(toy, samples=50).meta_train(toy_tasks(toy), progress=False) for _ in range(2))
    assert torch.equal(first.mixture.get().component_distribution.mean, again.mixture.get().component_distribution.mean)
    one, two = (first.adapt(toy_tasks(toy)[0], steps=20, draws=5) for _ in range(2))
    assert torch.equal(one.thetas, two.thetas)
    other = first.adapt(toy_tasks(toy)[0], steps=20, draws=5, seed=7)
    assert not torch.equal(one.thetas, other.thetas)


def test_one_chain_gives_a_prior_for_each_number_of_components() -> None:
    toy = LinearGaussian(5, seed=0)
    priors = toy_lift(toy, samples=400).meta_train_many(toy_tasks(toy), [1, 2], progress=False)
    assert [p.mixture.components for p in priors] == [1, 2]
    means = [p.mixture.get().mean for p in priors]
    torch.testing.assert_close(means[0], means[1], atol=0.1, rtol=0)


def test_the_chain_begins_where_it_is_told_to() -> None:
    """One draw of a chain that hardly moves is its start; the prior of phi stays about the adapter's own."""
    toy = LinearGaussian(3, seed=0)
    start = torch.full((toy.dim,), 5.0, dtype=torch.float64)
    still = toy_lift(toy, burn_in=1, samples=2, beta=1e-6, learning_rate=1e-16, translation="none")
    prior = still.meta_train(toy_tasks(toy), progress=False, start=start)
    torch.testing.assert_close(prior.mixture.get().mean, start, rtol=0.0, atol=1e-4)
    with pytest.raises(ValueError, match=r"start has shape \(7,\); the adapter has"):
        still.meta_train(toy_tasks(toy), progress=False, start=torch.zeros(7))


def test_steps_are_counted() -> None:
    toy = LinearGaussian(5, seed=0)
    steps: list[int] = []
    lift = toy_lift(toy, samples=30, burn_in=10, sgd_steps=5)
    lift.meta_train(toy_tasks(toy), progress=False, on_step=lambda: steps.append(1))
    assert len(steps) == 45


def classifier() -> RandomAdapter:

    from pyro_lift.models.backbones import adapt_backbone

    return adapt_backbone(nn.Sequential(nn.Linear(2, 3)), peft.LoraConfig(r=1, target_modules=["0"]))


def test_a_label_outside_the_heads_range_is_refused_before_training() -> None:
    tasks = [Task("ok", (torch.randn(4, 2), torch.tensor([0, 1, 2, 0])), num_classes=3)]
    tasks.append(Task("wide", (torch.randn(4, 2), torch.tensor([0, 1, 2, 4])), num_classes=5))
    with pytest.raises(ValueError, match=r"'wide': labels up to 4 .* 0 \.\. 2"):
        LiFT(classifier()).meta_train(tasks, progress=False)


def test_a_label_outside_the_tasks_own_classes_is_refused() -> None:
    with pytest.raises(ValueError, match="4"):
        Task("wrong", (torch.randn(4, 2), torch.tensor([0, 1, 2, 4])), num_classes=3)


def test_no_task_and_no_data_are_refused(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="pyro_lift")
    for learn in (partial(LiFT(classifier()).meta_train, progress=False), LiFT(classifier()).tune):
        with pytest.raises(ValueError, match="tasks is empty"):
            learn([])
    assert not caplog.messages
    with pytest.raises(ValueError, match="bare"):
        Task("bare", (torch.randn(0, 2), torch.zeros(0, dtype=torch.long)), num_classes=3)


def test_priors_and_posteriors_can_be_sent_to_other_processes() -> None:
    rows = (torch.randn(6, 2), torch.tensor([0, 1, 2, 0, 1, 2]))
    tasks = [Task(name, rows, num_classes=3) for name in "abc"]
    prior = LiFT(classifier(), sgd_steps=2, burn_in=2, samples=4, seed=0).meta_train(tasks, progress=False)
    posterior = prior.adapt(tasks[0], steps=4, draws=2)
    sent = pickle.loads(pickle.dumps(posterior))
    assert torch.equal(sent.predict(rows[0]), posterior.predict(rows[0]))
    there = pickle.loads(pickle.dumps(prior))
    assert torch.equal(there.adapt(tasks[0], steps=4, draws=2).thetas, posterior.thetas)


def test_two_tasks_of_one_name_are_refused_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = (torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))
    tasks = [Task(name, rows, num_classes=3) for name in ("a", "b", "a", "c")]
    lift = LiFT(classifier())
    monkeypatch.setattr(lift.adapter.backbone, "forward", None)
    for learn in (partial(lift.meta_train, progress=False), lift.tune):
        with pytest.raises(ValueError, match=r"'a' stands twice \(places 0 and 2\)"):
            learn(tasks)


def test_a_loss_that_is_not_finite_names_step_and_task_and_keeps_the_state() -> None:
    toy = LinearGaussian(5, seed=0)
    tasks = toy_tasks(toy)
    spoiled = tasks[3].train.positional[0].clone()
    spoiled[0, 0] = 1e200  # finite, but its square is not
    tasks[3] = Task("spoiled", (spoiled, tasks[3].train.target), kind="regression")
    lift = toy_lift(toy, samples=30)
    with pytest.raises(DivergedError, match=r"step 3, task 3.*(inf|nan)") as caught:
        lift.meta_train(tasks, progress=False)
    assert (caught.value.step, caught.value.tasks) == (3, (3,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bta": 0.1}, "did you mean 'beta'"),
        ({"beta": 0.0}, "beta=0.0"),
        ({"sigma": -1.0}, "sigma=-1.0"),
        ({"components": 0}, "components=0"),
        ({"samples": 0}, "samples=0"),
        ({"learning_rate": float("nan")}, "learning_rate=nan"),
        ({"temperature": -0.5}, "temperature=-0.5"),
        ({"preconditioner": "rmsprop"}, "did you mean 'rms'"),
        ({"covariance": "full"}, "covariance='full'"),
    ],
)
def test_wrong_settings_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LiFT(classifier(), **options)  # type: ignore[arg-type]


def test_wrong_adaptation_settings_are_refused() -> None:
    toy = LinearGaussian(5, seed=0)
    prior = toy_lift(toy, samples=20).meta_train(toy_tasks(toy), progress=False)
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        prior.adapt(toy_tasks(toy)[0], step=5)
    with pytest.raises(ValueError, match="need 40 steps"):
        prior.adapt(toy_tasks(toy)[0], steps=30, draws=20)
    with pytest.raises(TypeError, match="sgd_steps='5'"):
        LiFTSettings(sgd_steps="5")  # type: ignore[arg-type]


def test_a_plain_network_needs_an_adapter() -> None:
    with pytest.raises(ValueError, match=r"all .* weights of the backbone are trainable"):
        RandomAdapter(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no trainable tensor"):
        RandomAdapter(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.gpu
def test_the_front_door_runs_on_cuda() -> None:
    tasks = [Task(f"t{i}", (torch.randn(8, 2), torch.arange(8) % 3), num_classes=3) for i in range(3)]
    lift = LiFT(classifier(), device="cuda", sgd_steps=5, burn_in=5, samples=20, seed=0)
    posterior = lift.meta_train(tasks, progress=False).adapt(tasks[0], steps=20, draws=5)
    assert posterior.predict(torch.randn(2, 2)).device.type == "cuda"


def test_adaptation_moves_twice_as_fast_as_the_chain_where_no_rate_is_given() -> None:
    toy = LinearGaussian(3, seed=0)
    short = {"burn_in": 2, "samples": 4, "preconditioner": "rms"}

    def rates(**options: object) -> tuple[float | None, float | None]:
        prior = toy_lift(toy, **{**short, **options}).meta_train(toy_tasks(toy), progress=False)
        return prior.settings.learning_rate, prior.adapt_settings.learning_rate

    chain, adaptation = rates(learning_rate=None)
    assert chain is not None and adaptation == pytest.approx(2.0 * chain)
    assert rates(learning_rate=0.003) == (0.003, None)  # what meta-training was given, adaptation inherits
    assert rates(learning_rate=None, preconditioner="none")[1] is None


def test_a_device_that_is_not_here_and_a_name_in_the_place_of_a_network_are_refused() -> None:
    with pytest.raises(ValueError, match="device='nosuch' cannot be used here"):
        LiFT(nn.Sequential(nn.Linear(3, 2)), peft.LoraConfig(r=1, target_modules=["0"]), device="nosuch")
    with pytest.raises(TypeError, match=r"expected a torch module: load it by .*load_backbone"):
        LiFT("bert-base-uncased", peft.LoraConfig(r=1))  # type: ignore[arg-type]
