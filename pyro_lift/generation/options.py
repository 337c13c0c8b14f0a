"""Options of transformers' ``generate``: what is said where, and what is added to it."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

__all__ = ["added", "said"]


def said(name: str, options: Mapping[str, Any], network: Any) -> Any:
    """Return an option as transformers reads it: of the call, else of its ``generation_config``, else the backbone's.

    Raises:
        TypeError: a ``generation_config`` that is none.
    """
    given = options.get("generation_config")
    if given is not None and not hasattr(given, "pad_token_id"):
        raise TypeError(
            f"generation_config is a {type(given).__name__}; expected a transformers.GenerationConfig. Give options "
            "that are a dictionary as keywords: generate(inputs, **options)."
        )
    if name in options:
        return options[name]
    values = (getattr(config, name, None) for config in (given, network.generation_config))
    return next((value for value in values if value is not None), None)


def added(options: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """Add options: to a copy of the ``generation_config`` where there is one, which transformers wants by itself."""
    given = options.get("generation_config")
    if given is None:
        return {**options, **values}
    config = copy.deepcopy(given)
    for name, value in values.items():
        setattr(config, name, value)
    taken = {name: value for name, value in options.items() if name not in values}
    return {**taken, "generation_config": config}
