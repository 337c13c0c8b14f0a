r"""How much wider or narrower than of most tasks predictions of a regression are, by what its own rows miss.

All tasks have one noise :math:`\tau`, and some are noisier than others: a sensor, a patient, a unit of another scale.
What a task's rows say of it is how far each is from what the others predict. Under the head's prior and the noise,
targets are normal with the covariance K, and leaving out one row has a closed form,

.. math:: e_n = \frac{[K^{-1} (y - h)]_n}{[K^{-1}]_{nn}}, \qquad \operatorname{Var} e_n = \frac{1}{[K^{-1}]_{nn}},
          \qquad r = \frac1N \sum_n e_n^2 \,[K^{-1}]_{nn},

so that r is 1 where the task is as noisy as that. With what r is in most tasks, :math:`\bar r`, and a factor s on the
variance that is scaled inverse chi-squared with :math:`\nu` degrees of freedom, :math:`r / \bar r` has an F
distribution, and

.. math:: \hat s = c\,\frac{\nu + N r / \bar r}{\nu + N}

multiplies the variance of predictions. Tasks of meta-training say :math:`\nu`, :math:`\bar r` and, of several values,
how unlike their widths are, c (:mod:`~pyro_lift.tuning.dispersion`). One task in a thousand is taken to be of none of
these, with :math:`\nu` of :data:`ODD_ROWS`: it goes by its own rows where r is too far off to be of the others.

References:
    Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", equations 5.10 to 5.12, for leaving out a
    row. Gelman et al., "Bayesian Data Analysis", section 2.6, for the scaled inverse chi-squared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyro_lift.models.head_choice import HeadChoice
from pyro_lift.models.value_spread import scaling_under
from pyro_lift.support.small_problems import on_one_thread

__all__ = ["UNKNOWN", "Dispersed", "Dispersion", "left_out_squares"]

#: Share of the tasks that are taken to be of none of the kind, and the degrees of freedom of their factor.
ODD, ODD_ROWS = 0.001, 1.0
#: Rows from which on they say how noisy a task is, not only whether it is of the kind. Two rows of tasks whose noises
#: differ thirtyfold are predicted 0.1 nats worse where they are asked, three 0.03 and ten 0.07 nats better.
FEWEST = 3
#: Rows of a task that count, at most: what r is in most tasks is of as many rows as these have, and grows with them.
COUNTED = 64
#: The least of r over what it is in most tasks: of targets that are all alike it would be zero.
LEAST = 1e-12
#: Rows that are looked at, at most.
MOST = 1_000


class Dispersed(NamedTuple):
    """The factors of one task.

    Attributes:
        factors: on the variance of predictions of each value, ``[M]``.
        odd: whether the task goes by its own rows, as none of those that the others say.
        missed: :math:`r / \\bar r` of the value that is furthest off.
    """

    factors: Tensor
    odd: bool
    missed: float


class Dispersion(NamedTuple):
    """What tasks say of how unevenly regressions vary.

    Attributes:
        rows: degrees of freedom of the factor, the rows that what all tasks say counts for; the more the more alike.
        usual: r of most tasks, for each value; or one for all.
        values: c, how wide predictions of each value are beside the others; or one for all.
    """

    rows: float
    usual: tuple[float, ...]
    values: tuple[float, ...]

    @classmethod
    def read(cls, plain: Sequence[Any] | None) -> Dispersion | None:
        """Make one of its parts as they come back from a file, in lists; none of none."""
        return None if plain is None else cls(plain[0], *map(tuple, plain[1:]))

    def of(self, left_out: Tensor, rows: int) -> Dispersed:
        """Find a task's factors.

        Args:
            left_out: r of each value ``[M]`` (:func:`left_out_squares`).
            rows: that it is of; one alone says nothing.
        """
        from scipy.stats import f

        values, number = torch.tensor(self.values, dtype=torch.float64), min(rows, COUNTED)
        if len(values) not in (1, len(left_out)):  # the others had other values
            return Dispersed(torch.ones(len(left_out), dtype=torch.float64), False, 1.0)
        values = values.expand(len(left_out))
        if rows < 2 or not bool(torch.isfinite(left_out).all()):
            return Dispersed(values, False, 1.0)
        missed = (left_out.double().cpu() / torch.tensor(self.usual, dtype=torch.float64)).clamp_min(LEAST)
        told = []
        for share, known in ((1.0 - ODD, self.rows), (ODD, ODD_ROWS)):
            told.append(math.log(share) + torch.as_tensor(f.logpdf(missed.numpy(), number, known)))
        odd = torch.stack(told).softmax(0)[1]
        usual, own = ((known + number * missed) / (known + number) for known in (self.rows, ODD_ROWS))
        usual = usual if rows >= FEWEST else torch.ones_like(usual)
        furthest = int(missed.log().abs().argmax())
        return Dispersed(values * ((1.0 - odd) * usual + odd * own), bool((odd > 0.5).any()), float(missed[furthest]))


#: Of tasks that cannot be asked, as none has rows to leave out: r is what the noise expects, and own rows soon say
#: more.
UNKNOWN = Dispersion(8.0, (1.0,), (1.0,))


@on_one_thread
@torch.no_grad()
def left_out_squares(features: Tensor, target: Tensor, choice: HeadChoice, noise_scale: float) -> Tensor:
    """Compute r of each value of a regression ``[M]``: rows left out in turn, in units of what is expected.

    Args:
        features: of the task's rows, ``[n, E]``.
        target: values ``[n]`` or ``[n, M]``.
        choice: what its head is solved under (:func:`~pyro_lift.models.value_head.choose_value_head`).
        noise_scale: standard deviation of the program's noise.
    """
    some = slice(None, None, -(-len(features) // MOST))
    x, y, model = features[some].double(), target[some].double().reshape(-1, target[0].numel()), choice.model
    assert isinstance(model.bias_sd, float) and isinstance(model.noise_scale, float)
    z, offset = scaling_under(model, x).apply(x), model.offset(x)
    missed = y - (y.mean(0) if offset is None else offset)
    slope, bias = choice.sd / model.noise_scale, model.bias_sd / model.noise_scale
    inverse = torch.linalg.inv(slope**2 * (z @ z.mT) + bias**2 + torch.eye(len(z)).to(z))
    precision = inverse.diagonal().unsqueeze(-1)
    squares: Tensor = (inverse @ missed).square() / precision
    return squares.mean(0) / noise_scale**2
