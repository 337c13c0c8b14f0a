"""What hangs on what in one run of a program, read off its autograd graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor
from torch.distributions import Normal

from pyro_lift.inference.program import Evaluation, Latent
from pyro_lift.inference.supports import innermost

__all__ = ["Links", "coupled_families", "hangs_on", "leaves_of", "links_of", "reached"]


class Links(NamedTuple):
    """The latent sites that each term of one run's density hangs on.

    Attributes:
        laws: by latent site, the other latent sites that its distribution, or its support, hangs on.
        observed: by observed site, the latent sites that its log probability hangs on.
    """

    laws: dict[str, frozenset[str]]
    observed: dict[str, frozenset[str]]

    def children(self, site: str) -> list[str]:
        """The latent sites whose distribution hangs on one."""
        return [name for name, parents in self.laws.items() if site in parents]


def leaves_of(quantity: Tensor) -> list[Tensor]:
    """The leaves that the graph of ``quantity`` reaches."""
    if quantity.grad_fn is None:
        return [quantity] if quantity.requires_grad else []
    leaves, stack, seen = [], [quantity.grad_fn], set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            leaves.append(leaf)
        stack.extend(parent for parent, _ in node.next_functions if parent is not None)
    return leaves


def hangs_on(quantity: Tensor, leaf: Tensor) -> bool:
    """Whether the graph of ``quantity`` reaches ``leaf``."""
    return any(found is leaf for found in leaves_of(quantity))


def reached(quantity: Tensor, sites: Mapping[str, Latent]) -> frozenset[str]:
    """The sites whose leaves the graph of ``quantity`` reaches."""
    names = {id(site.leaf): name for name, site in sites.items()}
    return frozenset(names[id(leaf)] for leaf in leaves_of(quantity) if id(leaf) in names)


def links_of(run: Evaluation) -> Links:
    """Read the links of one run, which must have been made with gradients."""
    laws = {name: _parents(site, run.latents) for name, site in run.latents.items()}
    terms = run.terms | {site.name: site.log_prob() for site in run.observed if not site.local}
    return Links(laws, {name: reached(term, run.latents) for name, term in terms.items()})


def _parents(site: Latent, sites: Mapping[str, Latent]) -> frozenset[str]:
    """The sites that a distribution hangs on; a normal one need not be evaluated for that, however long it is."""
    base = innermost(site.fn)
    if isinstance(base, Normal) and site.mask is None and not isinstance(site.scale, Tensor):
        return reached(base.loc, sites) | reached(base.scale, sites)
    return reached(site.log_prob_at(site.leaf.detach()), sites)


def coupled_families(run: Evaluation, links: Links) -> frozenset[str]:
    """Families of the local sites (of all sites, in a program without a task plate) that hang on another one."""
    sites = run.locals or run.latents
    return frozenset(site.family for name, site in sites.items() if links.laws[name] & sites.keys())
