"""Reading a Pyro program the way a Gibbs sampler needs it.

One messenger runs the program once and yields everything a visit needs: it fixes the indices of the task plate,
puts in the values of the latent sites (as leaves of the autograd graph, in unconstrained space), draws the indices
of inner minibatch plates from the chain's own generator, and keeps the distributions. Pyro's stock handlers do the
same in five layers at four times the cost.

Scales. Pyro multiplies every site inside ``plate("tasks", N, subsample_size=B)`` by N/B. That is right for phi and
wrong by N/B for the block's own theta, so the task plate's factor is taken out here, once; the factor n/b of an inner
minibatch plate stays in. A site's scale and mask are of its log probability; the Jacobian of the map to its support
counts once, as in Pyro's own potential.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from pyro.distributions.util import scale_and_mask
from pyro.poutine.messenger import Messenger
from pyro.poutine.runtime import _PYRO_STACK
from pyro.poutine.subsample_messenger import SubsampleMessenger, _Subsample
from torch import Tensor
from torch.distributions import Distribution, Transform

from pyro_lift.inference.arguments import arguments_named, no_tensor
from pyro_lift.inference.families import Families
from pyro_lift.inference.location_scale import Distance, location_scale
from pyro_lift.inference.sgld import Drift
from pyro_lift.inference.site_density import site_density
from pyro_lift.inference.starts import InitStrategy, start_of
from pyro_lift.inference.supports import Supports, innermost, unmasked
from pyro_lift.models.priors import LocalGaussian, gaussian_at
from pyro_lift.support.spans import span

__all__ = ["Evaluation", "Latent", "LocalSite", "Observed", "PlateSize", "Program", "discrete_refusal"]

Rows = Mapping[str, Tensor]


class Latent(NamedTuple):
    """A latent site of one run: ``leaf`` is unconstrained and requires grad, ``value`` is what the program saw.

    Attributes:
        scale: what its log density is multiplied by, with the task plate's factor already taken out.
        subsampled: a subsampled plate, other than the task plate, that the site stands in; None where there is none.
        raw: what ``leaf`` was made of where the run was given the site by its distance from its location, in scales;
            that then is what requires grad.
    """

    name: str
    family: str
    task: int | None
    plate_dim: int | None
    leaf: Tensor
    value: Tensor
    fn: Distribution
    scale: float | Tensor
    mask: Any
    transform: Transform | None
    subsampled: str | None = None
    raw: Distance | None = None

    @property
    def discrete(self) -> bool:
        """Whether its support is discrete, so that no gradient can move it."""
        return bool(self.fn.support.is_discrete) if self.fn.support is not None else False

    def log_prob_at(self, leaf: Tensor) -> Tensor:
        """Log density of the site in unconstrained space, summed; differentiable in ``leaf`` and in the parents."""
        value = leaf if self.transform is None else self.transform(leaf)
        total: Tensor = scale_and_mask(site_density(self.name, self.fn, value), self.scale, self.mask).sum()
        if self.transform is not None:
            total = total + self.transform.log_abs_det_jacobian(leaf, value).sum()
        return total

    def gaussian(self) -> LocalGaussian | None:
        """The site's own Gaussian prior, where it has one in unconstrained space."""
        if self.transform is not None or self.mask is not None or isinstance(self.scale, Tensor) or self.scale != 1.0:
            return None
        return gaussian_at(unmasked(self.fn), self.leaf.detach())


