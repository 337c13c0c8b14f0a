"""Programs as they are often first written: each mistake is named, with what to write instead."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

from pyro_lift import MCMC, SGLD, SGLDGibbs
from pyro_lift.inference.sgld import DivergedError

Y = torch.tensor([[0.1, 0.9, 0.4], [1.2, 0.3, 0.8], [0.2, -0.4, 0.6], [1.5, 1.1, 0.7]])
N = len(Y)


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()


def shared() -> Tensor:
    return torch.as_tensor(pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0)))


def observe(mean: Tensor, obs: Tensor | None) -> None:
    pyro.sample("y", dist.Normal(mean.unsqueeze(-1), 1.0).to_event(1), obs=obs)


def in_plate(name: str = "tasks", extra: Callable[[Tensor], Tensor] = lambda theta: theta) -> Callable[[], None]:
    def model() -> None:
        phi = shared()
        with pyro.plate(name, N, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            observe(extra(theta), Y[index])

    return model


def no_plate() -> None:
    phi = shared()
    theta = pyro.sample("theta", dist.Normal(phi, 0.5).expand([N]).to_event(1))
    pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(2), obs=Y)


def theta_outside() -> None:
    phi = shared()
    theta = pyro.sample("theta", dist.Normal(phi, 0.5).expand([N]).to_event(1))
    with pyro.plate("tasks", N, subsample_size=1) as index:
        observe(theta[index], Y[index])


def offset_outside() -> None:
    phi, own = shared(), pyro.sample("own", dist.Normal(torch.zeros(N), 1.0).to_event(1))
    with pyro.plate("tasks", N, subsample_size=1) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        observe(theta + own[index], Y[index])


def discrete(theta: Tensor) -> Tensor:
    return theta + torch.as_tensor(pyro.sample("z", dist.Bernoulli(torch.tensor(0.5))))


def nested() -> None:
    phi = shared()
    with pyro.plate("regions", 2, dim=-2):
        region = pyro.sample("region", dist.Normal(phi, 0.5))
        with pyro.plate("tasks", N, dim=-1, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(region, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[index, :2].T)


def data_of_all() -> None:
    phi = shared()
    with pyro.plate("tasks", N, subsample_size=1):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        observe(theta, Y)


def guide() -> None:
    phi = pyro.sample("phi", dist.Normal(pyro.param("mean", torch.tensor(0.0)), 1.0))
    with pyro.plate("tasks", N, subsample_size=1):
        pyro.sample("theta", dist.Normal(phi, 0.5))


def rows_first() -> None:
    phi = shared()
    with pyro.plate("tasks", N):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        with pyro.plate("rows", Y.shape[1]):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=Y)


def no_rows() -> None:
    phi = shared()
    with pyro.plate("tasks", N):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0), obs=Y)


MISTAKES: dict[str, tuple[Callable[[], object], str]] = {
    "no plate": (lambda: SGLDGibbs(no_plate), "its plates: none.*theta and what is observed.*SGLD"),
    "a misspelt plate": (
        lambda: SGLDGibbs(in_plate("taks"), plate="tasks"),
        r"no plate named 'tasks' \(its plates: 'taks'\). Did you mean 'taks'\? Then write .*plate='taks'\)",
    ),
    "another plate": (lambda: SGLDGibbs(in_plate("schools"), plate="tasks"), r"SGLDGibbs\(model, plate='schools'\)"),
    "theta outside": (
        lambda: SGLDGibbs(theta_outside),
        "holds no latent site.*'theta' stands outside .*4 tasks",
    ),
    "an offset outside": (lambda: SGLDGibbs(offset_outside), "'own' stands outside the plate 'tasks' .*its 4 tasks"),
    "a discrete site": (
        lambda: SGLDGibbs(in_plate(extra=discrete)),
        r"'z' is discrete \(Bernoulli\).*Marginalise.*logsumexp.*MixtureSameFamily.*config_enumerate",
    ),
    "nested plates": (
        lambda: SGLDGibbs(nested),
        r"'tasks' stands inside 'regions'.*plate='regions'\)",
    ),
    "the data of all tasks": (
        lambda: SGLDGibbs(data_of_all),
        r"'y' observes 4 tasks .*shows 1.*obs=y\[index\]",
    ),
    "plates without dims": (
        lambda: SGLDGibbs(rows_first),
        r"'y': values of shape \[4, 3\] do not fit .*gives \[3, 4\].*plate\(\"tasks\", N, dim=-2\)",
    ),
    "rows of no plate": (lambda: SGLDGibbs(no_rows), r"'y': values of shape \[4, 3\] .*add .to_event\(1\)"),
    "a guide": (lambda: SGLDGibbs(guide), r"model=guide looks like a guide.*parameters \(mean\).*observes nothing"),
    "an automatic guide": (lambda: SGLDGibbs(AutoNormal(no_plate)), "looks like a guide.*pass the model"),
    "a guide for SGLD": (lambda: SGLD(guide), "looks like a guide"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_the_mistake_is_named_with_what_to_write_instead(case: str) -> None:
    build, message = MISTAKES[case]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        MCMC(build(), num_samples=2, warmup_steps=0, disable_progbar=True).run()


def test_data_that_are_no_numbers_are_pointed_at() -> None:
    odd = Y.clone()
    odd[2, 1] = torch.nan

    def model() -> None:
        phi = shared()
        with pyro.plate("tasks", N, subsample_size=N) as index:
            observe(pyro.sample("theta", dist.Normal(phi, 0.5)), odd[index])  # type: ignore[arg-type]

    with pytest.raises(DivergedError, match=r"'y' observes values that are not finite, the first at \[2, 1\].*mask"):
        MCMC(SGLDGibbs(model), num_samples=2, warmup_steps=0, disable_progbar=True).run()


def draws(model: Callable[[], None], **options: object) -> Tensor:
    kernel = SGLDGibbs(model, step_size=0.05, seed=3, **options)  # type: ignore[arg-type]
    mcmc = MCMC(kernel, num_samples=2 * N, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    return torch.as_tensor(mcmc.get_samples()["phi"])


def test_a_parameter_is_warned_of_and_stays_where_it_is() -> None:
    with pytest.warns(UserWarning, match=r"pyro.param sites \(gain\) are not sampled.*Give what is unknown a prior"):
        found = draws(in_plate(extra=lambda theta: theta * pyro.param("gain", torch.tensor(1.0))))
    torch.testing.assert_close(found, draws(in_plate()))


def gamma_tasks(observed: bool) -> Callable[[], None]:
    """A program that has no exact draw of phi, and is looked at twice: for that, and to be moved as a whole."""

    def model() -> None:
        rate = pyro.sample("phi", dist.Gamma(torch.tensor(2.0), 1.0))
        rate = rate * pyro.param("gain", torch.tensor(1.0)) if observed else rate
        with pyro.plate("tasks", N):
            theta = pyro.sample("theta", dist.Gamma(2.0, rate))
            if observed:
                observe(theta, Y)

    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (in_plate(extra=lambda theta: theta * pyro.param("gain", torch.tensor(1.0))), "pyro.param sites"),
        (gamma_tasks(True), "pyro.param sites"),
        (gamma_tasks(False), "observes nothing"),
    ],
)
def test_a_warning_is_given_once(model: Callable[[], None], words: str, caplog: pytest.LogCaptureFixture) -> None:
    kernel = SGLDGibbs(model, seed=0)
    kernel.begin_run(2)
    with warnings.catch_warnings(record=True) as said, caplog.at_level(logging.WARNING, "pyro_lift"):
        warnings.simplefilter("always")
        kernel.setup(1)
        kernel.setup(1)  # the second chain's
    assert sum(words in one for one in [str(w.message) for w in said] + caplog.messages) == 1


def test_factors_and_deterministic_sites_are_part_of_a_program() -> None:
    def model() -> None:
        phi = shared()
        with pyro.plate("tasks", N, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.deterministic("twice", 2.0 * theta)
            pyro.factor("y", dist.Normal(theta.unsqueeze(-1), 1.0).log_prob(Y[index]).sum(-1))

    torch.testing.assert_close(draws(model), draws(in_plate()))


def test_a_plate_inside_the_tasks_is_part_of_a_task() -> None:
    def model() -> None:
        phi = shared()
        with pyro.plate("tasks", N, subsample_size=1, dim=-2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            with pyro.plate("rows", 3, dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[index])

    torch.testing.assert_close(draws(model), draws(in_plate()))


def test_a_program_that_observes_nothing_says_so(caplog: pytest.LogCaptureFixture) -> None:
    def model() -> None:
        phi = shared()
        with pyro.plate("tasks", N, subsample_size=1):
            pyro.sample("theta", dist.Normal(phi, 0.5))

    with caplog.at_level(logging.WARNING, "pyro_lift"):
        draws(model)
    assert "the program observes nothing, so its draws are the prior's" in caplog.text


def of_counts(y: Tensor | None = None, exposure: float = 1.0) -> None:
    phi = shared()
    with pyro.plate("tasks", N):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        pyro.sample("y", dist.Poisson(exposure * theta.exp()), obs=y)  # type: ignore[arg-type]


def of_numbers(y: Tensor | None = None) -> None:
    phi = shared()
    with pyro.plate("tasks", N):
        pyro.sample("y", dist.Normal(pyro.sample("theta", dist.Normal(phi, 0.5)), 1.0), obs=y)  # type: ignore[arg-type]


@pytest.mark.parametrize("kernel", [SGLD, SGLDGibbs])
def test_a_run_without_the_data_names_the_argument(
    kernel: type[SGLD] | type[SGLDGibbs], caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r"run was not given 'y', and so 'y' \(Poisson\).*mcmc\.run\(y=y\)") as refused:
        MCMC(kernel(of_counts, seed=0), 2, 0, disable_progbar=True).run()
    assert "Marginalise" not in str(refused.value)
    with caplog.at_level(logging.WARNING, "pyro_lift"):
        MCMC(kernel(of_numbers, seed=0), 2, 0, disable_progbar=True).run()
    assert "its draws are the prior's" in caplog.text and "run was not given 'y'" in caplog.text


@pytest.mark.parametrize("count", [1, 2])
def test_one_task_alone_is_said_to_teach_nothing(count: int, caplog: pytest.LogCaptureFixture) -> None:
    def model() -> None:
        phi = shared()
        with pyro.plate("tasks", count):
            observe(pyro.sample("theta", dist.Normal(phi, 0.5)), Y[:count])  # type: ignore[arg-type]

    kernels = [SGLDGibbs(model, seed=0), SGLDGibbs(model, seed=0, phi_update="nuts")]
    with caplog.at_level(logging.WARNING, "pyro_lift"):
        for kernel in kernels:
            MCMC(kernel, num_samples=2, warmup_steps=2, disable_progbar=True).run()
    assert caplog.text.count("'tasks' holds one task") == (2 if count == 1 else 0)
    assert ("posterior of 'phi' is about as wide" in caplog.text) == (count == 1)


def in_a_python_loop(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    for i in range(4):
        theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 1.0))
        pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=y[i])


def without_theta(y: Tensor) -> None:
    phi = pyro.sample("phi", dist.Normal(0.0, 1.0))
    with pyro.plate("tasks", 4):
        pyro.sample("y", dist.Normal(phi, 1.0), obs=y)


@pytest.mark.parametrize("model", [in_a_python_loop, without_theta])
def test_no_one_is_told_to_subsample_a_program_that_can_be_seen_whole(model: Callable[[Tensor], None]) -> None:
    # One task a visit has an effective sample size of a few in 1,000 draws: it is no advice to someone's first program.
    with pytest.raises(ValueError, match=r"with pyro\.plate\(.*, N\):") as raised:
        SGLDGibbs(model).setup(1, torch.zeros(4))
    assert "subsample_size" not in str(raised.value)


def test_a_loop_over_range_is_told_to_loop_over_the_plate() -> None:
    with pytest.raises(ValueError, match=r'for i in pyro\.plate\("\.\.\.", N\):'):
        SGLDGibbs(in_a_python_loop).setup(1, torch.zeros(4))
