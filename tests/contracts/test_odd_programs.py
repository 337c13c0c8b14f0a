"""Programs in which one task is not as the first: right, or refused with the task's number; never silently wrong."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide.initialization import init_to_value
from torch import Tensor

from pyro_lift import MCMC, SGLD, SGLDGibbs

N, ODD = 6, 2
TABLE: dict[str, Any] = {"phi_update": "langevin", "accumulator": "table", "phi_step_size": 1e-4, "step_size": 1e-3}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def rows(generator_seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(generator_seed)
    return 1.0 + torch.randn(N, 5, generator=generator, dtype=torch.float64)


Y = rows()
Part = Callable[[int, Tensor], Tensor | None]


def sample(name: str, law: Any) -> Tensor:
    """``pyro.sample`` of a latent site, as the tensor that it is."""
    value: Tensor = pyro.sample(name, law)
    return value


def normal_theta(i: int, phi: Tensor) -> Tensor:
    return sample(f"theta_{i}", dist.Normal(phi, 0.5))


def observe(i: int, theta: Tensor) -> None:
    pyro.sample(f"y_{i}", dist.Normal(theta, 1.0).expand([5]).to_event(1), obs=Y[i])


def program(odd: Part, odd_rows: Part | None = None) -> Callable[[], None]:
    """A sequential program whose task 2 draws its theta by ``odd``, and adds ``odd_rows`` to what it observes."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        for i in pyro.plate("tasks", N, subsample_size=1):
            theta = (odd if i == ODD else normal_theta)(i, phi)
            if theta is not None:
                observe(i, theta)
            if odd_rows is not None and i == ODD:
                odd_rows(i, phi)

    return model


def named(law: Callable[[Tensor], Any], **handlers: Any) -> Part:
    def theta(i: int, phi: Tensor) -> Tensor:
        with poutine.scale(scale=handlers["scale"]) if "scale" in handlers else nullcontext():
            return sample(f"theta_{i}", law(phi))

    return theta


def shifted(i: int, phi: Tensor) -> Tensor:
    own = pyro.sample(f"own_{i}", dist.Normal(torch.tensor(0.0), 1.0))
    return sample(f"theta_{i}", dist.Normal(phi + own, 0.5))


def spread(i: int, phi: Tensor) -> Tensor:
    own = pyro.sample(f"own_{i}", dist.LogNormal(torch.tensor(0.0), 0.1))
    return sample(f"theta_{i}", dist.Normal(phi, 0.5 * own))


def twice(i: int, phi: Tensor) -> Tensor:
    return normal_theta(i, phi) + sample(f"more_{i}", dist.Normal(phi, 0.5))


def replaced(i: int, phi: Tensor) -> Tensor:
    return sample(f"theta_{i}", dist.Normal(torch.tensor(0.0), 0.5))


def discrete(i: int, phi: Tensor) -> Tensor:
    return normal_theta(i, phi) + sample(f"z_{i}", dist.Bernoulli(torch.tensor(0.5)))


def point(i: int, phi: Tensor) -> Tensor:
    theta = normal_theta(i, phi)
    return sample(f"d_{i}", dist.Delta(theta))


def direct(i: int, phi: Tensor) -> Tensor:
    return phi + sample(f"theta_{i}", dist.Normal(phi, 0.5))


def census(i: int, phi: Tensor) -> None:
    pyro.sample("census", dist.Normal(phi, 0.1), obs=torch.tensor(3.0))


def push(i: int, phi: Tensor) -> None:
    pyro.factor("push", -phi.square())


