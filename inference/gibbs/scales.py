r"""Unknown scales: a global site tau that only the variance of theta_i around phi hangs on, recognised in the graph.

What a program writes differs: ``Normal(phi, tau)``, ``Normal(phi, tau2.sqrt())``, ``Normal(phi, precision.rsqrt())``,
``Normal(phi, log_tau.exp())``, ``Normal(phi, tau[group] * 0.3)``. All of these are

.. math:: \log v_d = a_d + \kappa\,x_{g(d)}, \qquad x = \log\tau \text{ or } x = \tau,

v_d being the variance of coordinate d and g(d) the element of tau that it hangs on. The law is read off a few runs
with other values of tau, and held against value and derivative in every block at its first visit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Transform
from torch.distributions.transforms import IndependentTransform

from pyro_lift.inference.dependence import Links, hangs_on
from pyro_lift.inference.gibbs.normal_sites import described, listed, local_normal, variance_by_task
from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.supports import bijection, innermost
from pyro_lift.models.priors import LocalGaussian

__all__ = ["Reading", "ScaleLaw", "ScaleSite", "is_scale", "law_fault", "read_law", "scale_fault", "scale_site"]

#: Powers that are tried where it must be found out, too, which coordinate hangs on which element.
POWERS = (2.0, 1.0, -1.0, -2.0)
#: How far a log variance may be from its law, in roundings of its dtype.
ROUNDINGS = 200.0


class ScaleLaw(NamedTuple):
    """How the variance of a local family hangs on its scale site; see the module's text.

    Attributes:
        site: the scale site.
        offset: a, one number or of phi's shape; float64.
        power: kappa.
        logarithmic: whether x is the logarithm of the site's value; the value itself where not.
        groups: g, of phi's shape, into the flat value; None where the value broadcasts to phi's shape.
        shape: of phi.
    """

    site: str
    offset: Tensor
    power: float
    logarithmic: bool
    groups: Tensor | None
    shape: torch.Size

    def coordinate(self, value: Tensor) -> Tensor:
        """Return x at a value of the site, in float64."""
        return value.double().log() if self.logarithmic else value.double()

    def spread(self, x: Tensor) -> Tensor:
        """Return a number for each coordinate of theta from one for each element of the site."""
        if self.groups is not None:
            return x.reshape(-1)[self.groups]
        return torch.broadcast_to(x, self.shape)

    def gathered(self, numbers: Tensor, like: Tensor) -> Tensor:
        """Return, for each element of the site (of the shape of ``like``), the sum over its coordinates."""
        numbers = torch.broadcast_to(numbers, self.shape)
        if self.groups is None:
            return numbers.sum_to_size(like.shape) if numbers.shape != like.shape else numbers
        total = torch.zeros(like.numel(), dtype=numbers.dtype, device=numbers.device)
        return total.index_add(0, self.groups.reshape(-1), numbers.reshape(-1)).view(like.shape)

    def variance(self, value: Tensor) -> Tensor:
        """Return v at a value of the site, in float64: one number where it is the same for all coordinates."""
        x = self.coordinate(value)
        if x.numel() == 1 and self.offset.numel() == 1:
            return (self.offset.reshape(()) + self.power * x.reshape(())).exp()
        return (self.offset + self.power * self.spread(x)).exp()


class ScaleSite(NamedTuple):
    """A global site that the variance of paired families hangs on, and nothing else does.

    Attributes:
        name: of the site.
        prior: its distribution, elementwise.
        transform: from unconstrained space, elementwise; None for the identity.
    """

    name: str
    prior: Distribution
    transform: Transform | None

    def value(self, leaf: Tensor) -> Tensor:
        """Return the site's value at a point of unconstrained space."""
        return leaf if self.transform is None else self.transform(leaf)  # type: ignore[no-any-return]

    def log_prior(self, leaf: Tensor, value: Tensor) -> Tensor:
        """Return the log prior density in unconstrained space, by element."""
        density: Tensor = self.prior.log_prob(value)
        return density if self.transform is None else density + self.transform.log_abs_det_jacobian(leaf, value)


class Reading(NamedTuple):
    """The value of a scale site in one run, and the log variance of a task's theta there; both in float64.

    Attributes:
        value: of the site.
        log_variance: of phi's shape.
        rounding: of the program's dtype.
    """

    value: Tensor
    log_variance: Tensor
    rounding: float


def is_scale(name: str, run: Evaluation, links: Links) -> bool:
    """Whether a global site enters the variance of some normal local site, and not its mean."""
    leaf = run.globals[name].leaf
    for child in links.children(name):
        normal = local_normal(run.latents[child])
        if child not in run.locals or normal is None:
            continue
        if hangs_on(normal.precision, leaf) and not hangs_on(normal.mean, leaf):
            return True
    return False


def scale_fault(name: str, run: Evaluation, links: Links) -> str | None:
    """Why a global site is more than the scale of normal local sites; None where it is no more than that."""
    if name not in run.globals:
        return "it is not a global site of every task"
    site = run.globals[name]
    if links.laws[name]:
        return f"its own distribution depends on another site ({listed(links.laws[name])})"
    if described(site).startswith(("masked", "scaled")):
        return f"its own distribution is {described(site)}"
    if innermost(site.fn).event_shape:
        return f"the elements of its distribution ({type(innermost(site.fn)).__name__}) are not independent"
    observed = [o for o, parents in links.observed.items() if name in parents]
    if observed:
        return f"an observed site depends on it directly ({listed(observed)})"
    for child in links.children(name):
        if child in run.globals:
            return f"another global site depends on it ({child!r})"
        normal = local_normal(run.locals[child])
        if normal is None:
            return f"the local site {child!r} is {described(run.locals[child])}, not a plain normal"
        if hangs_on(normal.mean, site.leaf):
            return f"the mean of the local site {child!r} depends on it"
    return None


