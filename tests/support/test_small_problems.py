"""Small problems are solved on one thread, and the caller's threads are afterwards what they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from pyro_lift.models import heads, value_head
from pyro_lift.models.head_problem import HeadModel
from pyro_lift.support.small_problems import SMALL, on_one_thread


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@on_one_thread
def threads_of(features: Tensor, *, fails: bool = False) -> int:
    if fails:
        raise ArithmeticError(f"{features.shape}")
    return torch.get_num_threads()


@pytest.mark.parametrize(("values", "threads"), [(1, 1), (SMALL, 1), (SMALL + 1, 3)])
def test_a_small_problem_has_one_thread_and_a_large_one_all(values: int, threads: int) -> None:
    assert threads_of(torch.zeros(values)) == threads
    assert torch.get_num_threads() == 3


def test_the_callers_threads_come_back_after_an_error() -> None:
    with pytest.raises(ArithmeticError):
        threads_of(torch.zeros(4), fails=True)
    assert torch.get_num_threads() == 3


def test_heads_are_solved_and_chosen_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(features: Tensor, weight: Tensor | None = None) -> heads.Scaling:
        seen.append(torch.get_num_threads())
        return scaling_of(features, weight)

    scaling_of = heads.scaling_of
    monkeypatch.setattr(heads, "scaling_of", noted)
    monkeypatch.setattr(value_head, "scaling_of", noted)
    x, y = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    model = HeadModel(2)
    solved = heads.solve_head(features=x, target=y, model=model, prior_sd=1.0).head
    heads.choose_prior_sd(x, y, model)
    heads.laplace_head(x, y, model, solved, 2, prior_sd=1.0, generator=torch.Generator().manual_seed(0))
    value_head.choose_value_head(x, x[:, 0])
    assert len(seen) >= 4 and set(seen) == {1}
    assert torch.get_num_threads() == 3
