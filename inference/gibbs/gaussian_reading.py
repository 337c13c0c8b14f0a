r"""Reading a program's Gaussian tasks: whether its likelihood is quadratic in theta, and the quadratic form.

It is read from what the program computes, and not from its distributions' names: gradients at points near and far, for
every task, must be those of the form. The references r_i are where each task's posterior is at the start, so that the
gradients are small there and rounding too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pyro_lift.inference.gibbs.gaussian_tasks import GaussianTasks, Part
from pyro_lift.inference.gibbs.normal_sites import local_normal
from pyro_lift.inference.gibbs.state import Settings, Structure
from pyro_lift.inference.program import Evaluation, Latent, Program

__all__ = ["exact_theta", "read_gaussian_tasks"]

#: Coordinates of a task's theta, and numbers of all tasks' curvatures, up to which they are kept.
COORDINATES, NUMBERS = 64, 50_000_000
#: Where the quadratic form is tried, in standard deviations of the posterior of theta and of its whole prior.
NEAR, FAR = (0.3, 3.0), (1.0, 10.0)
#: Share of a gradient's change, and of its change over one standard deviation, by which it may differ from the form's.
SHARE = 1e-3


def exact_theta(
    program: Program,
    run: Evaluation,
    structure: Structure,
    settings: Settings,
    generator: torch.Generator | None,
    held: str | None,
) -> tuple[Settings, GaussianTasks | None]:
    """Settle how theta moves: exactly where that was asked for, or left to us and possible; else by Langevin steps.

    Args:
        program: the model.
        run: of the first block at the start, with its graph.
        structure: of the program.
        settings: as they were given.
        generator: of minibatches.
        held: an option of the chain's set-up that an exact draw does not go with; None where there is none.

    Returns:
        The settings with ``theta_update`` settled, and the tasks where theta is drawn exactly.

    Raises:
        ValueError: an exact draw was asked for and is not possible; with the reason.
    """
    if settings.theta_update not in ("auto", "exact"):
        return settings, None
    option = held or _option(settings)
    if settings.theta_update == "exact" and option is not None:
        raise ValueError(
            f'theta_update="exact" does not go with {option}: nothing is left for it to act on, or no exact law. Leave '
            'it out, or use theta_update="sgld".'
        )
    chosen = settings.step_size is not None or settings.translation != "none" or settings.theta_steps_per_visit > 1
    chosen = chosen or settings.control_variates > 0
    if settings.theta_update == "auto" and (option is not None or chosen or structure.reasons):
        return replace(settings, theta_update="sgld"), None
    found = read_gaussian_tasks(program, run, structure, settings, generator)
    if isinstance(found, GaussianTasks):
        # phi and theta are drawn together: there is nothing left to shift, and nothing adapts.
        return replace(settings, theta_update="exact", translation="none", adapts=0), found
    if settings.theta_update == "exact":
        raise ValueError(
            f'theta_update="exact" draws theta where its likelihood is Gaussian: {found}. '
            'Otherwise use "sgld" or "hmc".'
        )
    return replace(settings, theta_update="sgld"), None


def _option(settings: Settings) -> str | None:
    """An option of a visit that an exact draw does not go with."""
    options = {
        f'phi_update="{settings.phi_update}"': settings.phi_update != "gibbs",
        'preconditioner="rms"': settings.decay is not None,
        "max_grad_norm": settings.max_grad_norm is not None,
        "site_step_scale": bool(settings.site_step_scale),
        "site_temperature": bool(settings.site_temperature),
        "site_update": bool(settings.site_update),
        "translation_step_size": settings.translation_step_size is not None,
        'integrator="euler"': settings.integrator == "euler",
    }
    return next((name for name, given in options.items() if given), None)


def read_gaussian_tasks(
    program: Program, run: Evaluation, structure: Structure, settings: Settings, generator: torch.Generator | None
) -> GaussianTasks | str:
    """Read the tasks of a program in one block; return why they are not Gaussian where they are not.

    Args:
        program: the model.
        run: of all tasks at the start, with its graph, which is kept.
        structure: of the program.
        settings: of a visit; the power on the likelihood is in them.
        generator: of minibatches; there are none.
    """
    fault = _structure_fault(run, structure)
    if fault is not None:
        return fault
    sites = list(run.locals.values())
    phi = {name: site.leaf.detach() for name, site in run.globals.items()}
    theta, prior, broad = _rows(sites, [s.leaf for s in sites]), _prior_precision(sites), _prior_sd(structure, sites)
    try:
        gradient, curvature = _derivatives(run.log_likelihood, sites)
    except RuntimeError:  # an operation without second derivatives
        return "its likelihood has no second derivatives"
    if not bool(torch.isfinite(gradient).all() and torch.isfinite(curvature).all()):
        return "its likelihood has no finite second derivatives"
    scale = curvature.diagonal(dim1=1, dim2=2).amax(1)
    least = torch.linalg.eigvalsh(curvature)[:, 0]
    if bool((least < -1e-5 * scale).any()):
        return f"the likelihood of task {int((least + 1e-5 * scale).argmin())} curves upward"
    power = settings.n_inflate
    whole = power * curvature + torch.diag_embed(prior)
    pull = power * gradient + prior * (_means(structure, phi, sites) - theta)
    reference = theta + torch.linalg.solve(whole, pull)
    narrow = torch.linalg.inv(whole).diagonal(dim1=1, dim2=2).clamp(min=0.0).sqrt()

    def at(rows: Tensor) -> Evaluation:
        values = {site.family: value for site, value in zip(sites, _values(sites, rows), strict=True)}
        return program.run(phi, {None: values}, torch.arange(structure.num_tasks), generator)

    there = at(reference)
    own = list(there.locals.values())
    rounded, base = _rows(own, [s.leaf for s in own]), _gradient(there.log_likelihood, own)
    stream = torch.Generator().manual_seed(0)
    for sd in (*(share * narrow for share in NEAR), *(share * broad for share in FAR)):
        noise = torch.randn(reference.shape, generator=stream, dtype=torch.float64).to(reference.device)
        moved = at(rounded + sd * noise)
        own = list(moved.locals.values())
        apart = _rows(own, [s.leaf for s in own]) - rounded
        change = (curvature @ apart.unsqueeze(-1)).squeeze(-1)
        error = (_gradient(moved.log_likelihood, own) - (base - change)).norm(dim=1)
        allowed = SHARE * (change.norm(dim=1) + scale * narrow.norm(dim=1))
        if not bool((error <= allowed).all()):
            task = int((error - allowed).nan_to_num(nan=torch.inf).argmax())
            return f"the log likelihood of task {task} is not quadratic in its theta"
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    tied = bool((curvature - torch.diag_embed(diagonal)).abs().amax(dim=(1, 2)).gt(1e-7 * scale).any())
    H = power * (_without_negative(curvature) if tied else diagonal.clamp(min=0.0))
    likelihood = there.log_likelihood.detach().double()
    pairs = [structure.pair_of[site.family] for site in sites]
    mean, precision = (
        torch.cat([torch.broadcast_to(x.detach().double(), phi[p.global_site].shape).reshape(-1) for p, x in values])
        for values in ([(p, p.prior_mean) for p in pairs], [(p, p.prior_precision) for p in pairs])
    )
    tasks = tuple(range(structure.num_tasks))
    return GaussianTasks(_parts(structure, sites), rounded, power * base, H, mean, precision, likelihood, power, tasks)


def _structure_fault(run: Evaluation, structure: Structure) -> str | None:
    if structure.sequential or structure.block_size < structure.num_tasks:
        return (
            "a visit does not take all tasks at once; write the plate vectorised (with pyro.plate(...):) and without "
            "subsample_size"
        )
    for plate, (size, taken) in run.plates.items():
        if taken < size:
            return f"the plate {plate!r} takes {taken} of {size} rows; take subsample_size out of it"
    for site in run.locals.values():
        pair, normal = structure.pair_of.get(site.family), local_normal(site)
        if pair is None or normal is None:
            return f"the local site {site.name!r} is not normal around a global site"
        mean = run.globals[pair.global_site].leaf.detach()
        if not torch.allclose(torch.broadcast_to(mean, site.leaf.shape), normal.mean.detach().expand(site.leaf.shape)):
            return f"the mean of the local site {site.name!r} differs by task"
    size = sum(site.leaf.numel() for site in run.locals.values()) // structure.num_tasks
    if size > COORDINATES or structure.num_tasks * size * size > NUMBERS:
        return f"a task's theta has {size} coordinates, and only short ones are read this way"
    return None


def _parts(structure: Structure, sites: list[Latent]) -> tuple[Part, ...]:
    parts, begin = [], 0
    for site in sites:
        end = begin + site.leaf.numel() // structure.num_tasks
        parts.append(Part(structure.pair_of[site.family].global_site, site.family, begin, end))
        begin = end
    return tuple(parts)


def _dim(site: Latent) -> int:
    return 0 if site.plate_dim is None else site.plate_dim


def _rows(sites: list[Latent], values: list[Tensor]) -> Tensor:
    """Values of the sites, one row a task ``[N, D]``, in float64."""
    parts = [value.detach().movedim(_dim(site), 0) for site, value in zip(sites, values, strict=True)]
    return torch.cat([part.reshape(len(part), -1) for part in parts], 1).double()


def _values(sites: list[Latent], rows: Tensor) -> list[Tensor]:
    """The inverse of :func:`_rows`, in the sites' own dtype."""
    values, begin = [], 0
    for site in sites:
        dim = _dim(site)
        shape = site.leaf.movedim(dim, 0).shape
        size = shape[1:].numel()
        part = rows[:, begin : begin + size].reshape(shape).movedim(0, dim)
        values.append(part.to(site.leaf.dtype).contiguous())
        begin += size
    return values


