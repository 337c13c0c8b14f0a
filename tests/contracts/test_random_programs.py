"""Random hierarchical programs: what the kernel moves by is what Pyro's own trace says, or the program is refused.

For each program: the gradient of every theta_i at a random point, the exact conditional of phi (mean and variance), and
what the accumulators add. A refusal must be deserved by a feature that the program has.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import pyro
import pytest
import torch
from kernel_seam import STEP, Seam, Visit, whole_gradient
from pyro.infer.mcmc.util import initialize_model
from pyro_reference import latent_sites, local_sites, log_density
from random_programs import RandomProgram
from torch import Tensor

EXACT: list[dict[str, Any]] = [{"phi_update": "gibbs"}, {"phi_update": "langevin", "accumulator": "exact"}]
ANY: list[dict[str, Any]] = [
    {"phi_update": "langevin", "accumulator": "table"},
    {"phi_update": "langevin", "accumulator": "single"},
    {"phi_update": "langevin", "accumulator": "single", "single_scale": "1"},
]
Minibatches = Mapping[int | None, Tensor]


class Verdict(NamedTuple):
    """How one program fared: ``agree``, ``refused`` by every update, ``undeserved`` or ``DISAGREE``; and why."""

    seed: int
    outcome: str
    reasons: tuple[str, ...]


class DisagreementError(AssertionError):
    """The kernel's numbers are not Pyro's."""


def _assert_close(what: str, found: Tensor, expected: Tensor, size: float) -> None:
    tolerance = 1e-5 * (1.0 + size + float(expected.abs().max()))
    worst = float((found - expected).abs().max())
    if not worst <= tolerance:
        raise DisagreementError(f"{what}: {found.tolist()}, Pyro's {expected.tolist()}")


class Reference:
    """Pyro's density of a program, as a function of the kernel's values."""

    def __init__(self, program: RandomProgram, power: float) -> None:
        self.program, self.power = program, power
        program.minibatches.clear()
        everything: dict[int | None, Tensor] = {
            key: torch.arange(program.ragged[key or 0]) for key in [None, *range(program.num_tasks)]
        }
        self.everything = everything
        self.names = local_sites(lambda: program.whole(everything), program.num_tasks)

    def values(self, phi: Mapping[str, Tensor], theta: Mapping[int, list[Tensor]]) -> dict[str, Tensor]:
        """By site of the whole program, as leaves."""
        found = {name: value.clone() for name, value in phi.items()}
        for task, names in self.names.items():
            if task is not None:
                found |= dict(zip(names, (value.clone() for value in theta[task]), strict=True))
            else:
                stacked = zip(*(theta[k] for k in range(self.program.num_tasks)), strict=True)
                found |= {name: torch.stack(parts) for name, parts in zip(names, stacked, strict=True)}
        return {name: value.detach().requires_grad_() for name, value in found.items()}

    def density(self, values: Mapping[str, Tensor], taken: Minibatches) -> Any:
        """The parts of the log density, with the minibatches taken."""
        taken = {**self.everything, **taken}
        return log_density(lambda: self.program.whole(taken), values, self.program.num_tasks)

    def check_theta(self, visit: Visit, theta: Mapping[int, list[Tensor]], taken: Minibatches) -> None:
        """The gradient of every local site of the block."""
        values = self.values(visit.phi, theta)
        total = self.density(values, taken).total(self.power)
        for task in visit.tasks:
            names = self.names[task if self.program.sequential else None]
            grads = torch.autograd.grad(total, [values[n] for n in names], retain_graph=True, allow_unused=True)
            for name, grad, found in zip(names, grads, visit.gradients[task], strict=True):
                expected = torch.zeros_like(values[name]) if grad is None else grad
                expected = expected if self.program.sequential else expected[task]
                size = float(values[name].detach().abs().max())
                _assert_close(f"gradient of {name!r}, task {task}", found, expected, size)

    def check_draw(self, visit: Visit, theta: Mapping[int, list[Tensor]], covariance: Tensor) -> None:
        """Mean and covariance of phi given all theta, from gradient and Hessian: the exact draw is for quadratics."""
        values = self.values(visit.phi, theta)
        total = self.density(values, {}).total(self.power)
        names = list(visit.phi)
        leaves = [values[name] for name in names]
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in grads])
        rows = [torch.autograd.grad(g, leaves, retain_graph=True, materialize_grads=True) for g in flat]
        hessian = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
        start = torch.cat([leaf.detach().reshape(-1) for leaf in leaves])
        mean = start - torch.linalg.solve(hessian, flat.detach())
        found = torch.cat([visit.moved_phi[name].reshape(-1) for name in names])
        _assert_close("mean of phi given theta", found, mean, float(start.detach().abs().max()))
        _assert_close("covariance of phi given theta", covariance, torch.linalg.inv(-hessian), 0.0)

    def phi_gradient(
        self, phi: Mapping[str, Tensor], theta: Mapping[int, list[Tensor]], taken: Minibatches, tasks: list[int]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Of what stands outside the plate, and of the terms of some tasks."""
        values = self.values(phi, theta)
        density = self.density(values, taken)
        leaves = [values[name] for name in phi]
        outside = density.shared + self.power * density.outside
        inside = (density.local + self.power * density.observed)[tasks].sum()
        pair = []
        for part in (outside, inside):
            grads = (
                torch.autograd.grad(part, leaves, retain_graph=True, allow_unused=True)
                if part.requires_grad
                else (None,) * len(leaves)
            )
            pair.append(
                {n: torch.zeros_like(x) if g is None else g for n, x, g in zip(phi, leaves, grads, strict=True)}
            )
        return pair[0], pair[1]