#: One task that the exact draw of phi cannot take: its theta, what it observes beside, and what is said of it.
ODD_TASKS: dict[str, tuple[Part, Any, str]] = {
    "an offset": (named(lambda phi: dist.Normal(phi + 1.0, 0.5)), None, "mean of the local site 'theta_2' is not"),
    "a sign": (named(lambda phi: dist.Normal(-phi, 0.5)), None, "mean of the local site 'theta_2' is not"),
    "a factor": (named(lambda phi: dist.Normal(1.001 * phi, 0.5)), None, "mean of the local site 'theta_2' is not"),
    "a square": (named(lambda phi: dist.Normal(phi + phi**2, 0.5)), None, "mean of the local site 'theta_2' is not"),
    "a scale": (named(lambda phi: dist.Normal(phi, 0.4)), None, "scale of the local site 'theta_2' differs by task"),
    "a scale by phi": (named(lambda phi: dist.Normal(phi, 0.5 + 0.0 * phi)), None, "'theta_2' depends on 'phi'"),
    "a mask": (named(lambda phi: dist.Normal(phi, 0.5).mask(torch.tensor(False))), None, "'theta_2' is masked Normal"),
    "a weight": (named(lambda phi: dist.Normal(phi, 0.5), scale=0.5), None, "'theta_2' is scaled Normal"),
    "another law": (named(lambda phi: dist.StudentT(5.0, phi, 0.5)), None, "'theta_2' is StudentT"),
    "a width": (named(lambda phi: dist.Normal(phi, 0.5).expand([5]).to_event(1)), None, r"it has shape \[5\]"),
    "a local mean": (shifted, None, r"'theta_2' depends on another site too \('own_2'\)"),
    "a local scale": (spread, None, r"'theta_2' depends on another site too \('own_2'\)"),
    "two children": (twice, None, "2 local sites depend on it in task 2"),
    "no child": (replaced, None, "0 local sites depend on it in task 2"),
    "phi in the likelihood": (direct, None, r"an observed site depends on it directly \('y_2'\)"),
    "an observation of phi": (normal_theta, census, r"an observed site depends on it directly \('census'\)"),
    "a factor of phi": (normal_theta, push, r"an observed site depends on it directly \('push'\)"),
}
#: What no update can take.
NEVER: dict[str, tuple[Part, str]] = {
    "a discrete site": (discrete, "'z_2' is discrete"),
    "a point mass": (point, "'d_2' is a point mass.*deterministic"),
    "nothing of its own": (lambda i, phi: None, "task 2 has no latent site of its own"),
}


def run(kernel: Any, num_samples: int = 2 * N, **options: Any) -> MCMC:
    mcmc = MCMC(kernel, num_samples=num_samples, warmup_steps=0, disable_progbar=True, **options)
    pyro.set_rng_seed(7)
    mcmc.run()
    return mcmc


@pytest.mark.parametrize("accumulator", ["gibbs", "exact"])
@pytest.mark.parametrize("name", ODD_TASKS)
def test_an_exact_draw_refuses_the_odd_task_by_its_number(name: str, accumulator: str) -> None:
    theta, odd_rows, message = ODD_TASKS[name]
    options: dict[str, Any] = {"step_size": 1e-3}
    if accumulator == "exact":
        options |= {"phi_update": "langevin", "phi_step_size": 1e-3}
    kernel = SGLDGibbs(program(theta, odd_rows), **options)
    with pytest.raises(ValueError, match=rf"(?s)^task 2: .*{message}.*accumulator=\"table\""):
        run(kernel)
    assert kernel.state.step == ODD  # the tasks before it were visited, and their draws stand


@pytest.mark.parametrize("name", ODD_TASKS)
def test_the_table_takes_the_odd_task(name: str) -> None:
    theta, odd_rows, _ = ODD_TASKS[name]
    kernel = SGLDGibbs(program(theta, odd_rows), **TABLE)
    assert torch.isfinite(run(kernel).get_samples()["phi"]).all()
    assert len(kernel.theta(ODD)) >= 1


@pytest.mark.parametrize("name", NEVER)
@pytest.mark.parametrize("options", [{"step_size": 1e-3}, TABLE])
def test_no_update_takes_a_task_that_it_cannot_sample(name: str, options: dict[str, Any]) -> None:
    theta, message = NEVER[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(SGLDGibbs(program(theta), **options))


def test_the_joint_training_refuses_an_odd_task_too() -> None:
    kernel = SGLDGibbs(program(ODD_TASKS["an offset"][0]), sgd_steps=8, **TABLE)
    with pytest.raises(ValueError, match="task 2: the mean"):
        MCMC(kernel, num_samples=2, warmup_steps=8, disable_progbar=True).run()


# --------------------------------------------------------------------------------------------- what is the same


def vectorised(dim: int | None) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("tasks", N, subsample_size=2, dim=dim) as i:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(1), obs=Y[i].view(*theta.shape, 5))

    return model


