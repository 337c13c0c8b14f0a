r"""Online EM in place, for a million coordinates and more: the same numbers as the plain form, in two passes.

:func:`pyro_lift.inference.mixture.online_em.step` is the reference. It makes some twenty arrays of K x D at each draw;
here

* the E-step reads means and variances once, and x twice, in pieces that stay in the cache: the last draw's component
  comes first, then all others together. The log-determinants are kept. A quadratic form only grows from piece to piece,
  so a component is given up, exactly, as soon as its density cannot reach the best one's;
* past a thousand dimensions the responsibilities are one-hot, and a component with :math:`w_j = 0` to rounding does
  not move. The M-step reads and writes the others only.
* The average of the sufficient statistics (the polynomial schedule) takes in every component at every draw. While a
  component stands still, though, pooling is associative: its share only grows, and one pooling when it next moves is
  the pooling of all the draws between. That share is kept in ``pending``.

Traffic of a draw that moves one component of K, in numbers: :math:`(2K + 2)\,D` read, then :math:`9 D` read or
written (:math:`5 D` without averaging).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pyro_lift.inference.mixture.batch_em import Covariance, Moments
from pyro_lift.inference.mixture.compiled import FusedSteps, compiles
from pyro_lift.inference.tiles import Buffers, split, tile_size, total

__all__ = ["MixtureStream"]

#: A component whose joint density is below the best one's by this many nats has a responsibility of exactly zero.
NEGLIGIBLE = 745.0
#: A component whose w_j is below this does not move: the change would be lost in float32's last digits.
STILL = 1e-12


class _Part:
    """One component's mean or variance, and views of its pieces."""

    def __init__(self, value: Tensor, tile: int) -> None:
        self.value = value
        self.tiles = split(value, tile)


