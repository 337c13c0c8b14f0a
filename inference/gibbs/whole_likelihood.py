"""What needs a task's data whole: a Metropolis test of theta, and local sites that are solved.

See :mod:`~pyro_lift.inference.gibbs.metropolis` and :mod:`~pyro_lift.inference.gibbs.solved_sites`.
"""

from __future__ import annotations

from pyro_lift.inference.gibbs.state import Settings, Structure
from pyro_lift.inference.program import Evaluation, Program

__all__ = ["check_metropolis", "check_solved", "check_solved_rows", "check_whole"]


def check_metropolis(settings: Settings, distributed: bool, program: Program, run: Evaluation) -> None:
    """Refuse what no Metropolis test can hold exactly, or is not made for; nothing for Langevin steps.

    Raises:
        ValueError: with the reason and the way out.
    """
    if settings.is_untested or settings.theta_update == "exact":
        return
    name = f'theta_update="{settings.theta_update}"'
    faults = {
        'preconditioner="rms"': settings.decay is not None and "its scales would have to be the test's; leave it out",
        "max_grad_norm": settings.max_grad_norm is not None and "a test holds any gradient; leave it out",
        "temperature=0": settings.temperature == 0.0 and "it has no law to test; use theta_update='sgld'",
        "site_temperature": any(t != 1.0 for t in settings.site_temperature.values())
        and "sites of several temperatures have no common density; use theta_update='sgld'",
        "distributed=True": distributed and "each process would tune a step of its own; use theta_update='sgld'",
    }
    for option, reason in faults.items():
        if reason:
            raise ValueError(f"{name} does not go with {option}: {reason}.")
    check_whole(settings, program, run)


def check_whole(settings: Settings, program: Program, run: Evaluation, tasks: str = "") -> None:
    """Refuse tasks whose rows are subsampled, where theta is moved with a Metropolis test.

    Args:
        tasks: a name for the tasks, where they are not the first ones.
    """
    if settings.is_untested or settings.theta_update == "exact":
        return
    for plate, (size, taken) in run.plates.items():
        if plate != program.plate and taken < size:
            raise ValueError(
                f'{tasks + ": " if tasks else ""}theta_update="{settings.theta_update}" tests each step by the whole '
                f"likelihood, and the plate {plate!r} takes {taken} of {size} rows. Take subsample_size out of that "
                'plate, or use theta_update="sgld".'
            )


def check_solved(settings: Settings, structure: Structure, program: Program, run: Evaluation) -> None:
    """Refuse at set-up what cannot be solved, or what would step it all the same.

    Raises:
        ValueError: with the reason and the way out.
    """
    if not settings.site_update:
        return
    families = {site.family for site in run.locals.values()}
    for family in settings.site_update:
        if family not in families:
            known = ", ".join(sorted(families))
            raise ValueError(f"site_update: no local site {family!r} in the program; it has {known}.")
        if family in structure.pair_of and settings.translation != "none":
            raise ValueError(
                f'site_update[{family!r}] with translation="{settings.translation}": {family!r} is shifted together '
                f"with {structure.pair_of[family].global_site!r} by its gradient, which is zero at its mode. Use "
                'translation="none", or let it step.'
            )
    if settings.theta_update != "sgld":
        raise ValueError(
            f'site_update with theta_update="{settings.theta_update}", whose test is of all local sites together. Use '
            'theta_update="sgld", or leave site_update out.'
        )
    if families <= settings.site_update.keys():
        raise ValueError("site_update names every local site: there is none left to step. Leave one of them out.")
    check_solved_rows(settings, program, run)


def check_solved_rows(settings: Settings, program: Program, run: Evaluation, tasks: str = "") -> None:
    """Refuse tasks whose rows are subsampled: the mode of some rows is not that of the task.

    Args:
        tasks: a name for the tasks, where they are not the first ones.
    """
    for plate, (size, taken) in run.plates.items() if settings.site_update else ():
        if plate != program.plate and taken < size:
            raise ValueError(
                f"{tasks + ': ' if tasks else ''}site_update solves {', '.join(settings.site_update)} on all rows of a "
                f"task, and the plate {plate!r} takes {taken} of {size}. Take subsample_size out of that plate, or "
                "leave site_update out."
            )