@pytest.mark.parametrize("how", ["handler", "distribution", "weight"])
def test_a_mask_or_a_weight_that_lets_everything_pass_changes_nothing(how: str) -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("tasks", N, subsample_size=2) as i:
            law = dist.Normal(phi, 0.5).mask(True) if how == "distribution" else dist.Normal(phi, 0.5)
            handlers = {"handler": poutine.mask(mask=True), "weight": poutine.scale(scale=torch.tensor(1.0))}
            with handlers.get(how, nullcontext()):
                theta = pyro.sample("theta", law)
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(1), obs=Y[i])

    expected, found = (run(SGLDGibbs(m, step_size=0.01)).get_samples()["phi"] for m in (vectorised(None), model))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dim", [-1, -2, -3])
@pytest.mark.parametrize("options", [{"step_size": 0.01}, TABLE, {"step_size": 0.01, "preconditioner": "rms"}])
def test_the_plates_dimension_changes_nothing(dim: int, options: dict[str, Any]) -> None:
    expected, found = (run(SGLDGibbs(vectorised(d), **options)).get_samples()["phi"] for d in (None, dim))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_the_joint_training_takes_any_dimension_of_the_plate() -> None:
    draws = []
    for dim in (None, -2):
        kernel = SGLDGibbs(vectorised(dim), step_size=0.01, sgd_steps=4)
        mcmc = MCMC(kernel, num_samples=6, warmup_steps=6, disable_progbar=True)
        pyro.set_rng_seed(1)
        mcmc.run()
        draws.append(mcmc.get_samples()["phi"])
    torch.testing.assert_close(draws[0], draws[1], rtol=0, atol=0)


NAMES: dict[str, Callable[[str, int], str]] = {
    "number": lambda base, i: f"{base}_{i}",
    "own ids": lambda base, i: f"{base}_{(3, 1, 4, 0, 5, 2)[i]}",
    "words": lambda base, i: f"{base}_{('oslo', 'rome', 'bern', 'kyiv', 'lima', 'bonn')[i]}",
    "words first": lambda base, i: f"{('oslo', 'rome', 'bern', 'kyiv', 'lima', 'bonn')[i]}.{base}",
    "scope": lambda base, i: f"task{i}/{base}",
    "middle": lambda base, i: f"{base}_{i}_w",
    "padded": lambda base, i: f"{base}{i + 7:03d}",
    "letters and digits": lambda base, i: f"{base}_{('1a', '2b', '10c', 'd4', '5e', 'f')[i]}",
    "two numbers": lambda base, i: f"{base}_{i}_0",
    "brackets": lambda base, i: f"{base}[{i}]",
    "same": lambda base, i: base,
}


def with_names(name: Callable[[str, int], str], loops: int = 1) -> Callable[[], None]:
    """Two sites a task and a third in one task only, which comes first there."""

    def local(i: int, phi: Tensor) -> Tensor:
        extra = sample(name("extra", i), dist.Normal(torch.tensor(0.0), 1.0)) if i == ODD else torch.tensor(0.0)
        theta = sample(name("theta", i), dist.Normal(phi, 0.5))
        return theta + extra + sample(name("head", i), dist.Normal(torch.tensor(0.0), 1.0))

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        tasks = pyro.plate("tasks", N, subsample_size=1)
        drawn = {i: local(i, phi) for i in tasks} if loops == 2 else {}
        for i in tasks:
            value = drawn[i] if loops == 2 else local(i, phi)
            pyro.sample(name("y", i), dist.Normal(value, 1.0).expand([5]).to_event(1), obs=Y[i])

    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{"step_size": 0.01}, TABLE])
def test_tasks_may_be_named_in_any_way(name: str, options: dict[str, Any]) -> None:
    plain = run(SGLDGibbs(with_names(NAMES["number"]), **options)).get_samples()["phi"]
    kernel = SGLDGibbs(with_names(NAMES[name]), **options)
    torch.testing.assert_close(run(kernel).get_samples()["phi"], plain, rtol=0, atol=0)
    assert [len(kernel.theta(i)) for i in range(N)] == [3 if i == ODD else 2 for i in range(N)]