class MixtureStream:
    """A mixture that draws are moved through in place.

    Laws. ``update`` mutates; a draw that is refused changes nothing. ``moments`` and ``average`` are fresh tensors.

    Args:
        moments: the mixture that the stream begins from, as in
            :class:`~pyro_lift.inference.mixture.online_em.MixtureState`.
        average: the running average; ignored at ``power`` 1, where the last iterate is the average.
        total: sum of n_j.
        seen: draws so far.
        log_likelihood: their sum of log p(x).
        covariance: ``"diag"`` or ``"spherical"``.
        power: gamma_t = (1 + total)^-power.
        floor: least variance.
        pending: shares not yet in the average, as :meth:`state_dict` gives them; None for none.
        exponent: variances are about two to this power; None looks at them.
        shares: the average's weights as sums over draws, without those pending; None takes them from ``average``.
        log_det: of the variances; None computes them.
        tile: numbers in a piece; None goes by the device.
        fused: whether a diagonal mixture's steps are compiled
            (:mod:`~pyro_lift.inference.mixture.compiled`); None does so on an accelerator, where it works.
    """

    def __init__(
        self,
        moments: Moments,
        average: Moments,
        total: float,
        seen: int,
        log_likelihood: float,
        covariance: Covariance,
        *,
        power: float,
        floor: float,
        pending: list[float] | None = None,
        exponent: int | None = None,
        shares: list[float] | None = None,
        log_det: list[float] | None = None,
        tile: int | None = None,
        fused: bool | None = None,
    ) -> None:
        mean, variance = moments.mean, moments.variance
        self.covariance, self.power, self.floor = covariance, power, floor
        self.total, self.seen, self.log_likelihood = total, seen, log_likelihood
        self.components, self.dim = mean.shape
        self.dtype = mean.dtype
        self._tile = tile or tile_size(mean)
        self.weight: list[float] = moments.weight.double().tolist()
        self._mean = [_Part(row.clone(), self._tile) for row in mean]
        self._variance = [_Part(row.clone(), self._tile) for row in variance]
        self._averages = power != 1.0
        # In the average weights are kept as sums over draws, so that a draw adds to them and rescales nothing.
        self._shares = [total * w for w in average.weight.double().tolist()]
        self.pending = list(pending) if pending is not None else [0.0] * self.components
        if self._averages:
            self._shares = [share - p for share, p in zip(self._shares, self.pending, strict=True)]
            self._shares = self._shares if shares is None else list(shares)
            self._mean_average = [_Part(row.clone(), self._tile) for row in average.mean]
            self._variance_average = [_Part(row.clone(), self._tile) for row in average.variance]
        device = mean.device.type
        fused = device != "cpu" if fused is None else fused
        self.fused = FusedSteps(self.dim) if fused and covariance == "diag" and compiles(device) else None
        self._buffers = Buffers(2, mean, min(self._tile, self.dim))
        self._last = 0
        #: Whether a component's density is given up as soon as it cannot reach the best one's.
        self.early = True
        # Exact scaling by a power of two near the typical variance, for products of several variances.
        self._exponent = _exponent_of(variance) if exponent is None else exponent
        self._log_det = list(log_det) if log_det else [self._log_determinant(part) for part in self._variance]

    # ------------------------------------------------------------------------------------------------ one draw

    def update(self, x: Tensor) -> None:
        """Move one draw ``[D]`` through.

        Raises:
            ValueError: a draw that is not finite.
        """
        x = x.to(self.dtype)
        tiles = split(x, self._tile)
        q, evidence = self._responsibilities(x, tiles)
        gamma = (1.0 + self.total) ** -self.power
        for j in range(self.components):
            weight = self.weight[j] + gamma * (q[j] - self.weight[j])
            w = gamma * q[j] / max(weight, 1e-300)
            if w > STILL:
                self._move(j, x, tiles, w)
            self.weight[j] = weight
            self.pending[j] += weight
        self.total += 1.0
        self.seen += 1
        self.log_likelihood += evidence

    def _responsibilities(self, x: Tensor, tiles: tuple[Tensor, ...]) -> tuple[list[float], float]:
        r"""Do the E-step: :math:`q_j \propto \alpha_j\,\mathcal N(x; \mu_j, V_j)` and :math:`\log p(x)`."""
        joint = [-math.inf] * self.components
        occupied = [j for j in range(self.components) if self.weight[j] > 0.0]
        constant = {
            j: math.log(self.weight[j]) - 0.5 * (self._log_det[j] + self.dim * math.log(2.0 * math.pi))
            for j in occupied
        }
        if self.fused is not None:
            means, variances = ([parts[j].value for j in occupied] for parts in (self._mean, self._variance))
            quadratics = dict(zip(occupied, self.fused.quadratics(x, means, variances), strict=True))
            joint = [
                constant[j] - 0.5 * quadratics[j] if j in quadratics else -math.inf for j in range(self.components)
            ]
        else:
            self._by_turns(tiles, occupied, constant, joint)
        top = max(joint)
        if not math.isfinite(top):
            # Equal draws leave variances at the floor, where float32 has no room for the distance of another draw.
            joint = self._in_double(x, occupied, constant)
            top = max(joint)
        if not math.isfinite(top):
            raise ValueError(f"draw {self.seen} is not finite; the mixture is left as it was.")
        self._last = joint.index(top)
        shares = [math.exp(value - top) for value in joint]
        norm = math.fsum(shares)
        return [share / norm for share in shares], top + math.log(norm)

    def _in_double(self, x: Tensor, occupied: list[int], constant: dict[int, float]) -> list[float]:
        """Compute the joint densities in float64: minus infinity where a draw is not finite."""
        joint = [-math.inf] * self.components
        for j in occupied:
            gap = x.double() - self._mean[j].value.double()
            value = float((gap.square_() / self._variance[j].value.double()).sum())
            joint[j] = constant[j] - 0.5 * value if math.isfinite(value) else -math.inf
        return joint

    def _by_turns(
        self, tiles: tuple[Tensor, ...], occupied: list[int], constant: dict[int, float], joint: list[float]
    ) -> None:
        """Fill in the joint densities; the last draw's component first: by it the others can be given up early."""
        turns = [j for j in occupied if j == self._last], [j for j in occupied if j != self._last]
        for turn in turns if tiles[0].device.type == "cpu" else (occupied,):
            best = max(joint)
            limits = {j: 2.0 * (constant[j] - best + NEGLIGIBLE) for j in turn}
            for j, value in self._quadratics(tiles, limits).items():
                joint[j] = constant[j] - 0.5 * value

    def _quadratics(self, tiles: tuple[Tensor, ...], limits: dict[int, float]) -> dict[int, float]:
        r""":math:`\sum_d (x_d - \mu_{jd})^2 / V_{jd}` of some components, infinity where past the limit: it only grows.

        Piece by piece, so that x is read once for all of them; on an accelerator, which then has to be asked for each
        number at each piece, to the end and with one question.
        """
        if tiles[0].device.type != "cpu":
            return dict(zip(limits, self._all_quadratics(tiles, list(limits)), strict=True))
        values = dict.fromkeys(limits, 0.0)
        left = list(limits)
        for t, x in enumerate(tiles):
            gap, scaled = self._buffers.of(len(x))
            for j in left:
                torch.sub(x, self._mean[j].tiles[t], out=gap)
                if self.covariance == "diag":
                    torch.div(gap, self._variance[j].tiles[t], out=scaled)
                    values[j] += float(torch.dot(gap, scaled))
                else:
                    values[j] += float(torch.dot(gap, gap)) / float(self._variance[j].value)
            if self.early:
                values |= {j: math.inf for j in left if values[j] > limits[j]}
                left = [j for j in left if values[j] <= limits[j]]
        return values

    def _all_quadratics(self, tiles: tuple[Tensor, ...], components: list[int]) -> list[float]:
        sums = []
        for j in components:
            parts = []
            for t, x in enumerate(tiles):
                gap, scaled = self._buffers.of(len(x))
                torch.sub(x, self._mean[j].tiles[t], out=gap)
                if self.covariance == "diag":
                    parts.append(torch.dot(gap, torch.div(gap, self._variance[j].tiles[t], out=scaled)))
                else:
                    parts.append(torch.dot(gap, gap) / self._variance[j].value.reshape(()))
            sums.append(total(parts))
        values: list[float] = torch.stack(sums).tolist()
        return values

    def _move(self, j: int, x: Tensor, tiles: tuple[Tensor, ...], w: float) -> None:
        """The M-step of one component, its pending share taken into the average on the way; one pass."""
        mean, variance = self._mean[j], self._variance[j]
        if self.fused is not None:
            self._move_fused(j, self.fused, x, w)
            return
        pool = self._pool_of(j)
        squares, between, logs = [], [], []
        for t, piece in enumerate(tiles):
            gap, spare = self._buffers.of(len(piece))
            if pool is not None:
                between.append(pool(t, gap))
            torch.sub(piece, mean.tiles[t], out=gap)
            mean.tiles[t].add_(gap, alpha=w)
            # (x - mu)(x - mu') = (1 - w) (x - mu)^2
            if self.covariance == "diag":
                v = variance.tiles[t]
                v.mul_(1.0 - w).addcmul_(gap, gap, value=w * (1.0 - w)).clamp_min_(self.floor)
                logs.append(self._log_sum(v, spare))
            else:
                squares.append(torch.dot(gap, gap))
        self._end_pool(j, between)
        if self.covariance == "spherical":
            square = total(squares) / self.dim
            variance.value.mul_(1.0 - w).add_((w * (1.0 - w) * square).to(self.dtype)).clamp_min_(self.floor)
        self._log_det[j] = self._log_determinant(variance, logs)

    def _move_fused(self, j: int, steps: FusedSteps, x: Tensor, w: float) -> None:
        average, share = None, 0.0
        if self._averages and self.pending[j] > 0.0:
            average = self._mean_average[j].value, self._variance_average[j].value
            share = self.pending[j] / (self._shares[j] + self.pending[j])
        mean, variance = self._mean[j].value, self._variance[j].value
        about = {"share": share, "w": w, "floor": self.floor}
        value = steps.move(x, mean, variance, average, **about, exponent=self._exponent)
        if average is not None:
            self._shares[j] += self.pending[j]
            self.pending[j] = 0.0
        self._log_det[j] = value if math.isfinite(value) else self._log_determinant(self._variance[j])

    def _fold(self, j: int) -> None:
        """Take a component's pending share into the average; one pass."""
        pool = self._pool_of(j)
        if pool is not None:
            lengths = [len(tile) for tile in self._mean[j].tiles]
            self._end_pool(j, [pool(t, next(self._buffers.of(n))) for t, n in enumerate(lengths)])

    def _pool_of(self, j: int) -> Callable[[int, Tensor], Tensor] | None:
        """What takes the pending share of component j into the average, piece by piece; None where none is pending."""
        if not self._averages or self.pending[j] == 0.0:
            return None
        share = self.pending[j] / (self._shares[j] + self.pending[j])
        mean, variance = self._mean[j].tiles, self._variance[j].tiles
        mean_average, variance_average = self._mean_average[j].tiles, self._variance_average[j].tiles

        def pool(t: int, gap: Tensor) -> Tensor:
            torch.sub(mean[t], mean_average[t], out=gap)
            mean_average[t].add_(gap, alpha=share)
            if self.covariance == "spherical":
                return torch.dot(gap, gap)
            variance_average[t].lerp_(variance[t], share).addcmul_(gap, gap, value=share * (1.0 - share))
            return gap

        return pool

    def _end_pool(self, j: int, between: list[Tensor]) -> None:
        if not between:
            return
        share = self.pending[j] / (self._shares[j] + self.pending[j])
        if self.covariance == "spherical":
            square = (share * (1.0 - share) * total(between) / self.dim).to(self.dtype)
            self._variance_average[j].value.lerp_(self._variance[j].value, share).add_(square)
        self._shares[j] += self.pending[j]
        self.pending[j] = 0.0

    def _log_determinant(self, variance: _Part, logs: list[Tensor] | None = None) -> float:
        if self.covariance == "spherical":
            return self.dim * float(variance.value.double().log())
        if logs is None:
            logs = [self._log_sum(v, next(self._buffers.of(len(v)))) for v in variance.tiles]
        value = float(total(logs)) + self.dim * self._exponent * math.log(2.0)
        if math.isfinite(value):
            return value
        # Products of four over- or underflow where variances spread over nine orders of magnitude and more, or have
        # left the scale they began at.
        self._exponent = _exponent_of(variance.value)
        return float(total([v.double().log().sum() for v in variance.tiles]))

    def _log_sum(self, v: Tensor, out: Tensor) -> Tensor:
        """Sum of log v - log 2^exponent: logarithms of products of four, which cost a quarter of the logarithms."""
        half = len(v) // 4 * 2
        pairs = torch.mul(v[:half], v[half : 2 * half], out=out[:half]).mul_(2.0 ** (-2 * self._exponent))
        fours = pairs[: half // 2].mul_(pairs[half // 2 :])
        rest = (v[2 * half :] * 2.0**-self._exponent).log().sum()
        return fours.log_().sum() + rest

    # ------------------------------------------------------------------------------------------------ what it holds

    @property
    def moments(self) -> Moments:
        """The current mixture."""
        return Moments(self._weights(self.weight), _stacked(self._mean), _stacked(self._variance))

    @property
    def average(self) -> Moments:
        """The running average, pending shares included."""
        if not self._averages:
            return self.moments
        copy = self.copy()
        for j in range(self.components):
            copy._fold(j)
        weight = [share / self.total for share in copy._shares]
        return Moments(self._weights(weight), _stacked(copy._mean_average), _stacked(copy._variance_average))

    def copy(self) -> MixtureStream:
        """A stream of its own."""
        tensors = self.tensors()
        moments, average = _moments(tensors, "moments"), _moments(tensors, "average")
        return MixtureStream(
            moments,
            average,
            self.total,
            self.seen,
            self.log_likelihood,
            self.covariance,
            power=self.power,
            floor=self.floor,
            pending=self.pending,
            exponent=self._exponent,
            shares=self._shares,
            log_det=self._log_det,
            tile=self._tile,
            fused=self.fused is not None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """What a stream is resumed from to the bit; the average's weights include the pending shares."""
        weight = [(a + p) / self.total for a, p in zip(self._shares, self.pending, strict=True)]
        mean, variance = _stacked(self._mean), _stacked(self._variance)
        if not self._averages:
            average = {"weight": torch.tensor(self.weight, dtype=torch.float64), "mean": mean, "variance": variance}
        else:
            average = {
                "weight": torch.tensor(weight, dtype=torch.float64),
                "mean": _stacked(self._mean_average),
                "variance": _stacked(self._variance_average),
            }
        moments = {"weight": torch.tensor(self.weight, dtype=torch.float64), "mean": mean, "variance": variance}
        return {
            **{f"moments.{name}": value for name, value in moments.items()},
            **{f"average.{name}": value for name, value in average.items()},
            "pending": torch.tensor(self.pending, dtype=torch.float64),
            "exponent": torch.tensor(self._exponent),
            "shares": torch.tensor(self._shares, dtype=torch.float64),
            "log_det": torch.tensor(self._log_det, dtype=torch.float64),
        }

    def _weights(self, weight: list[float]) -> Tensor:
        return torch.tensor(weight, dtype=self.dtype, device=self._mean[0].value.device)


def _stacked(parts: list[_Part]) -> Tensor:
    return torch.stack([part.value for part in parts])


def _moments(tensors: dict[str, Tensor], name: str) -> Moments:
    return Moments(*(tensors[f"{name}.{field}"] for field in Moments._fields))


def _exponent_of(variance: Tensor) -> int:
    """The power of two nearest to a typical variance."""
    return round(math.log2(max(float(variance.double().mean()), 1e-30)))
