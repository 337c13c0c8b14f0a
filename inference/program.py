"""Reading a Pyro program the way a Gibbs sampler needs it.

One messenger runs the program once and yields everything a visit needs: it fixes the indices of the task plate,
puts in the values of the latent sites (as leaves of the autograd graph, in unconstrained space), draws the indices
of inner minibatch plates from the chain's own generator, and keeps the distributions. Pyro's stock handlers do the
same in five layers at four times the cost.

Scales. Pyro multiplies every site inside ``plate("tasks", N, subsample_size=B)`` by N/B. That is right for phi and
wrong by N/B for the block's own theta, so the task plate's factor is taken out here, once; the factor n/b of an inner
minibatch plate stays in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform, biject_to
from torch.distributions.transforms import IndependentTransform, identity_transform

from pyro_lift.inference.sgld import Drift
from pyro_lift.models.priors import LocalGaussian, gaussian_at
from pyro_lift.support.spans import span

__all__ = ["Evaluation", "Latent", "LocalSite", "Observed", "PlateSize", "Program", "depends"]

InitStrategy = Callable[[dict[str, Any]], Tensor]
Rows = Mapping[str, Tensor]


class Latent(NamedTuple):
    """A latent site of one run: ``leaf`` is unconstrained and requires grad, ``value`` is what the program saw."""

    name: str
    family: str
    task: int | None
    plate_dim: int | None
    leaf: Tensor
    value: Tensor
    fn: Distribution
    scale: float
    mask: Any
    transform: Transform | None

    @property
    def discrete(self) -> bool:
        """Whether its support is discrete, so that no gradient can move it."""
        return bool(self.fn.support.is_discrete) if self.fn.support is not None else False

    def log_prob_at(self, leaf: Tensor) -> Tensor:
        """Log density of the site in unconstrained space, summed; differentiable in ``leaf`` and in the parents."""
        value = leaf if self.transform is None else self.transform(leaf)
        total: Tensor = scale_and_mask(self.fn.log_prob(value), self.scale, self.mask).sum()
        if self.transform is not None:
            total = total + self.transform.log_abs_det_jacobian(leaf, value).sum() * self.scale
        return total

    def gaussian(self) -> LocalGaussian | None:
        """The site's own Gaussian prior, where it has one in unconstrained space."""
        if self.transform is not None or self.mask is not None or self.scale != 1.0:
            return None
        return gaussian_at(self.fn, self.leaf.detach())


class Observed(NamedTuple):
    """An observed site of one run, with the task plate's factor already taken out of its scale."""

    name: str
    local: bool
    value: Tensor
    fn: Distribution
    scale: float
    mask: Any

    def log_prob(self) -> Tensor:
        """Log likelihood, summed, scaled from the minibatch to the data."""
        total: Tensor = scale_and_mask(self.fn.log_prob(self.value), self.scale, self.mask).sum()
        return total


class PlateSize(NamedTuple):
    """Size of a plate and how many of its indices one run takes."""

    size: int
    taken: int


class LocalSite(NamedTuple):
    """Where a local site stands in a task's row: family, shape of one task's (unconstrained) value, and the
    dimension that the task plate takes in a vectorised block."""

    family: str
    shape: torch.Size
    plate_dim: int


