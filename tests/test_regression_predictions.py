"""Predictions of regressions have the shape of their targets, and networks that end in features say what they lack."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import peft
import pytest
import torch

from pyro_lift import LiFT, Task, TaskPosterior

SHORT = {"sgd_steps": 0, "burn_in": 2, "samples": 4, "noise_scale": 0.5, "seed": 0}


def network(outputs: int) -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


def lift(outputs: int) -> LiFT:
    return LiFT(network(outputs), peft.LoraConfig(r=2, target_modules=["0", "2"]), **SHORT)  # type: ignore[arg-type]


def tasks(shape: Sequence[int]) -> list[Task]:
    generator = torch.Generator().manual_seed(1)
    return [
        Task(
            f"t{k}", (torch.randn(9, 3, generator=generator), torch.randn(9, *shape, generator=generator)), "regression"
        )
        for k in range(4)
    ]


@pytest.mark.parametrize("shape", [(), (1,), (2,)])
def test_means_and_their_widths_are_shaped_as_the_targets_and_so_are_those_of_a_saved_posterior(
    shape: Sequence[int], tmp_path: Path
) -> None:
    outputs = shape[0] if shape else 1
    made = tasks(shape)
    posterior = lift(outputs).meta_train(made[:3], progress=False).adapt(made[3], seed=0)
    posterior.save_pretrained(tmp_path / "posterior")
    loaded = TaskPosterior.from_pretrained(tmp_path / "posterior", network(outputs))
    x = torch.randn(5, 3)
    for each in (posterior, loaded):
        assert each.predict(x).shape == each.predict_sd(x).shape == (5, *shape)
        assert torch.equal(each.predict(x), posterior.predict(x))


def test_outputs_of_another_width_than_the_targets_are_refused_with_the_way_out() -> None:
    shared = LiFT(network(8), peft.LoraConfig(r=2, target_modules=["0", "2"]), head="shared", **SHORT)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"leave head open.*Or put a layer on them.*torch\.nn\.Linear\(8, 1\)\), the layer"
    ):
        shared.meta_train(tasks(()), progress=False)
    with pytest.raises(ValueError, match=r"give targets as rows of 6 values: y\.flatten\(1\)\.$"):
        lift(8).meta_train(tasks((3, 2)), progress=False)
    with pytest.raises(ValueError, match=r"expected one shape, \[\.\.\., b\] or \[\.\.\., b, M\]\.$"):
        lift(1).meta_train(tasks((2,)), progress=False)
