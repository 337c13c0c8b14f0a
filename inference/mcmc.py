"""Pyro's MCMC and StreamingMCMC, with checkpoints: ``run(checkpoint=folder)``, ``run(resume=folder)``.

Without these arguments they are Pyro's own, but that chains in processes of their own begin where they were told.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pyro.infer
import pyro.infer.mcmc.api as api
import torch
from pyro import validation_enabled
from pyro.infer.mcmc.logger import ProgressBar, initialize_logger
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine import block
from torch import Tensor

from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.inference.checkpoint.summaries import check_statistics
from pyro_lift.inference.kernel import Kernel, log
from pyro_lift.inference.mixture.online_em import OnlineGaussianMixture
from pyro_lift.inference.movement import LEAST_DRAWS, doubts_of
from pyro_lift.inference.parallel_chains import ParallelChains, checked_starts
from pyro_lift.support.options import check_number
from pyro_lift.watching.steps import Run
from pyro_lift.watching.watch import Watchers

__all__ = ["MCMC", "StreamingMCMC"]

#: Coordinates of a site up to which :meth:`MCMC.diagnostics` computes R-hat and effective sample size for each.
DIAGNOSED = 1_000


class MCMC(pyro.infer.MCMC):
    """Pyro's own :class:`pyro.infer.MCMC` with a default for the number of draws, and with checkpoints.

    ``MCMC(SGLDGibbs(model)).run()`` therefore runs as written, for a model whose data is bound in. Several chains run
    in processes of their own where ``mp_context`` says how these are started (``"spawn"``, ``"fork"``), however many
    cores there are; without it, as in Pyro, only where there are more cores than chains. The draws are the same.
    """

    sampler: Any
    disable_validation: bool | None
    _samples: Any

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int = 2000,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Any] | None = None,
        num_chains: int = 1,
        **options: Any,
    ) -> None:
        check_number("num_samples", num_samples, least=1, open_below=False, whole=True)
        if warmup_steps is not None:
            check_number("warmup_steps", warmup_steps, open_below=False, whole=True)
        starts = checked_starts(initial_params, num_chains)
        context = options.get("mp_context")
        with _callers_logger(), warnings.catch_warnings():
            if context is not None:
                warnings.filterwarnings("ignore", message="num_chains=.*Chains will be drawn sequentially")
            super().__init__(kernel, num_samples, warmup_steps, starts, num_chains, **options)
            if context is not None and num_chains > 1 and not isinstance(self.sampler, api._MultiSampler):
                self.sampler = _side_by_side(self, starts, context)
        if isinstance(self.sampler, api._MultiSampler):
            self.sampler = ParallelChains.in_place_of(self.sampler)

    def run(
        self,
        *args: Any,
        checkpoint: str | Path | Session | None = None,
        checkpoint_every: int = 1000,
        resume: str | Path | None = None,
        callbacks: Any = (),
        **kwargs: Any,
    ) -> None:
        """Run the chain.

        Args:
            args: of the model.
            checkpoint: folder to save the run in; must not hold one yet.
            checkpoint_every: transitions between two checkpoints.
            resume: folder to go on with; where it holds no checkpoint yet, the run begins and saves there. A folder
                that looks misspelt, because a run is saved beside it, is warned of.
            callbacks: told of every transition (:mod:`pyro_lift.watching`); of chains in this process.
            kwargs: of the model.

        Raises:
            ValueError: the folder holds another run, or none that is intact; another run works in it; several chains
                with a folder, or chains in processes of their own with callbacks.
            OSError: a checkpoint could not be written; the last one is intact.
            RunStopped: SIGTERM or Ctrl-C; the run is saved.
        """
        if isinstance(self.kernel, Kernel):
            self.kernel.draws_to_keep = self.num_samples * self.num_chains
        _begin_run(self.kernel, self.num_chains)
        session = _session(self, checkpoint, checkpoint_every, resume)
        if session is None:
            _read_transforms(self, args, kwargs)
            with _callers_logger(), _watched(self, callbacks):
                super().run(*args, **kwargs)
            self._say_doubts()
            return
        plain = self.sampler
        try:
            with _alone(session, self.kernel), _callers_logger(), _watched(self, callbacks, session.transitions):
                self.sampler = _SavedChain(plain, session, None)
                super().run(*args, **kwargs)
        finally:
            self.sampler = plain
        self._say_doubts()

    def diagnostics(self) -> dict[str, Any]:
        """Report Pyro's R-hat and effective sample size by coordinate, and what the kernel reports of each chain.

        A site of more than :data:`DIAGNOSED` coordinates, theta of many tasks say, is left out, and the log says so.
        """
        kept = self._samples
        large = {name: x[0, 0].numel() for name, x in (kept or {}).items() if x[0, 0].numel() > DIAGNOSED}
        if large:
            named = ", ".join(f"{name} ({count:,} coordinates)" for name, count in large.items())
            log.warning(
                "diagnostics() leaves out %s; pyro_lift.summarise(mcmc) judges projections of them, and "
                "arviz.ess(pyro_lift.from_mcmc(mcmc)) every coordinate.",
                named,
            )
        self._samples = {name: x for name, x in kept.items() if name not in large} if large else kept
        try:
            report: dict[str, Any] = super().diagnostics()
        finally:
            self._samples = kept
        return report

    def _say_doubts(self) -> None:
        """Log in words what speaks against trusting the draws of a kernel of ours."""
        if not isinstance(self.kernel, Kernel) or self.num_samples < LEAST_DRAWS:
            return
        doubts = doubts_of(self)
        if doubts:
            log.warning("this run cannot be trusted yet: %s", " ".join(doubts))


class StreamingMCMC(pyro.infer.mcmc.StreamingMCMC):
    """Pyro's own :class:`pyro.infer.mcmc.StreamingMCMC`, with checkpoints.

    Several chains run one after another, or side by side where ``mp_context`` says how their processes are started
    (``"spawn"``, ``"fork"``); the draws, and so the statistics, are the same. ``get_statistics(group_by_chain=False)``
    merges those of all chains: mixtures of :class:`~pyro_lift.OnlineGaussianMixture` too.
    """

    sampler: Any
    num_samples: int

    def __init__(
        self,
        kernel: MCMCKernel,
        num_samples: int = 2000,
        warmup_steps: int | None = None,
        initial_params: Mapping[str, Any] | None = None,
        statistics: Any = None,
        num_chains: int = 1,
        mp_context: str | None = None,
        **options: Any,
    ) -> None:
        starts = checked_starts(initial_params, num_chains)
        if isinstance(statistics, OnlineGaussianMixture):
            raise TypeError(
                f"statistics={statistics!r} is of one vector, and a draw is a dict of sites. Give each site its own: "
                "statistics=StatsOfDict(default=lambda: OnlineGaussianMixture(...)), from pyro.ops.streaming."
            )
        with _callers_logger():
            super().__init__(kernel, num_samples, warmup_steps, starts, statistics, num_chains, **options)
            if mp_context is not None and num_chains > 1:
                self.sampler = ParallelChains.in_place_of(_side_by_side(self, starts, mp_context))

    def run(
        self,
        *args: Any,
        checkpoint: str | Path | Session | None = None,
        checkpoint_every: int = 1000,
        resume: str | Path | None = None,
        until: Callable[[int], bool] | None = None,
        callbacks: Any = (),
        **kwargs: Any,
    ) -> None:
        """Run the chain; see :meth:`MCMC.run`. Statistics must be Pyro's, ours, or have a ``state_dict``.

        ``until`` is told the number of draws after each, once the statistics have seen it, and ends the chain by
        returning True; ``num_samples`` is then the number of draws made.
        """
        if until is not None and self.num_chains > 1:
            raise ValueError(f"num_chains={self.num_chains}: until is of one chain. Run each chain on its own.")
        _begin_run(self.kernel, self.num_chains)
        session = _session(self, checkpoint, checkpoint_every, resume)
        if session is None and until is None:
            _read_transforms(self, args, kwargs)
            with _callers_logger(), _watched(self, callbacks):
                super().run(*args, **kwargs)
            _in_order_of_chains(self._statistics)
            return
        plain, total = self.sampler, self.num_samples
        before = 0 if session is None else session.draws
        # What is saved is in the statistics already; Pyro counts the draws that are still to come.
        self.num_samples = total - before
        ending = None
        done = 0 if session is None else session.transitions
        try:
            with _alone(session, self.kernel), _callers_logger(), _watched(self, callbacks, done):
                if session is not None:
                    check_statistics(self._statistics)
                    self.sampler = _SavedChain(plain, session, self._statistics)
                if until is not None:
                    ending = _EndingChain(self.sampler, self, lambda made: until(before + made))
                    self.sampler = ending
                super().run(*args, **kwargs)
        finally:
            ended = ending is not None and ending.ended
            self.sampler, self.num_samples = plain, before + self.num_samples if ended else total


def _side_by_side(mcmc: Any, starts: dict[str, Tensor] | None, context: str) -> Any:
    """Return Pyro's sampler of chains in processes in the place of the one that draws them in turn."""
    one = mcmc.sampler
    return api._MultiSampler(
        mcmc.kernel,
        mcmc.num_samples,
        one.warmup_steps,
        mcmc.num_chains,
        context,
        one.disable_progbar,
        initial_params=starts,
        hook=one.hook,
    )


