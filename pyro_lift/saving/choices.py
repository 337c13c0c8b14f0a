"""What tasks chose, in a folder's config.json: matching's scale, the predictions' temperature, the tuning, kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from pyro_lift.inference.adaptation.tempered_rows import TemperedRows
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.dispersion import Dispersion
from pyro_lift.models.few_classes import FewClasses
from pyro_lift.models.few_values import FewValues
from pyro_lift.models.heads import FewRows, UsualPrior
from pyro_lift.models.likelihoods import LossKind
from pyro_lift.models.out_of_proportion import InputSize
from pyro_lift.saving.parts import SavablePrior
from pyro_lift.support.archive import DamagedError

__all__ = ["described_choices", "saved_choices", "saved_input_sizes", "saved_positive", "saved_positives"]

#: Names of the tensors of the head that regressions of few rows stand around, and of what its features vary by.
FEW_VALUES, FEW_VALUES_SD = "head_few_values", "head_few_values_sd"
#: Name of the tensor of the head that classes of few rows stand around.
FEW_CLASSES = "head_few_classes"


def described_choices(prior: SavablePrior) -> dict[str, Any]:
    """Return what is written of a prior."""
    few_values = None if prior.head_mean is None else prior.head_mean.few_values
    few_classes = None if prior.head_mean is None else prior.head_mean.few_classes
    return {
        "matching_scale": prior.matching_scale,
        "prediction_temperature": prior.prediction_temperature,
        "tuning": prior.tuning,
        "kinds": list(prior.kinds),
        "classes": dict(prior.classes),
        "moment_power": prior.settings.n_inflate if prior.rescales else None,
        "moment_rows": prior.rows,
        "masks": prior.masks,
        "around_rates": prior.around_rates,
        "value_heads": prior.value_heads,
        "tempered_rows": None if prior.tempered_rows is None else list(prior.tempered_rows),
        "dispersion": None if prior.dispersion is None else list(prior.dispersion),
        "common_classes": prior.common_classes,
        "input_sizes": {name: list(size) for name, size in prior.input_sizes.items()},
        "head_labels": [] if prior.head_mean is None else list(prior.head_mean.labels),
        "head_width": 1.0 if prior.head_mean is None else prior.head_mean.width,
        "head_bias_sd": None if prior.head_mean is None else prior.head_mean.bias_sd,
        "head_around_width": None if prior.head_mean is None else prior.head_mean.around_width,
        "head_rows": None if prior.head_mean is None else prior.head_mean.rows,
        "head_kept": 0 if prior.head_mean is None else prior.head_mean.kept,
        "head_few": [] if prior.head_mean is None else _written_few(prior.head_mean.few),
        "head_few_values": [] if few_values is None else _written_few(few_values.priors),
        "head_few_classes": [] if few_classes is None else _written_few(few_classes.priors),
        "head_few_labels": [] if few_classes is None else list(few_classes.labels),
    }


def saved_choices(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read what was written of a prior; folders from before have a temperature of 1, no tuning and no kinds.

    Raises:
        DamagedError: values that were never written; names the file and the key.
    """
    tuning, scale = config.get("tuning"), config.get("matching_scale")
    if scale is not None and not (isinstance(scale, (int, float)) and scale > 0.0):
        raise DamagedError(f"{path}: matching_scale is {scale!r}; expected a positive number or none.")
    if tuning is not None and not isinstance(tuning, dict):
        raise DamagedError(f"{path}: key 'tuning' is a {type(tuning).__name__}, not a table.")
    temperature = saved_positive(path, config, "prediction_temperature")
    # Before that was written, an adaptation with another power took the preconditioner as it was, and still does.
    rescales = config.get("moment_power") is not None
    # Nor was it brought to the rows of a task.
    rows = None if config.get("moment_rows") is None else saved_positive(path, config, "moment_rows")
    kinds = config.get("kinds", [])
    if not isinstance(kinds, list) or not set(kinds) <= set(get_args(LossKind)):
        raise DamagedError(f"{path}: key 'kinds' is {kinds!r}; expected a list of {', '.join(get_args(LossKind))}.")
    classes = config.get("classes", {})
    if not isinstance(classes, dict) or not all(type(number) is int and number >= 0 for number in classes.values()):
        raise DamagedError(f"{path}: key 'classes' is {classes!r}; expected the number of each class by its name.")
    choices: dict[str, Any] = {
        "matching_scale": scale,
        "prediction_temperature": temperature,
        "tuning": tuning,
        "rescales": rescales,
    }
    # Before that was written, outputs that were no classes of a new task had probability, and still do.
    masks, around_rates = config.get("masks") is True, config.get("around_rates") is True
    choices |= {"input_sizes": saved_input_sizes(path, config), "head_mean": _saved_head_mean(path, config, tensors)}
    choices["dispersion"] = _saved_dispersion(path, config)
    choices["common_classes"] = _saved_classes(path, config)
    choices["value_heads"] = config.get("value_heads") is True
    choices |= {"masks": masks, "around_rates": around_rates, "tempered_rows": _saved_rows(path, config)}
    return {**choices, "rows": rows, "kinds": tuple(kinds), "classes": classes}


