"""Model cards, filled in: what was learned, from what, how, and how to use it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pyro_lift.saving.parts import SavablePosterior, SavablePrior

__all__ = ["posterior_card", "prior_card"]

_PRIOR = """{header}
# A LiFT prior over {kind} adapters of {base}

A Gaussian mixture with K = {K} over the adapter's {dim:,} weights, learned from {count} tasks by SGLD-Gibbs (Bayesian
meta-learning of adapters; a new task is adapted to by SGLD under this prior).

## Use

```python
from pyro_lift import LiFTPrior, Task

prior = LiFTPrior.from_pretrained({source!r}, backbone)   # the plain base model, {base}
posterior = prior.adapt(Task("new", (inputs, labels)))
probabilities = posterior.predict(test_inputs)
```

The folder is also a PEFT adapter, the mean of the heaviest component, with no pyro_lift needed:
`peft.PeftModel.from_pretrained(backbone, {source!r})`.

## Components

{components}

## Tasks ({count})

{tasks}

## Settings

{settings}

## Results

{results}

## Chosen on held-out tasks

{choices}

## Limits

- It fits one base model: {parameters:,} frozen weights, compared by digest when it is loaded.
- `beta` and `sigma` are standard deviations. With `temperature` below 1 or `n_inflate` above 1 the draws are those of a
  colder posterior, and uncertainty is smaller than the model's own.

Written by {versions}.
"""

_POSTERIOR = """{header}
# Draws of an adapter of {base} for the task {task!r}

{draws} draws of the adapter's {dim:,} weights given {rows} training rows, under a LiFT prior (component {component}).

## Use

```python
from pyro_lift import TaskPosterior

posterior = TaskPosterior.from_pretrained({source!r}, backbone)   # the plain base model, {base}
probabilities = posterior.predict(inputs)   # averaged over the draws
```

The folder is also a PEFT adapter, the mean of the draws: `peft.PeftModel.from_pretrained(backbone, {source!r})`.{head}

## Task

{about}

## Results

{results}

Written by {versions}.
"""


def prior_card(prior: SavablePrior, config: Mapping[str, Any]) -> str:
    """Format the README.md of a prior's folder."""
    weight, mean, variance = prior.mixture.moments
    rows = [
        [k, f"{float(w):.3f}", f"{float(m.norm()):.4g}", f"{float(v.mean()) ** 0.5:.3g}"]
        for k, (w, m, v) in enumerate(zip(weight, mean, variance, strict=True))
    ]
    return _PRIOR.format(
        **_common(config),
        K=prior.mixture.components,
        count=len(prior.tasks),
        tasks=", ".join(f"`{name}`" for name in prior.tasks) or "Not recorded.",
        components=_table(["component", "weight", "norm of the mean", "sd of a coordinate"], rows),
        settings=_table(["setting", "value"], [[f"`{k}`", f"`{_setting(v)}`"] for k, v in _settings(prior).items()]),
        results=_results(prior.results),
        choices=_choices(prior),
        parameters=config["base_model"]["parameters"],
    )


def posterior_card(posterior: SavablePosterior, config: Mapping[str, Any]) -> str:
    """Format the README.md of a posterior's folder."""
    about = [[key, f"`{json.dumps(value)}`"] for key, value in config["task"].items()]
    head = "" if posterior.heads is None else "\nThe task's own linear head is `head.safetensors` (`weight`, `bias`)."
    if posterior.heads is not None and posterior.task.kind == "matching":
        head = head[:-2] + ", `similarity_scale`): logits are the scale times the cosines of the encoded input and the "
        head += "label texts, plus weight and bias on the encoded input of length one."
    return _POSTERIOR.format(
        **_common(config),
        task=posterior.task.name,
        draws=len(posterior.thetas),
        rows=len(posterior.task.train),
        component=posterior.component,
        head=head,
        about=_table(["", "value"], about),
        results=_results(posterior.results),
    )


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    base = config["base_model"]
    return {
        "header": _header(base["name"]),
        "kind": config["peft"]["peft_type"],
        "base": base["name"] or base["class"],
        "dim": config["adapter"]["dim"],
        "source": "user/name",
        "versions": ", ".join(f"{name} {version}" for name, version in config["versions"].items()),
    }


def _header(base: str | None) -> str:
    lines = ["---", "library_name: peft", "tags:", "- pyro-lift", "- bayesian", "- meta-learning", "- lora"]
    # The hub refuses a card whose base model is a path of somebody's disk.
    if base and base.count("/") <= 1 and not base.startswith((".", "/", "~")) and not Path(base).exists():
        lines.append(f"base_model: {base}")
    return "\n".join([*lines, "---", ""])


def _settings(prior: SavablePrior) -> dict[str, Any]:
    adapt = {f"adapt.{name}": value for name, value in dataclasses.asdict(prior.adapt_settings).items()}
    return {**dataclasses.asdict(prior.settings), "seed": prior.seed, **adapt}


def _setting(value: Any) -> str:
    """Format a setting; one that has a number for each adapter tensor by its range."""
    if isinstance(value, (list, tuple)):
        return f"{min(value):.3g} .. {max(value):.3g}, by module"
    return json.dumps(value)


def _results(results: Mapping[str, Any]) -> str:
    if not results:
        return "None recorded; pass them as `save_pretrained(folder, results={...})`."
    return _table(["measure", "value"], [[name, _number(value)] for name, value in results.items()])


def _choices(prior: SavablePrior) -> str:
    """Say what was chosen on tasks that meta-training did not see: the temperature, and the settings."""
    T, at = prior.prediction_temperature, prior.tempered_rows
    of = (
        f" of tasks of {at.rows:.0f} rows or more"
        if at is not None and T < 1.0 and "regression" not in prior.kinds
        else ""
    )
    said = (
        f"Predictions{of} are brought to the temperature {T:.3g}." if T != 1.0 else "Predictions have no temperature."
    )
    if prior.tuning is None:
        return f"{said} The settings were not tuned."
    trials = sorted(prior.tuning["trials"], key=lambda trial: (-trial["share"], trial["loss"]))[:8]
    rows = [[trial["settings"], f"{trial['share']:.2g}", f"{trial['loss']:.4f}"] for trial in trials]
    table = _table(["settings, over the first's", "share of the length", prior.tuning["measure"]], rows)
    held_out = ", ".join(f"`{name}`" for name in prior.tuning["held_out"])
    return f"{said} Settings: `{prior.tuning['chosen']}`, the best on {held_out} (`tuning.png`):\n\n{table}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _table(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (header, *rows)]
    lines.insert(1, "|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join(lines)