def _in_order_of_chains(statistics: Any) -> None:
    """Put a chain's statistics in its place: Pyro merges them in the order in which processes first answered."""
    by_chain = getattr(statistics, "stats", None)
    if isinstance(by_chain, dict) and all(isinstance(key, tuple) for key in by_chain):
        ordered = sorted(by_chain.items())
        by_chain.clear()
        by_chain.update(ordered)


@contextmanager
def _callers_logger() -> Iterator[None]:
    """Put Pyro's logger back as the caller had it: Pyro takes its handlers away and gives it one of its own."""
    logger = logging.getLogger("pyro.infer.mcmc")
    before = list(logger.handlers), logger.propagate, logger.level
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[0], before[1]
        logger.setLevel(before[2])


@contextmanager
def _watched(mcmc: Any, callbacks: Any, done: int = 0) -> Iterator[None]:
    """Let callbacks see every transition of the chains of this process, beside the hook that the caller gave."""
    watchers = Watchers(callbacks, Run("mcmc", settings={"kernel": type(mcmc.kernel).__name__}))
    if not watchers:
        yield
        return
    sampler = mcmc.sampler
    if isinstance(sampler, api._MultiSampler):
        raise ValueError(
            "callbacks are told of chains of this process, and these run in processes of their own. Leave num_chains "
            "at 1 and run each chain by itself, or use StreamingMCMC, whose chains run one after another."
        )
    hook = sampler.hook

    def both(kernel: Any, samples: Any, stage: str, i: int) -> None:
        if hook is not None:
            hook(kernel, samples, stage, i)
        watchers.see(kernel, stage)

    total = (sampler.warmup_steps + sampler.num_samples) * mcmc.num_chains
    sampler.hook = both
    try:
        with watchers.running(total, done):
            yield
    finally:
        sampler.hook = hook