def scale_site(site: Latent) -> ScaleSite:
    """Return what a draw of a scale site needs: its prior and its map, element by element."""
    prior = innermost(site.fn)
    transform = bijection(site.name, prior)
    while isinstance(transform, IndependentTransform):
        transform = transform.base_transform
    return ScaleSite(site.name, prior, transform)


def read_law(site: Latent, measure: Callable[[Tensor], Reading]) -> ScaleLaw | None:
    """Find the law of a variance from runs at other values of the scale site; None where it has none of this form.

    Args:
        site: the scale site, where it stands.
        measure: a run with the site at another point of unconstrained space.
    """
    leaf = site.leaf.detach()
    readings = [measure(leaf), measure(leaf + _shifts(leaf, 1, 1.0)), measure(leaf + _shifts(leaf, 2, -0.9))]
    if not all(bool(torch.isfinite(reading.log_variance).all()) for reading in readings):
        return None
    forms = [True, False] if all(bool((reading.value > 0.0).all()) for reading in readings) else [False]
    for logarithmic in forms:
        law = _fitted(site.name, readings, logarithmic)
        if law is not None:
            return law
    return None


def _shifts(leaf: Tensor, seed: int, size: float) -> Tensor:
    """A shift of its own for each element, evenly spread so that none is taken for another."""
    count = leaf.numel()
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    spread = torch.linspace(0.3, 1.3, count, dtype=torch.float64) if count > 1 else torch.full((count,), 0.7).double()
    return (size * spread[order]).view(leaf.shape).to(leaf)


def _fitted(name: str, readings: list[Reading], logarithmic: bool) -> ScaleLaw | None:
    start, *others = readings
    shape, tolerance = start.log_variance.shape, ROUNDINGS * start.rounding
    blank = ScaleLaw(name, start.log_variance, 1.0, logarithmic, None, shape)
    moves = [
        (blank.coordinate(other.value) - blank.coordinate(start.value), other.log_variance - start.log_variance)
        for other in others
    ]
    for law in _structures(blank, *moves[0]):
        if all(bool(((change - law.power * law.spread(dx)).abs() <= tolerance).all()) for dx, change in moves):
            offset = start.log_variance - law.power * law.spread(law.coordinate(start.value))
            constant = bool((offset.max() - offset.min()) <= tolerance)
            return law._replace(offset=offset.mean() if constant else offset)
    return None


def _structures(blank: ScaleLaw, dx: Tensor, change: Tensor) -> list[ScaleLaw]:
    """Laws to try: the power and the groups that one move of the site suggests."""
    tried = []
    if dx.numel() == 1 or _broadcasts(dx.shape, blank.shape):
        groups = None if _broadcasts(dx.shape, blank.shape) else torch.zeros(blank.shape, dtype=torch.long)
        law = blank._replace(groups=None if groups is None else groups.to(dx.device))
        power = float((change / law.spread(dx)).median())
        half = round(2.0 * power) / 2.0
        tried.append(law._replace(power=half if abs(power - half) < 1e-3 else power))
    if dx.numel() > 1:
        moved, order = dx.reshape(-1).sort()
        for power in POWERS:
            wanted = (change / power).reshape(-1)
            above = torch.searchsorted(moved, wanted).clamp(1, len(moved) - 1)
            nearest = torch.where(wanted - moved[above - 1] < moved[above] - wanted, above - 1, above)
            tried.append(blank._replace(power=power, groups=order[nearest].view(blank.shape)))
    return tried


def _broadcasts(shape: torch.Size, to: torch.Size) -> bool:
    # Not torch.broadcast_shapes, which imports a computer algebra system at its first call.
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def law_fault(law: ScaleLaw, child: Latent, normal: LocalGaussian, run: Evaluation) -> str | None:
    """Why the variance of a local site is not that of its law, in value or derivative; None where it is."""
    tau = run.globals[law.site]
    text = f"the scale of the local site {child.name!r} hangs on {law.site!r} in another way than in the first tasks"
    if not hangs_on(normal.precision, tau.leaf):
        return f"the scale of the local site {child.name!r} does not depend on {law.site!r}, as in the first tasks"
    expected = torch.broadcast_to(law.variance(tau.value.detach()), law.shape)
    by_task = variance_by_task(child, normal).double()
    if not torch.allclose(
        by_task.reshape(-1, *law.shape), expected.expand(len(by_task), *law.shape), rtol=1e-5, atol=0.0
    ):
        return text
    probe = torch.randn(child.leaf.shape, generator=torch.Generator().manual_seed(0)).to(child.leaf)
    moved = torch.broadcast_to(normal.precision, child.leaf.shape).log()
    (derivative,) = torch.autograd.grad((probe * moved).sum(), tau.leaf, retain_graph=True)
    rows = probe.movedim(child.plate_dim, 0) if child.task is None and child.plate_dim is not None else probe[None]
    weights = rows.sum(0).reshape(law.shape).double()
    own_leaf = tau.leaf.detach().requires_grad_()
    with torch.enable_grad():
        value = own_leaf if tau.transform is None else tau.transform(own_leaf)
        along = -(law.power * weights * law.spread(law.coordinate(value))).sum()
    (wanted,) = torch.autograd.grad(along, own_leaf)
    near = (derivative - wanted).abs() <= 1e-3 * (1.0 + wanted.abs())
    return None if bool(near.all()) else text
