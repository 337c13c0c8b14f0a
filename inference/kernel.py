"""The base of both kernels: counting, seeding, thinning, statistics and state in Pyro's MCMC interface.

Only this file and :mod:`~pyro_lift.inference.mcmc` know ``pyro.infer.mcmc``: ``setup`` is called before
``initial_params`` and must start afresh; ``end_warmup`` is never called, so steps are counted here; ``transforms``
are None before set-up; ``logging`` is called at every step.
"""

from __future__ import annotations

import logging
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from pyro_lift.inference.admission import refuse_discrete, site_transforms
from pyro_lift.inference.dispersed import dispersed_start, is_dispersed
from pyro_lift.inference.program import Evaluation, Program
from pyro_lift.inference.sgld import diverged
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.inference.watch import Watch, watch_on
from pyro_lift.support.options import check_number
from pyro_lift.support.random_streams import own_global_stream, stream_seed

__all__ = ["Draw", "Kernel", "Model"]

log = logging.getLogger("pyro_lift")

Model = Callable[..., Any]
#: How often the log's numbers are brought to the host from a device: each time costs a synchronisation.
LOG_EVERY = 50


class Draw(NamedTuple):
    """What is kept of each draw for the sample_stats group; tensors stay on their device until they are asked for."""

    log_likelihood: Tensor
    grad_norm: Tensor
    step_size: float | Tensor
    clipped: bool | Tensor
    task: int
    acceptance: float | Tensor = math.nan
    diverged: bool = False


class StepInfo(Protocol):
    """Diagnostics of one step, as either kernel gives them."""

    @property
    def log_likelihood(self) -> Tensor:
        """Of the minibatch, scaled to the data."""
        ...

    @property
    def grad_norm(self) -> Tensor:
        """Euclidean norm of the gradient."""
        ...

    @property
    def step_size(self) -> float | Tensor:
        """The step size eta."""
        ...

    @property
    def clipped(self) -> bool | Tensor:
        """Whether the gradient was scaled down."""
        ...


