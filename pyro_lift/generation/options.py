"""Options of transformers' ``generate``: what is said where, what is added to it, and those of the command line."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyro_lift.support.options import check_number

__all__ = ["Writing", "added", "said"]


@dataclass(frozen=True)
class Writing:
    """How answers are written.

    Attributes:
        which: ``"mean"``, ``"draws"`` or a draw's number.
        consensus: of the draws: ``"probabilities"`` or ``"mbr"``.
        beams: of the search; 1 is greedy.
        max_new_tokens: longest answer; None takes the backbone's, or 64.
    """

    which: Any = "mean"
    consensus: str | None = None
    beams: int = 1
    max_new_tokens: int | None = None

    def options(self) -> dict[str, Any]:
        """Return options of ``generate``."""
        check_number("beams", self.beams, least=1, open_below=False, whole=True)
        if self.max_new_tokens is not None:
            check_number("max_new_tokens", self.max_new_tokens, least=1, open_below=False, whole=True)
        chosen = {"consensus": self.consensus, "max_new_tokens": self.max_new_tokens}
        beams = {"num_beams": self.beams} if self.beams > 1 else {}
        return {name: value for name, value in chosen.items() if value is not None} | beams


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