def _run(program: RandomProgram, options: dict[str, Any]) -> None:
    """One sweep to learn the program, and one that is compared.

    Raises:
        ValueError: a refusal.
        DisagreementError: numbers that are not Pyro's.
    """
    power, update, scale = options["n_inflate"], options["phi_update"], options.get("single_scale", "N")
    seam = Seam(program, **options)
    seam.sweep()
    seam.scatter(torch.Generator().manual_seed(program.seed))
    reference = Reference(program, power)
    J: Counter[str] = Counter()
    for number in range(seam.visits):
        program.minibatches.clear()
        theta = seam.theta()
        visit = seam.visit()
        first, last = program.minibatches[0], program.minibatches[-1]
        reference.check_theta(visit, theta, first)
        after = seam.theta()
        if update == "gibbs":
            reference.check_draw(visit, after, seam.covariance(list(visit.phi)))
            continue
        outside, inside = reference.phi_gradient(visit.phi, after, last, visit.tasks)
        accumulator = options["accumulator"]
        for name in visit.phi:
            J[name] = J[name] + inside[name]  # type: ignore[assignment]
        if accumulator == "table" and number < seam.visits - 1:
            continue  # the other blocks' gradients are of the first sweep still
        if accumulator == "exact":
            _, inside = reference.phi_gradient(visit.phi, after, {}, list(range(program.num_tasks)))
        factor = program.num_tasks / len(visit.tasks) if accumulator == "single" and scale == "N" else 1.0
        for name, phi in visit.phi.items():
            found = 2.0 * (visit.moved_phi[name] - phi) / STEP
            pull: Any = J[name] if accumulator == "table" else factor * inside[name]
            _assert_close(f"drift of {name!r}", found, outside[name] + pull, float(phi.abs().max()))


def _run_at_once(program: RandomProgram, options: dict[str, Any]) -> None:
    """SGLD on every site of the program: its gradient at a random point.

    Raises:
        ValueError: a refusal.
        DisagreementError: numbers that are not Pyro's.
    """
    reference = Reference(program, options["n_inflate"])
    sites = latent_sites(lambda: program.whole(reference.everything))
    draws = torch.Generator().manual_seed(program.seed)
    values = [0.7 * torch.randn(shape, generator=draws, dtype=torch.float64) for shape in sites.values()]
    program.minibatches.clear()
    found, position = whole_gradient(program.unplated, values, **options)
    leaves = {name: x.clone().requires_grad_() for name, x in zip(sites, values, strict=True)}
    total = reference.density(leaves, program.minibatches[-1]).total(options["n_inflate"])
    grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
    for (name, leaf), grad, own in zip(leaves.items(), grads, position, strict=True):
        expected = torch.zeros_like(leaf) if grad is None else grad
        _assert_close(
            f"gradient of {name!r}, all sites at once", found[own], expected, float(leaf.detach().abs().max())
        )


