"""Whose the heads are, settled for a whole run: on all its tasks, before any part of it looks at a part of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from pyro_lift.inference.checkpoint.folder import ARCHITECTURE, NETWORK, TASK_DATA, saved_config
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.architecture import architecture_of
from pyro_lift.models.conventions import base_of
from pyro_lift.models.digest import digest_of_network, digests_of_tasks
from pyro_lift.models.door import check_rows
from pyro_lift.models.observation import AUTOMATIC_SCALE, is_narrower, own_head_scale
from pyro_lift.models.task import Task
from pyro_lift.settings import LiFTSettings, upgraded_run
from pyro_lift.tuning.class_layer import without_foreign_classes
from pyro_lift.tuning.value_layer import without_value_layer

__all__ = [
    "RULES",
    "Settled",
    "as_saved",
    "asks_dispersion",
    "asks_few_classes",
    "asks_few_values",
    "asks_kept_rows",
    "asks_value_layer",
    "counts_rounds",
    "counts_together",
    "counts_width",
    "fades_temperature",
    "fades_with_rows",
    "finds_class_power",
    "finds_matching_biases",
    "finds_share_of_tokens",
    "finds_sureness_of_matching",
    "finds_unmoved",
    "grows_heads",
    "has_few_rows",
    "has_few_values",
    "has_head_mean",
    "has_usual_widths",
    "has_value_widths",
    "heads_settled",
    "leaves_outliers_out",
    "leaves_units_out",
    "lets_one_task_lose",
    "rules_of_heads",
    "run_config",
    "sharpens_by_rows",
    "takes_a_share",
    "tempers_around_rates",
    "trains_through_mean",
    "tries_known_classes",
    "with_heads_settled",
]

#: Keys and values in the configuration of a saved run that name rules it was begun under, each later than the first
#: runs: an output wider than all tasks' classes calls for heads of their own; the length of the chain for control
#: variates in its translation; heads of tasks that share their classes stand around one head; theta sees that one; one
#: odd task leaves the trial of joint training to the others; tasks choose the prior of their heads of classes together;
#: predictions are tempered around the rates of a task's classes; regressions choose together how near to the head of
#: all their own are; tasks of classes say together how many draws stay at the start of an adaptation; rows say whether
#: a network's own classes are the tasks'; tasks choose a prior of their heads of classes for each number of rows; a
#: network that knows the tasks' classes is tried beside heads of their own too; predictions are surer than they came
#: where tasks have rows enough for that; regressions of few rows go by all tasks; tasks whose rows lack some of the
#: classes by chance have those of the others; regressions say what prior heads of each number of rows have; and how
#: unevenly they vary around one noise; what tasks say of a prior of heads weighs less where there are many more rows; a
#: few regressions in a larger unit than most are left out; classes of few rows may share a head that helps no others;
#: heads of classes stand around a share of that of all tasks, which four fifths of them are asked about; classes that
#: a network has itself choose the power in adaptation; a temperature above 1 holds less for tasks of many more rows;
#: tasks say how free the biases of heads beside their label texts are; new tasks of many more rows have heads of their
#: own beside a network's classes; tasks of tokens say together how many draws stay at the start of an adaptation; tasks
#: under label matching how sure their predictions may be, and how many draws stay; rows that a second chain has not
#: seen say how noisy new regressions of many more rows are, where they have heads of their own too; a network whose
#: output is a regression's value is tried beside heads on the features before its last layer.
RULES = {
    "heads": "by width",
    "translation": "by rounds",
    "head mean": "of all tasks",
    "trained heads": "the mean",
    "trial": "one may lose",
    "head widths": "of all tasks",
    "prediction temperature": "around rates",
    "value widths": "of all tasks",
    "unmoved draws": "of all tasks",
    "class layer": "by rows",
    "few rows": "a prior of their own",
    "known classes": "on trial",
    "sharper predictions": "of rows enough",
    "few values": "by all tasks",
    "counted classes": "of all tasks",
    "values by rows": "of all tasks",
    "noise": "of each task",
    "many rows": "less sure",
    "other units": "left out",
    "head of few rows": "of all tasks",
    "share of the head": "by four fifths",
    "power of classes": "by rows left out",
    "temperature of many rows": "fades",
    "matching biases": "of all tasks",
    "heads of many rows": "beside the layer",
    "unmoved draws of tokens": "of all tasks",
    "sureness of matching": "of unseen tasks",
    "noise of many rows": "beside heads too",
    "value layer": "on trial",
}


class Settled(NamedTuple):
    """Whose the heads of a run are, and what they stand on.

    Attributes:
        settings: of meta-training.
        adapter: the network, read where the heads stand.
        layer: settings with the network's output as the tasks' classes or value, where that is worth a trial too; else
            None.
    """

    settings: LiFTSettings
    adapter: RandomAdapter
    layer: LiFTSettings | None = None


def heads_settled(
    settings: LiFTSettings,
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    *,
    by_width: bool = True,
    by_rows: bool = True,
    known_too: bool = True,
    values: bool = True,
    trial: bool = False,
) -> Settled:
    """Settle whose the heads are (:func:`with_heads_settled`), and what they stand on.

    Args:
        settings: of meta-training; what is given in them stays.
        adapter: the network as a function of theta.
        tasks: all of the run.
        by_width: see :func:`with_heads_settled`.
        by_rows: whether a network's own classes are put to the test (:mod:`~pyro_lift.tuning.class_layer`).
        known_too: whether that is also asked of classes that the network knows.
        values: whether a network whose output is the tasks' value may be read before its last layer
            (:mod:`~pyro_lift.tuning.value_layer`).
        trial: whether both ways can be gone where it is doubtful which is better; else the network stays as it is.

    Raises:
        ValueError: rows that the network would misread.
    """
    settled = with_heads_settled(settings, adapter, tasks, by_width=by_width)
    if not by_rows or settings.head_scale is not None or settings.head in ("langevin", "shared"):
        return Settled(settled, adapter)
    if trial and values and settled.head_scale is None and settings.noise_scale is None:
        before = without_value_layer(adapter, tasks)
        if before is not None:
            return Settled(replace(settings, head_scale=AUTOMATIC_SCALE), before, settled)
    apart = without_foreign_classes(adapter, tasks, settled.head_scale, known_too=known_too)
    if apart is None or (apart.doubtful and not trial):
        return Settled(settled, adapter)
    return Settled(replace(settings, head_scale=AUTOMATIC_SCALE), apart.adapter, settled if apart.doubtful else None)


def with_heads_settled(
    settings: LiFTSettings, adapter: RandomAdapter, tasks: Sequence[Task], *, by_width: bool = True
) -> LiFTSettings:
    """Write down in the settings whose the heads are, where some of the tasks alone might call for others.

    Trials, halves and turns that hold tasks out then all have the same heads. Where the network's output is features,
    or just as wide as every task has classes, any part of the tasks says the same, and the settings are left alone.

    Args:
        settings: of meta-training; what is given in them stays.
        adapter: the network as a function of theta.
        tasks: all of the run.
        by_width: see :func:`~pyro_lift.models.observation.own_head_scale`.

    Raises:
        ValueError: rows that the network would misread.
    """
    if settings.head_scale is not None or settings.head in ("langevin", "shared"):
        return settings
    check_rows(adapter, tasks)  # the network is called with some of them
    scale = own_head_scale(adapter, tasks, None, solve=True, by_width=by_width)
    if adapter.gives_features:
        return settings
    if scale is not None:
        return replace(settings, head_scale=scale)
    varied = len({task.num_classes for task in tasks}) > 1 or not by_width
    return replace(settings, head="shared") if varied and is_narrower(adapter, tasks) else settings


def rules_of_heads(session: Session | None) -> dict[str, bool]:
    """Return by which rules a run's heads are settled, for :func:`heads_settled`."""
    by = {"by_width": counts_width(session), "by_rows": _has_rule(session, "class layer")}
    return by | {"known_too": tries_known_classes(session), "values": asks_value_layer(session)}