class Kernel(MCMCKernel):
    """The base of both kernels: counting, seeding, thinning and statistics. Not for use by itself."""

    state: Any
    #: Whether the user named the plate; else the only one with latent sites inside is taken where it is missing.
    plate_named = True

    def __init__(
        self, model: Model, thinning: int, init_strategy: Callable[..., Tensor], seed: int | None = None
    ) -> None:
        if not callable(model):
            raise TypeError(f"model={model!r}: expected a Pyro program, that is a function.")
        check_number("thinning", thinning, least=1, open_below=False, whole=True)
        self.model = model
        self.thinning = thinning
        self.init_strategy = init_strategy
        if seed is not None:
            check_number("seed", seed, open_below=False, whole=True)
        self.seed = seed
        #: Number of the chain among those of one run; None counts the set-ups.
        self.chain_number: int | None = None
        self._setups = self._chain = 0
        self._run_chains = 1
        self._run_seed: int | None = None
        #: Draws that the run will hold in memory, all chains together; MCMC says so.
        self.draws_to_keep = 0
        #: What the caller calls options of this kernel and of its run, where others are set; advice takes these names.
        self.option_names: Mapping[str, str] = {}
        #: From constrained to unconstrained space, by site; None before set-up, when Pyro's MCMC asks for a set-up.
        self.transforms: dict[str, Any] | None = None
        self._preset: dict[str, Tensor] | None = None
        self._generator: torch.Generator | None = None
        self._noise_generator: torch.Generator | None = None
        self._watch: Watch | None = None
        self._warmup_steps = 0
        self._draws: list[Draw] = []
        self._sampling_since = self._sampling_until = 0.0
        self._drawn_before = 0
        self._last_log: tuple[int, dict[str, str]] = (-LOG_EVERY, {})
        self._start_log_likelihood = math.nan
        super().__init__()

    # A torch.Generator cannot be sent to a spawned worker, and Pyro would wait for that worker for ever.
    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_generator": None, "_noise_generator": None, "_watch": None}

    def _begin(self, warmup_steps: int) -> None:
        self._warmup_steps = warmup_steps
        self._draws = []
        self._sampling_since = self._sampling_until = 0.0
        self._last_log = (-LOG_EVERY, {})
        self._chain = self._number()
        self._generator = torch.Generator().manual_seed(self._chain_seed(self._chain))

    def begin_run(self, num_chains: int = 1) -> None:
        """Count the chains of a new run from zero; :class:`~pyro_lift.inference.mcmc.MCMC` calls it.

        Raises:
            ValueError: an option that several chains cannot share.
        """
        self._setups = 0
        self._run_chains = num_chains
        self._run_seed = None
        self.resume_as({})
        if num_chains > 1 and self.seed is None:
            # One draw for all of them: the chains are then the same whether they run in turn or side by side.
            self._run_seed = int(torch.randint(2**62, ()))

    @property
    def plate(self) -> str | None:
        """Name of the plate inside which sites are local; None where all are sampled alike."""
        return None

    @at_top_level()
    def read_transforms(self, *args: Any, **kwargs: Any) -> None:
        """Learn the maps to unconstrained space without set-up, for chains that run in other processes."""
        program = Program(self.model, self.plate, args, kwargs, self.init_strategy)
        with torch.random.fork_rng(devices=[]):
            read, _ = program.peek(torch.Generator().manual_seed(0))
            if not self.plate_named and self.plate not in read.plates and program.only_plate is not None:
                program.plate = program.only_plate
                read, _ = program.peek(torch.Generator().manual_seed(0))
        refuse_discrete(read)
        self.transforms = {name: t for name, t in site_transforms(read).items() if name in read.globals}

    def _take_start(self) -> dict[str, Tensor]:
        """Take the start that was asked for; it is of the next set-up alone."""
        start, self._preset = self._preset or {}, None
        return start

    def _own_stream(self) -> AbstractContextManager[None]:
        """Keep what set-up draws from the global stream away from the caller's, where there is a seed."""
        return own_global_stream(self._start_seed())

    def _start_of(
        self, program: Program, read: Callable[[dict[str, Tensor]], Evaluation], eta: float | None, n_inflate: float
    ) -> dict[str, Tensor]:
        """Return the start that was asked for, else that of a later chain (:mod:`~pyro_lift.inference.dispersed`)."""
        start = self._take_start()
        if start or self._run_chains == 1 or self._chain == 0 or not is_dispersed(self.init_strategy):
            return start
        assert self._generator is not None
        return dispersed_start(program, read, stream_seed(self._generator.initial_seed(), 0), eta, n_inflate)

    def _start_seed(self) -> int | None:
        """Return the seed of what starting values are drawn with; None, the caller's stream, without a seed of ours."""
        assert self._generator is not None
        return None if self._seed_of_run() is None else self._generator.initial_seed()

    def _seed_of_run(self) -> int | None:
        """Return the seed of all chains of this run; None without one of ours."""
        return self._run_seed if self.seed is None else self.seed

    def _number(self) -> int:
        """Return the number of the next chain among those of its run."""
        number = self._setups if self.chain_number is None else self.chain_number
        self._setups += 1
        name = multiprocessing.current_process().name
        if self.chain_number is None and multiprocessing.parent_process() is not None and name.isdigit():
            # Pyro's own MCMC runs chains in processes, and tells each its number by this name alone.
            self._run_chains, number = max(self._run_chains, 2), int(name)
        return number

    def _chain_seed(self, number: int) -> int:
        """Return the seed of a chain's stream."""
        seed = self._seed_of_run()
        if seed is None:
            # One draw from the caller's stream, as documented: `pyro.set_rng_seed` then governs the chain.
            return int(torch.randint(2**62, ()))
        source = torch.Generator().manual_seed(seed)
        return int(torch.randint(2**62, (number + 1,), generator=source)[-1])

    def _noise_from(self, values: Mapping[str, Tensor]) -> None:
        """The noise's generator lives where the values do; on the CPU it is the one for indices."""
        assert self._generator is not None
        device = next(iter(values.values())).device if values else torch.device("cpu")
        self._noise_generator = self._generator
        if device.type != "cpu":
            self._noise_generator = torch.Generator(device=device).manual_seed(self._generator.initial_seed())
        self._watch = None if self.distributed else watch_on(device)

    def look(self, *, due: bool = False) -> None:
        """Look at the visits since the last look, where the chain is on an accelerator; see the module ``watch``.

        Args:
            due: do nothing unless it is time for a look.

        Raises:
            DivergedError: a visit failed; the chain stands where it began.
        """
        if self._watch is None or (due and not self._watch.due):
            return
        failure = self._watch.look()
        if failure is not None:
            self.state = self.state._replace(step=failure.step)
            raise diverged(failure)

    def _keep(self, info: StepInfo, task: int) -> None:
        self._sampling_until = time.perf_counter()
        if not self._sampling_since:
            self._sampling_since, self._drawn_before = self._sampling_until, len(self._draws)
        tested = getattr(info, "acceptance", math.nan)
        left = getattr(info, "diverged", False)
        draw = Draw(info.log_likelihood, info.grad_norm, info.step_size, info.clipped, task, tested, left)
        self._draws.append(draw)

    def _columns(self) -> dict[str, Any]:
        """Statistics of all draws by name; that of tests only where there were any."""
        columns = {name: _column([getattr(draw, name) for draw in self._draws]) for name in Draw._fields}
        if not isinstance(columns["acceptance"], Tensor):
            del columns["acceptance"]
        if not any(columns["diverged"]):
            del columns["diverged"]
        return columns

    @property
    def logged_at(self) -> int:
        """The step that what the bar shows was read at."""
        return self._last_log[0]

    def _log(self, step: int, info: StepInfo | None, phase: str) -> dict[str, str]:
        if info is not None and step - self._last_log[0] >= (1 if _is_at_hand(info.log_likelihood) else LOG_EVERY):
            text = {
                "phase": phase,
                "loglik": f"{float(info.log_likelihood):.3e}",
                "step": f"{float(info.step_size):.1e}",
            }
            self._last_log = (step, text)
        return dict(self._last_log[1])

    def diagnostics(self) -> dict[str, Any]:
        """Report a run's statistics.

        Returns:
            ``clipped``, the draws whose gradient was scaled down; ``divergences``, the draws at which a trajectory left
            the region in which its step is stable (a chain that leaves the finite numbers stops with
            :class:`~pyro_lift.inference.sgld.DivergedError`); ``sample_stats``, a list per
            statistic, with one entry a draw (``acceptance`` where theta is moved with a test); ``report``, see
            :meth:`report`; ``in_force``, see :meth:`in_force`; ``seconds``, of the wall clock, spent on draws.
        """
        self.look()
        stats = {name: x.tolist() if isinstance(x, Tensor) else x for name, x in self._columns().items()}
        divergences = [i for i, left in enumerate(stats.get("diverged", [])) if left]
        return {
            "divergences": divergences,
            "clipped": [i for i, clipped in enumerate(stats["clipped"]) if clipped],
            "sample_stats": stats,
            "report": {**self.report(), **({"divergences": float(len(divergences))} if divergences else {})},
            "in_force": self._in_force(),
            "seconds": self._seconds(),
        }

    def _in_force(self) -> dict[str, Any]:
        run = {"thinning": self.thinning, "warmup_steps": self._warmup_steps, "names": dict(self.option_names)}
        return {**self.in_force(), **run}

    def _seconds(self) -> float:
        """Wall time of all draws; the first draw and those made before a resume are assumed to take the mean time."""
        timed = len(self._draws) - self._drawn_before - 1
        return (self._sampling_until - self._sampling_since) * len(self._draws) / max(timed, 1)

    def report(self) -> dict[str, float | str]:
        """Dimensionless step sizes and what was learned at set-up."""
        return {}

    def in_force(self) -> dict[str, Any]:
        """Options as the chain runs with them, those left open filled in: what advice goes by."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Everything the next transition depends on but what :meth:`rows` holds: tensors and plain data, nested."""
        assert self._generator is not None and self._noise_generator is not None
        self.look()
        own = self._noise_generator is not self._generator
        return {
            "state": self.state._asdict(),
            "warmup_steps": self._warmup_steps,
            "generator": self._generator.get_state(),
            "noise_generator": self._noise_generator.get_state() if own else None,
            "draws": self._columns(),
            "last_log": list(self._last_log),
        }

    def load_state_dict(self, tree: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was called; after set-up with the same program."""
        assert self._generator is not None and self._noise_generator is not None
        here = next(iter(self.initial_params.values())).device
        # A run of an earlier version lacks some of the fields; they are then as set-up left them.
        self.state = self.state._replace(**{name: to_device(here, value) for name, value in tree["state"].items()})
        self._warmup_steps = tree["warmup_steps"]
        self._generator.set_state(tree["generator"].cpu())
        if self._noise_generator is not self._generator and tree["noise_generator"] is not None:
            self._noise_generator.set_state(tree["noise_generator"].cpu())
        draws = to_device(here, dict(tree["draws"]))
        if "refused" in draws:  # of a run that an earlier version saved
            draws["clipped"] = draws.pop("refused")
        draws.setdefault("acceptance", [math.nan] * len(draws["task"]))
        draws.setdefault("diverged", [False] * len(draws["task"]))
        self._draws = [Draw(*row) for row in zip(*(draws[name] for name in Draw._fields), strict=True)]
        self._last_log = (tree["last_log"][0], tree["last_log"][1])

    def resume_as(self, fingerprint: Mapping[str, Any]) -> None:
        """Learn, before set-up, what a run was that is gone on with; empty where one begins."""

    @property
    def distributed(self) -> bool:
        """Whether several processes share this chain."""
        return False

    def rows(self) -> dict[str, Any]:
        """What is too large for the state: none here."""
        return {}

    def cleanup(self) -> None:
        """Nothing to release; Pyro calls it twice."""


def _column(values: list[Any]) -> Any:
    """One statistic of all draws: a tensor where some of them are tensors."""
    like = next((value for value in values if isinstance(value, Tensor)), None)
    return values if like is None else torch.stack([torch.as_tensor(value).to(like) for value in values])


def to_device(device: torch.device, value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    return {name: to_device(device, one) for name, one in value.items()} if isinstance(value, dict) else value


# ------------------------------------------------------------------------------------------------ checks at the door


def _is_at_hand(value: float | Tensor) -> bool:
    """Whether a number can be read without waiting for a device."""
    return not isinstance(value, Tensor) or value.device.type == "cpu"
