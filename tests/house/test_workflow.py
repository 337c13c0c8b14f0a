"""The programs of docs/workflow.md run one after another, and README's first program gives the exact posterior."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from conftest import ROOT


def blocks(name: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:.*hape validation.*")
def test_the_programs_of_the_workflow_run(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    for program in blocks("docs/workflow.md"):
        exec(compile(program, "workflow.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "elpd_loo" in printed and "largest: observed" in printed and "torch.Size([300, 8, 12])" in printed
    # exact: given known scales, the mean of each task's rows is normal around phi
    y = names["y"].double()
    variance = 0.5**2 + 0.8**2 / 12
    precision = 8 / variance + 1 / 2.0**2
    phi = names["mcmc"].get_samples()["phi"]
    assert float(phi.mean()) == pytest.approx(float(y.mean(1).sum() / variance / precision), abs=0.08)


def test_readmes_first_program_gives_the_exact_posterior(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(compile(blocks("README.md")[0], "README.md", "exec"), names)
    capsys.readouterr()
    x, y = names["x"].double(), names["y"].double()
    precision, pull = torch.eye(2).double(), torch.zeros(2).double()
    for rows, answers in zip(x, y, strict=True):
        inverse = torch.linalg.inv(0.3**2 * torch.eye(30).double() + 0.5**2 * rows @ rows.T)
        precision += rows.T @ inverse @ rows
        pull += rows.T @ inverse @ answers
    exact, sd = torch.linalg.solve(precision, pull), torch.linalg.inv(precision).diagonal().sqrt()
    draws = names["mcmc"].get_samples()["phi"].double()
    # ESS of about 800: means within 5 standard errors, sds within 15 %
    assert bool(((draws.mean(0) - exact).abs() < 5 * sd / 800**0.5).all()), (draws.mean(0), exact)
    assert bool(((draws.std(0) / sd - 1).abs() < 0.15).all()), (draws.std(0), sd)