def asks_value_layer(session: Session | None) -> bool:
    """Whether regressions may have heads before the layer that says their value: in a run of before they do not."""
    return _has_rule(session, "value layer")


def counts_width(session: Session | None) -> bool:
    """Whether the width of the output counts in whose the heads are: in a run that an earlier version began it did not.

    What a caller's own session says nothing of is a run of today.
    """
    return _has_rule(session, "heads")


def counts_rounds(session: Session | None) -> bool:
    """Whether the length of the chain counts in its translation: in a run of before the step of that always falls."""
    return _has_rule(session, "translation")


def counts_together(session: Session | None) -> bool:
    """Whether tasks whose rows lack some classes by chance have those of the others: in a run of before they do not."""
    return _has_rule(session, "counted classes")


def has_head_mean(session: Session | None) -> bool:
    """Whether heads of tasks that share their classes stand around one head: in a run of before they do not."""
    return _has_rule(session, "head mean")


def trains_through_mean(session: Session | None) -> bool:
    """Whether theta sees the head of all tasks: in a run of before it sees heads of the tasks' own around it."""
    return _has_rule(session, "trained heads")


def has_usual_widths(session: Session | None) -> bool:
    """Whether tasks choose the prior of their heads of classes together: in a run of before each chooses its own."""
    return _has_rule(session, "head widths")


def has_few_rows(session: Session | None) -> bool:
    """Whether heads of few rows have a prior of their own: in a run of before all have that of the usual number."""
    return _has_rule(session, "few rows")


def has_few_values(session: Session | None) -> bool:
    """Whether regressions of few rows go by all tasks: in a run of before each goes by its own rows."""
    return _has_rule(session, "few values")


def asks_few_classes(session: Session | None) -> bool:
    """Whether tasks of few rows may share a head that helps no others: in a run of before they shared none."""
    return _has_rule(session, "head of few rows")


def takes_a_share(session: Session | None) -> bool:
    """Whether heads of classes stand around a share of that of all tasks: in a run of before around all of it."""
    return _has_rule(session, "share of the head")


def asks_few_values(session: Session | None) -> bool:
    """Whether regressions say what prior heads of each number of rows have: in a run of before all have one."""
    return _has_rule(session, "values by rows")