class Observed(NamedTuple):
    """An observed site of one run, with the task plate's factor already taken out of its scale.

    Attributes:
        plate_dim: the dimension, counted from the last, that the task plate takes in its log probability; None where
            the plate is iterated over, or the site stands outside it.
    """

    name: str
    local: bool
    value: Tensor
    fn: Distribution
    scale: float | Tensor
    mask: Any
    task: int | None = None
    plate_dim: int | None = None

    def log_prob(self) -> Tensor:
        """Log likelihood, summed, scaled from the minibatch to the data."""
        total: Tensor = scale_and_mask(site_density(self.name, self.fn, self.value), self.scale, self.mask).sum()
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
    """One run of the program: its sites, and the gradients asked of them.

    Attributes:
        terms: log likelihood by local observed site.
        tasks: the task plate's indices.
    """

    def __init__(
        self,
        latents: dict[str, Latent],
        observed: list[Observed],
        plates: dict[str, PlateSize],
        tasks: Sequence[int] = (),
    ) -> None:
        self.tasks = tuple(tasks)
        self.latents = latents
        self.observed = observed
        self.plates = plates
        self.globals = {k: s for k, s in latents.items() if s.task is None and s.plate_dim is None}
        self.locals = {k: s for k, s in latents.items() if k not in self.globals}
        self.terms = {site.name: site.log_prob() for site in observed if site.local}
        terms = list(self.terms.values())
        self.log_likelihood = sum(terms[1:], terms[0]) if terms else torch.zeros(())

    def relabel(self, families: Families) -> None:
        """Take the labels of local sites of a sequential plate as they are now."""
        for name, site in self.locals.items():
            if site.task is not None:
                self.locals[name] = self.latents[name] = site._replace(family=families.label(site.task, name))

    def without(self, families: Collection[str]) -> Evaluation:
        """Return the run with fewer local sites, as values that stand still; itself where none of them is left out."""
        if not families:
            return self
        twin = copy.copy(self)
        twin.locals = {name: site for name, site in self.locals.items() if site.family not in families}
        return twin

    def log_prior(self, sites: Mapping[str, Latent]) -> Tensor:
        """Summed log density of some latent sites at their own values; of distances, where the run was given these."""
        terms = (s.log_prob_at(s.leaf) if s.raw is None else s.raw.log_density() for s in sites.values())
        return sum(terms, torch.zeros(()))

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
        supports: Supports,
        families: Families,
        raw: Collection[str] = (),
    ) -> None:
        super().__init__()
        self.raw = raw
        self.supports = supports
        self.families = families
        self.loop: SubsampleMessenger | None = None
        self.plate = plate
        self.index = index
        self.global_values = global_values
        self.local_values = local_values
        self.initial = initial
        self.generator = generator
        self.want_grad = want_grad
        self.tasks: list[int] = []
        self.names: set[str] = set()
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

    def _check_name(self, name: str) -> None:
        if name in self.names:
            raise ValueError(
                f"two sites of one run are named {name!r}. Give each a name of its own: in a loop over a plate, one "
                'with the task in it, as f"theta_{i}".'
            )
        self.names.add(name)

    def _put_latent(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        self._check_name(name)
        frame, task = self._task_of(msg)
        family = name if task is None else self.families.label(task, name)
        rows = self.global_values if frame is None else self.local_values.get(task, {})
        transform = self.supports.transform(name, fn)
        if family in rows:
            leaf = rows[family].detach()
        else:
            with torch.no_grad():
                leaf = start_of(msg, transform, self.initial)
        if self.want_grad:
            if not leaf.is_floating_point():
                raise ValueError(discrete_refusal(name, fn))
            leaf = leaf.requires_grad_()
        raw, around = None, location_scale(fn, transform) if family in self.raw and frame is not None else None
        if around is not None:
            raw, leaf = Distance(leaf, around), around.leaf(leaf)
        value = leaf if transform is None else transform(leaf)
        msg["value"], msg["done"] = value, True
        plate_dim = None if frame is None else -1
        if frame is not None and frame.vectorized:
            plate_dim = value.dim() - fn.event_dim + frame.dim
        self.latents[name] = Latent(
            name,
            family,
            task,
            plate_dim,
            leaf,
            value,
            fn,
            self._scale(msg, frame),
            None if msg["mask"] is True else msg["mask"],
            transform,
            self._subsampled(msg),
            raw,
        )

    def _keep_observed(self, msg: dict[str, Any]) -> None:
        if msg["infer"].get("_deterministic", False):
            return
        self._check_name(msg["name"])
        if not isinstance(msg["value"], Tensor):
            raise TypeError(no_tensor(msg["name"], msg["value"]))
        frame, task = self._task_of(msg)
        local = self.plate is None or frame is not None
        scale = self._scale(msg, frame)
        plate_dim = frame.dim if frame is not None and frame.vectorized else None
        self.observed.append(Observed(msg["name"], local, msg["value"], msg["fn"], scale, msg["mask"], task, plate_dim))

    def _scale(self, msg: dict[str, Any], frame: Any) -> float | Tensor:
        scale = msg["scale"]
        # A weight by row, or one that hangs on another site, stays what it is.
        if not isinstance(scale, Tensor) or (scale.numel() == 1 and not scale.requires_grad):
            scale = float(scale)
        if frame is None:
            return scale  # type: ignore[no-any-return]
        size, taken = self.plates[frame.name]
        return scale * taken / size  # type: ignore[no-any-return]

    def _subsampled(self, msg: dict[str, Any]) -> str | None:
        for frame in msg["cond_indep_stack"]:
            size, taken = self.plates.get(frame.name, PlateSize(0, 0))
            if frame.name != self.plate and taken < size:
                return str(frame.name)
        return None

    def _task_of(self, msg: dict[str, Any]) -> tuple[Any, int | None]:
        for frame in msg["cond_indep_stack"]:
            if frame.name == self.plate:
                return frame, None if frame.vectorized else self._task_at(frame.counter)
        return None, None

    def _task_at(self, counter: int) -> int:
        """The task of a loop over the plate; Pyro counts on where the plate is iterated over once more."""
        if self.loop is None:
            plates = (plate for plate in reversed(_PYRO_STACK) if isinstance(plate, SubsampleMessenger))
            self.loop = next((plate for plate in plates if plate.name == self.plate), None)
        return self.tasks[(counter - 1) % len(self.tasks)]

    def check_loop(self) -> None:
        """Refuse a loop over the plate that was left early: which task a later loop is at cannot be told."""
        if self.loop is not None and self.loop.counter > len(self.tasks) and self.loop.counter % len(self.tasks):
            raise ValueError(
                f"the program iterates over the plate {self.plate!r} more than once, and left one of the loops early. "
                "Let each loop run to its end."
            )

    def _fix_plate(self, msg: dict[str, Any]) -> None:
        name, fn = msg["name"], msg["fn"]
        if fn.size == 0:
            raise ValueError(f"the plate {name!r} is empty: a task without data cannot be trained on. Leave it out.")
        taken = fn.size if fn.subsample_size is None else min(fn.subsample_size, fn.size)
        indices = msg["value"]
        if name == self.plate and self.index is not None:
            indices, taken = self.index, len(self.index)
        elif indices is None:
            order = torch.randperm(fn.size, generator=self.generator) if taken < fn.size else torch.arange(fn.size)
            indices = order[:taken]
        self.plates[name] = PlateSize(fn.size, taken)
        if name == self.plate:
            self.tasks = indices.tolist()
        # They are known on the host already: a device that is still busy is not waited for.
        msg["value"] = indices.to(fn.device, non_blocking=True)


def discrete_refusal(name: str, fn: Distribution) -> str:
    """Return the message about a discrete latent site."""
    return (
        f"the latent site {name!r} is discrete ({type(innermost(fn)).__name__}); no gradient can move it. "
        "Marginalise it out, by hand (torch.logsumexp over its values) or as a mixture: "
        "dist.MixtureSameFamily(dist.Categorical(probs), components). Enumeration is for NUTS and SVI: "
        'pyro.infer.config_enumerate(model) with infer={"enumerate": "parallel"} at the site.'
    )


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
        self.families = Families()
        self.supports = Supports()
        #: What the first run showed beside its sites: ``pyro.param`` sites, and plates around the task plate by site.
        self.params: set[str] = set()
        self.around: dict[str, tuple[str, ...]] = {}
        #: And plates with latent sites inside.
        self.holding: set[str] = set()

    @property
    def only_plate(self) -> str | None:
        """The one plate that held latent sites in the first run; None where there were several, or none."""
        return next(iter(self.holding)) if len(self.holding) == 1 else None

    @span("pyro_lift.handlers")
    def run(
        self,
        global_values: Rows,
        local_values: Mapping[int | None, Rows],
        index: Tensor | None,
        generator: torch.Generator | None,
        *,
        want_grad: bool = True,
        raw: Collection[str] = (),
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
            raw: local families whose values are given as distances from their location, in scales.
        """
        reader = _Reader(
            self.plate,
            index,
            global_values,
            local_values,
            self.initial,
            generator,
            want_grad,
            self.supports,
            self.families,
            raw,
        )
        with torch.set_grad_enabled(want_grad), reader:
            self.model(*self.args, **self.kwargs)
        reader.check_loop()
        with torch.set_grad_enabled(want_grad):
            return Evaluation(reader.latents, reader.observed, reader.plates, reader.tasks)

    def peek(self, generator: torch.Generator | None = None) -> tuple[Evaluation, dict[str, bool]]:
        """Run the program once as it stands, without gradients, to learn its sites and plates.

        Returns:
            The evaluation, and for each plate whether the program gave it a ``subsample_size``, so that it takes that
            many indices and no other number.

        Raises:
            TypeError: arguments that the program cannot be called with, or arrays with which it fails.
        """
        probe = _PlateProbe(self.plate)
        with arguments_named(self.model, self.args, self.kwargs), probe:
            evaluation = self.run({}, {}, None, generator, want_grad=False)
        self.params, self.around, self.holding = probe.params, probe.around, probe.holding
        self.families = Families()  # the tasks of this run are chance's; families are named after those of set-up
        return evaluation, probe.subsampled


class _PlateProbe(Messenger):
    """Notes, from outside the reader, which plates the program declares with a ``subsample_size``."""

    def __init__(self, plate: str | None) -> None:
        super().__init__()
        self.plate = plate
        self.subsampled: dict[str, bool] = {}
        self.declared: dict[str, int | None] = {}
        self.params: set[str] = set()
        self.around: dict[str, tuple[str, ...]] = {}
        self.holding: set[str] = set()

    def _pyro_param(self, msg: dict[str, Any]) -> None:
        self.params.add(msg["name"])

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        fn = msg["fn"]
        if type(fn) is _Subsample:
            self.subsampled[msg["name"]] = fn.subsample_size is not None
            self.declared[msg["name"]] = fn.subsample_size
            return
        plates = [frame.name for frame in msg["cond_indep_stack"]]
        if not msg["is_observed"]:
            self.holding.update(plates)
        if self.plate in plates and plates[0] != self.plate:
            self.around[msg["name"]] = tuple(plates[: plates.index(self.plate)])
