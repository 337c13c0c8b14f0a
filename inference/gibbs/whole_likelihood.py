"""Where theta may be moved with a Metropolis test (:mod:`~pyro_lift.inference.gibbs.metropolis`): with whole data."""

from __future__ import annotations

from pyro_lift.inference.gibbs.state import Settings
from pyro_lift.inference.program import Evaluation, Program

__all__ = ["check_metropolis", "check_whole"]


def check_metropolis(settings: Settings, distributed: bool, program: Program, run: Evaluation) -> None:
    """Refuse what no Metropolis test can hold exactly, or is not made for; nothing for Langevin steps.

    Raises:
        ValueError: with the reason and the way out.
    """
    if settings.theta_update == "sgld":
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
    if settings.theta_update == "sgld":
        return
    for plate, (size, taken) in run.plates.items():
        if plate != program.plate and taken < size:
            raise ValueError(
                f'{tasks + ": " if tasks else ""}theta_update="{settings.theta_update}" tests each step by the whole '
                f"likelihood, and the plate {plate!r} takes {taken} of {size} rows. Take subsample_size out of that "
                'plate, or use theta_update="sgld".'
            )
