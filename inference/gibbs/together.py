r"""Phi and all theta_i moved together by the no-U-turn sampler: exact for any program whose visit sees everything.

Where a global site is not drawn exactly (it enters the likelihood, or theta_i is not normal around it), one visit that
evaluates all tasks and all rows can move every site of the program at once, by a trajectory of the whole posterior's
Hamiltonian (:mod:`~pyro_lift.inference.nuts`). A visit makes two: one in the coordinates of the program, and one in
which each local site that has a location and a scale is written as its distance from that location, in scales
(:mod:`~pyro_lift.inference.location_scale`): where the data say little of single theta_i, a scale and the spread of
theta_i hold each other in the first, and do not in the second. Each has a step and a metric of its own, which tune
themselves in the warm-up.

Either can be the worse by far: its trajectories then take many times as many steps as the other's, and move little that
those do not. So the warm-up counts the steps of both, and from its second half on the longer trajectory is
made at every k-th visit alone, k the ratio of the two: a visit then costs at most twice the shorter one. Which visits
these are does not depend on where the chain stands, so that each leaves the posterior as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pyro_lift.inference.dependence import reached
from pyro_lift.inference.gibbs.rows import Values, block_values, task_rows
from pyro_lift.inference.gibbs.state import Chain, Phase, SGLDGibbsInfo, SGLDGibbsState, Streams
from pyro_lift.inference.location_scale import location_scale
from pyro_lift.inference.nuts import Point, Trajectory, trajectory
from pyro_lift.inference.nuts_tuning import begun, inverse_mass_of, step_of, tuned, window_ends
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.sgld import diverged
from pyro_lift.inference.watch import Failure
from pyro_lift.support.spans import span

__all__ = ["Posterior", "raw_families", "reported", "visit"]

#: Names of the tunings of the two trajectories of a visit.
PLAIN, RAW = "plain ", "raw "
#: Name of the mean number of steps of a trajectory in the tuning; how much each new one counts.
STEPS, NEWEST = "steps", 0.1
#: From this ratio of their steps on the longer trajectory is not made at each visit; and how rarely it is made at most.
UNEQUAL, RAREST = 2.0, 10


def raw_families(run: Evaluation) -> frozenset[str]:
    """Return the local families that have a location or a scale that another site moves, and no weight of their own."""
    found: dict[str, bool] = {}
    for site in run.locals.values():
        around = location_scale(site.fn, site.transform)
        plain = site.mask is None and not isinstance(site.scale, Tensor) and site.scale == 1.0
        moved = around is not None and bool(reached(around.loc, run.latents) | reached(around.scale, run.latents))
        found[site.family] = found.get(site.family, True) and plain and moved
    return frozenset(family for family, holds in found.items() if holds)


@dataclass(frozen=True)
class _Slot:
    """Where a site's value lies in the vector of all: of a global site by its name, of a local one by its family."""

    name: str
    task: int | None
    shared: bool
    shape: torch.Size
    dtype: torch.dtype


class Posterior:
    """The log density of all sites of a program as a function of one vector, in float64.

    Args:
        chain: whose program is evaluated, with all tasks.
        run: of the program, from which sites and shapes are taken.
        raw: families that stand in the vector as distances from their location, in scales.
    """

    def __init__(self, chain: Chain, run: Evaluation, raw: frozenset[str] = frozenset()) -> None:
        self.chain, self.raw, self.index = chain, raw, torch.tensor(run.tasks)
        self.slots = [self._slot(site, name in run.globals) for name, site in run.latents.items()]

    @staticmethod
    def _slot(site: Latent, shared: bool) -> _Slot:
        name = site.name if shared else site.family
        return _Slot(name, None if shared else site.task, shared, site.leaf.shape, site.leaf.dtype)

    def flat(self, run: Evaluation) -> Tensor:
        """Return the vector of a run's values, wherever it was made."""
        parts = []
        for site in run.latents.values():
            value = site.leaf.detach()
            if site.family in self.raw and site.name in run.locals:
                around = location_scale(site.fn, site.transform)
                assert around is not None
                value = around.raw(value).detach()
            parts.append(value.reshape(-1).double())
        return torch.cat(parts)

    def split(self, vector: Tensor) -> tuple[dict[str, Tensor], dict[int | None, dict[str, Tensor]]]:
        """Return the values of global sites, and of local ones by task and family."""
        phi: dict[str, Tensor] = {}
        values: dict[int | None, dict[str, Tensor]] = {}
        parts = vector.split([slot.shape.numel() for slot in self.slots])
        for slot, part in zip(self.slots, parts, strict=True):
            value = part.view(slot.shape).to(slot.dtype, copy=True)
            (phi if slot.shared else values.setdefault(slot.task, {}))[slot.name] = value
        return phi, values

    def run(self, vector: Tensor, *, want_grad: bool = False) -> Evaluation:
        """Run the program at a vector."""
        phi, values = self.split(vector)
        return self.chain.program.run(phi, values, self.index, None, want_grad=want_grad, raw=self.raw)

    def at(self, vector: Tensor) -> Point:
        """Return the point at a vector: log density, minus infinity where there is none, and gradient."""
        run = self.run(vector, want_grad=True)
        settings = self.chain.settings
        total = run.log_prior(run.latents)
        for seen in run.observed:
            total = total + settings.n_inflate * (run.terms[seen.name] if seen.local else seen.log_prob())
        leaves = [site.leaf if site.raw is None else site.raw.z for site in run.latents.values()]
        total = total / settings.temperature
        grads = torch.autograd.grad(total, leaves, allow_unused=True)
        parts = [
            torch.zeros(leaf.numel(), dtype=torch.float64, device=leaf.device) if g is None else g.reshape(-1).double()
            for leaf, g in zip(leaves, grads, strict=True)
        ]
        gradient, density = torch.cat(parts), float(total.detach())
        if not math.isfinite(density) or not bool(torch.isfinite(gradient).all()):
            return Point(vector, -math.inf, torch.zeros_like(gradient))
        return Point(vector, density, gradient)

    def density(self, vector: Tensor) -> tuple[float, Tensor]:
        """Return log density and gradient; minus infinity where a distribution's parameters leave their range."""
        try:
            point = self.at(vector)
        except (ValueError, RuntimeError):  # a trajectory that diverges; at its start the program has run
            return -math.inf, torch.zeros_like(vector)
        return point.density, point.gradient


