"""Projections of long vectors: the variance of a coordinate, the same for trace and draws, one pass."""

from __future__ import annotations

import pytest
import torch

from pyro_lift.inference import projections
from pyro_lift.inference.projections import ProjectedTrace, project, signs, sketched

D, M = 1003, 8


def test_a_sketch_is_the_matrix_product_it_stands_for() -> None:
    x = torch.randn(3, D, dtype=torch.float64)
    sign = signs(D, M).double()
    matrix = torch.zeros(D, M, dtype=torch.float64)
    for i in range(D):
        matrix[i, i % M] = sign[i // M] * (M / D) ** 0.5
    torch.testing.assert_close(sketched(x, M, sign), x @ matrix)
    torch.testing.assert_close(sketched(x[0], M, sign), x[0] @ matrix)


def test_a_projection_has_the_mean_variance_of_its_coordinates() -> None:
    """Over 4,000 independent draws, to five standard errors of a variance."""
    scale = torch.linspace(0.5, 2.0, D)
    draws = scale * torch.randn(4000, D)
    found = sketched(draws, M, signs(D, M)).var(0)
    expected = torch.stack([(M / D) * scale[j::M].square().sum() for j in range(M)])
    assert bool(((found / expected - 1.0).abs() < 5.0 * (2.0 / 4000) ** 0.5).all())
    assert float(expected.mean()) == pytest.approx(float(scale.square().mean()), rel=1e-2)


def test_trace_and_draws_are_projected_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projections, "SPARSE_FROM", 100)
    draws = torch.randn(5, D)
    kept = ProjectedTrace(coordinates=M)
    for draw in draws:
        kept.update(draw)
    torch.testing.assert_close(kept.get()["projection"], project(draws, M), rtol=1e-5, atol=1e-6)