class Evaluation:
    """One run of the program: its sites, and the gradients asked of them."""

    def __init__(self, latents: dict[str, Latent], observed: list[Observed], plates: dict[str, PlateSize]) -> None:
        self.latents = latents
        self.observed = observed
        self.plates = plates
        self.globals = {k: s for k, s in latents.items() if s.task is None and s.plate_dim is None}
        self.locals = {k: s for k, s in latents.items() if k not in self.globals}
        terms = [site.log_prob() for site in observed if site.local]
        self.log_likelihood = sum(terms[1:], terms[0]) if terms else torch.zeros(())

    def log_prior(self, sites: Mapping[str, Latent]) -> Tensor:
        """Summed log density of some latent sites at their own values."""
        return sum((s.log_prob_at(s.leaf) for s in sites.values()), torch.zeros(()))

    @span("pyro_lift.backward")
    def drift(
        self,
        sites: Mapping[str, Latent],
        coupled: Collection[str] = (),
        n_inflate: float = 1.0,
        *,
        keep_graph: bool = True,
    ) -> Drift:
        """Gradients of the block's log density with respect to ``sites``.

        A site with a Gaussian prior gets the gradient of everything else and the prior beside it, for the
        integrator to treat; where its mean or scale depends on another of the sites (``coupled``), the prior's pull
        on *that* site is in the gradient. ``keep_graph`` is for accumulators of phi, which differentiate the
        conditionals of the same run; without it activations are freed on the way, and their memory used again.
        """
        objective = n_inflate * self.log_likelihood
        gaussian = {name: site.gaussian() for name, site in sites.items()}
        for name, site in sites.items():
            if gaussian[name] is None:
                objective = objective + site.log_prob_at(site.leaf)
            elif site.family in coupled:
                objective = objective + site.log_prob_at(site.leaf.detach())
        leaves = [site.leaf for site in sites.values()]
        grads: Sequence[Tensor | None]
        if objective.requires_grad:
            grads = torch.autograd.grad(objective, leaves, retain_graph=keep_graph, allow_unused=True)
        else:
            grads = (None,) * len(leaves)
        gradient = {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf, g) in zip(sites, leaves, grads, strict=True)
        }
        detached = {
            name: g if g is None else LocalGaussian(g.mean.detach(), g.precision.detach())
            for name, g in gaussian.items()
        }
        return Drift(self.log_likelihood.detach(), gradient, detached)