def _gradient(log_likelihood: Tensor, sites: list[Latent]) -> Tensor:
    leaves = [site.leaf for site in sites]
    if not log_likelihood.requires_grad:
        return torch.zeros_like(_rows(sites, leaves))
    grads = torch.autograd.grad(log_likelihood, leaves, allow_unused=True)
    return _rows(sites, [torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True)])


def _derivatives(log_likelihood: Tensor, sites: list[Latent]) -> tuple[Tensor, Tensor]:
    """Gradient ``[N, D]``, and minus the Hessian of each task by its own theta ``[N, D, D]``."""
    leaves = [site.leaf for site in sites]
    rows = _rows(sites, leaves)
    count, size = rows.shape
    curvature = rows.new_zeros(count, size, size)
    if not log_likelihood.requires_grad:
        return torch.zeros_like(rows), curvature
    found = torch.autograd.grad(log_likelihood, leaves, create_graph=True, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]
    used = [k for k, g in enumerate(grads) if g.requires_grad]
    for d in range(size if used else 0):
        unit = torch.zeros_like(rows)
        unit[:, d] = 1.0
        along = _values(sites, unit)
        # Tasks do not touch each other given phi: one product gives this column of every task's Hessian.
        products = torch.autograd.grad(
            [grads[k] for k in used], leaves, [along[k] for k in used], retain_graph=True, allow_unused=True
        )
        filled = [torch.zeros_like(x) if p is None else p for p, x in zip(products, leaves, strict=True)]
        curvature[:, :, d] = -_rows(sites, filled)
    return _rows(sites, grads), 0.5 * (curvature + curvature.transpose(1, 2))