def test_a_plate_may_be_iterated_over_twice() -> None:
    once, twice_ = (
        run(SGLDGibbs(with_names(NAMES["number"], loops), step_size=0.01)).get_samples()["phi"] for loops in (1, 2)
    )
    torch.testing.assert_close(twice_, once, rtol=0, atol=0)


def test_a_loop_that_is_left_early_before_another_is_refused() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        tasks = pyro.plate("tasks", N, subsample_size=3)
        drawn = {i: normal_theta(i, phi) for i in tasks}
        for i in tasks:
            observe(i, drawn[i])
            break

    with pytest.raises(ValueError, match="left one of the loops early"):
        run(SGLDGibbs(model, step_size=0.01))


def test_a_chain_of_odd_tasks_resumes_where_it_was(tmp_path: Path) -> None:
    """What later tasks added (a coupled site, names that are no numbers) is saved with the chain."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        for i in pyro.plate("tasks", N, subsample_size=1):
            name = NAMES["letters and digits"]
            theta = pyro.sample(name("theta", i), dist.Normal(phi, 0.5))
            if i == ODD:
                theta = pyro.sample(name("child", i), dist.Normal(theta, 0.3))
            pyro.sample(name("y", i), dist.Normal(theta, 1.0).expand([5]).to_event(1), obs=Y[i])

    whole = run(SGLDGibbs(model, step_size=0.02), 3 * N).get_samples()["phi"]
    pyro.set_rng_seed(7)
    MCMC(SGLDGibbs(model, step_size=0.02), N + 1, warmup_steps=0, disable_progbar=True).run(checkpoint=tmp_path / "run")
    rest = MCMC(SGLDGibbs(model, step_size=0.02), 3 * N, warmup_steps=0, disable_progbar=True)
    rest.run(resume=tmp_path / "run")
    torch.testing.assert_close(rest.get_samples()["phi"], whole, rtol=0, atol=0)


# --------------------------------------------------------------------------------------------- supports and starts


def test_each_task_has_its_own_bounds() -> None:
    bounds, truth = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.5, 1.7, 2.6])
    y = truth.unsqueeze(-1) + 0.1 * torch.randn(3, 5)
    seen: dict[int, float] = {}

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("tasks", 3, subsample_size=1) as i:
            u = pyro.sample("u", dist.Uniform(torch.zeros(1), bounds[i]))
            pyro.sample("theta", dist.Normal(phi, 0.1))
            seen[int(i)] = float(u.detach())
            pyro.sample("y", dist.Normal(u.unsqueeze(-1), 0.1).to_event(1), obs=y[i])

    run(SGLDGibbs(model, step_size=2e-3, temperature=0.0, check_stability=False), 600)
    assert [abs(seen[i] - float(y[i].mean())) < 0.01 for i in range(3)] == [True] * 3


WIDE: dict[str, Callable[[], Any]] = {
    "half-Cauchy": lambda: dist.HalfCauchy(torch.tensor(1.0)),
    "half-Cauchy, a vector": lambda: dist.HalfCauchy(torch.ones(2)).to_event(1),
    "Cauchy": lambda: dist.Cauchy(torch.tensor(0.0), 1.0),
    "Pareto": lambda: dist.Pareto(torch.tensor(1.0), 0.9),
    "inverse gamma": lambda: dist.InverseGamma(torch.tensor(0.5), torch.tensor(1.0)),
    "Student with one degree": lambda: dist.StudentT(torch.tensor(1.0), 0.0, 1.0),
    "improper": lambda: dist.ImproperUniform(dist.constraints.positive, (), ()),
    "improper simplex": lambda: dist.ImproperUniform(dist.constraints.simplex, (), (3,)),
    "correlation": lambda: dist.LKJCholesky(3, torch.tensor(1.0)),
    "masked": lambda: dist.HalfCauchy(torch.tensor(1.0)).mask(True),
}


@pytest.mark.parametrize("where", ["global", "local"])
@pytest.mark.parametrize("name", WIDE)
def test_every_site_starts_at_a_finite_point(name: str, where: str) -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        wide = pyro.sample("wide", WIDE[name]()) if where == "global" else None
        for i in pyro.plate("tasks", 3, subsample_size=1):
            value = pyro.sample(f"wide_{i}", WIDE[name]()) if wide is None else wide
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 1.0))
            pyro.sample(f"y_{i}", dist.Normal(theta + value.sum(), 1.0).expand([5]).to_event(1), obs=Y[i])

    draws = run(SGLDGibbs(model, **TABLE), 6).get_samples()
    assert all(torch.isfinite(value).all() for value in draws.values())


def test_a_start_of_the_callers_own_is_not_replaced() -> None:
    def model() -> None:
        pyro.sample("tau", dist.HalfCauchy(torch.tensor(1.0)))

    kernel = SGLD(model, step_size=0.1, init_strategy=init_to_value(values={"tau": torch.tensor(math.inf)}))
    with pytest.raises(ValueError, match="'tau' would start at inf, which is not inside the support of its HalfCauchy"):
        run(kernel)


def test_the_first_tasks_may_say_nothing_of_theta() -> None:
    """Their rows are masked: no saddle, for the other tasks' gradients are not zero."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("tasks", N, subsample_size=1) as i:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            law = dist.Normal(theta.unsqueeze(-1), 1.0).expand([1, 5]).to_event(1).mask(i >= ODD)
            pyro.sample("y", law, obs=Y[i])

    assert torch.isfinite(run(SGLDGibbs(model, step_size=0.01)).get_samples()["phi"]).all()


