r"""Online EM: a Gaussian mixture over a stream of draws, each seen once (Eq. 12-14).

With the normalised sufficient statistics of component j, weight s_j, mean and variance, a draw x moves

.. math:: q_j \propto \alpha_j\,\mathcal N(x; \mu_j, V_j), \qquad
          s_j \leftarrow s_j + \gamma_t\,(q_j - s_j), \qquad w_j = \gamma_t\,q_j / s_j,

.. math:: \mu_j' = \mu_j + w_j\,(x - \mu_j), \qquad V_j' = (1 - w_j)\,V_j + w_j\,(x - \mu_j)(x - \mu_j')^\top.

The last line equals the paper's :math:`S_j - \mu_j\mu_j^\top` without its cancellation. With
:math:`\gamma_t = 1/(1 + \sum_j n_j)` it *is* Eq. 14; a slower decay, with averaging, forgets wrong early assignments.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import pyro.distributions as dist
import torch
from pyro.ops.streaming import StreamingStats
from torch import Tensor

from pyro_lift.inference.mixture.batch_em import Covariance, Moments, fit, floored, kmeans_start, log_densities
from pyro_lift.inference.mixture.in_place import MixtureStream
from pyro_lift.support.options import check_literal, check_number
from pyro_lift.support.spans import span

__all__ = ["MixtureState", "OnlineGaussianMixture", "init", "pooled", "step"]

#: Step sizes of the stochastic approximation.
StepSchedule = Literal["counts", "polynomial"]

#: Above this many numbers a mean is kept in the draws' own precision, and diagonal and spherical mixtures are updated
#: in place (:mod:`~pyro_lift.inference.mixture.in_place`); responsibilities always are in float64.
DOUBLE_UP_TO = 100_000


class MixtureState(NamedTuple):
    """State of the stream between two draws.

    Attributes:
        moments: the current mixture.
        average: the running average of its sufficient statistics, as moments.
        total: sum of n_j: draws seen, plus the prior strength.
        seen: draws moved through :func:`step`.
        log_likelihood: sum over those of log p(x) under the mixture before the draw.
    """

    moments: Moments
    average: Moments
    total: float
    seen: int
    log_likelihood: float


def init(moments: Moments, total: float) -> MixtureState:
    """Make the state of a mixture that counts as ``total`` draws."""
    return MixtureState(moments, moments, total, 0, 0.0)


def step(
    state: MixtureState, x: Tensor, covariance: Covariance, *, power: float, floor: Tensor | float
) -> MixtureState:
    r"""Update the mixture with one draw. Pure.

    Args:
        state: the mixture so far.
        x: ``[D]``.
        covariance: of the components.
        power: gamma_t = (1 + total)^-power; 1 is Eq. 14 with ``total`` the sum of n_j.
        floor: least variance.
    """
    joint = log_densities(state.moments, x, covariance)
    evidence = float(joint.logsumexp(-1))
    q = torch.softmax(joint, -1).to(state.moments.weight)
    gamma = (1.0 + state.total) ** -power
    weight = state.moments.weight + gamma * (q - state.moments.weight)
    w = (gamma * q / weight.clamp_min(torch.finfo(weight.dtype).tiny)).unsqueeze(-1)
    old_gap = x - state.moments.mean
    mean = state.moments.mean + w * old_gap
    new_gap = x - mean
    if covariance == "full":
        w = w.unsqueeze(-1)
        variance = (1.0 - w) * state.moments.variance + w * (old_gap.unsqueeze(-1) * new_gap.unsqueeze(-2))
        variance = 0.5 * (variance + variance.mT)
    else:
        square = old_gap * new_gap
        square = square.mean(-1, keepdim=True) if covariance == "spherical" else square
        variance = (1.0 - w) * state.moments.variance + w * square
    moments = Moments(weight / weight.sum(), mean, floored(variance, covariance, floor))
    total = state.total + 1.0
    # With Eq. 14's step the last iterate is already the average of all; with a slower one the average is taken.
    average = moments if power == 1.0 else pooled(state.average, moments, 1.0 / total, covariance)
    return MixtureState(moments, average, total, state.seen + 1, state.log_likelihood + evidence)


def pooled(first: Moments, second: Moments, share: float, covariance: Covariance) -> Moments:
    """Pool the moments of component j of both: ``1 - share`` of the first, ``share`` of the second."""
    a, b = (1.0 - share) * first.weight, share * second.weight
    weight = a + b
    part = (b / weight.clamp_min(torch.finfo(weight.dtype).tiny)).unsqueeze(-1)
    gap = second.mean - first.mean
    mean = first.mean + part * gap
    if covariance == "full":
        part = part.unsqueeze(-1)
        between = gap.unsqueeze(-1) * gap.unsqueeze(-2)
    elif covariance == "spherical":
        between = gap.square().mean(-1, keepdim=True)
    else:
        between = gap.square()
    variance = (1.0 - part) * first.variance + part * second.variance + part * (1.0 - part) * between
    return Moments(weight, mean, variance)


class OnlineGaussianMixture(StreamingStats):
    """A Gaussian mixture fitted to a stream of draws, each seen once, as Pyro's ``StreamingMCMC`` feeds it.

    Laws. ``update`` mutates and returns nothing. Unlike what Pyro's streaming statistics promise, the order of
    draws matters, because early draws are assigned by an early mixture; for K = 1 it does not. ``merge`` is pure: it
    matches components first, since two chains number theirs as they please. Identical components stay identical for
    ever, which is why the start is never a jittered copy of one point: the first draws are kept in a buffer, and the
    best of several batch-EM fits of it begins the stream, counting as the draws it has seen.

    Args:
        components: K.
        covariance: ``"diag"``, ``"spherical"`` or ``"full"``.
        schedule: ``"counts"``: gamma_t = 1 / (1 + sum of n_j), Eq. 14. ``"polynomial"``: (1 + sum of n_j)^-power with
            averaging (Cappé and Moulines). None takes counts for K = 1, where they are exact, else polynomial.
        power: of the polynomial schedule, in (0.5, 1].
        count: n_j at the start. None: what the buffer's fit gives. A number is the paper's recipe (it uses 100): the
            start is a plain k-means++ seeding of the buffer, weighs ``count`` draws a component, and the buffer's
            draws then go through the stream as all others.
        buffer_size: draws kept for the start; None takes 100 K, or 10 K past 1,000 dimensions.
        variance_floor: least variance, as a share of the buffer's mean variance.
        seed: of the k-means++ start.
        fused: whether the steps of a large diagonal mixture are compiled, which takes a compiler and, the first time,
            up to half a minute; None does so on an accelerator only. On a CPU the piecewise form, which gives up
            components early, is as fast for mixtures whose components are apart.

    Raises:
        ValueError: an option out of range; a draw that is not finite or of another length (the mixture is
            unchanged); ``get`` before K draws.

    References:
        On-line expectation-maximization algorithm for latent data models, Cappé and Moulines, 2009,
        arXiv:0712.4273. LiFT, section 2.3 and appendix B.

    Example:
        >>> mixture = OnlineGaussianMixture(components=1)
        >>> for x in torch.arange(5.0):
        ...     mixture.update(x)
        >>> mixture.get().mean.item(), round(mixture.get().variance.item(), 6)
        (2.0, 2.0)
    """

    def __init__(
        self,
        components: int = 1,
        covariance: Covariance = "diag",
        *,
        schedule: StepSchedule | None = None,
        power: float = 0.7,
        count: float | None = None,
        buffer_size: int | None = None,
        variance_floor: float = 1e-6,
        seed: int = 0,
        fused: bool | None = None,
    ) -> None:
        check_number("components", components, least=1, open_below=False, whole=True)
        check_literal("covariance", covariance, Covariance)
        if schedule is not None:
            check_literal("schedule", schedule, StepSchedule)
        if not 0.5 < power <= 1.0:
            raise ValueError(f"power={power!r}: expected above 0.5 (or the noise never averages out) and at most 1.")
        if count is not None:
            check_number("count", count, open_below=False)
        if buffer_size is not None:
            check_number("buffer_size", buffer_size, least=components, open_below=False, whole=True)
        check_number("variance_floor", variance_floor)
        self.components, self.covariance = components, covariance
        self.schedule = schedule or ("counts" if components == 1 else "polynomial")
        self.power = 1.0 if self.schedule == "counts" else power
        self.count, self.buffer_size, self.variance_floor, self.seed = count, buffer_size, variance_floor, seed
        self.fused = fused
        self._buffer: list[Tensor] = []
        self._running: MixtureState | MixtureStream | None = None
        self._dtype = torch.get_default_dtype()
        self._floor: Tensor | float = 0.0

    @classmethod
    def from_moments(
        cls,
        moments: Moments,
        seen: int,
        covariance: Covariance = "diag",
        *,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> OnlineGaussianMixture:
        """Make a mixture that streams on from given moments.

        Args:
            moments: weights, means and variances of the components; their number is K.
            seen: draws that they count as.
            covariance: of the components.
            dtype: of the distribution that :meth:`get` gives; None is torch's default.
            options: further ones of the class.

        Raises:
            ValueError: weights that are no probabilities, or a variance that is not positive.

        Example:
            >>> moments = Moments(torch.tensor([0.5, 0.5]), torch.tensor([[-1.0], [1.0]]), torch.ones(2, 1))
            >>> mixture = OnlineGaussianMixture.from_moments(moments, seen=10)
            >>> mixture.seen, mixture.get().mean.item()
            (10, 0.0)
        """
        check_number("seen", seen, least=1, open_below=False, whole=True)
        weight, variance = moments.weight, moments.variance
        if not bool((weight >= 0.0).all()) or abs(float(weight.double().sum()) - 1.0) > 1e-4:
            raise ValueError(f"weights {weight.tolist()}: expected numbers of at least 0 that sum to 1.")
        spread = variance.diagonal(dim1=-2, dim2=-1) if covariance == "full" else variance
        if not bool((spread > 0.0).all()):
            raise ValueError(f"the least variance is {float(spread.min())}; expected variances above 0.")
        mixture = cls(len(weight), covariance, **options)
        mixture._dtype = dtype or mixture._dtype
        mixture._floor = mixture.variance_floor * spread.min()
        mixture._resume(MixtureState(moments, moments, float(seen), seen, 0.0))
        return mixture

    def __repr__(self) -> str:
        return f"OnlineGaussianMixture({self.components}, {self.covariance!r}, seen={self.seen})"

    @property
    def seen(self) -> int:
        """Draws seen, those in the buffer included."""
        return len(self._buffer) if self._running is None else self._running.seen

    @property
    def dim(self) -> int | None:
        """D; None before the first draw."""
        if isinstance(self._running, MixtureStream):
            return self._running.dim
        if self._running is not None:
            return self._running.moments.mean.shape[-1]
        return self._buffer[0].numel() if self._buffer else None

    @span("pyro_lift.mixture")
    def update(self, sample: Tensor) -> None:
        """Update the mixture with one draw, flattened to a vector."""
        x = sample.detach().reshape(-1)
        if self.dim not in (None, x.numel()):
            raise ValueError(f"a draw of length {x.numel()} for a mixture over {self.dim} coordinates.")
        if isinstance(self._running, MixtureStream):
            self._running.update(x)  # looks for itself whether x is finite
            self._dtype = x.dtype
            return
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"draw {self.seen} is not finite; the mixture is left as it was.")
        self._dtype = x.dtype
        x = x.double() if x.numel() * self.components <= DOUBLE_UP_TO else x
        if self._running is not None:
            self._running = self._stepped(self._running, x)
            return
        self._buffer.append(x.clone())
        if len(self._buffer) >= self.buffer_limit(x.numel()):
            self._begin()

    def _begin(self) -> None:
        """Turn the buffer into a mixture that streams, in place where it is large."""
        state, self._floor = self._started()
        self._resume(state)
        self._buffer = []

    def _resume(self, state: MixtureState, **resumed: Any) -> None:
        """Stream on from a state, in place where it is large; ``resumed`` is what only :class:`MixtureStream` keeps."""
        self._running = self._in_place(state, **resumed) if self._is_large(state.moments.mean) else state

    def _is_large(self, mean: Tensor) -> bool:
        return self.covariance != "full" and mean.numel() > DOUBLE_UP_TO

    def _in_place(self, state: MixtureState, **resumed: Any) -> MixtureStream:
        resumed |= {"power": self.power, "floor": float(self._floor), "fused": self.fused}
        return MixtureStream(*state, self.covariance, **resumed)

    def start(self, samples: Tensor) -> None:
        """Begin from burn-in draws ``[n, D]``, which count as seen, instead of from the stream's own first ones.

        Raises:
            ValueError: the stream has begun already, or fewer draws than components.
        """
        if self._running is not None or self._buffer:
            raise ValueError(f"{self.seen} draws have been seen already: start() comes before the first update().")
        flat = samples.detach().reshape(len(samples), -1)
        self._dtype = flat.dtype
        flat = flat.double() if flat[0].numel() * self.components <= DOUBLE_UP_TO else flat
        self._buffer = list(flat)
        self._begin()

    def buffer_limit(self, dim: int) -> int:
        """Return how many draws ``[D]`` are kept for the start."""
        if self.buffer_size is not None:
            return self.buffer_size
        return max(2, self.components * (100 if dim <= 1_000 else 10))

    def _stepped(self, state: MixtureState, x: Tensor) -> MixtureState:
        return step(state, x, self.covariance, power=self.power, floor=self._floor)

    def _started(self) -> tuple[MixtureState, Tensor | float]:
        """Fit the mixture to the buffer alone."""
        if len(self._buffer) < self.components:
            raise ValueError(
                f"{len(self._buffer)} draws for {self.components} components: at least one each is needed. "
                "Sample longer, or use fewer components."
            )
        x = torch.stack(self._buffer)
        # A floor of zero would let a component collapse on one draw; the scale is the draws' own.
        floor = self.variance_floor * x.var(0, unbiased=False).mean().clamp_min(1e-30)
        if self.count is None:
            moments, score = fit(x, self.components, self.covariance, floor=floor, seed=self.seed)
            return MixtureState(moments, moments, float(len(x)), len(x), score * len(x)), floor
        generator = torch.Generator().manual_seed(self.seed)
        state = init(kmeans_start(x, self.components, self.covariance, floor, generator), self.count * self.components)
        for row in x:
            state = step(state, row, self.covariance, power=self.power, floor=floor)
        return state, floor

    def _current(self) -> MixtureState:
        running = self._running
        if running is None:
            return self._started()[0]
        if isinstance(running, MixtureState):
            return running
        return MixtureState(running.moments, running.average, running.total, running.seen, running.log_likelihood)

    @property
    def moments(self) -> Moments:
        """Weights, means and variances as :meth:`get` uses them: averaged, where the schedule averages."""
        average = self._current().average
        return average._replace(weight=average.weight / average.weight.sum())

    def get(self) -> dist.MixtureSameFamily:
        """Return the mixture in the draws' dtype, its components Normals (diag, spherical) or MultivariateNormals."""
        weight, mean, variance = (part.to(self._dtype) for part in self.moments)
        categorical = dist.Categorical(probs=weight)
        if self.covariance == "full":
            return dist.MixtureSameFamily(categorical, dist.MultivariateNormal(mean, variance))
        scale = variance.sqrt().expand_as(mean)
        return dist.MixtureSameFamily(categorical, dist.Normal(mean, scale).to_event(1))

    def report(self) -> dict[str, Any]:
        """Report what to look at before believing in K components.

        Returns:
            ``seen``; ``n``, the draws of each component; ``log_likelihood``, the mean over draws of log p(x) under
            the mixture before each; ``distance``, Euclidean between means ``[K, K]``; ``separation``, the same over
            the mean standard deviation times the root of D, so that 1 is one typical radius.
        """
        state, (weight, mean, variance) = self._current(), self.moments
        distance = torch.cdist(mean, mean)
        spread = variance.diagonal(dim1=-2, dim2=-1) if self.covariance == "full" else variance.expand_as(mean)
        radius = spread.mean(-1).sqrt().mean() * mean.shape[-1] ** 0.5
        return {
            "seen": state.seen,
            "n": (weight * state.total).tolist(),
            "log_likelihood": state.log_likelihood / max(state.seen, 1),
            "distance": distance.tolist(),
            "separation": (distance / radius).tolist(),
        }

    def merge(self, other: OnlineGaussianMixture) -> OnlineGaussianMixture:
        """Merge both streams' mixtures, components matched by the smallest total distance of their means.

        Distances are measured in standard deviations of both components together. An empty side adds nothing.

        Raises:
            ValueError: another K, covariance or dimension.
        """
        for name in ("components", "covariance"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} and {getattr(other, name)!r}: only mixtures of one kind merge."
                )
        if self.seen == 0 or other.seen == 0:
            return (other if self.seen == 0 else self)._copy()
        if self.dim != other.dim:
            raise ValueError(f"mixtures over {self.dim} and {other.dim} coordinates do not merge.")
        if self._running is None or other._running is None:
            return self._merged_buffer(other)
        first, second = self._current(), other._current()
        order = _matching(first.average, second.average, self.covariance)
        share = second.total / (first.total + second.total)
        merged = self._copy()
        state = MixtureState(
            pooled(first.moments, _permuted(second.moments, order), share, self.covariance),
            pooled(first.average, _permuted(second.average, order), share, self.covariance),
            first.total + second.total,
            first.seen + second.seen,
            first.log_likelihood + second.log_likelihood,
        )
        merged._running = self._in_place(state) if isinstance(self._running, MixtureStream) else state
        return merged

    def _merged_buffer(self, other: OnlineGaussianMixture) -> OnlineGaussianMixture:
        """Put the draws of the side that has no mixture yet through the other's stream."""
        first, second = (self, other) if self._running is not None else (other, self)
        merged = first._copy()
        for x in second._buffer:
            merged.update(x)
        merged._dtype = first._dtype  # small buffers are kept in float64, whatever came in
        return merged

    def _copy(self) -> OnlineGaussianMixture:
        copy = object.__new__(OnlineGaussianMixture)
        copy.__dict__ = {**self.__dict__, "_buffer": list(self._buffer)}
        if isinstance(self._running, MixtureStream):
            copy._running = self._running.copy()
        return copy

    def state_dict(self) -> dict[str, Tensor]:
        """Return everything but the options, as tensors."""
        s = self._running
        if s is None:
            dtype = torch.empty(0, dtype=self._dtype)
            return {"buffer": torch.stack(self._buffer), "dtype": dtype} if self._buffer else {}
        numbers = torch.tensor([s.total, float(s.seen), s.log_likelihood], dtype=torch.float64)
        rest = {"numbers": numbers, "floor": torch.as_tensor(self._floor)}
        rest["dtype"] = torch.empty(0, dtype=self._dtype)
        if isinstance(s, MixtureStream):
            return {**s.tensors(), **rest}
        tensors = {f"moments.{k}": v for k, v in s.moments._asdict().items()}
        tensors |= {f"average.{k}": v for k, v in s.average._asdict().items()}
        return {**tensors, **rest}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take up a stream where :meth:`state_dict` left it; the options must be the same.

        Raises:
            ValueError: a tensor is missing, or belongs to another K.
        """
        if not tensors:
            self._running, self._buffer = None, []
            return
        self._dtype = tensors["dtype"].dtype if "dtype" in tensors else self._dtype
        if "buffer" in tensors:
            self._running, self._buffer = None, list(tensors["buffer"])
            return
        parts = [f"{part}.{name}" for part in ("moments", "average") for name in Moments._fields]
        for name in [*parts, "numbers", "floor"]:
            if name not in tensors:
                raise ValueError(f"the mixture's tensor {name!r} is missing.")
        moments = Moments(*(tensors[f"moments.{name}"] for name in Moments._fields))
        if moments.weight.shape != (self.components,):
            raise ValueError(f"a state of {len(moments.weight)} components for a mixture of {self.components}.")
        average = Moments(*(tensors[f"average.{name}"] for name in Moments._fields))
        total, seen, log_likelihood = tensors["numbers"].tolist()
        state = MixtureState(moments, average, total, int(seen), log_likelihood)
        self._floor, self._buffer = tensors["floor"], []
        resumed = {
            name: tensors[name].tolist() for name in ("pending", "exponent", "shares", "log_det") if name in tensors
        }
        self._resume(state, **resumed)


def _permuted(moments: Moments, order: Tensor) -> Moments:
    return Moments(*(part[order] for part in moments))


def _matching(first: Moments, second: Moments, covariance: Covariance) -> Tensor:
    """Return the index of the matching component of ``second`` for each of ``first`` (Hungarian algorithm)."""
    from scipy.optimize import linear_sum_assignment

    def spread(m: Moments) -> Tensor:
        return m.variance.diagonal(dim1=-2, dim2=-1) if covariance == "full" else m.variance.expand_as(m.mean)

    variance = spread(first).unsqueeze(1) + spread(second).unsqueeze(0)
    gap = first.mean.unsqueeze(1) - second.mean.unsqueeze(0)
    cost = (gap.square() / variance).sum(-1)
    return torch.as_tensor(linear_sum_assignment(cost.cpu().numpy())[1], device=first.mean.device)