def _prior_precision(sites: list[Latent]) -> Tensor:
    """Precision of each coordinate's own prior at the start ``[N, D]``."""
    normals = [local_normal(site) for site in sites]
    return _rows(sites, [n.precision.expand(s.leaf.shape) for n, s in zip(normals, sites, strict=True) if n])


def _means(structure: Structure, phi: dict[str, Tensor], sites: list[Latent]) -> Tensor:
    found = [phi[structure.pair_of[s.family].global_site].expand(s.leaf.shape) for s in sites]
    return _rows(sites, found)


def _prior_sd(structure: Structure, sites: list[Latent]) -> Tensor:
    """Standard deviation of theta where phi is unknown, too ``[N, D]``."""
    of_phi = [
        torch.broadcast_to(1.0 / structure.pair_of[site.family].prior_precision.detach(), site.leaf.shape)
        for site in sites
    ]
    return (_rows(sites, of_phi) + 1.0 / _prior_precision(sites)).sqrt()


def _without_negative(curvature: Tensor) -> Tensor:
    """The same matrices with what rounding has taken below zero put at zero."""
    values, axes = torch.linalg.eigh(curvature)
    positive: Tensor = (axes * values.clamp(min=0.0).unsqueeze(1)) @ axes.transpose(1, 2)
    return positive
