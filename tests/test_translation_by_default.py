"""Which translation LiFT takes where none is given: control variates where they fit, else the falling step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common_map import adapter, tasks

from pyro_lift import LiFT, LiFTSettings, Task
from pyro_lift.defaults import resolved, with_translation
from pyro_lift.tuning.halves import Joint
from pyro_lift.tuning.whose_heads import run_config

SETTINGS = LiFTSettings(burn_in=10, samples=20)


def of_rows(*rows: int) -> list[Task]:
    return [Task(f"t{k}", (torch.randn(n, 6), torch.zeros(n).long()), num_classes=3) for k, n in enumerate(rows)]


@pytest.mark.parametrize(
    ("settings", "made", "kind"),
    [
        (SETTINGS, of_rows(*[4] * 15), "saga"),
        (SETTINGS, of_rows(*[4] * 16), "falling"),  # not every task is visited twice
        (replace(SETTINGS, block_size=2), of_rows(*[4] * 16), "saga"),
        (replace(SETTINGS, thinning=2), of_rows(*[4] * 16), "saga"),
        (replace(SETTINGS, ranks_block_size=4), of_rows(*[4] * 16), "saga"),
        (SETTINGS, of_rows(4, 4, 8), "saga"),
        (SETTINGS, of_rows(4, 4, 9), "falling"),  # its pull is more than half as strong again as the mean
        (replace(SETTINGS, translation="none"), of_rows(4, 4), "none"),
        (replace(SETTINGS, phi_update="langevin"), of_rows(4, 4), None),
    ],
)
def test_control_variates_are_for_chains_that_are_long_enough_and_tasks_that_are_alike(
    settings: LiFTSettings, made: list[Task], kind: str | None
) -> None:
    assert with_translation(settings, made).translation == kind


def test_a_run_that_was_begun_with_the_falling_step_goes_on_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lift = LiFT(adapter(), sgd_steps=80, burn_in=10, samples=20, seed=0)
    with monkeypatch.context() as earlier:
        # Its folder says nothing of how long a chain is.
        earlier.setattr("pyro_lift.lift.run_config", lambda *run, rules: run_config(*run, rules={"heads": "by width"}))
        first = lift.meta_train(tasks(), progress=False, checkpoint=tmp_path / "before", calibrate=False)
    again = lift.meta_train(tasks(), progress=False, resume=tmp_path / "before", calibrate=False)
    assert first.settings == again.settings and again.settings.translation == "falling"
    now = lift.meta_train(tasks(), progress=False, checkpoint=tmp_path / "now", calibrate=False)
    assert now.settings.translation == "saga"
    assert lift.meta_train(tasks(), progress=False, resume=tmp_path / "now").settings.translation == "saga"


def test_a_step_that_is_given_is_the_translations_and_not_joint_trainings() -> None:
    lift = LiFT(adapter(), sgd_steps=80, burn_in=10, samples=20, translation_step_size=1e-4, seed=0)
    prior = lift.meta_train(tasks(), progress=False)
    assert prior.settings.translation == "saga" and prior.settings.translation_step_size == 1e-4


def test_a_smaller_rate_of_joint_training_is_the_translations_too() -> None:
    """It pulls phi as joint training does, which did not help at the larger rate."""
    made = tasks()
    run = LiFT(adapter(), sgd_steps=80, burn_in=10, samples=20)._with(replace(SETTINGS, translation="saga"))
    default = resolved(run.settings, run.adapter)
    assert default.learning_rate is not None and default.sgd_learning_rate is not None
    small = Joint(0.2 * default.sgd_learning_rate, 80, 0.5, 0.1, True)
    step = run._no_faster_than(small, len(made)).settings.translation_step_size
    assert step == pytest.approx(0.2 * 2.0 * default.learning_rate / len(made))
    for joint in (small._replace(rate=default.sgd_learning_rate), small._replace(helps=False)):
        assert run._no_faster_than(joint, len(made)).settings.translation_step_size is None
    given = run._with(replace(run.settings, translation_step_size=1e-3))
    assert given._no_faster_than(small, len(made)).settings.translation_step_size == 1e-3


@pytest.mark.parametrize("given", [{"translation": "none"}, {"phi_update": "langevin"}])
def test_a_step_of_no_translation_is_refused_at_the_door(given: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"translation_step_size=0\.001 is of the translation, and .* takes none"):
        LiFTSettings(translation_step_size=1e-3, **given)  # type: ignore[arg-type]


def test_fewer_draws_than_components_are_refused_before_any_visit() -> None:
    with pytest.raises(ValueError, match=r"samples=2 with components=3: .*Raise samples"):
        LiFT(adapter(), samples=2, components=3).meta_train(tasks(), progress=False)