def saved_input_sizes(path: Path, config: Mapping[str, Any]) -> dict[str, InputSize]:
    """Read how large inputs are; folders from before do not say.

    Raises:
        DamagedError: values that were never written; names the file and the key.
    """
    sizes = config.get("input_sizes", {})
    try:
        return {name: InputSize(*map(float, size)) for name, size in sizes.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise DamagedError(f"{path}: key 'input_sizes' is {sizes!r}; expected two numbers by input.") from error


def head_tensors(mean: ClassHead | None) -> dict[str, Tensor]:
    """Return the tensors of the head that tasks' own have their prior around, by the names they are saved under."""
    found = {} if mean is None else {"head_mean": mean.head, "head_feature_sd": mean.feature_sd}
    if mean is not None and mean.few_values is not None:
        found |= {FEW_VALUES: mean.few_values.head, FEW_VALUES_SD: mean.few_values.feature_sd}
    if mean is not None and mean.few_classes is not None:
        found[FEW_CLASSES] = mean.few_classes.head
    return {name: x for name, x in found.items() if x is not None}


def _saved_head_mean(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ClassHead | None:
    """Read the head that tasks' own have their prior around; folders without one have none.

    Raises:
        DamagedError: no matrix, not one name for each of its rows, or not one spread for each of its features.
    """
    head = tensors.get("head_mean")
    if head is None:
        return None
    labels = _saved_labels(path, config, "head_labels", "head_mean", head)
    sd = tensors.get("head_feature_sd")
    if sd is not None and sd.shape != (head.shape[-1] - 1,):
        raise DamagedError(
            f"{path}: tensor 'head_feature_sd' has shape {tuple(sd.shape)}, not ({head.shape[-1] - 1},)."
        )
    width = saved_positive(path, config, "head_width")
    bias_sd, around_width = (
        None if config.get(name) is None else saved_positive(path, config, name)
        for name in ("head_bias_sd", "head_around_width")
    )
    few, values = _saved_few(path, config, "head_few"), _saved_few_values(path, config, tensors)
    rows = saved_positive(path, config, "head_rows") if few or config.get("head_rows") not in (None, 0) else 0
    kept = saved_positive(path, config, "head_kept") if config.get("head_kept") not in (None, 0) else 0
    classes = _saved_few_classes(path, config, tensors)
    return ClassHead(head, labels, width, sd, bias_sd, around_width, int(rows), few, int(kept), values, classes)


def _saved_labels(path: Path, config: Mapping[str, Any], key: str, name: str, head: Tensor) -> tuple[str, ...]:
    """Read the names of a head's classes; none where they have only numbers.

    Raises:
        DamagedError: no matrix, or not one name for each of its rows.
    """
    labels = config.get(key, [])
    if head.dim() != 2 or head.shape[-1] < 2:
        raise DamagedError(f"{path}: tensor {name!r} has shape {tuple(head.shape)}, not (classes, features + 1).")
    named = isinstance(labels, list) and all(isinstance(label, str) for label in labels)
    if not named or len(labels) not in (0, len(head)):
        raise DamagedError(f"{path}: key {key!r} is {labels!r}; expected a name for each of {len(head)} classes.")
    return tuple(labels)


def _saved_few_classes(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FewClasses | None:
    """Read the head that classes of few rows stand around; folders from before have none.

    Raises:
        DamagedError: one part without the other.
    """
    priors, head = _saved_few(path, config, "head_few_classes"), tensors.get(FEW_CLASSES)
    if not priors and head is None:
        return None
    if not priors or head is None:
        raise DamagedError(f"{path}: key 'head_few_classes' and tensor {FEW_CLASSES!r} do not belong together.")
    return FewClasses(head, _saved_labels(path, config, "head_few_labels", FEW_CLASSES, head), priors)


def _saved_few_values(path: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> FewValues | None:
    """Read what regressions say of heads of few rows; folders from before have nothing.

    Raises:
        DamagedError: one part without the others, or a head and spreads of different features.
    """
    priors, head, sd = _saved_few(path, config, "head_few_values"), tensors.get(FEW_VALUES), tensors.get(FEW_VALUES_SD)
    if not priors and head is None and sd is None:
        return None
    if not priors or head is None or sd is None or head.dim() != 2 or sd.shape != (head.shape[-1] - 1,):
        raise DamagedError(
            f"{path}: key 'head_few_values' and tensors {FEW_VALUES!r} and {FEW_VALUES_SD!r} do not belong together."
        )
    return FewValues(head, sd, priors)


def _written_few(few: FewRows) -> list[list[float]]:
    return [[rows, *usual] for rows, usual in few]


def _saved_few(path: Path, config: Mapping[str, Any], name: str) -> FewRows:
    """Read the priors of heads of few rows; folders from before have none.

    Raises:
        DamagedError: not a number of rows and two standard deviations each.
    """
    few = config.get(name, [])
    try:
        found = tuple((int(rows), UsualPrior(float(width), float(bias_sd))) for rows, width, bias_sd in few)
        if all(0.0 < x < math.inf for rows, usual in found for x in (rows, *usual)):
            return found
    except (TypeError, ValueError):
        pass
    raise DamagedError(f"{path}: key {name!r} is {few!r}; expected numbers of rows, each with two standard deviations.")


def _saved_classes(path: Path, config: Mapping[str, Any]) -> int | None:
    """Read how many classes tasks have in common; folders from before do not say.

    Raises:
        DamagedError: not a number of classes.
    """
    classes = config.get("common_classes")
    if classes is None or (type(classes) is int and classes >= 0):
        return classes
    raise DamagedError(f"{path}: key 'common_classes' is {classes!r}; expected a whole number, 0 or more.")


def _saved_rows(path: Path, config: Mapping[str, Any]) -> TemperedRows | None:
    """Read the rows that a temperature was found at; in folders from before it holds for all tasks.

    Raises:
        DamagedError: not a number of rows and a share of classes.
    """
    rows = config.get("tempered_rows")
    try:
        found = None if rows is None else TemperedRows(*map(float, rows))
        if found is None or (
            0.0 < found.rows < math.inf and 0.0 <= found.unseen <= 1.0 and 0.0 <= found.many_more < math.inf
        ):
            return found
    except (TypeError, ValueError):
        pass
    raise DamagedError(f"{path}: key 'tempered_rows' is {rows!r}; expected a number of rows and a share of classes.")


def _saved_dispersion(path: Path, config: Mapping[str, Any]) -> Dispersion | None:
    """Read how unevenly regressions vary; those of folders from before are alike.

    Raises:
        DamagedError: not a number and two lists of as many numbers above zero.
    """
    told = config.get("dispersion")
    if told is None:
        return None
    if not isinstance(told, list) or len(told) != 3:
        raise DamagedError(f"{path}: key 'dispersion' is {told!r}; expected a number and two lists.")
    rows, usual, values = (saved_positives(path, "dispersion", part) for part in ([told[0]], *told[1:]))
    if len(usual) != len(values):
        raise DamagedError(f"{path}: key 'dispersion' is {told!r}; expected two lists of one length.")
    return Dispersion(rows[0], usual, values)


def saved_positives(path: Path, name: str, values: Any) -> tuple[float, ...]:
    """Read numbers above zero.

    Raises:
        DamagedError: not a list of these.
    """
    if isinstance(values, list) and values and all(type(x) in (int, float) and 0.0 < x < math.inf for x in values):
        return tuple(map(float, values))
    raise DamagedError(f"{path}: key {name!r} has {values!r}; expected a list of numbers above 0.")


def saved_positive(path: Path, config: Mapping[str, Any], name: str) -> float:
    """Read a number above zero; 1 where none was written.

    Raises:
        DamagedError: not a number above zero.
    """
    value = config.get(name, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0.0 < value < math.inf:
        raise DamagedError(f"{path}: key {name!r} is {value!r}, not a number above 0.")
    return float(value)
