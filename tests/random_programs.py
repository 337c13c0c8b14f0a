"""Small random hierarchical Pyro programs, each made from one integer.

A program is a list of features. Some are harmless (a second pair, a positive local site, rows that are masked); some
break what the exact draw of phi relies on, for one task or for all (an offset, a sign, phi in one task's likelihood).
The generator knows which, so a test can tell a refusal that is deserved from one that is not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.reparam import LocScaleReparam
from torch import Tensor

__all__ = ["RandomProgram"]

Index = Any  # a task's number, or a tensor of them in a vectorised plate
Locals = dict[str, Tensor]

#: Features after which phi given all theta_i is no longer the kernel's exact draw: it must say so.
BREAKING = {
    "offset": 0.04,  # the mean of theta is phi plus a number that is zero for the first and the last task
    "sign": 0.04,
    "square": 0.02,  # the mean is phi + phi^2, which is phi at phi = 0
    "scale by task": 0.04,
    "theta masked": 0.04,
    "theta scaled": 0.03,
    "theta student": 0.03,
    "theta mixture": 0.02,
    "tau": 0.05,  # the scale of theta is a global site
    "local scale": 0.03,  # ... is a local site
    "local shift": 0.03,  # the mean of theta is phi plus a local site
    "second child": 0.03,
    "missing": 0.03,  # one task has no theta
    "direct": 0.05,  # phi stands in one task's likelihood
    "census": 0.04,  # one task observes phi
    "mixture prior": 0.02,
    "masked prior": 0.02,
    "scaled prior": 0.02,
    "global chain": 0.03,  # another global site hangs on phi
    "outside": 0.03,  # phi is observed outside the plate
    "interval below phi": 0.02,  # the support of a local site moves with phi
    "factor of phi": 0.03,
}
#: Features that no update can take.
IMPOSSIBLE = {
    "theta observed outside": 0.01,
    "latent in the data plate": 0.01,
    "global in a subsampled plate": 0.01,
}
#: Features that change nothing for phi.
HARMLESS = {
    "second pair": 0.2,
    "positive": 0.15,
    "interval by task": 0.15,
    "simplex": 0.1,
    "student": 0.1,
    "improper": 0.05,
    "correlation": 0.05,
    "coupled": 0.15,  # a local site hangs on theta, in some tasks
    "scaled local": 0.1,  # poutine.scale on a positive local site
    "rows masked": 0.15,
    "missing rows": 0.07,  # obs_mask: the missing rows are latent
    "rows scaled": 0.1,
    "rows weighted": 0.05,
    "exposure": 0.2,
    "factor": 0.1,
    "deterministic": 0.1,
    "decentred": 0.06,  # poutine.reparam on a local site
    "one site more": 0.1,  # an observed site that one task has and the others have not
    "two loops": 0.1,
}
SCHEMES: dict[str, Callable[[str, int], str]] = {
    "number": lambda base, i: f"{base}_{i}",
    "own ids": lambda base, i: f"{base}_{(3, 1, 4, 0, 2)[i]}",
    "words": lambda base, i: f"{base}_{('ada', 'bob', 'cy', 'di', 'ed')[i]}",
    "scope": lambda base, i: f"task{i}/{base}",
    "middle": lambda base, i: f"{base}_{i}_w",
    "padded": lambda base, i: f"{base}{i + 7:03d}",
    "inner": lambda base, i: f"{base}_{i}_0",
    "same": lambda base, i: base,
}


def _numbers(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


class RandomProgram:
    """One program, with the same density however it is run.

    ``program()`` is what the kernel gets. ``program.whole(taken)`` runs over all tasks at once under plain names, with
    the minibatches ``taken``.

    Attributes:
        features: what it holds, by name.
        minibatches: of each run since the list was last cleared, the rows taken: by task in a sequential plate,
            under None in a vectorised one.
    """

    def __init__(self, seed: int) -> None:
        rng, self.seed = random.Random(seed), seed
        draws = torch.Generator().manual_seed(seed)
        self.num_tasks = rng.randint(2, 5)
        self.sequential = rng.random() < 0.5
        divisors = [b for b in range(2, self.num_tasks + 1) if self.num_tasks % b == 0]
        self.block = 1 if rng.random() < 0.5 else rng.choice(divisors)
        self.rows = rng.randint(2, 5)
        self.nested = rng.random() < 0.4
        self.batch = rng.choice([None, 1, 2]) if self.nested else None
        self.tasks_dim = -2 if self.nested else rng.choice([None, -1])
        self.width = rng.choice([0, 1, 2, 3])
        self.declared = rng.choice(["to_event", "Independent", "expand"])
        self.likelihood = rng.choice(["Normal", "Bernoulli", "Poisson", "StudentT"])
        weights = {**BREAKING, **IMPOSSIBLE, **HARMLESS}
        self.features = {name for name, p in weights.items() if rng.random() < p}
        if not self.sequential:
            self.features -= {"missing", "one site more", "two loops"}
        if not self.nested or self.batch is None:
            self.features -= {"latent in the data plate"}
        if self.likelihood != "Normal" or self.nested:
            self.features -= {"missing rows"}
        if "missing" in self.features:
            self.features |= {"student"}  # a task must have something of its own
        if self.likelihood != "Poisson":
            self.features -= {"exposure"}
        schemes = [name for name in SCHEMES if name != "same" or self.block == 1]
        self.scheme = rng.choice(schemes) if rng.random() < 0.7 else "number"
        self.order = rng.sample(range(4), 4)  # of the local sites around theta
        N, n, d = self.num_tasks, self.rows, max(self.width, 1)
        self.odd = rng.randrange(N)  # the task that differs
        # Zero for the first and the last task where there are others: set-up looks at these two.
        self.some = torch.zeros(N, dtype=torch.float64)
        self.some[self.odd] = 1.0
        self.prior_scale = 0.5 + torch.rand(d, generator=draws, dtype=torch.float64)
        self.local_scale = 0.3 + torch.rand(d, generator=draws, dtype=torch.float64)
        if rng.random() < 0.5:
            self.prior_scale, self.local_scale = self.prior_scale[:1].expand(d), self.local_scale[:1].expand(d)
        self.prior_mean = _numbers(draws, d) if rng.random() < 0.5 else torch.zeros(d, dtype=torch.float64)
        self.offset, self.exposure = 1.0 + 0.1 * _numbers(draws, N), 0.5 + torch.rand(N, generator=draws).double()
        self.bound = torch.arange(1.0, N + 1.0, dtype=torch.float64)
        self.masked = torch.rand(N, n, generator=draws) < 0.7
        self.ragged = [n + (self.sequential and i == self.odd) for i in range(N)]
        self.y = self._data(draws, N, n + 1)
        self.minibatches: list[dict[int | None, Tensor]] = []

    def unplated(self) -> None:
        """What SGLD on all sites samples: every task at once, with the program's own minibatches of rows."""
        self.minibatches.append({})
        scheme = "number" if self.scheme == "same" else self.scheme
        self._program(None, None, SCHEMES[scheme] if self.sequential else lambda base, i: base)

    def _data(self, draws: torch.Generator, tasks: int, rows: int) -> Tensor:
        y = _numbers(draws, tasks, rows)
        if self.likelihood == "Bernoulli":
            return (y > 0).double()
        return (2.0 * y).abs().round() if self.likelihood == "Poisson" else y

    def __repr__(self) -> str:
        plate = "sequential" if self.sequential else f"vectorised, dim {self.tasks_dim}"
        data = f", {self.rows} rows, batch {self.batch}" if self.nested else ""
        return (
            f"program {self.seed}: {self.num_tasks} tasks, {plate}, block {self.block}{data}, width {self.width}, "
            f"{self.likelihood}, names '{self.scheme}', {sorted(self.features)}"
        )

    def breaking(self) -> set[str]:
        """Its features that forbid the exact draw."""
        return self.features & (set(BREAKING) | set(IMPOSSIBLE))

    def impossible(self) -> set[str]:
        """Its features that no update can take."""
        return self.features & set(IMPOSSIBLE)

    def impossible_at_once(self) -> set[str]:
        """Its features that SGLD on all sites cannot take: draws on a support that moves could not be mapped back."""
        return self.features & {"latent in the data plate", "global in a subsampled plate", "interval below phi"}

    def __call__(self) -> None:
        """What the kernel samples."""
        self.minibatches.append({})
        self._program(self.block, None, SCHEMES[self.scheme] if self.sequential else lambda base, i: base)

    def whole(self, taken: Mapping[int | None, Tensor]) -> None:
        """All tasks at once, named by their numbers."""
        self._program(None, taken, SCHEMES["number"] if self.sequential else lambda base, i: base)

    # ---------------------------------------------------------------------------------------- the program

    def _program(
        self, block: int | None, taken: Mapping[int | None, Tensor] | None, name: Callable[[str, Index], str]
    ) -> None:
        shared = self._globals(whole=taken is not None)
        if not self.sequential:
            with pyro.plate("tasks", self.num_tasks, subsample_size=block, dim=self.tasks_dim) as index:
                theta = self._locals(index, shared, name)
                self._observe(index, shared, theta, name, taken)
                last = theta
        else:
            tasks = pyro.plate("tasks", self.num_tasks, subsample_size=block)
            last = {}
            if "two loops" in self.features:
                drawn = {i: self._locals(i, shared, name) for i in tasks}
                for i in tasks:
                    self._observe(i, shared, drawn[i], name, taken)
                last = next(iter(drawn.values()))
            else:
                for i in tasks:
                    last = self._locals(i, shared, name)
                    self._observe(i, shared, last, name, taken)
        if "outside" in self.features:
            pyro.sample("poll", dist.Normal(shared["phi"].sum(), 0.7), obs=torch.tensor(0.4).double())
        if "theta observed outside" in self.features and last:
            pyro.sample("late", dist.Normal(next(iter(last.values())).sum(), 1.0), obs=torch.tensor(0.2).double())

    def _globals(self, whole: bool) -> dict[str, Tensor]:
        has, shared = self.features.__contains__, {}
        shape = self.prior_scale.shape if self.width else torch.Size(())
        mean, scale = self.prior_mean.reshape(shape), self.prior_scale.reshape(shape)
        prior: Any = dist.Normal(mean, scale)
        if has("mixture prior") and self.width:
            both = dist.Normal(torch.stack([mean, -mean]), torch.stack([scale, 2.0 * scale])).to_event(1)
            prior = dist.MixtureSameFamily(dist.Categorical(probs=torch.tensor([0.3, 0.7]).double()), both)
        elif has("mixture prior"):
            prior = dist.StudentT(5.0, mean, scale)
        elif self.width:
            prior = prior.to_event(1)
        if has("masked prior"):
            prior = prior.mask(False)
        with poutine.scale(scale=0.3) if has("scaled prior") else nullcontext():
            shared["phi"] = pyro.sample("phi", prior)
        if has("tau"):
            with poutine.scale(scale=0.5) if self.seed % 2 else nullcontext():
                tau = dist.HalfCauchy(torch.tensor(1.0).double()) if self.seed % 3 else dist.Gamma(self.offset[0], 2.0)
                shared["tau"] = pyro.sample("tau", tau)
        if has("second pair"):
            shared["psi"] = pyro.sample("psi", dist.Normal(torch.zeros(2).double(), 1.5).to_event(1))
        if has("global chain"):
            shared["omega"] = pyro.sample("omega", dist.Normal(shared["phi"].sum(), 1.0))
        if has("global in a subsampled plate"):
            with pyro.plate("others", 4, subsample_size=None if whole else 2, dim=-3):
                pyro.sample("other", dist.Normal(torch.tensor(0.0).double(), 1.0))
        return shared

    def _at(self, table: Tensor, index: Index, events: int = 0) -> Tensor:
        """A number for each task, ready to stand beside values of the task plate's batch shape and some event dims."""
        value = table[index]
        if not self.sequential and self.tasks_dim == -2:
            value = value.unsqueeze(-1)
        return value[(..., *(None,) * events)]

    def _odd(self, index: Index) -> bool:
        return bool((self.some[index] > 0).any())

    def _locals(self, index: Index, shared: dict[str, Tensor], name: Callable[[str, Index], str]) -> Locals:
        values: Locals = {}
        makers = [self._around_phi, self._second_pair, self._constrained, self._other]
        for k in sorted(range(4), key=self.order.__getitem__):
            makers[k](index, shared, name, values)
        self._after_theta(index, name, values)
        return values

    def _around_phi(
        self, index: Index, shared: dict[str, Tensor], name: Callable[[str, Index], str], values: Locals
    ) -> None:
        has = self.features.__contains__
        if has("missing") and self._odd(index):
            return
        events = int(self.width > 0)
        phi, some = shared["phi"], self._at(self.some, index, events)
        shape = self.local_scale.shape if self.width else torch.Size(())
        mean, scale = phi, self.local_scale.reshape(shape)
        if has("offset"):
            mean = mean + some * self._at(self.offset, index, events)
        if has("sign"):
            mean = mean * (1.0 - 2.0 * some)
        if has("square"):
            mean = mean + some * phi.square()
        if has("scale by task"):
            scale = scale * (1.0 + some)
        if has("tau") and (not self.sequential or self._odd(index)):
            scale = scale * shared["tau"]
        if has("local scale"):
            own = pyro.sample(name("spread", index), dist.LogNormal(self._zero(index), 0.5))
            scale = scale * (1.0 + some * (own.unsqueeze(-1) if events else own))
        if has("local shift"):
            own = pyro.sample(name("shift", index), dist.Normal(self._zero(index), 1.0))
            mean = mean + some * (own.unsqueeze(-1) if events else own)
        law: Any = dist.Normal(mean, scale)
        if self.declared == "expand":
            law = dist.Normal(mean, scale).expand(torch.broadcast_shapes(mean.shape, scale.shape))
        if has("theta student") and (not self.sequential or self._odd(index)):
            law = dist.StudentT(5.0, mean, scale)
        if has("theta mixture") and self.width:
            both = dist.Normal(
                torch.stack([mean, mean], -2), torch.stack(torch.broadcast_tensors(scale, 2 * scale), -2)
            )
            law = dist.MixtureSameFamily(dist.Categorical(logits=torch.zeros(2).double()), both.to_event(1))
        elif self.width:
            law = dist.Independent(law, 1) if self.declared == "Independent" else law.to_event(1)
        if has("theta masked"):
            law = law.mask(self._at(self.some, index) < 0.5)
        if has("theta scaled") and (not self.sequential or self._odd(index)):
            with poutine.scale(scale=0.5):
                values["theta"] = pyro.sample(name("theta", index), law)
        else:
            values["theta"] = pyro.sample(name("theta", index), law)
        if has("second child") and (not self.sequential or self._odd(index)):
            again = dist.Normal(phi, scale.detach() if not has("tau") else self.local_scale.reshape(shape))
            values["again"] = pyro.sample(name("again", index), again.to_event(events))

    def _second_pair(
        self, index: Index, shared: dict[str, Tensor], name: Callable[[str, Index], str], values: Locals
    ) -> None:
        if "second pair" in self.features:
            values["u"] = pyro.sample(name("u", index), dist.Normal(shared["psi"], 0.4).to_event(1))

    def _zero(self, index: Index) -> Tensor:
        return 0.0 * self._at(self.some, index)

    def _constrained(
        self, index: Index, shared: dict[str, Tensor], name: Callable[[str, Index], str], values: Locals
    ) -> None:
        has = self.features.__contains__
        if has("positive"):
            with poutine.scale(scale=0.25) if has("scaled local") else nullcontext():
                values["rate"] = pyro.sample(name("rate", index), dist.Gamma(3.0 + self._zero(index), 2.0))
        if has("interval by task"):
            values["u1"] = pyro.sample(name("u1", index), dist.Uniform(self._zero(index), self._at(self.bound, index)))
        if has("simplex"):
            three = (2.0 + self._zero(index)).unsqueeze(-1) * torch.ones(3).double()
            values["share"] = pyro.sample(name("share", index), dist.Dirichlet(three))
        if has("correlation"):
            values["lkj"] = pyro.sample(name("lkj", index), dist.LKJCholesky(3, 1.5 + self._zero(index)))
        if has("interval below phi"):
            top = shared["phi"].sum().exp() + self._zero(index)
            values["below"] = pyro.sample(name("below", index), dist.Uniform(self._zero(index) - 1.0, top))

    def _other(
        self, index: Index, shared: dict[str, Tensor], name: Callable[[str, Index], str], values: Locals
    ) -> None:
        has = self.features.__contains__
        if has("student"):
            values["t"] = pyro.sample(name("t", index), dist.StudentT(4.0, self._zero(index), 0.5))
        if has("decentred"):
            site = name("z", index)
            law = dist.Normal(self._at(self.offset, index), 0.3 * self._at(self.bound, index))
            with poutine.reparam(config={site: LocScaleReparam(0.3)}):
                values["z"] = pyro.sample(site, law)
        if has("improper"):
            flat = dist.ImproperUniform(dist.constraints.positive, self._zero(index).shape, ())
            values["flat"] = pyro.sample(name("flat", index), flat)

    def _after_theta(self, index: Index, name: Callable[[str, Index], str], values: Locals) -> None:
        if "coupled" in self.features and "theta" in values and (not self.sequential or self._odd(index)):
            centre = values["theta"].sum(-1) if self.width else values["theta"]
            values["child"] = pyro.sample(name("child", index), dist.Normal(centre, 0.8))

    # ---------------------------------------------------------------------------------------- what is observed

    def _predictor(self, index: Index, shared: dict[str, Tensor], values: Locals) -> Tensor:
        eta = self._zero(index)
        for site, value in values.items():
            events = {"theta": int(self.width > 0), "again": int(self.width > 0), "u": 1, "share": 1, "lkj": 2}
            for _ in range(events.get(site, 0)):
                value = (value * torch.arange(1.0, value.shape[-1] + 1.0, dtype=torch.float64)).sum(-1)
            eta = eta + 0.3 * value
        if "direct" in self.features and (not self.sequential or self._odd(index)):
            eta = eta + self._at(self.some, index) * shared["phi"].sum()
        return eta

    def _observe(
        self,
        index: Index,
        shared: dict[str, Tensor],
        values: Locals,
        name: Callable[[str, Index], str],
        taken: Mapping[int | None, Tensor] | None,
    ) -> None:
        has = self.features.__contains__
        eta = self._predictor(index, shared, values)
        if has("deterministic"):
            pyro.deterministic(name("eta", index), eta)
        if has("factor"):
            pyro.factor(name("weight", index), -0.1 * eta.square())
        if has("factor of phi"):
            pyro.factor(name("push", index), -0.2 * self._at(self.some, index) * shared["phi"].square().sum())
        if has("census") and self._odd(index):
            with poutine.mask(mask=self._at(self.some, index) > 0.5):
                law = dist.Normal(shared["phi"].sum() + self._zero(index), 0.5)
                pyro.sample(name("census", index), law, obs=1.0 + self._zero(index))
        if has("one site more") and self._odd(index):
            pyro.sample(name("more", index), dist.Normal(eta, 1.0), obs=torch.tensor(0.3).double())
        context: AbstractContextManager[Any] = nullcontext()
        if has("rows scaled"):
            context = poutine.scale(scale=1.7)
        with context:
            if self.nested:
                self._rows_in_a_plate(index, eta, name, taken)
            else:
                self._rows_together(index, eta, name)

    def _law(self, eta: Tensor, index: Index, events: int) -> Any:
        if self.likelihood == "Normal":
            return dist.Normal(eta, 0.9)
        if self.likelihood == "StudentT":
            return dist.StudentT(4.0, eta, 0.7)
        if self.likelihood == "Bernoulli":
            return dist.Bernoulli(logits=eta)
        rate = (0.3 * eta.clamp(-8.0, 8.0)).exp()
        return dist.Poisson(rate * (self._at(self.exposure, index, events) if "exposure" in self.features else 1.0))

    def _rows_together(self, index: Index, eta: Tensor, name: Callable[[str, Index], str]) -> None:
        n = self.ragged[index] if self.sequential else self.rows
        y = self.y[index][..., :n]
        law = self._law(eta.unsqueeze(-1), index, 1).expand(y.shape)
        if "missing rows" in self.features and n == self.rows:
            law, seen = law.to_event(1), self.masked[index].any(-1)
            pyro.sample(name("y", index), law, obs=y, obs_mask=seen)
            return
        if "rows masked" in self.features and n == self.rows:
            law = law.mask(self.masked[index])
        if "rows weighted" in self.features:
            weights = 1.0 + self._at(self.some, index)
            with poutine.scale(scale=weights):
                pyro.sample(name("y", index), law.to_event(1), obs=y)
            return
        pyro.sample(name("y", index), law.to_event(1), obs=y)

    def _rows_in_a_plate(
        self, index: Index, eta: Tensor, name: Callable[[str, Index], str], taken: Mapping[int | None, Tensor] | None
    ) -> None:
        key = index if self.sequential else None
        n = self.ragged[index] if self.sequential else self.rows
        plate = name("data", index) if self.sequential else "data"
        if taken is None:
            rows = pyro.plate(plate, n, subsample_size=self.batch, dim=-1)
        else:
            rows = pyro.plate(plate, n, subsample=taken[key], dim=-1)
        with rows as j:
            if taken is None:
                self.minibatches[-1][key] = j.clone()
            if "latent in the data plate" in self.features:
                eta = eta + pyro.sample(name("row", index), dist.Normal(torch.tensor(0.0).double(), 1.0))
            y = self.y[index][..., j]
            masked = "rows masked" in self.features and n == self.rows
            with poutine.mask(mask=self.masked[index][..., j]) if masked else nullcontext():
                pyro.sample(name("y", index), self._law(eta, index, 0), obs=y)
