"""Errors at the door: each names the value and the way out, before any training."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model, constrained, data, sequential, vectorised
from pyro.infer import MCMC
from torch import Tensor, nn

import pyro_lift
from pyro_lift import SGLD, DivergedError, LiFT, SGLDGibbs, Task
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.hierarchical import AdapterHierarchy

D0 = torch.tensor(0.0, dtype=torch.float64)


def program(local: Callable[[Tensor, Tensor], Tensor], prior: Any = None, N: int = 6) -> Model:
    """A plate of tasks with a latent site made by ``local(phi, index)``, and observations around it."""
    y = data(max(N, 1), d=1)[:, 0, 0]

    def model() -> None:
        phi = pyro.sample("phi", prior or dist.Normal(D0, 1.0))
        with pyro.plate("tasks", N, subsample_size=min(1, N)) as index:
            mean = local(phi, index)
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    return model


def theta_around(phi: Tensor, index: Tensor) -> Tensor:
    del index
    return torch.as_tensor(pyro.sample("theta", dist.Normal(phi, 0.5)))


def no_local(phi: Tensor, index: Tensor) -> Tensor:
    return phi.expand(len(index))


def discrete(phi: Tensor, index: Tensor) -> Tensor:
    del index
    return theta_around(phi, D0) + torch.as_tensor(pyro.sample("which", dist.Bernoulli(0.5)))


def scaled_by_task(phi: Tensor, index: Tensor) -> Tensor:
    return torch.as_tensor(pyro.sample("theta", dist.Normal(phi, 0.5 + index.double())))


def nothing_shared() -> None:
    with pyro.plate("tasks", 4, subsample_size=1):
        pyro.sample("theta", dist.Normal(D0, 1.0))


def no_latent() -> None:
    pyro.sample("y", dist.Normal(D0, 1.0), obs=D0)


def saddle() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.zeros(2).double(), 1.0).to_event(1))
    with pyro.plate("tasks", 4, subsample_size=1):
        theta = pyro.sample("theta", dist.Normal(phi, 0.1).to_event(1))
        pyro.sample("y", dist.Normal(theta.prod(-1), 1.0), obs=torch.ones(1).double())


def two_subsampled_plates() -> None:
    phi = pyro.sample("phi", dist.Normal(D0, 1.0))
    with pyro.plate("tasks", 4, subsample_size=1, dim=-2), pyro.plate("rows", 6, subsample_size=2, dim=-1):
        theta = pyro.sample("theta", dist.Normal(phi, 1.0))
        pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.ones(1, 2).double())


def latent_in_a_minibatch() -> None:
    with pyro.plate("rows", 6, subsample_size=2):
        pyro.sample("x", dist.Normal(D0, 1.0))


def bad_likelihood(value: float) -> Model:
    def model() -> None:
        x = pyro.sample("x", dist.Normal(D0, 1.0))
        pyro.factor("loss", value * x)

    return model


def langevin(model: Model, **options: Any) -> SGLDGibbs:
    return SGLDGibbs(model, phi_update="langevin", **{"step_size": 0.01, "phi_step_size": 1e-4, **options})


TASK = Task("t", (torch.zeros(4, 3), torch.tensor([0, 1, 2, 1])))
FEATURES = [Task(f"t{k}", (torch.randn(4, 3), TASK.train.target), num_classes=3) for k in range(4)]
NARROWER = Task("v", (torch.zeros(4, 2), TASK.train.target), num_classes=3)
DEEPER = Task("w", (torch.zeros(4, 1, 3), TASK.train.target), num_classes=3)
ALSO_NARROWER = Task("u", TASK.train, num_classes=3, test=(torch.zeros(2, 2), torch.tensor([0, 1])))


def adapter(width: int = 2, inputs: int = 3) -> RandomAdapter:
    import peft

    net = nn.Sequential(nn.Linear(inputs, width))
    return RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["0"])))


def adapter_of_nan() -> RandomAdapter:
    import peft

    linear = nn.Linear(3, 2)
    linear.weight.data[0, 0] = math.nan
    net = nn.Sequential(linear)
    return RandomAdapter(peft.get_peft_model(net, peft.LoraConfig(r=1, target_modules=["0"])))


#: What is built, the error, and what its message must say. A kernel that comes back is set up, too.
DOOR: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    # --- the program
    "no plate of that name": (
        lambda: SGLDGibbs(vectorised(), plate="task", step_size=0.01),
        ValueError,
        r"no plate named 'task' \(its plates: 'tasks'\).*plate=\"...\"",
    ),
    "no plate at all": (
        lambda: SGLDGibbs(bad_likelihood(1.0)),
        ValueError,
        r"no plate named 'tasks' \(its plates: none\)",
    ),
    "a plate without a local latent site": (
        lambda: SGLDGibbs(program(no_local)),
        ValueError,
        "plate 'tasks' holds no latent site.*Sample each task's own variable inside it",
    ),
    "an empty task plate": (
        lambda: SGLDGibbs(program(theta_around, N=0)),
        ValueError,
        "plate 'tasks' is empty: a task without data",
    ),
    "nothing shared": (lambda: SGLDGibbs(nothing_shared), ValueError, "its tasks share nothing. Use SGLD"),
    "no latent site": (lambda: SGLD(no_latent), ValueError, "no latent site: there is nothing to sample"),
    "a discrete local site": (
        lambda: SGLDGibbs(program(discrete)),
        ValueError,
        r"'which' is discrete \(Bernoulli\).*Marginalise it out",
    ),
    "a discrete site under SGLD": (
        lambda: SGLD(lambda: pyro.sample("z", dist.Categorical(torch.ones(3)))),
        ValueError,
        r"'z' is discrete \(Categorical\).*no gradient can move it",
    ),
    "a local site in a second subsampled plate": (
        lambda: SGLDGibbs(two_subsampled_plates, step_size=0.01),
        ValueError,
        r"second subsampled plate \('rows'\).*Take it out of that plate",
    ),
    "a latent site in a minibatch": (
        lambda: SGLD(latent_in_a_minibatch),
        ValueError,
        r"'x' stands inside a subsampled plate \('rows'\).*Use SGLDGibbs",
    ),
    "gibbs where nothing is normal given normal": (
        lambda: SGLDGibbs(constrained(), step_size=0.01),
        ValueError,
        "'gibbs' needs every global site normal.*accumulator=\"table\", which works for any program",
    ),
    "gibbs where the scale differs by task": (
        lambda: SGLDGibbs(program(scaled_by_task), step_size=0.01),
        ValueError,
        "the scale of the local site 'theta' differs by task",
    ),
    "exact where the prior is not normal": (
        lambda: langevin(program(theta_around, dist.StudentT(3.0, D0, 1.0))),
        ValueError,
        "'exact' needs every global site normal.*'phi' is not: its own distribution is StudentT",
    ),
    "a saddle at zero": (
        lambda: SGLDGibbs(saddle, step_size=0.01),
        ValueError,
        "exactly zero at the start.*a saddle.*Start elsewhere: init_strategy=init_to_value",
    ),
    "blocks that do not divide the tasks": (
        lambda: langevin(sequential(block=None), accumulator="table", block_size=4),
        ValueError,
        "6 tasks are no whole number of blocks of 4. Use a block_size that divides 6",
    ),
    "another block size than the program's": (
        lambda: SGLDGibbs(vectorised(), step_size=0.01, block_size=2),
        ValueError,
        "block_size=2, but the program takes subsample_size=1",
    ),
    "a block larger than the plate": (
        lambda: SGLDGibbs(sequential(block=None), step_size=0.01, block_size=7),
        ValueError,
        "block_size=7 is more than the plate's 6 tasks",
    ),
    "more SGD than warm-up": (
        lambda: SGLDGibbs(vectorised(), step_size=0.01, sgd_steps=5),
        ValueError,
        "sgd_steps=5 is more than the warm-up's 0 visits.*Raise warmup_steps",
    ),
    # --- step sizes past their limits
    "theta past the prior's limit": (
        lambda: SGLDGibbs(vectorised(), step_size=1.01, integrator="euler"),
        ValueError,
        r"site 'theta'.*=1.01 is past its stability limit 1 = 4 β².*integrator=\"exponential\"",
    ),
    "theta past the curvature's limit": (
        lambda: SGLDGibbs(vectorised(), step_size=0.55, integrator="euler"),
        ValueError,
        r"step_size=0.55 is past its stability limit 0.5 = 4 / \(largest curvature",
    ),
    "SGLD past the curvature's limit": (
        lambda: SGLD(vectorised(None), step_size=0.9),
        ValueError,
        "step_size=0.9 is past its stability limit.*Use a value well below it",
    ),
    "phi past 4 beta^2 / N": (
        lambda: langevin(vectorised(), phi_step_size=4 * 0.25 / 6),
        ValueError,
        'phi_step_size=0.166667 is past its stability limit.*4 β²/N.*phi_update="gibbs" for phi',
    ),
    "phi past pi^2 beta^2 / N^2": (
        lambda: langevin(vectorised(), accumulator="table", phi_step_size=1.01 * math.pi**2 * 0.25 / 36),
        ValueError,
        "phi_step_size=0.0692.*stability limit 0.0685.*π² β² B/N²",
    ),
    # --- options
    "an unknown option": (
        lambda: SGLDGibbs(vectorised(), step_sise=0.1),  # type: ignore[call-arg]
        TypeError,
        "unknown option 'step_sise'=0.1; did you mean 'step_size'",
    ),
    "an unknown option of SGLD": (
        lambda: SGLD(vectorised(None), temprature=0.1),  # type: ignore[call-arg]
        TypeError,
        "unknown option 'temprature'=0.1; did you mean 'temperature'",
    ),
    "an unknown setting of LiFT": (
        lambda: LiFT(adapter(), betta=0.1),
        ValueError,
        "'betta' is not known; did you mean 'beta'",
    ),
    "an unknown update": (
        lambda: SGLDGibbs(vectorised(), phi_update="gibs"),  # type: ignore[arg-type]
        ValueError,
        "phi_update='gibs' is not known; did you mean 'gibbs'",
    ),
    "an unknown accumulator": (
        lambda: SGLDGibbs(vectorised(), accumulator="tabel"),  # type: ignore[arg-type]
        ValueError,
        "accumulator='tabel' is not known; did you mean 'table'",
    ),
    "an unknown translation": (
        lambda: SGLDGibbs(vectorised(), translation="sega"),  # type: ignore[arg-type]
        ValueError,
        "translation='sega' is not known; did you mean 'saga'",
    ),
    "a translation of a phi that takes steps": (
        lambda: langevin(vectorised(), translation="saga"),
        ValueError,
        "translation='saga' with phi_update='langevin'.*exact draw.*translation=\"none\"",
    ),
    "a step of no translation": (
        lambda: SGLDGibbs(vectorised(), step_size=0.01, translation="none", translation_step_size=0.1),
        ValueError,
        "translation_step_size is of the translation.*leave translation_step_size out",
    ),
    "a translation past its limit": (
        lambda: SGLDGibbs(vectorised(), step_size=0.01, translation="saga", translation_step_size=0.2),
        ValueError,
        r"translation_step_size=0\.2 is past its stability limit 0\.164948 = 4 / \(N λ \+ 1/σ²\)",
    ),
    "an unknown store": (lambda: SGLDGibbs(vectorised(), store="devise"), ValueError, "store='devise'.*'device'"),
    "a negative step": (
        lambda: SGLD(vectorised(None), step_size=-0.1),
        ValueError,
        "=-0.1: expected a finite",
    ),
    "a step that is text": (
        lambda: SGLD(vectorised(None), step_size="big"),  # type: ignore[arg-type]
        TypeError,
        "step_size='big': expected a positive number or a function",
    ),
    "a negative temperature": (lambda: SGLD(vectorised(None), temperature=-1.0), ValueError, "temperature=-1.0"),
    "no thinning": (lambda: SGLD(vectorised(None), thinning=0), ValueError, "thinning=0"),
    "a decay of one": (
        lambda: SGLD(vectorised(None), decay=1.0),
        ValueError,
        "decay=1.0: expected at least 0 and",
    ),
    "not a program": (lambda: SGLD(3.0), TypeError, "model=3.0: expected a Pyro program"),  # type: ignore[arg-type]
    # --- losses at the start
    "a loss that is not a number": (
        lambda: SGLD(bad_likelihood(math.nan)),
        DivergedError,
        "step 0: log likelihood nan",
    ),
    "an infinite loss": (lambda: SGLD(bad_likelihood(math.inf)), DivergedError, "step 0: log likelihood"),
    # --- tasks
    "a task without data": (lambda: Task("void", (torch.zeros(0, 3), torch.zeros(0).long())), ValueError, "'void'"),
    "no task": (lambda: AdapterHierarchy(adapter(), [], beta=0.1, sigma=1.0), ValueError, "tasks is empty"),
    "labels outside the task's head": (
        lambda: Task("t", (torch.zeros(2, 3), torch.tensor([0, 4])), num_classes=3),
        ValueError,
        r"label 4 is outside the head's range 0 .. 2. Raise num_classes",
    ),
    "labels outside the network's head": (
        lambda: AdapterHierarchy(adapter(2), [TASK], beta=0.1, sigma=1.0),
        ValueError,
        r"task 't': labels up to 2 are outside the range of the network's head, 0 .. 1. Give the tasks heads",
    ),
    "labels that begin at 1": (
        lambda: AdapterHierarchy(
            adapter(2), [Task("t", (torch.zeros(2, 3), torch.tensor([1, 2])))], beta=0.1, sigma=1.0
        ),
        ValueError,
        r"outside the range of the network's head, 0 .. 1. No label is 0: if they begin at 1, take 1 off.",
    ),
    "classes under one output": (
        lambda: AdapterHierarchy(
            adapter(1), [Task("t", (torch.zeros(2, 3), torch.tensor([0, 1])))], beta=0.1, sigma=1.0
        ),
        ValueError,
        r"network's head, 0 .. 0. The network has one output: numbers to predict take kind=\"regression\"",
    ),
    "more classes declared than the network's outputs": (
        lambda: AdapterHierarchy(adapter(3), [Task("t", TASK.train, num_classes=5)], beta=0.1, sigma=1.0),
        ValueError,
        r"task 't': it has 5 classes \(labels up to 2 occur\), the last of which are outside the range .* 0 \.\. 2\.",
    ),
    "rows of single numbers for a network of vectors": (
        lambda: LiFT(adapter(2, inputs=1), sgd_steps=2, burn_in=2, samples=2).meta_train(
            [Task("t", (torch.zeros(4), torch.arange(4) % 2))]
        ),
        ValueError,
        r"task 't': .* first two rows .*\[2\].*: its layer '0' takes 1 numbers a row, and is given 2\. .* x\[:, None\]",
    ),
    "test rows of another width": (
        lambda: LiFT(adapter(3), sgd_steps=2, burn_in=2, samples=2).meta_train([ALSO_NARROWER]),
        ValueError,
        r"task 'u', test data: the network cannot be called with its first row.*\[1, 2\].*: its layer '0' takes 3 "
        r"numbers a row, and is given 2\. .* rows are inputs torch.float32 \[1, 3\]",
    ),
    "a task of another width among heads of their own": (
        lambda: LiFT(adapter(8), sgd_steps=2, burn_in=2, samples=2).meta_train([*FEATURES, NARROWER]),
        ValueError,
        r"task 'v': the network cannot be called with its.* \[4, 2\]",
    ),
    "a task of another shape among heads of their own": (
        lambda: LiFT(adapter(8), sgd_steps=2, burn_in=2, samples=2).meta_train([*FEATURES, DEEPER]),
        ValueError,
        r"task 'w': the network's output for its rows .* has shape \[4, 1, 8\]; a head of the task's own stands on one",
    ),
    "a generator of tasks": (
        lambda: LiFT(adapter(3)).meta_train(TASK for _ in range(2)),  # type: ignore[arg-type]
        TypeError,
        r"tasks is a generator; expected a list of them: list\(\.\.\.\)",
    ),
    "a configuration that is none of PEFT's": (
        lambda: LiFT(nn.Linear(3, 2), {"r": 2}),  # type: ignore[arg-type]
        TypeError,
        "peft_config is a dict; expected a configuration of PEFT's",
    ),
    "a seed of more than 63 bits": (
        lambda: LiFT(adapter(3), seed=2**64),
        ValueError,
        r"seed=18446744073709551616: expected a whole number below 2\*\*63",
    ),
    "a weight that is no number": (
        lambda: adapter_of_nan(),
        ValueError,
        "the frozen weight 'base_model.model.0.base_layer.weight' holds values that are not finite",
    ),
    "a tensor without values": (
        lambda: Task("t", (torch.zeros(4, 3, device="meta"), torch.zeros(4).long())),
        TypeError,
        "task 't', train data: inputs: a tensor on the meta device",
    ),
    "a name that is no string": (
        lambda: Task(3, TASK.train),  # type: ignore[arg-type]
        TypeError,
        "name=3: the name of a task is a string; expected '3', say",
    ),
    "no name": (lambda: Task(" ", TASK.train), ValueError, "name=' ': a task needs a name"),
    "one string as labels": (
        lambda: Task("t", TASK.train, labels="abc"),
        TypeError,
        r"labels='abc' is one name, not a list of them: \['abc', \.\.\.\]",
    ),
    "a scale that is not positive": (
        lambda: AdapterHierarchy(adapter(3), [TASK], beta=0.0, sigma=1.0),
        ValueError,
        "beta=0.0: expected a finite number above 0",
    ),
    # --- the mixture
    "a mixture of nothing": (lambda: OnlineGaussianMixture(0), ValueError, "components=0"),
    "an unknown covariance": (
        lambda: OnlineGaussianMixture(2, "diagonal"),  # type: ignore[arg-type]
        ValueError,
        "covariance='diagonal'.*'diag'",
    ),
    "a power that never averages": (
        lambda: OnlineGaussianMixture(2, power=0.5),
        ValueError,
        "power=0.5: expected above 0.5",
    ),
}


@pytest.mark.parametrize("case", DOOR)
def test_the_door_says_what_is_wrong_and_what_to_do(case: str) -> None:
    build, error, message = DOOR[case]
    with pytest.raises(error, match=f"(?s){message}"), pyro.validation_enabled(False):  # as in Pyro's MCMC
        build().setup(0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["vectorised", "sequential"])
def test_a_bad_loss_names_task_and_step_and_keeps_the_last_good_state(value: float, name: str) -> None:
    y = data(6, d=1).squeeze(-1)
    y[3, 1] = value

    def together() -> None:
        phi = pyro.sample("phi", dist.Normal(D0, 1.0))
        with pyro.plate("tasks", 6, subsample_size=1) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.factor("y", -0.5 * (y[index] - theta.unsqueeze(-1)).square().sum(-1))

    def one_by_one() -> None:
        phi = pyro.sample("phi", dist.Normal(D0, 1.0))
        for i in pyro.plate("tasks", 6, subsample_size=1):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
            pyro.factor(f"y_{i}", -0.5 * (y[i] - theta).square().sum())

    good = SGLDGibbs({"vectorised": together, "sequential": one_by_one}[name], step_size=0.02)
    pyro.set_rng_seed(1)
    MCMC(good, num_samples=3, warmup_steps=0, disable_progbar=True).run()
    kernel = SGLDGibbs({"vectorised": together, "sequential": one_by_one}[name], step_size=0.02)
    pyro.set_rng_seed(1)
    with pytest.raises(DivergedError, match=r"step 3, task 3: log likelihood .*Use a smaller step_size") as caught:
        MCMC(kernel, num_samples=9, warmup_steps=0, disable_progbar=True).run()
    assert (caught.value.step, caught.value.tasks) == (3, (3,))
    assert kernel.state.step == 3
    torch.testing.assert_close(kernel.state.phi["phi"], good.state.phi["phi"], rtol=0, atol=0)
    torch.testing.assert_close(kernel.state.sums["phi"], good.state.sums["phi"], rtol=0, atol=0)
    torch.testing.assert_close(kernel.theta(2)["theta"], good.theta(2)["theta"], rtol=0, atol=0)


def test_a_scale_that_differs_in_the_middle_is_refused_at_that_tasks_first_visit() -> None:
    def odd_one_out(phi: Tensor, index: Tensor) -> Tensor:
        return torch.as_tensor(pyro.sample("theta", dist.Normal(phi, 0.5 + 0.1 * (index == 2))))

    kernel = SGLDGibbs(program(odd_one_out), step_size=0.01)
    with pytest.raises(
        ValueError, match=r"task 2: the scale of .* 'theta' differs by task.*exact draw of 'phi'.*table"
    ):
        MCMC(kernel, num_samples=9, warmup_steps=0, disable_progbar=True).run()
    assert kernel.state.step == 2


def test_an_sgld_chain_that_runs_away_stops_at_its_last_good_state() -> None:
    def cliff() -> None:
        x = pyro.sample("x", dist.Normal(D0, 1.0))
        pyro.factor("loss", torch.log(x + 0.001 + 0.2))  # not a number once x falls below -0.201

    pyro.set_rng_seed(0)
    kernel = SGLD(cliff, step_size=0.05, check_stability=False)
    with pytest.raises(DivergedError, match=r"step \d+: log likelihood nan") as caught:
        MCMC(kernel, num_samples=500, warmup_steps=0, disable_progbar=True).run()
    assert caught.value.tasks == () and kernel.state.step == caught.value.step
    assert math.isfinite(float(kernel.state.position["x"]))


def test_a_clipped_gradient_is_counted() -> None:
    kernel = SGLDGibbs(vectorised(), step_size=0.02, max_grad_norm=4.0)
    mcmc = MCMC(kernel, num_samples=40, warmup_steps=0, disable_progbar=True)
    mcmc.run()
    found = kernel.diagnostics()
    norms = found["sample_stats"]["grad_norm"]
    expected = [i for i, norm in enumerate(norms) if norm > 4.0]
    assert found["clipped"] == expected and 0 < len(expected) < 40


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 0}, "num_samples=0"),
        ({"num_samples": -5}, "num_samples=-5"),
        ({"num_samples": 5, "warmup_steps": -1}, "warmup_steps=-1"),
    ],
)
def test_a_chain_without_draws_is_refused(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyro_lift.MCMC(SGLDGibbs(program(theta_around)), disable_progbar=True, **options)  # type: ignore[arg-type]


def test_steps_that_are_told_are_numbers(caplog: pytest.LogCaptureFixture) -> None:
    def whole() -> None:
        phi = pyro.sample("phi", dist.Normal(D0, 1.0))
        with pyro.plate("tasks", 6):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=torch.ones(6).double())

    kernel = SGLDGibbs(whole, theta_update="exact")  # which has no step
    with caplog.at_level("INFO", "pyro_lift"):
        MCMC(kernel, num_samples=1, warmup_steps=0, disable_progbar=True).run()
    (told,) = (words for words in caplog.messages if words.startswith("dimensionless steps"))
    assert "phi_update gibbs" in told and "step_size" not in told and "nan" not in told