@span("pyro_lift.together")
def visit(
    state: SGLDGibbsState, chain: Chain, index: Tensor, streams: Streams, phase: Phase
) -> tuple[SGLDGibbsState, SGLDGibbsInfo]:
    """Move all sites of the program once.

    Args:
        state: of the chain.
        chain: what was set at set-up.
        index: all tasks.
        streams: of the momenta and of the draws along trajectories.
        phase: ``"burn-in"`` tunes steps and metrics, ``"sample"`` does not.

    Raises:
        DivergedError: the density is not finite where the chain stands.
    """
    values = block_values(state, chain, index, streams)
    run = chain.program.run(state.phi, values, index, None, want_grad=False)
    tuning, made = dict(state.tuned), []
    for label, raw in ((PLAIN, frozenset[str]()), (RAW, chain.raw or frozenset[str]())):
        if label == RAW and not raw:
            continue
        if made_later(tuning, label, state.step, phase, chain.settings.adapts):
            continue
        posterior = Posterior(chain, run, raw)
        own = {k.removeprefix(label): v for k, v in tuning.items() if k.startswith(label)}
        moved, own = _moved(posterior, posterior.flat(run), own, state, chain, streams, phase)
        tuning |= {label + k: v for k, v in own.items()}
        made.append(moved)
        run = posterior.run(moved.end.position)
    phi = {name: site.leaf.detach().clone() for name, site in run.globals.items()}
    chain.store.write(run.tasks, task_rows(chain, run.tasks, _values_of(run, values)))
    info = SGLDGibbsInfo(
        tuple(run.tasks),
        sum((run.terms[o.name] if o.local else o.log_prob() for o in run.observed), torch.zeros(())).detach(),
        made[-1].end.gradient.norm(),
        step_of({k.removeprefix(PLAIN): v for k, v in tuning.items() if k.startswith(PLAIN)}, phase == "burn-in") ** 2,
        False,
        phase,
        torch.tensor(sum(moved.acceptance for moved in made) / len(made)),
        any(moved.diverged for moved in made),
    )
    return state._replace(step=state.step + 1, phi=phi, tuned=tuning), info


def made_later(tuning: Mapping[str, Tensor], label: str, step: int, phase: Phase, warmup: int) -> bool:
    """Whether a trajectory is left out of a visit, because it is the longer one and its turn comes later.

    Args:
        tuning: of both trajectories.
        label: of the trajectory.
        step: number of the visit.
        phase: of the chain.
        warmup: visits of the warm-up; in its first half, and where a window of its metric ends, none is left out.
    """
    if phase == "burn-in" and (2 * step < warmup or step + 1 in window_ends(warmup)[1]):
        return False
    steps = {key: float(tuning[key + STEPS]) for key in (PLAIN, RAW) if key + STEPS in tuning}
    if len(steps) < 2:
        return False
    ratio = steps[label] / min(steps.values())
    return ratio >= UNEQUAL and step % min(round(ratio), RAREST) != 0


def _values_of(run: Evaluation, like: Values) -> dict[int | None, dict[str, Tensor]]:
    values: dict[int | None, dict[str, Tensor]] = {task: dict(rows) for task, rows in like.items()}
    for site in run.locals.values():
        values[site.task][site.family] = site.leaf.detach()
    return values


def _moved(
    posterior: Posterior,
    vector: Tensor,
    tuning: Mapping[str, Tensor],
    state: SGLDGibbsState,
    chain: Chain,
    streams: Streams,
    phase: Phase,
) -> tuple[Trajectory, dict[str, Tensor]]:
    """Make one trajectory from a vector, and learn from it in the warm-up."""
    here = posterior.at(vector)
    if not math.isfinite(here.density):
        raise diverged(Failure(state.step, tuple(posterior.index.tolist()), here.density, math.nan, ()))
    if not tuning:
        tuning = begun(posterior.density, here, streams.noise)
    moved = trajectory(
        posterior.density, here, step_of(tuning, phase == "burn-in"), inverse_mass_of(tuning), streams.noise
    )
    if phase != "burn-in":
        return moved, dict(tuning)
    warmup = chain.settings.adapts
    learned = tuned(tuning, moved.acceptance, moved.end, state.step, warmup, posterior.density, streams.noise)
    made = torch.tensor(float(moved.steps), dtype=torch.float64, device=vector.device)
    mean = tuning.get(STEPS, made)
    return moved, {**learned, STEPS: mean + NEWEST * (made - mean)}


def reported(report: Mapping[str, float | str], tuning: Mapping[str, Tensor]) -> dict[str, float | str]:
    """Put the tuned step of either trajectory in a report, squared: it is a step eta in the metric's own units."""
    steps = {k.split()[0]: float(v.exp()) ** 2 for k, v in tuning.items() if k.endswith("log mean")}
    changed = dict(report)
    if steps:
        changed["step_size"] = steps["plain"]
    if "raw" in steps:
        changed["step_size (raw)"] = steps["raw"]
    return changed