class _Reader(Messenger):
    """Runs once over a program; see the module's docstring."""

    def __init__(
        self,
        plate: str | None,
        index: Tensor | None,
        global_values: Rows,
        local_values: Mapping[int | None, Rows],
        initial: InitStrategy,
        generator: torch.Generator | None,
        want_grad: bool,
        transform_of: Callable[[str, Distribution], Transform | None],
    ) -> None:
        super().__init__()
        self.transform_of = transform_of
        self.plate = plate
        self.index = index
        self.global_values = global_values
        self.local_values = local_values
        self.initial = initial
        self.generator = generator
        self.want_grad = want_grad
        self.tasks: list[int] = []
        self.latents: dict[str, Latent] = {}
        self.observed: list[Observed] = []
        self.plates: dict[str, PlateSize] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        # Plates stand inside this messenger and have been through already: fn is broadcast, the scale complete.
        if type(msg["fn"]) is _Subsample:
            self._fix_plate(msg)
        elif msg["is_observed"]:
            self._keep_observed(msg)
        else:
            self._put_latent(msg)

    def _put_latent(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        frame, task = self._task_of(msg)
        family = name if task is None else _family(name, task, self.latents)
        rows = self.global_values if frame is None else self.local_values.get(task, {})
        transform = self.transform_of(family, fn)
        if family in rows:
            leaf = rows[family].detach()
        else:
            with torch.no_grad():
                start = self.initial(msg)
                leaf = (start if transform is None else transform.inv(start)).detach().clone()
        if self.want_grad:
            leaf = leaf.requires_grad_()
        value = leaf if transform is None else transform(leaf)
        msg["value"], msg["done"] = value, True
        plate_dim = None if frame is None else -1
        if frame is not None and frame.vectorized:
            plate_dim = value.dim() - fn.event_dim + frame.dim
        self.latents[name] = Latent(
            name, family, task, plate_dim, leaf, value, fn, self._scale(msg, frame), msg["mask"], transform
        )

    def _keep_observed(self, msg: dict[str, Any]) -> None:
        if msg["infer"].get("_deterministic", False):
            return
        frame, _ = self._task_of(msg)
        local = self.plate is None or frame is not None
        scale = self._scale(msg, frame)
        self.observed.append(Observed(msg["name"], local, msg["value"], msg["fn"], scale, msg["mask"]))

    def _scale(self, msg: dict[str, Any], frame: Any) -> float:
        scale = float(msg["scale"])
        if frame is None:
            return scale
        size, taken = self.plates[frame.name]
        return scale * taken / size

    def _task_of(self, msg: dict[str, Any]) -> tuple[Any, int | None]:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                return frame, None if frame.vectorized else self.tasks[frame.counter - 1]
        return None, None

    def _fix_plate(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if fn.size == 0:
            raise ValueError(f"the plate {name!r} is empty: a task without data cannot be trained on. Leave it out.")
        taken = fn.size if fn.subsample_size is None else min(fn.subsample_size, fn.size)
        if name == self.plate and self.index is not None:
            msg["value"] = self.index
            taken = len(self.index)
        elif msg["value"] is None:
            order = torch.randperm(fn.size, generator=self.generator) if taken < fn.size else torch.arange(fn.size)
            msg["value"] = order[:taken].to(fn.device)
        self.plates[name] = PlateSize(fn.size, taken)
        if name == self.plate:
            self.tasks = msg["value"].tolist()


def _family(name: str, task: int, seen: Mapping[str, Latent]) -> str:
    """``theta_12`` of task 12 is of family ``theta``; a name without its task's number goes by its order."""
    stem = re.sub(rf"[_\-./]?{task}$", "", name)
    if stem and stem != name:
        return stem
    return f"site{sum(site.task == task for site in seen.values())}"


class Program:
    """A model with its arguments, read through one plate.

    Args:
        model: a Pyro program.
        plate: name of the task plate; None reads the whole program as one block.
        args: positional arguments of the model.
        kwargs: keyword arguments of the model.
        initial: value of a latent site that has none yet, as Pyro's ``init_to_...`` functions give it.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        plate: str | None,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        initial: InitStrategy,
    ) -> None:
        self.model = model
        self.plate = plate
        self.args = tuple(args)
        self.kwargs = dict(kwargs)
        self.initial = initial
        self._transforms: dict[str, Transform | None] = {}

    def _transform(self, family: str, fn: Distribution) -> Transform | None:
        """The map from unconstrained space to the site's support; None for the identity. Looked up once a family."""
        if family not in self._transforms:
            support: Any = fn.support
            if support is not None and support.is_discrete:  # refused at the door, where there is more to say
                self._transforms[family] = None
                return None
            if type(support).__name__ == "MixtureSameFamilyConstraint":  # torch knows no bijection to it
                support = support.base_constraint
            transform = base = biject_to(support)
            while isinstance(base, IndependentTransform):
                base = base.base_transform
            self._transforms[family] = None if base == identity_transform else transform
        return self._transforms[family]

    @span("pyro_lift.handlers")
    def run(
        self,
        global_values: Rows,
        local_values: Mapping[int | None, Rows],
        index: Tensor | None,
        generator: torch.Generator | None,
        *,
        want_grad: bool = True,
    ) -> Evaluation:
        """Run the program once.

        Args:
            global_values: unconstrained values of the sites outside the plate, by name.
            local_values: unconstrained values of the sites inside it, by family: under the key None for a
                vectorised plate (the block's tasks stacked along the plate's dimension), under the task's number
                for a sequential one. Sites without a value get the initial one.
            index: the plate's indices; None leaves the plate to the program.
            generator: source of minibatches.
            want_grad: whether the values become leaves of an autograd graph.
        """
        reader = _Reader(
            self.plate,
            index,
            global_values,
            local_values,
            self.initial,
            generator,
            want_grad,
            self._transform,
        )
        with torch.set_grad_enabled(want_grad), reader:
            self.model(*self.args, **self.kwargs)
        with torch.set_grad_enabled(want_grad):
            return Evaluation(reader.latents, reader.observed, reader.plates)

    def peek(self, generator: torch.Generator | None = None) -> tuple[Evaluation, dict[str, bool]]:
        """Run the program once as it stands, without gradients, to learn its sites and plates.

        Returns:
            The evaluation, and for each plate whether the program subsamples it (gave it a ``subsample_size``
            below its size, so that it takes what it is given).
        """
        probe = _PlateProbe(self.plate)
        with probe:
            evaluation = self.run({}, {}, None, generator, want_grad=False)
        return evaluation, probe.subsampled


class _PlateProbe(Messenger):
    """Notes, from outside the reader, which plates the program declares with a ``subsample_size``."""

    def __init__(self, plate: str | None) -> None:
        super().__init__()
        self.plate = plate
        self.subsampled: dict[str, bool] = {}
        self.declared: dict[str, int | None] = {}

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if type(fn) is _Subsample:
            self.subsampled[msg["name"]] = fn.subsample_size is not None and fn.subsample_size < fn.size
            self.declared[msg["name"]] = fn.subsample_size


def depends(quantity: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``quantity`` reaches ``leaf``."""
    if not quantity.requires_grad:
        return False
    return torch.autograd.grad(quantity.sum(), leaf, retain_graph=True, allow_unused=True)[0] is not None
