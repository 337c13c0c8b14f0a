"""Over-dispersed starts: where the second and later chains of one run begin, so that R-hat can tell something.

R-hat compares the spread between chains with that within them. Chains that begin at one point agree for as long as
none of them has moved, and R-hat is near one for the wrong reason; it needs starts spread wider than the posterior
(Gelman and Rubin 1992; Vehtari et al. 2021). The prior is wider than the posterior, and each later chain begins at a
draw of it: where the density there is not finite, or curves so much that the step would not be stable, half way back
to the first chain's start, and so on.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from pyro.infer.autoguide.initialization import init_to_mean, init_to_sample
from torch import Tensor

from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.stability import measured_curvature
from pyro_lift.support.random_streams import own_global_stream

__all__ = ["dispersed_start", "is_dispersed"]

#: How often the way to the draw is halved; after that a chain begins where the first one does.
HALVINGS = 12
#: Products by which the curvature of a start is compared.
ITERATIONS = 8
#: How much more than the first chain's start a start may curve, where the step is yet to be chosen.
ROUGHER = 2.0


def is_dispersed(init_strategy: object) -> bool:
    """Whether later chains begin elsewhere: only where the user has not said where all of them do."""
    return init_strategy is init_to_mean


def dispersed_start(
    program: Program,
    read: Callable[[dict[str, Tensor]], Evaluation],
    seed: int,
    eta: float | None = None,
    n_inflate: float = 1.0,
) -> dict[str, Tensor]:
    """Draw a chain's start from the prior of its global sites, unconstrained.

    Args:
        program: the model.
        read: evaluates the density for some tasks at values of the global sites; ``{}`` is the first chain's start.
        seed: of the draw; the caller's streams are left alone.
        eta: the step size, if it is chosen already: a start is then taken where the curvature is below half its limit.
        n_inflate: power on the likelihood.
    """
    with own_global_stream(seed):
        prior = Program(program.model, program.plate, program.args, program.kwargs, init_to_sample)
        drawn, _ = prior.peek(torch.Generator().manual_seed(seed))
        begin = read({})
    centre = {name: site.leaf.detach() for name, site in begin.globals.items()}
    far = {name: site.leaf.detach().to(centre[name]) for name, site in drawn.globals.items() if name in centre}
    here = _curvature(begin, n_inflate)
    most = ROUGHER * here if eta is None else max(2.0 / eta, here)
    if not here > 0.0 and eta is None:
        most = math.inf  # nothing to compare with
    for halving in range(HALVINGS):
        share = 0.5**halving
        start = {name: torch.lerp(centre[name], value, share) for name, value in far.items()}
        with own_global_stream(seed):
            try:
                there = read(start)
            except ValueError:  # parameters of a distribution that are out of range there
                continue
        if _is_finite(there, n_inflate) and _curvature(there, n_inflate) <= most:
            return start
    return {}


def _curvature(run: Evaluation, n_inflate: float) -> float:
    """The largest curvature of the block's density; 0 where it is not measured."""
    found = measured_curvature(run, n_inflate, wanted=False, iterations=ITERATIONS)
    return 0.0 if found is None else abs(found) if math.isfinite(found) else math.inf


def _is_finite(run: Evaluation, n_inflate: float) -> bool:
    sites = run.locals or run.latents
    total = n_inflate * run.log_likelihood + run.log_prior(run.latents)
    if not bool(torch.isfinite(total)):
        return False
    grads = torch.autograd.grad(total, [site.leaf for site in sites.values()], retain_graph=True, allow_unused=True)
    return all(g is None or bool(torch.isfinite(g).all()) for g in grads)
