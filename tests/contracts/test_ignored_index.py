"""A subsampled plate whose index the program does not use: refused where that is certain, warned of where likely."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from pyro_lift import MCMC, SGLD, SGLDGibbs, whole

N, B, ROWS = 12, 3, 4
Y = torch.randn(N, ROWS, generator=torch.Generator().manual_seed(0))
BINARY = (Y > 0).float()


def program(obs: Callable[[Tensor], Tensor], law: type = dist.Normal) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("tasks", N, subsample_size=B, dim=-2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            with pyro.plate("rows", ROWS, dim=-1):
                fn = dist.Normal(theta, 1.0) if law is dist.Normal else law(logits=theta)
                pyro.sample("y", fn, obs=obs(index))

    return model


def looped(obs: Callable[[int, int], Tensor], x: Callable[[int], float | Tensor] = lambda i: 0.0) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        for k, i in enumerate(pyro.plate("tasks", N, subsample_size=B)):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
            pyro.sample(f"y_{i}", dist.Normal(theta + x(i), 1.0).expand([ROWS]).to_event(1), obs=obs(k, i))

    return model


def rows_ignored() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("tasks", N, dim=-2) as index:
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        with pyro.plate("rows", ROWS, subsample_size=2, dim=-1):
            pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[index][:, :2])


def factor_without_data() -> None:
    phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
    with pyro.plate("tasks", N, subsample_size=B):
        theta = pyro.sample("theta", dist.Normal(phi, 0.5))
        pyro.factor("y", -(theta - 1.0).square())


def set_up(model: Callable[[], None], kernel: type = SGLDGibbs) -> list[str]:
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        kernel(model, step_size=0.01, seed=0).setup(1)
    return [str(w.message) for w in said]


@pytest.mark.parametrize("first", [B, 1])
def test_a_slice_instead_of_the_index_is_refused_with_the_way_out(first: int) -> None:
    with pytest.raises(ValueError, match=r"'tasks' shows 3 of 12 .* 'y' observes the same .*obs=y\[index\]"):
        set_up(program(lambda index: Y[:first]))


def test_one_that_is_not_told_the_step_size_is_refused_likewise() -> None:
    with pytest.raises(ValueError, match=r"does not use the plate's index"):
        MCMC(SGLDGibbs(program(lambda index: Y[:B])), num_samples=2, disable_progbar=True).run()


def test_a_loop_that_counts_instead_of_taking_the_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"for i in pyro\.plate\('tasks', 12, subsample_size=3\): .*obs=y\[i\]"):
        set_up(looped(lambda k, i: Y[k]))
    assert set_up(looped(lambda k, i: Y[i])) == []


def rows_copied_or_not(copied: bool) -> Callable[[], None]:
    first = Y[:, :2]

    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("tasks", N, dim=-2):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            with pyro.plate("rows", ROWS, subsample_size=2, dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=first.clone() if copied else first)

    return model


@pytest.mark.parametrize("kernel", [SGLDGibbs, SGLD])
def test_a_plate_of_rows_is_held_to_the_same(kernel: type) -> None:
    with pytest.raises(ValueError, match="'rows' shows 2 of 4"):
        set_up(rows_copied_or_not(False), kernel)


@pytest.mark.parametrize(
    "model",
    [
        program(lambda index: Y[torch.arange(B)]),
        program(lambda index: BINARY[torch.arange(B)], dist.Bernoulli),
        rows_copied_or_not(True),
        rows_ignored,
    ],
    ids=["numbers", "zeros and ones", "copied rows", "indexed, then sliced"],
)
def test_copies_of_the_same_values_are_warned_of(model: Callable[[], None]) -> None:
    (said,) = set_up(model)
    assert "does not use the plate's index" in said and "If the data do repeat themselves, nothing is wrong." in said


def test_a_factor_may_know_no_data() -> None:
    assert set_up(factor_without_data) == []


def test_data_that_are_alike_by_chance_are_no_ones_fault() -> None:
    few = torch.zeros(N, ROWS)
    few[-1] = 1.0  # the first blocks are equal, and say nothing
    zeros = torch.zeros(B, ROWS)
    for obs in (lambda index: few[index], lambda index: BINARY[index], lambda index: zeros):
        assert set_up(program(obs, dist.Bernoulli)) == []
    assert set_up(program(lambda index: Y[index])) == []
    assert set_up(program(lambda index: Y[0].expand(N, ROWS)[index] * 0.0 + 1.0)) == []


def labelled(labels: Callable[[Tensor], Tensor], inputs: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("tasks", N, subsample_size=B, dim=-2) as index:
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            with pyro.plate("rows", ROWS, dim=-1):
                logits = (theta - theta.detach().mean()) * inputs(index)
                pyro.sample("y", dist.Bernoulli(logits=logits), obs=labels(index))

    return model


def test_labels_in_one_order_with_inputs_of_each_tasks_own_are_no_mistake() -> None:
    order = torch.tensor([0.0, 1.0, 0.0, 1.0])
    for labels in (lambda index: order.expand(N, ROWS)[index], lambda index: order.clone()):
        assert set_up(labelled(labels, lambda index: Y[index])) == []
    assert set_up(labelled(lambda index: order, lambda index: Y[index])) == []
    with pytest.raises(ValueError, match="does not use the plate's index"):  # one piece of memory, and tasks differ
        set_up(labelled(lambda index: BINARY[:B], lambda index: Y[index]))
    (said,) = set_up(labelled(lambda index: BINARY[:B].clone(), lambda index: Y[:B]))
    assert "does not use the plate's index" in said
    (said,) = set_up(looped(lambda k, i: Y[0], lambda i: Y[i]))
    assert "nothing is wrong" in said
    assert set_up(looped(lambda k, i: order, lambda i: Y[i])) == []


@pytest.mark.parametrize("rows", [2, 3, 4, 5, 6])
def test_rows_that_chance_shows_twice_are_no_mistake(rows: int) -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        for i in pyro.plate("tasks", 3):
            theta = pyro.sample(f"theta_{i}", dist.Normal(phi, 0.5))
            with pyro.plate(f"rows_{i}", rows, subsample_size=rows - 1) as index:
                pyro.sample(f"y_{i}", dist.Normal(theta, 1.0), obs=Y.reshape(3, -1)[i, index])

    assert set_up(model) == []


def test_no_stream_of_the_callers_is_drawn_from_and_the_chain_is_what_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def chain() -> Tensor:
        mcmc = MCMC(SGLDGibbs(program(lambda index: Y[index]), step_size=0.01), num_samples=5, disable_progbar=True)
        torch.manual_seed(3)
        mcmc.run()
        return torch.cat([mcmc.get_samples()["phi"], torch.rand(1)])

    held = chain()
    monkeypatch.setattr("pyro_lift.inference.gibbs.plan.check_index_used", lambda program, run, says: None)
    torch.testing.assert_close(chain(), held, rtol=0.0, atol=0.0)


def test_the_data_of_one_task_stretched_over_all_of_them_are_warned_of() -> None:
    def model() -> None:
        phi = pyro.sample("phi", dist.Normal(torch.tensor(0.0), 1.0))
        with pyro.plate("tasks", N, subsample_size=1, dim=-2):
            theta = pyro.sample("theta", dist.Normal(phi, 0.5))
            with pyro.plate("rows", ROWS, dim=-1):
                pyro.sample("y", dist.Normal(theta, 1.0), obs=Y[:1])

    with pytest.warns(UserWarning, match=r"'y' observes the data of one element .*'tasks' \(shape \[1, 4\]\).*its 12"):
        SGLDGibbs(whole(model), seed=0).setup(1)