def has_value_widths(session: Session | None) -> bool:
    """Whether regressions choose together how near to the head of all theirs are: in a run of before each by itself."""
    return _has_rule(session, "value widths")


def tempers_around_rates(session: Session | None) -> bool:
    """Whether predictions are tempered around the rates of a task's classes: in a run of before around even ones."""
    return _has_rule(session, "prediction temperature")


def finds_class_power(session: Session | None) -> bool:
    """Whether classes that a network has itself choose the power in adaptation: in a run of before it was 1."""
    return _has_rule(session, "power of classes")


def finds_matching_biases(session: Session | None) -> bool:
    """Whether tasks say how free biases are under label matching: in a run of before they were as free as can be."""
    return _has_rule(session, "matching biases")


def finds_sureness_of_matching(session: Session | None) -> bool:
    """Whether unseen tasks say how sure label matching may be: in a run of before its predictions are as they come."""
    return _has_rule(session, "sureness of matching")


def finds_share_of_tokens(session: Session | None) -> bool:
    """Whether tasks of tokens say together how many draws stay at the start: in a run of before none."""
    return _has_rule(session, "unmoved draws of tokens")


def finds_unmoved(session: Session | None) -> bool:
    """Whether tasks say together how many draws stay at the start: in a run of before half, or none."""
    return _has_rule(session, "unmoved draws")


def grows_heads(session: Session | None) -> bool:
    """Whether new tasks of many more rows have heads of their own beside a network's classes, or noise: before not."""
    return _has_rule(session, "heads of many rows")


def asks_kept_rows(session: Session | None) -> bool:
    """Whether kept rows say the noise of new regressions of many more rows with heads: in a run of before heads do."""
    return _has_rule(session, "noise of many rows")


def tries_known_classes(session: Session | None) -> bool:
    """Whether heads are tried beside a network that knows the tasks' classes: in a run of before it stays."""
    return _has_rule(session, "known classes")


def sharpens_by_rows(session: Session | None) -> bool:
    """Whether predictions are surer where tasks have rows enough: in a run of before all are, by a test."""
    return _has_rule(session, "sharper predictions")


def asks_dispersion(session: Session | None) -> bool:
    """Whether regressions say how unevenly they vary around one noise: in a run of before they were taken for alike."""
    return _has_rule(session, "noise")


def fades_temperature(session: Session | None) -> bool:
    """Whether a temperature above 1 holds less for tasks of many more rows: in a run of before it held for all."""
    return _has_rule(session, "temperature of many rows")


def fades_with_rows(session: Session | None) -> bool:
    """Whether a prior of heads weighs less where there are more rows than it is of: in a run of before it did not."""
    return _has_rule(session, "many rows")


def leaves_units_out(session: Session | None) -> bool:
    """Whether a few regressions in a larger unit than most are left out: in a run of before they were not."""
    return _has_rule(session, "other units")


def lets_one_task_lose(session: Session | None) -> bool:
    """Whether one odd task leaves the trial of joint training to the others: in a run of before it decided alone."""
    return _has_rule(session, "trial")


def _has_rule(session: Session | None, name: str) -> bool:
    return session is None or not session.config or session.config.get(name) == RULES[name]


def leaves_outliers_out(session: Session | None) -> bool:
    """Whether the prior's widths are found without tasks out of all proportion: earlier versions found them with all.

    Their runs are told by what names them in their folder, where there are no digests of the tasks' rows.
    """
    return session is None or not session.config or TASK_DATA in session.config


def run_config(
    settings: LiFTSettings,
    seed: int | None,
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    *,
    rules: Mapping[str, str],
) -> dict[str, Any]:
    """Return what names a run in its folder: a run that goes on with it must agree.

    Args:
        settings: of meta-training.
        seed: of everything random.
        adapter: the network as a function of theta.
        tasks: all of the run.
        rules: of :data:`RULES`, those that it is under.
    """
    return {
        "settings": asdict(settings),
        "seed": seed,
        "adapter": [[entry.name, list(entry.shape)] for entry in adapter.layout],
        "tasks": [[task.name, task.kind, len(task.train)] for task in tasks],
        TASK_DATA: digests_of_tasks(tasks),
        NETWORK: digest_of_network(adapter),
        ARCHITECTURE: architecture_of(base_of(adapter.backbone)),
        **rules,
    }


def as_saved(settings: LiFTSettings, folder: Path) -> tuple[LiFTSettings, dict[str, str]]:
    """Take from a saved run what settings leave open: what was filled in then may not be today's choice.

    Returns:
        The settings, and those of :data:`RULES` that the run was begun under. Where nothing is saved, the run begins,
        under all of them, and the settings are as they were.
    """
    config = saved_config(folder)
    if not config:
        return settings, RULES
    saved = upgraded_run(config).get("settings", {})
    left_open = [f.name for f in fields(LiFTSettings) if getattr(settings, f.name) is None]
    then = {name: saved[name] for name in left_open if saved.get(name) is not None}
    return replace(settings, **then), {name: rule for name, rule in RULES.items() if config.get(name) == rule}
