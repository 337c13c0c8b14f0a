r"""Simulation-based calibration: are posteriors right, judged without knowing them?

Draw parameters from the prior, data from the parameters, and L draws from the posterior of those data. If the sampler
is right, the true value's rank among the draws is uniform on 0 .. L, whatever the model.

References:
    Validating Bayesian inference algorithms with simulation-based calibration, Talts et al., 2018, arXiv:1804.06788.
    Graphical test for discrete uniformity and its applications in goodness-of-fit evaluation and multiple sample
    comparison, Säilynoja, Bürkner and Vehtari, 2022, arXiv:2103.10522.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np
import torch
from torch import Tensor

from pyro_lift.diagnostics.passes import prior_draws
from pyro_lift.inference.gibbs.kernel import SGLDGibbs
from pyro_lift.inference.mcmc import MCMC
from pyro_lift.inference.whole import whole
from pyro_lift.inference.with_data import with_data
from pyro_lift.support.figures import COLOURS, new_figure, save_figure

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Calibration", "ecdf_band", "rank_counts", "sbc", "uniform_p_value"]


def rank_counts(ranks: Tensor, draws: int, bins: int) -> Tensor:
    """Return how many ranks, each from 0 to ``draws``, fall into bins of equal width; ``[bins]``."""
    return torch.bincount(ranks * bins // (draws + 1), minlength=bins)


def uniform_p_value(counts: Tensor) -> float:
    """Return the p-value of the chi-square test that all bins are equally likely."""
    from scipy.stats import chisquare

    return float(chisquare(counts.numpy()).pvalue)


@lru_cache(maxsize=16)
def ecdf_band(count: int, draws: int, probability: float = 0.95, simulations: int = 2_000) -> tuple[Any, Any, Any]:
    r"""Return a band that the whole ECDF of uniform ranks stays in with a probability.

    At each point z the number of ranks below it is Binomial(count, z); the pointwise band has the level
    :math:`1 - \gamma`, with :math:`\gamma` such that, of simulated uniform samples, the wanted share lies inside at
    every point at once (Säilynoja et al., algorithm 1).

    Args:
        count: of ranks.
        draws: largest rank.
        probability: of the band as a whole.
        simulations: of uniform samples.

    Returns:
        Points z, k / (draws + 1) for k = 1 .. draws, and the lower and upper edge of the ECDF there.
    """
    from scipy.stats import binom

    points = np.arange(1, draws + 1) / (draws + 1)
    random = np.random.default_rng(0)
    counts = random.multinomial(count, np.full(draws + 1, 1.0 / (draws + 1)), size=simulations)
    below = np.cumsum(counts, axis=1)[:, :-1]
    tails = 2.0 * np.minimum(binom.cdf(below, count, points), binom.sf(below - 1, count, points))
    gamma = float(np.quantile(tails.min(1), 1.0 - probability))
    return points, binom.ppf(gamma / 2, count, points) / count, binom.ppf(1 - gamma / 2, count, points) / count


@dataclass(frozen=True)
class Calibration:
    """Ranks of true values among posterior draws; ``str()`` is a table.

    Attributes:
        ranks: by coordinate, ``[replicates]``, each from 0 to ``draws``.
        draws: L.
    """

    ranks: Mapping[str, Tensor]
    draws: int

    def p_value(self, name: str) -> float:
        """Return the p-value of the chi-square test of one coordinate's ranks, in bins of at least five expected."""
        ranks = self.ranks[name]
        bins = max(2, min(20, self.draws + 1, len(ranks) // 5))
        counts = rank_counts(ranks, self.draws, bins)
        # Bins differ in how many ranks they hold where draws + 1 is no multiple of their number.
        held = rank_counts(torch.arange(self.draws + 1), self.draws, bins).double()
        from scipy.stats import chisquare

        return float(chisquare(counts.numpy(), (held / held.sum() * len(ranks)).numpy()).pvalue)

    @property
    def p_values(self) -> dict[str, float]:
        """The p-values by coordinate; multiply by their number (Bonferroni) to judge the least of them."""
        return {name: self.p_value(name) for name in self.ranks}

    def ecdf(self, name: str) -> NDArray[np.float64]:
        """Return the share of ranks below k, for k = 1 .. L; on average k / (L + 1) where all is right."""
        ranks = self.ranks[name].numpy()
        return np.array([(ranks < k).mean() for k in range(1, self.draws + 1)])

    def outside(self, probability: float = 0.95) -> list[str]:
        """Return the coordinates whose ECDF leaves the band of a probability."""
        return [name for name, ranks in self.ranks.items() if self._leaves(name, len(ranks), probability)]

    def _leaves(self, name: str, count: int, probability: float) -> bool:
        _, low, high = ecdf_band(count, self.draws, probability)
        values = self.ecdf(name)
        return bool(((values < low - 1e-9) | (values > high + 1e-9)).any())

    def __str__(self) -> str:
        out = set(self.outside())
        rows = [f"{n:<20}{p:>10.3g}   {'leaves' if n in out else 'stays in'}" for n, p in self.p_values.items()]
        count = len(next(iter(self.ranks.values())))
        head = f"{count} data sets, {self.draws} draws each\n{'':<20}{'p':>10}   95 % band of the ECDF"
        return "\n".join([head, *rows])

    def plot(self, path: str | Path) -> None:
        """Draw, for each coordinate, the ECDF of ranks less the uniform one, in its 95 % band.

        A curve that rises above the band first and falls below it then has draws that are too narrow; the other way
        round, too wide; one that stays on a side, a bias.
        """
        names = list(self.ranks)
        columns = min(3, len(names))
        rows = -(-len(names) // columns)
        figure, made = new_figure(rows, columns, width=3.1 * columns, height=2.4 * rows, sharex=True)
        axes = np.atleast_1d(made).ravel()
        for axis, name in zip(axes, names, strict=False):
            points, low, high = ecdf_band(len(self.ranks[name]), self.draws)
            axis.fill_between(points, low - points, high - points, color="0.88", step="mid", zorder=0)
            axis.axhline(0.0, color="0.6", linewidth=0.8)
            axis.step(points, self.ecdf(name) - points, where="mid", color=COLOURS[0])
            axis.set_title(f"{name}: p = {self.p_value(name):.2g}", fontsize=9)
        for axis in axes[len(names) :]:
            axis.set_visible(False)
        figure.supxlabel("rank of the true value, as a share", fontsize=10)
        figure.supylabel("ECDF less the uniform one", fontsize=10)
        save_figure(figure, Path(path))


class SBCOptions(TypedDict, total=False):
    """Options of :func:`sbc` that are seldom set."""

    draws: int
    warmup_steps: int
    thinning: int
    seed: int


def sbc(
    model: Callable[..., Any],
    simulate: Callable[[int], tuple[Mapping[str, Tensor], Sequence[Any]]] | None = None,
    *,
    replicates: int = 100,
    sites: Sequence[str] | None = None,
    kernel: Callable[[Callable[..., Any], int], Any] | None = None,
    args: Sequence[Any] = (),
    **options: Unpack[SBCOptions],
) -> Calibration:
    """Run simulation-based calibration of a program and a sampler.

    Args:
        model: a Pyro program.
        simulate: from a seed to true values by site and the arguments of the program that holds data made from them.
            None draws both from the program itself, with full plates, and puts the data in the place of those observed.
        replicates: data sets.
        sites: whose ranks are looked at; None takes all sites that have true values and draws.
        kernel: from a program and a seed to a kernel; None is ``SGLDGibbs(program, keep_theta=True)``.
        args: of the program, where nothing is simulated.
        options: ``draws`` (63) of each posterior, ``warmup_steps`` (500) and ``thinning`` (20) transitions before and
            between them: ranks want draws that are nearly independent; ``seed`` (0).

    Returns:
        The ranks, with tests, bands and a figure.

    Raises:
        ValueError: no site has both a true value and draws.
        TypeError: an unknown option.
    """
    if odd := set(options) - set(SBCOptions.__annotations__):
        raise TypeError(f"unknown option {min(odd)!r} of sbc; known are: {', '.join(SBCOptions.__annotations__)}.")
    draws, seed, thinning = options.get("draws", 63), options.get("seed", 0), options.get("thinning", 20)
    make = kernel or (lambda program, number: SGLDGibbs(program, keep_theta=True, seed=number))
    ranks: dict[str, list[Tensor]] = {}
    for replicate in range(replicates):
        number = seed * 1_000_003 + replicate
        program, truth, given = _simulated(model, simulate, args, number)
        mcmc = MCMC(
            make(program, number),
            num_samples=draws * thinning,
            warmup_steps=options.get("warmup_steps", 500),
            disable_progbar=True,
        )
        mcmc.run(*given)
        drawn = {name: value[thinning - 1 :: thinning] for name, value in mcmc.get_samples().items()}
        for name in sites if sites is not None else [name for name in drawn if name in truth]:
            if name not in drawn or name not in truth:
                raise ValueError(f"sites: {name!r} has no true value or no draws (draws: {', '.join(sorted(drawn))}).")
            ranks.setdefault(name, []).append((drawn[name] < truth[name]).sum(0))
    if not ranks:
        raise ValueError("no site has both a true value and draws: simulate() must name the program's latent sites.")
    return Calibration(_by_coordinate({name: torch.stack(found) for name, found in ranks.items()}), draws)


def _simulated(
    model: Callable[..., Any], simulate: Any, args: Sequence[Any], number: int
) -> tuple[Callable[..., Any], Mapping[str, Tensor], Sequence[Any]]:
    if simulate is not None:
        truth, given = simulate(number)
        return model, truth, given
    latent, data = prior_draws(whole(model), tuple(args), {}, 1, number)
    truth = {name: value[0] for name, value in latent.items()}
    return with_data(model, {name: value[0] for name, value in data.items()}), truth, args


def _by_coordinate(ranks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    named: dict[str, Tensor] = {}
    for name, values in ranks.items():
        flat = values.reshape(len(values), -1)
        for k in range(flat.shape[1]):
            index = np.unravel_index(k, values.shape[1:]) if values.dim() > 1 else ()
            named[f"{name}[{', '.join(map(str, index))}]" if len(index) else name] = flat[:, k]
    return named