def starting(likelihood: Callable[[Tensor], Any], y: Tensor) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.zeros(2), 2.0).to_event(1))
        with pyro.plate("tasks", 3, subsample_size=1):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5).to_event(1))
            pyro.sample("y", likelihood(theta).to_event(1), obs=y)

    return model


def test_a_mode_is_no_saddle() -> None:
    """Balanced classes have their mode where theta starts, with a gradient of exactly zero; a product has a saddle."""
    y = torch.tensor([[0.0, 1.0]])
    balanced = starting(lambda theta: dist.Bernoulli(logits=theta.sum(-1, keepdim=True).expand(1, 2)), y)
    assert torch.isfinite(run(SGLDGibbs(balanced, step_size=0.01)).get_samples()["phi"]).all()
    unseen = starting(lambda theta: dist.Normal(theta, 1.0).mask(torch.tensor(False)), y)
    assert torch.isfinite(run(SGLDGibbs(unseen, step_size=0.01)).get_samples()["phi"]).all()
    product = starting(lambda theta: dist.Normal(theta.prod(-1, keepdim=True).expand(1, 2), 1.0), y + 1.0)
    with pytest.raises(ValueError, match="a saddle"):
        run(SGLDGibbs(product, step_size=0.01))


# --------------------------------------------------------------------------------------------- the whole program


def after_the_plate(latent: bool) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        with pyro.plate("tasks", N, subsample_size=1) as i:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta.unsqueeze(-1), 1.0).to_event(1), obs=Y[i])
        pyro.sample("late", dist.Normal(theta.sum(), 1.0), obs=None if latent else torch.tensor(0.3))

    return model


def chained() -> None:
    phi, before = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0)), torch.tensor(0.0)
    for i in pyro.plate("tasks", N, subsample_size=2):
        theta = normal_theta(i, phi)
        before = pyro.sample(f"walk_{i}", dist.Normal(before + theta, 1.0))
        observe(i, before)


def one_name() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
    for i in pyro.plate("tasks", N, subsample_size=2):
        observe(i, pyro.sample("theta", dist.Normal(phi, 0.5)))


def moving_bound() -> None:
    top = pyro.sample("top", dist.LogNormal(torch.tensor(0.0), 1.0))
    phi = pyro.sample("phi", dist.Uniform(torch.tensor(0.0), top))
    for i in pyro.plate("tasks", N, subsample_size=1):
        observe(i, normal_theta(i, phi))


