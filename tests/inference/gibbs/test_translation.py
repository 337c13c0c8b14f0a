"""The translation move: its estimate, its bookkeeping, its law, its step, and a run that goes on to the bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from programs import Model, sequential, vectorised
from torch import Tensor

from pyro_lift import MCMC, DivergedError, SGLDGibbs
from pyro_lift.inference.gibbs import movers, translation, visit
from pyro_lift.inference.gibbs.rows import block_values, pair_rows, regrouped
from pyro_lift.inference.gibbs.state import Chain, SGLDGibbsState, Streams
from pyro_lift.inference.gibbs.task_curvature import task_curvature
from pyro_lift.models.linear_gaussian import LinearGaussian

SAGA: dict[str, Any] = {"translation": "saga", "step_size": 0.01, "seed": 1}


def two_pairs(block: int = 1) -> Model:
    """Two global sites of unequal length, each the mean of a family of its own."""
    y = torch.linspace(-1.0, 2.0, 5 * 4, dtype=torch.float64).view(5, 4).sin()

    def model() -> None:
        a = pyro.sample("a", dist.Normal(torch.ones(3).double(), 1.0).to_event(1))
        b = pyro.sample("b", dist.Normal(torch.zeros(1).double(), 0.7).to_event(1))
        with pyro.plate("tasks", 5, subsample_size=block) as index:
            u = pyro.sample("u", dist.Normal(a, 0.5).to_event(1))
            v = pyro.sample("v", dist.Normal(b, 0.3).to_event(1))
            mean = torch.cat([u, v], -1) + 0.1 * u.sum(-1, keepdim=True)
            pyro.sample("y", dist.Normal(mean, 0.8).to_event(1), obs=y[index])

    return model


def run(model: Model, visits: int, **options: Any) -> SGLDGibbs:
    kernel = SGLDGibbs(model, **{**SAGA, **options})
    kernel.setup(options.get("sgd_steps", 0) + 4)
    params = kernel.initial_params
    for _ in range(visits):
        params = kernel.sample(params)
    return kernel


def sum_of_theta(kernel: SGLDGibbs) -> dict[str, Tensor]:
    structure = kernel.chain.structure
    return {
        name: torch.stack([kernel.theta(i)[pair.family] for i in range(structure.num_tasks)]).double().sum(0)
        for name, pair in structure.pairs.items()
    }


def scalars(sequentially: bool, odd: int | None = None) -> Model:
    """Sites without a dimension of their own; the odd task has two of them."""
    y = torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)

    def one_by_one() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.5).double(), 2.0))
        for i in pyro.plate("tasks", 6, subsample_size=1):
            mean = phi.expand(2) if i == odd else phi
            theta = pyro.sample(f"theta_{i}", dist.Normal(mean, 0.5).to_event(int(i == odd)))
            pyro.sample(f"y_{i}", dist.Normal(theta.sum(), 1.0), obs=y[i])

    def together() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.5).double(), 2.0))
        with pyro.plate("tasks", 6, subsample_size=2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            pyro.sample("y", dist.Normal(theta, 1.0), obs=y[index])

    return one_by_one if sequentially else together


KINDS: dict[str, tuple[Callable[[], Model], dict[str, Any]]] = {
    "vectorised": (vectorised, {}),
    "a block of three": (lambda: vectorised(3), {}),
    "a block that does not divide N": (lambda: vectorised(4), {}),
    "all tasks at once": (lambda: vectorised(None), {}),
    "sequential, minibatches, heads": (sequential, {}),
    "sequential, a block of two": (lambda: sequential(block=2), {}),
    "two pairs": (two_pairs, {}),
    "two pairs, blocks": (lambda: two_pairs(2), {}),
    "scalars": (lambda: scalars(sequentially=False), {}),
    "scalars, sequential": (lambda: scalars(sequentially=True), {}),
    "on the host": (sequential, {"store": "host"}),
    "on disk": (sequential, {"store": "disk"}),
    "euler": (vectorised, {"integrator": "euler"}),
    "rms": (sequential, {"preconditioner": "rms"}),
    "two steps a visit": (sequential, {"theta_steps_per_visit": 2}),
    "after joint training": (sequential, {"sgd_steps": 5}),
    "cold": (vectorised, {"temperature": 0.0}),
    "inflated, thinned": (vectorised, {"n_inflate": 3.0, "thinning": 2}),
    "clipped": (vectorised, {"max_grad_norm": 0.5}),
    "in random blocks": (lambda: vectorised(2), {"scan": "random"}),
    "falling": (sequential, {"translation": "falling"}),
}


@pytest.mark.parametrize("name", KINDS)
def test_s_and_r_are_the_sums_that_they_stand_for(name: str) -> None:
    make, options = KINDS[name]
    kernel = run(make(), 40, **options)
    state, chain = kernel.state, kernel.chain
    assert chain.translation is not None
    for site, total in sum_of_theta(kernel).items():
        torch.testing.assert_close(state.sums[site], total, rtol=1e-10, atol=1e-10)
        assert bool(state.offset[site].any())
    table = chain.translation.table
    if table is None:
        return
    found = torch.stack([row.double() for row in table.read(range(chain.structure.num_tasks))]).sum(0)
    torch.testing.assert_close(torch.cat([state.gradients[k].reshape(-1) for k in chain.structure.pairs]), found)


def test_a_shift_moves_all_theta_alike_and_unvisited_ones_by_nothing_else() -> None:
    kernel = run(vectorised(), 20)
    before = [kernel.theta(i)["theta"] for i in range(6)]
    offset = kernel.state.offset["phi"]
    kernel.sample(kernel.state.phi)
    shift = kernel.state.offset["phi"] - offset
    moved = [i for i in range(6) if not torch.allclose(kernel.theta(i)["theta"], before[i] + shift, atol=1e-12)]
    assert kernel._info is not None and moved == list(kernel._info.tasks)


def held(kernel: SGLDGibbs) -> tuple[SGLDGibbsState, Chain]:
    kernel.chain.cache.recycle = False
    return kernel.state, kernel.chain


@pytest.mark.parametrize("block", [1, 2, 3])
@pytest.mark.parametrize("make", [vectorised, lambda block: sequential(batch=None, block=block)])
def test_the_estimate_is_unbiased_whatever_the_table_holds(make: Any, block: int) -> None:
    """The mean over all blocks of the noiseless shift is that of the whole gradient, at a state far from any mode."""
    state, chain = held(run(make(block), 13, temperature=0.0, translation_step_size=0.01))
    table = chain.translation.table if chain.translation else None
    assert table is not None
    wrong = torch.randn(2, generator=torch.Generator().manual_seed(0)).double()
    table.write([4], [table.read([4])[0] + wrong])
    state = state._replace(gradients={"phi": state.gradients["phi"] + wrong}, step=60)
    shifts, whole = [], torch.zeros(2, dtype=torch.float64)
    pair = chain.structure.pairs["phi"]
    for first in range(0, 6, block):
        index = torch.arange(first, first + block)
        before = block_values(state, chain, index, Streams())
        at = chain.program.run(state.phi, before, index, None)
        gradient = at.drift(at.locals).gradient
        pull = translation.pull_of(state, chain, at, gradient, before)
        shifts.append(translation.shift(state, chain, pull, {}, None)["phi"])
        whole += torch.stack(pair_rows(chain, at.tasks, regrouped(at, gradient))).sum(0)
    drift = whole - (state.phi["phi"] - pair.prior_mean) * pair.prior_precision
    # The exponential integrator's factor: half the step where the prior is wide.
    factor = -torch.expm1(-0.005 * pair.prior_precision) / pair.prior_precision
    torch.testing.assert_close(torch.stack(shifts).mean(0), factor * drift, rtol=1e-9, atol=1e-12)


# ------------------------------------------------------------------------------------------------------ the law


def second_moment(toy: LinearGaussian, eta: float, eta_d: float, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Second moments of (1, phi, theta_1..N) in the stationary law of the kernel's own visit, over its random rounds.

    A visit is an affine map of (phi, theta, r) and of the noise, since the gradients are: its matrices are read off
    visits that begin at unit vectors, and the moments solve M = mean over orders of (A M A' + Q).
    """
    N, B = toy.num_tasks, toy.block_size or toy.num_tasks
    kernel = run(toy, 3 * N, step_size=eta, translation_step_size=eta_d)
    base, chain = held(kernel)
    assert chain.translation is not None
    table = chain.translation.table
    size = 1 + N + (N if table is not None else 0)
    drawn: list[Tensor] = []

    def planned(like: Tensor, generator: torch.Generator | None) -> Tensor:
        del generator
        return drawn.pop(0).view(like.shape)

    for module in (movers, visit, translation):
        monkeypatch.setattr(module, "gaussian_noise", planned)

    def visited(block: Sequence[int], x: Tensor, noise: Tensor) -> Tensor:
        chain.store.write(range(N), list(x[1 : 1 + N].view(N, 1)))
        if table is not None:
            table.write(range(N), list(x[1 + N :].view(N, 1)))
        state = base._replace(
            step=50 * N,
            phi={"phi": x[:1]},
            sums={"phi": x[1 : 1 + N].sum().view(1)},
            offset={"phi": torch.zeros(1).double()},
            gradients={} if table is None else {"phi": x[1 + N :].sum().view(1)},
        )
        drawn[:] = [noise[: len(block)], noise[len(block) : len(block) + 1], noise[len(block) + 1 :]]
        after, _ = visit.step(state, chain, torch.tensor(block), Streams())
        theta = [row + after.offset["phi"] for row in chain.store.read(range(N))]
        rows = [] if table is None else table.read(range(N))
        found: Tensor = torch.cat([after.phi["phi"], *theta, *rows])
        return found

    blocks = [tuple(range(first, first + B)) for first in range(0, N, B)]
    maps: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    still, eye = torch.zeros(B + 2).double(), torch.eye(size).double()
    for block in blocks:
        b = visited(block, torch.zeros(size).double(), still)
        A = torch.stack([visited(block, unit, still) - b for unit in eye], 1)
        noises = torch.stack([visited(block, 0.0 * eye[0], unit) - b for unit in torch.eye(B + 2).double()], 1)
        whole = torch.zeros(size + 1, size + 1).double()
        whole[0, 0], whole[1:, 0], whole[1:, 1:] = 1.0, b, A
        spread = torch.zeros_like(whole)
        spread[1:, 1:] = noises @ noises.mT
        maps[block] = whole, spread
    linear = torch.zeros((size + 1) ** 2, (size + 1) ** 2).double()
    added = torch.zeros(size + 1, size + 1).double()
    orders = list(itertools.permutations(blocks))
    for order in orders:
        through, noise = torch.eye(size + 1).double(), torch.zeros_like(added)
        for block in order:
            whole, spread = maps[block]
            through, noise = whole @ through, whole @ noise @ whole.mT + spread
        linear += torch.kron(through, through) / len(orders)
        added += noise / len(orders)
    # The moment of (1, 1) is 1 and stays so: it is held, the rest solved for.
    free = torch.eye((size + 1) ** 2).double() - linear
    free[0] = 0.0
    free[0, 0] = 1.0
    target = added.reshape(-1).clone()
    target[0] = 1.0
    moments = torch.linalg.solve(free, target).view(size + 1, size + 1)
    return torch.as_tensor(moments[: N + 2, : N + 2])