def _read_transforms(mcmc: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Have a kernel whose chains run in other processes, by copies of it, know what its draws stand for."""
    if not (isinstance(mcmc.kernel, Kernel) and isinstance(mcmc.sampler, ParallelChains)):
        return
    checked = nullcontext() if mcmc.disable_validation is None else validation_enabled(not mcmc.disable_validation)
    with checked, block():
        mcmc.kernel.read_transforms(*args, **kwargs)


def _begin_run(kernel: Any, num_chains: int) -> None:
    """Let a kernel of ours count its chains anew, so that a run with a seed can be repeated."""
    if isinstance(kernel, Kernel):
        kernel.begin_run(num_chains)


def _session(
    mcmc: Any, checkpoint: str | Path | Session | None, every: int, resume: str | Path | None
) -> Session | None:
    if checkpoint is None and resume is None:
        return None
    if checkpoint is not None and resume is not None:
        raise ValueError("give checkpoint=folder for a new run, or resume=folder to go on with one, not both.")
    if mcmc.num_chains > 1:
        raise ValueError(
            f"num_chains={mcmc.num_chains}: checkpoints are of one chain. Run each chain on its own, with a folder "
            "and a seed of its own."
        )
    for name in ("state_dict", "load_state_dict", "rows", "fingerprint"):
        if not hasattr(mcmc.kernel, name):
            raise ValueError(
                f"{type(mcmc.kernel).__name__} cannot be saved: it has no {name}(). Use SGLD or SGLDGibbs."
            )
    if isinstance(checkpoint, Session):
        session = checkpoint
    else:
        session = Session(str(resume or checkpoint), every=every, resume=resume is not None)
    if session.draws > mcmc.num_samples:
        raise ValueError(
            f"{session.folder} holds {session.draws} draws already, and num_samples={mcmc.num_samples} is fewer."
        )
    return session


def _alone(session: Session | None, kernel: Any) -> AbstractContextManager[None]:
    """Keep other runs out of the folder of a run that is saved."""
    return nullcontext() if session is None else session.alone(shared=getattr(kernel, "distributed", False))


class _EndingChain:
    """A sampler of one chain that ends before its last draw, where it is told to."""

    def __init__(self, plain: Any, mcmc: StreamingMCMC, until: Callable[[int], bool]) -> None:
        self.plain, self.mcmc, self.until, self.ended = plain, mcmc, until, False

    def run(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, int]]:
        """What Pyro's own sampler yields: the structure, draws until the end, the diagnostics."""
        mcmc, chain = self.mcmc, self.plain.run(*args, **kwargs)
        yield next(chain)
        for made, item in enumerate(chain, 1):
            yield item  # by the time this goes on, the statistics have seen it
            if made <= mcmc.num_samples and self.until(made) and made < mcmc.num_samples:
                chain.close()
                mcmc.num_samples, self.ended = made, True  # Pyro takes what comes after so many for the diagnostics
                yield mcmc.kernel.diagnostics(), 0
                mcmc.kernel.cleanup()
                return

    def terminate(self, *args: Any) -> None:
        """Hand on what the plain sampler is told."""
        self.plain.terminate(*args)


class _SavedChain:
    """Pyro's sampler of one chain, which can begin in the middle and saves as it goes."""

    def __init__(self, plain: Any, session: Session, statistics: Any) -> None:
        self.plain, self.session, self.statistics = plain, session, statistics

    def run(self, *args: Any, **kwargs: Any) -> Iterator[tuple[Any, int]]:
        """What Pyro's own sampler yields: the structure, every draw, the diagnostics; with the chain's number."""
        plain, session = self.plain, self.session
        kernel = plain.kernel
        bar = ProgressBar(plain.warmup_steps, plain.num_samples, disable=plain.disable_progbar)
        logger = initialize_logger(logging.getLogger("pyro.infer.mcmc"), "", bar)
        hook = api._add_logging_hook(logger, bar, plain.hook)
        if plain.initial_params is not None:
            kernel.initial_params = {name: value[0] for name, value in plain.initial_params.items()}
        with session.signals():
            session.before_setup()
            if isinstance(kernel, Kernel):
                kernel.resume_as(session.saved_fingerprint)
            kernel.setup(plain.warmup_steps, *args, **kwargs)
            device = next((x.device for x in kernel.initial_params.values()), torch.device("cpu"))
            session.after_setup(kernel, self.statistics, device)
            params = kernel.initial_params
            names = getattr(kernel, "save_params", sorted(params))
            yield {name: params[name].shape for name in names}, 0
            if self.statistics is None:
                yield from ((draw.to(device), 0) for draw in session.stored_draws())
            bar.update(session.transitions)
            total = plain.warmup_steps + plain.num_samples
            new: list[Tensor] = []
            for i in range(session.transitions, total):
                params = kernel.sample(params)
                drawn = i >= plain.warmup_steps
                hook(kernel, params, "Sample" if drawn else "Warmup", i - plain.warmup_steps if drawn else i)
                if drawn:
                    flat = [params[name].reshape(-1) for name in names]
                    draw = (torch.cat if flat else torch.tensor)(flat)
                    if self.statistics is None:
                        new.append(draw)
                    yield draw, 0  # by the time this goes on, the statistics have seen it
                session.after(kernel, self.statistics, new, drawn=drawn, last=i == total - 1)
            yield kernel.diagnostics(), 0
            kernel.cleanup()
        kernel.cleanup()
        bar.close()

    def terminate(self, *args: Any) -> None:
        """Nothing to end: there is no other process."""
        del args