class Opaque(dist.Normal):
    """A distribution that can be sampled from only."""

    def log_prob(self, value: Tensor) -> Tensor:
        raise NotImplementedError


def without_density() -> None:
    phi = pyro.sample("phi", Opaque(torch.tensor(0.0), torch.tensor(1.0)))
    for i in pyro.plate("tasks", N, subsample_size=1):
        observe(i, normal_theta(i, phi))


def other_shapes() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
    with pyro.plate("tasks", N, subsample_size=1) as i:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        head = pyro.sample("head", dist.Normal(torch.zeros(1, 2 + int(i) % 2), 1.0).to_event(1))
        pyro.sample("y", dist.Normal((theta + head.sum(-1)).unsqueeze(-1), 1.0).to_event(1), obs=Y[i])


REFUSED: dict[str, tuple[Callable[[], None], str]] = {
    "observed after the plate": (
        after_the_plate(False),
        "'late' stands outside the task plate and depends on .*'theta'",
    ),
    "latent after the plate": (after_the_plate(True), "'late' stands outside the task plate and depends on .*'theta'"),
    "tasks that hang together": (chained, "'walk_1' of task 1 depends on 'walk_0' of task 0"),
    "one name for two tasks of a block": (one_name, "two sites of one run are named 'theta'"),
    "a support that moves": (moving_bound, "the support of the site 'phi' moves with 'top'"),
    "no density": (without_density, r"'phi' \(Opaque\) has no density that can be computed"),
    "other shapes in a vectorised plate": (other_shapes, r"task 1: .*head: \[3\].*first tasks had .*head: \[2\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_chain_can_sample_is_refused_with_a_reason(name: str) -> None:
    model, message = REFUSED[name]
    with pytest.raises(ValueError, match=f"(?s){message}"):
        run(SGLDGibbs(model, **TABLE))


# --------------------------------------------------------------------------------------------- steps and chains


def stiff(precisions: list[float]) -> Callable[[], None]:
    """Tasks whose single observation has the given precisions; theta's own prior has precision 4."""

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 2.0))
        for i in pyro.plate("tasks", len(precisions), subsample_size=1):
            theta = normal_theta(i, phi)
            pyro.sample(f"y_{i}", dist.Normal(theta, precisions[i] ** -0.5), obs=Y[i, 0])

    return model


@pytest.mark.parametrize("integrator", ["exponential", "euler"])
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_step_past_the_limit_of_any_task_is_refused_and_one_below_it_is_not(odd: int, integrator: str) -> None:
    H, p = 400.0, 4.0
    limit = 4.0 / (H + p) if integrator == "euler" else -2.0 / p * math.log(1.0 - 2.0 / (1.0 + H / p))
    precisions = [H if i == odd else 1.0 for i in range(3)]
    options: dict[str, Any] = {"integrator": integrator}
    run(SGLDGibbs(stiff(precisions), step_size=0.98 * limit, **options), 6)
    said = "^step_size" if odd == 0 else f"^task {odd}: step_size"
    with pytest.raises(ValueError, match=rf"{said}=\S+ is past its stability limit"):
        run(SGLDGibbs(stiff(precisions), step_size=1.02 * limit, **options), 6)
    # And it is the limit: past it a chain without noise runs away, below it does not.
    for factor, grows in ((0.9, False), (1.1, True)):
        kernel = SGLDGibbs(
            stiff(precisions), step_size=factor * limit, temperature=0.0, check_stability=False, **options
        )
        run(kernel, 600)
        assert (abs(float(kernel.theta(odd)["theta"])) > 1e3) is grows


def test_chains_in_processes_of_their_own_start_where_they_were_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyro.infer.mcmc.api.mp.cpu_count", lambda: 4)

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 100.0))
        pyro.sample("y", dist.Normal(phi, 100.0), obs=torch.tensor(0.0))

    starts = {"phi": torch.tensor([5000.0, -5000.0])}
    mcmc = run(SGLD(model), 2, num_chains=2, mp_context="fork", initial_params=starts)
    first = mcmc.get_samples(group_by_chain=True)["phi"][:, 0].tolist()
    assert first[0] > 4000.0 and first[1] < -4000.0
