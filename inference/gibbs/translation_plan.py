r"""The plan of a translation: whether it fits the program, its step, and the table of its control variates.

The shift's density has a largest curvature of about :math:`N\lambda + 1/\sigma^2`, with :math:`\lambda` the mean over
tasks of the largest curvature of a task's likelihood, so that its Euler step is stable for
:math:`\eta_d < 4/(N\lambda + 1/\sigma^2)`. The step taken is a share of that limit:

- rows whole: 5 B/N, at most a tenth. The mean of all theta then forgets where it was some ten times in a round; more
  would only add the noise of the estimate, which grows with N, while a theta_i moves by itself but once a round.
- rows subsampled: B/(40 N). What a task's minibatch adds to the estimate is as strong for the shift as it is for a
  theta's own step at a twentieth of *its* limit.
- not measured (a large network, or a preconditioner): :math:`\eta/N`, by which phi moves as joint training would.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from pyro_lift.inference.gibbs.state import Settings, Structure, Translation
from pyro_lift.inference.gibbs.task_curvature import TaskCurvature, task_curvature
from pyro_lift.inference.program import Program, Rows
from pyro_lift.inference.schedules import Schedule, constant
from pyro_lift.inference.stability import step_too_large
from pyro_lift.inference.stores.disk import DiskStore
from pyro_lift.inference.stores.store import ThetaStore, make_store

__all__ = ["SharedStep", "TranslationRequest", "check_translation", "default_share", "plan_translation", "second_store"]

#: Of the largest stable step: the most, the share times N / B, and that times N / B where rows are subsampled.
MOST, SHARE, SUBSAMPLED_SHARE = 0.1, 5.0, 0.025


@dataclass(frozen=True)
class SharedStep:
    """The step of theta over the number of tasks: what moves phi as joint training by that step would."""

    step_size: Schedule
    num_tasks: int

    def __call__(self, step: int) -> float:
        """Return the step size at a number of visits."""
        return self.step_size(step) / self.num_tasks


class TranslationRequest(NamedTuple):
    """What a translation's plan depends on beside program and settings.

    Attributes:
        begins: visits of the joint training before it.
        distributed: whether processes share the visits.
        check_stability: whether a step past its limit is refused.
        store: kind of the theta_i's store, or the caller's own.
    """

    begins: int
    distributed: bool
    check_stability: bool
    store: str | ThetaStore


def check_translation(settings: Settings) -> None:
    """Refuse a translation where phi is not drawn exactly.

    Raises:
        ValueError: names the option and the way out.
    """
    if settings.translation in ("saga", "falling") and settings.phi_update != "gibbs":
        raise ValueError(
            f"translation={settings.translation!r} with phi_update={settings.phi_update!r}: a shift of phi and all "
            "theta together rests on what is known of normal pairs, as the exact draw does. Use "
            'phi_update="gibbs", or translation="none".'
        )
    if settings.translation == "none" and settings.translation_step_size is not None:
        raise ValueError(
            'translation_step_size is of the translation, and translation="none" takes none. Use translation="saga", '
            "or leave translation_step_size out."
        )


def default_share(block_size: int, num_tasks: int, *, subsampled: bool) -> float:
    """Return the step as a share of the largest stable one."""
    part = block_size / num_tasks
    return SUBSAMPLED_SHARE * part if subsampled else min(MOST, SHARE * part)


def plan_translation(
    program: Program, phi: Rows, structure: Structure, settings: Settings, request: TranslationRequest
) -> tuple[Settings, Translation | None, dict[str, float | str]]:
    """Choose and check the step of a translation, and make its table.

    Args:
        program: the model.
        phi: the start, by global site.
        structure: of the program.
        settings: of a visit, with the step of theta chosen.
        request: what else it depends on.

    Returns:
        The settings with the translation's step in them, the translation, and what is reported of it.

    Raises:
        ValueError: a step past its limit.
    """
    if settings.translation == "none":
        return settings, None, {"translation": "none"}
    N, B = structure.num_tasks, structure.block_size
    measured = None
    if settings.decay is None and settings.phi_update == "gibbs":
        measured = task_curvature(program, phi, structure, settings.n_inflate)
    if settings.translation == "auto":
        fits = measured is not None and not measured.subsampled
        settings = replace(settings, translation="saga" if fits else "none")
        if not fits:
            return settings, None, {"translation": "none"}
    schedule, limit = settings.translation_step_size, _limit(structure, measured)
    if schedule is None:
        assert settings.step_size is not None
        schedule = SharedStep(settings.step_size, N)
        if limit is not None and measured is not None:
            schedule = constant(default_share(B, N, subsampled=measured.subsampled) * limit)
    if request.check_stability and limit is not None and schedule(0) >= limit:
        raise ValueError(step_too_large("translation_step_size", schedule(0), limit, "4 / (N λ + 1/σ²)"))
    round_length = -(-N // B)
    curvature = None if measured is None or not bool(measured.diagonal.any()) else measured.diagonal
    table = None
    if settings.translation == "saga" and B < N:
        size = sum(value.numel() * value.element_size() for value in phi.values())
        table = second_store(request.store, N, size, next(iter(phi.values())).device)
    translation = Translation(
        settings.translation,
        schedule,
        request.begins,
        round_length,
        float(round_length) if request.distributed else N / B,
        table,
        None if table is None else curvature,
        wraps=not request.distributed,
    )
    report: dict[str, float | str] = {
        "translation": settings.translation,
        "translation_step_size": schedule(0),
        "translation_limit": float("nan") if limit is None else limit,
    }
    return replace(settings, translation_step_size=schedule), translation, report


def _limit(structure: Structure, measured: TaskCurvature | None) -> float | None:
    if measured is None:
        return None
    own = max(float(pair.prior_precision.max()) for pair in structure.pairs.values())
    return 4.0 / (structure.num_tasks * measured.largest + own)


def second_store(store: str | ThetaStore, num_tasks: int, row_bytes: int, device: torch.device) -> ThetaStore:
    """Make a second store of the kind that theta's is."""
    if isinstance(store, str):
        return make_store(store, num_tasks, 2 * row_bytes, device)
    if isinstance(store, DiskStore):
        return DiskStore(num_tasks, store.folder)
    kind: Any = type(store)
    try:
        again: ThetaStore = kind(num_tasks)
    except TypeError:
        return make_store("auto", num_tasks, 2 * row_bytes, device)
    return again