def exact_moments(toy: LinearGaussian) -> Tensor:
    N = toy.num_tasks
    precision = torch.zeros(N + 1, N + 1).double()
    precision[0, 0] = 1 / toy.sigma**2 + N / toy.beta**2
    shift = torch.zeros(N + 1).double()
    for i in range(N):
        precision[i + 1, i + 1] = 1 / toy.beta**2 + float(toy.x[i].square().sum()) / toy.alpha**2
        precision[0, i + 1] = precision[i + 1, 0] = -1 / toy.beta**2
        shift[i + 1] = (toy.x[i, :, 0] * toy.y[i]).sum() / toy.alpha**2
    covariance = torch.linalg.inv(precision)
    mean = covariance @ shift
    both = torch.cat([torch.ones(1).double(), mean])
    moments = torch.outer(both, both)
    moments[1:, 1:] += covariance
    return moments


@pytest.mark.parametrize("block", [1, 3, None])
def test_the_stationary_law_is_the_posterior_up_to_the_steps(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mean and covariance of phi and all theta, solved for and not sampled, at B = 1 and in blocks alike.

    The mean is the posterior's at every step size; the covariance is off by a part that falls with the steps.
    """
    toy = LinearGaussian(3, 4, 1, alpha=2.0, seed=5, block_size=block)
    exact = exact_moments(toy)
    spread = exact[1:, 1:] - torch.outer(exact[0, 1:], exact[0, 1:])
    errors = []
    for scale in (1.0, 0.1):
        with monkeypatch.context() as patch:
            found = second_moment(toy, 0.04 * scale, 0.04 * scale, patch)
        torch.testing.assert_close(found[0], exact[0], rtol=0.0, atol=0.06 * scale)
        covariance = found[1:, 1:] - torch.outer(found[0, 1:], found[0, 1:])
        errors.append(float((covariance - spread).abs().max() / spread.abs().max()))
    assert errors[1] < 0.15 * errors[0] and errors[1] < 0.01, errors


# ------------------------------------------------------------------------------------------- its step and the table


@pytest.mark.parametrize("block", [1, 3, None])
def test_the_curvature_of_the_tasks_is_measured(block: int | None) -> None:
    toy = LinearGaussian(6, dim=3, alpha=1.5, seed=2, block_size=block)
    kernel = run(toy, 1)
    gram = 2.0 * toy.x.mT @ toy.x / toy.alpha**2
    found = task_curvature(kernel.chain.program, kernel.state.phi, kernel.chain.structure, 2.0)
    assert found is not None and not found.subsampled
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(gram)[:, -1].mean()), rel=0.02)
    torch.testing.assert_close(found.diagonal, gram.diagonal(dim1=1, dim2=2).mean(0))


def test_the_curvature_of_two_pairs_is_that_of_both_together() -> None:
    kernel = run(two_pairs(), 1)
    found = task_curvature(kernel.chain.program, kernel.state.phi, kernel.chain.structure, 1.0)
    mix = torch.eye(4).double()
    mix[:, :3] += 0.1
    gram = mix.mT @ mix / 0.8**2
    assert found is not None
    assert found.largest == pytest.approx(float(torch.linalg.eigvalsh(gram)[-1]), rel=0.02)
    torch.testing.assert_close(found.diagonal, gram.diagonal())


def test_a_task_that_is_not_as_the_others_is_refused_at_its_visit_and_not_at_set_up() -> None:
    kernel = run(scalars(sequentially=True, odd=3), 3)
    assert kernel.report()["translation_limit"] == pytest.approx(4.0 / (6 + 0.25))
    with pytest.raises(ValueError, match=r"^task 3: "):
        kernel.sample(kernel.state.phi)


def test_auto_is_saga_where_curvature_is_measured_on_whole_tasks() -> None:
    assert run(vectorised(), 1, translation="auto").report()["translation"] == "saga"
    for options in ({"preconditioner": "rms"}, {"phi_update": "langevin", "phi_step_size": 1e-4}):
        assert run(vectorised(), 1, translation="auto", **options).report()["translation"] == "none"
    assert run(sequential(), 1, translation="auto").report()["translation"] == "none"


def test_the_step_is_a_share_of_its_limit_and_reported() -> None:
    """Rows that are subsampled ask for a smaller one, and a preconditioner for that of joint training."""
    report = run(vectorised(), 1).report()
    limit = 4.0 / (6 * 4.0 + 0.25)
    assert report["translation"] == "saga" and report["translation_limit"] == pytest.approx(limit)
    assert report["translation_step_size"] == pytest.approx(0.1 * limit)
    subsampled = run(sequential(), 1).report()
    assert subsampled["translation_step_size"] == pytest.approx(0.025 / 6 * float(subsampled["translation_limit"]))
    assert run(sequential(), 1, preconditioner="rms").report()["translation_step_size"] == pytest.approx(0.01 / 6)


def test_later_rounds_visit_every_task_once_in_another_order() -> None:
    kernel = run(vectorised(2), 0)
    rounds = [[kernel._block_at(3 * r + k).tolist() for k in range(3)] for r in range(12)]
    assert all(sorted(itertools.chain(*blocks)) == list(range(6)) for blocks in rounds)
    assert rounds[0] == [[0, 1], [2, 3], [4, 5]] and len({str(blocks) for blocks in rounds}) > 3


@pytest.mark.parametrize("options", [{}, {"store": "disk"}, {"translation": "falling"}, {"preconditioner": "rms"}])
def test_a_resumed_chain_goes_on_to_the_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    def mcmc(draws: int) -> MCMC:
        return MCMC(SGLDGibbs(sequential(), **{**SAGA, **options}), draws, warmup_steps=5, disable_progbar=True)

    whole, part, rest = mcmc(30), mcmc(11), mcmc(30)
    whole.run()
    part.run(checkpoint=tmp_path / "run")
    rest.run(resume=tmp_path / "run")
    assert torch.equal(whole.get_samples()["phi"], rest.get_samples()["phi"])
    kernels: list[Any] = [whole.kernel, rest.kernel]
    assert torch.equal(*(kernel.state.offset["phi"] for kernel in kernels))
    assert torch.equal(*(kernel.theta(3)["theta"] for kernel in kernels))


def test_a_failed_visit_leaves_the_table_alone() -> None:
    kernel = run(vectorised(), 20)
    state, chain = held(kernel)
    assert chain.translation is not None and chain.translation.table is not None
    before = [row.tolist() for row in chain.translation.table.read(range(6))]
    broken = state._replace(offset={"phi": torch.full((2,), torch.nan).double()})
    with pyro.validation_enabled(False), pytest.raises(DivergedError, match="step"):
        visit.step(broken, chain, torch.tensor([1]), Streams())
    assert [row.tolist() for row in chain.translation.table.read(range(6))] == before


# ---------------------------------------------------------------------------------------------- the toy's posterior


@pytest.mark.slow
def test_weak_data_are_close_within_a_few_thousand_visits() -> None:
    from pyro_lift.bench.toy_chains import second_half_kl

    toy = LinearGaussian(100, alpha=20.0, seed=0)
    kl = {}
    for kind in ("saga", "none"):
        kernel = SGLDGibbs(toy, step_size=0.2, seed=0, translation=kind)  # type: ignore[arg-type]
        kernel.setup(0)
        params, draws = kernel.initial_params, []
        with pyro.validation_enabled(False):
            for _ in range(3_750):
                params = kernel.sample(params)
                draws.append(params["phi"])
        kl[kind] = second_half_kl(torch.stack(draws), toy.posterior())
    assert kl["saga"] < 0.1 < 0.5 < kl["none"], kl