def _reason(error: Exception) -> str:
    """A refusal without its names and numbers."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", "...", str(error).split("\n")[0])
    return re.sub(r"-?\d+(\.\d+)?(e-?\d+)?", "#", text)[:150]


def examine(seed: int) -> Verdict:
    """Try the exact draw where the program may be one for it, and an update that takes any program."""
    program = RandomProgram(seed)
    chooser = torch.Generator().manual_seed(seed)
    pick = torch.randint(1000, (4,), generator=chooser).tolist()
    common = {
        "integrator": ("euler", "exponential")[pick[0] % 2],
        "n_inflate": (1.0, 2.5)[pick[1] % 2],
    }
    reasons, refused = [], 0
    runs = [
        (_run, {**EXACT[pick[2] % 2], **common}, program.breaking() | program.impossible()),
        (_run, {**ANY[pick[3] % 3], **common}, program.impossible()),
        (_run_at_once, common, program.impossible_at_once()),
    ]
    for number, (run, options, excuse) in enumerate(runs):
        if number == 1 and not refused and pick[0] % 4 < 2:
            continue  # it agreed by the exact draw, and theta's gradients are the same
        torch.manual_seed(seed)
        try:
            with pyro.validation_enabled(False):  # as in Pyro's MCMC
                run(program, options)
        except ValueError as refusal:
            refused += 1
            reasons.append(_reason(refusal))
            if not excuse:
                return Verdict(seed, "undeserved", (f"{program}\n    {options}\n    {refusal}",))
        except Exception as error:
            kind = type(error).__name__
            return Verdict(seed, "DISAGREE", (f"{program}\n    {options}\n    {kind}: {str(error)[:400]}",))
    return Verdict(seed, "refused" if refused == len(runs) else "agree", tuple(reasons))


def examine_all(first: int, last: int) -> tuple[Counter[str], Counter[str], list[str]]:
    """Outcomes, reasons of refusals, and what went wrong."""
    torch.set_default_dtype(torch.float64)
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong = []
    for seed in range(first, last):
        verdict = examine(seed)
        outcomes[verdict.outcome] += 1
        if verdict.outcome in ("undeserved", "DISAGREE"):
            wrong.append(f"{verdict.outcome} {verdict.reasons[0]}")
        else:
            reasons.update(verdict.reasons)
    return outcomes, reasons, wrong


def _examined(chunk: int) -> Counter[str]:
    outcomes, _, wrong = examine_all(chunk * CHUNK, (chunk + 1) * CHUNK)
    assert not wrong, "\n".join([str(dict(outcomes)), *wrong])
    return outcomes


#: Programs of one test, and how many such tests the fast and the slow suite hold.
CHUNK, FAST, SLOW = 25, 8, 800


@pytest.mark.parametrize("chunk", range(FAST))
def test_gradients_and_draws_are_those_of_pyros_trace(chunk: int) -> None:
    assert _examined(chunk)["refused"] <= CHUNK // 4


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(FAST, SLOW, 40))
def test_gradients_and_draws_are_those_of_pyros_trace_in_twenty_thousand_programs(chunk: int) -> None:
    outcomes = sum((_examined(k) for k in range(chunk, min(chunk + 40, SLOW))), Counter[str]())
    assert outcomes["refused"] <= outcomes.total() // 10


@pytest.mark.parametrize("seed", range(0, 60, 3))
def test_the_reference_is_pyros_own_potential(seed: int) -> None:
    """Of programs that can be sampled from and whose supports PyTorch knows and are fixed: Pyro looks them up once."""
    program = RandomProgram(seed)
    program.features -= {"improper", "interval below phi", "masked prior", "mixture prior", "theta mixture"}
    torch.set_default_dtype(torch.float64)
    reference = Reference(program, 1.0)
    sites = latent_sites(lambda: program.whole(reference.everything))
    draws = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=draws, dtype=torch.float64) for name, shape in sites.items()}
    _, potential, _, _ = initialize_model(lambda: program.whole(reference.everything), ())
    found = reference.density(values, {}).total(1.0)
    torch.testing.assert_close(found, -potential(values))


if __name__ == "__main__":
    import sys

    wanted = [int(argument) for argument in sys.argv[1:3]]
    totals: list[Counter[str]] = [Counter(), Counter()]
    for begin in range(wanted[0], wanted[1], 100):
        summary = examine_all(begin, min(begin + 100, wanted[1]))
        totals = [total + new for total, new in zip(totals, summary[:2], strict=True)]
        print("\n".join([*summary[2], f"programs {wanted[0]} .. {begin + 99}: {dict(totals[0])}"]), flush=True)
    for text, count in totals[1].most_common():
        print(count, text)
