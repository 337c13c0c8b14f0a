"""The SGLD kernel: Langevin dynamics on every latent site of a program, in Pyro's MCMC interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pyro.infer.autoguide.initialization import init_to_mean
from torch import Tensor

from pyro_lift.inference import sgld
from pyro_lift.inference.admission import (
    check_common,
    check_latents,
    refuse_discrete,
    site_factors,
    site_transforms,
    start_values,
)
from pyro_lift.inference.data_support import check_values
from pyro_lift.inference.dependence import coupled_families, links_of
from pyro_lift.inference.gibbs.longest_move import check_limits
from pyro_lift.inference.gibbs.saved_chain import probed
from pyro_lift.inference.ignored_index import check_index_used
from pyro_lift.inference.kernel import Kernel, Model
from pyro_lift.inference.mistakes import check_program
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.schedules import Schedule, as_schedule
from pyro_lift.inference.sgld import Integrator, Preconditioner
from pyro_lift.inference.stability import (
    check_curvature,
    check_prior_steps,
    default_step,
    measured_curvature,
)
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.support.options import named_options

__all__ = ["SGLD"]


class SGLD(Kernel):
    r"""Stochastic gradient Langevin dynamics on every latent site of a program (Eq. 6 and 18).

    .. math:: x' = x + \tfrac{\eta}{2}\,\nabla \log p(x, D) + \sqrt{T\,\eta}\;\xi, \qquad \xi \sim \mathcal N(0, I)

    There is no Metropolis test: a Gaussian target of precision P is sampled with covariance
    ``T (P - (eta/4) P^2)^{-1}`` instead of ``T P^{-1}``.

    Args:
        model: a Pyro program. Minibatches are its own plates with ``subsample_size``; latent sites must stand
            outside those.
        step_size: eta, or a function of the number of steps; None measures the curvature at the start and takes a
            twentieth of the largest stable step.
        temperature: T, multiplies the noise's variance; 0 turns SGLD into gradient ascent.
        n_inflate: power on the likelihood.
        integrator: ``"euler"``, or ``"exponential"``, which is exact for normal (or mixture of normals) priors.
        preconditioner: None or ``"rms"``: an RMS preconditioner that adapts in the warm-up and is frozen after it.
        decay: of the preconditioner's moving average.
        damping: of the preconditioner, relative to its mean.
        second_moment: a moving average to begin with, by site.
        max_move: with the preconditioner, the most that the gradient moves a coordinate in a step, over step_size / 2;
            None sets no limit. A step that it shortens is counted as clipped.
        thinning: transitions per draw, after the warm-up.
        site_step_scale: factor on the step size by site, e.g. ``{"head": 10.0}``.
        site_temperature: factor on the temperature by site; ``{"head": 0.0}`` moves the head to its mode while
            everything else is sampled.
        init_strategy: where sites start, a function of ``pyro.infer.autoguide.initialization``.
        check_stability: refuse a step size that cannot be stable at the start.
        seed: of everything random in the chain, which then leaves the global streams alone; chains of one run get
            streams of their own. None draws one from torch's global stream.

    Raises:
        ValueError: an option out of range; at set-up, a program without latent sites, with discrete ones, with
            latent sites inside a subsampled plate, or a step size past its limit.
        DivergedError: a loss or gradient that is not finite; the last good state is in ``state``.

    References:
        Bayesian learning via stochastic gradient Langevin dynamics, Welling and Teh, 2011.
    """

    @named_options
    def __init__(
        self,
        model: Model,
        step_size: float | Schedule | None = None,
        *,
        temperature: float = 1.0,
        n_inflate: float = 1.0,
        integrator: Integrator = "euler",
        preconditioner: Preconditioner | None = None,
        decay: float = 0.99,
        damping: float = 0.1,
        second_moment: Mapping[str, Tensor] | None = None,
        max_move: float | None = None,
        thinning: int = 1,
        site_step_scale: Mapping[str, float] | None = None,
        site_temperature: Mapping[str, float] | None = None,
        init_strategy: Callable[..., Tensor] = init_to_mean,
        check_stability: bool = True,
        seed: int | None = None,
    ) -> None:
        super().__init__(model, thinning, init_strategy, seed)
        check_common(temperature, n_inflate, integrator, preconditioner, decay, damping)
        self.site_step_scale, self.site_temperature = site_factors(site_step_scale, site_temperature)
        self._schedule = None if step_size is None else as_schedule(step_size)
        self.temperature = temperature
        self.n_inflate = n_inflate
        self.integrator: Integrator = integrator
        self.decay = decay if preconditioner == "rms" else None
        self.damping = damping
        self.second_moment = dict(second_moment or {})
        check_limits(None, max_move, preconditioner)
        self.max_move = max_move
        self.check_stability = check_stability
        self.state = sgld.SGLDState(0, {}, {})
        self._info: sgld.SGLDInfo | None = None
        self._report: dict[str, float | str] = {}
        self._coupled: frozenset[str] = frozenset()
        self._program: Program | None = None

    @at_top_level()
    def setup(self, warmup_steps: int, *args: Any, **kwargs: Any) -> None:
        """Read the program, check it and the step size, and put the chain at its start."""
        self._begin(warmup_steps)
        program = self._program = Program(self.model, None, args, kwargs, self.init_strategy)
        with self._own_stream():
            self._put_at_start(program)

    def _put_at_start(self, program: Program) -> None:
        read, _ = program.peek(self._generator)
        check_program(program, read, says=self._chain == 0)
        refuse_discrete(read)
        eta = None if self._schedule is None or self.decay is not None else self._schedule(0)
        wanted = self._start_of(program, lambda v: program.run(v, {}, None, self._generator), eta, self.n_inflate)
        run = program.run(start_values(wanted, read), {}, None, self._generator)
        check_values(run)
        check_latents(run)
        check_index_used(program, run, says=self._chain == 0)
        self._coupled = coupled_families(run, links_of(run))
        self.transforms = site_transforms(run)
        position = {name: site.leaf.detach() for name, site in run.latents.items()}
        self._noise_from(position)
        self._step_settings = sgld.SGLDSettings(
            self._checked_step_size(run),
            self.temperature,
            self.integrator,
            self.decay,
            self.damping,
            self.site_step_scale,
            self.site_temperature,
            self.max_move,
        )
        self._start_log_likelihood = float(run.log_likelihood.detach())
        self.state = sgld.SGLDState(0, position, dict(self.second_moment))

    def _checked_step_size(self, run: Evaluation) -> Schedule:
        curvature = measured_curvature(run, self.n_inflate, wanted=self._schedule is None)
        schedule = self._schedule or default_step(curvature)
        eta = schedule(0)
        self._report = {"step_size": eta, "curvature": math.nan if curvature is None else curvature}
        if self.check_stability and self.decay is None:
            check_curvature(run, curvature, eta, self.integrator, self.n_inflate, self.site_step_scale)
            if self.integrator == "euler":
                check_prior_steps(run, eta, self.site_step_scale)
        return schedule

    @property
    def initial_params(self) -> dict[str, Tensor]:
        """Where the chain starts, unconstrained."""
        return dict(self.state.position)

    @initial_params.setter
    def initial_params(self, params: dict[str, Tensor]) -> None:
        self._preset = dict(params)

    @at_top_level()
    def sample(self, params: dict[str, Tensor]) -> dict[str, Tensor]:
        """One transition in the warm-up, ``thinning`` of them after it."""
        if params is not self.state.position:
            self.state = self.state._replace(position=dict(params))
        adapt = self.state.step < self._warmup_steps
        for _ in range(1 if adapt else self.thinning):
            self.state, self._info = sgld.step(
                self.state,
                self._density,
                self._step_settings,
                adapt=adapt,
                generator=self._noise_generator,
                watch=self._watch,
            )
            self.look(due=True)
        if not adapt and self._info is not None:
            self._keep(self._info, -1)
        return dict(self.state.position)

    def _density(self, position: dict[str, Tensor]) -> sgld.Drift:
        assert self._program is not None
        run = self._program.run(position, {}, None, self._generator)
        return run.drift(run.latents, self._coupled, self.n_inflate)

    @property
    def last_visit(self) -> sgld.SGLDInfo | None:
        """Diagnostics of the last transition; None before the first."""
        return self._info

    def logging(self) -> dict[str, str]:
        """For Pyro's progress bar."""
        phase = "burn-in" if self.state.step <= self._warmup_steps else "sample"
        return self._log(self.state.step, self._info, phase)

    def fingerprint(self) -> dict[str, Any]:
        """What must be the same for the chain to be the same: options, sites, the density at the start."""
        return {
            "kernel": "SGLD",
            "options": {
                "step_size": probed(self._step_settings.step_size),
                "temperature": self.temperature,
                "n_inflate": self.n_inflate,
                "integrator": self.integrator,
                "decay": self.decay,
                "damping": self.damping,
                "thinning": self.thinning,
                "site_step_scale": self.site_step_scale,
                "site_temperature": self.site_temperature,
                "warmup_steps": self._warmup_steps,
                **({} if self.max_move is None else {"max_move": self.max_move}),
            },
            "sites": {name: list(value.shape) for name, value in self.state.position.items()},
            "start_log_likelihood": self._start_log_likelihood,
        }

    def report(self) -> dict[str, float | str]:
        """Step size and curvature (largest, at the start)."""
        return dict(self._report)

    def in_force(self) -> dict[str, Any]:
        """See the base class."""
        left_open = ["step_size"] if self._schedule is None else []
        return {"kernel": "SGLD", "temperature": self.temperature, "left_open": left_open}
