"""The map of the house: docs/figures/architecture.svg shows the import graph as it is."""

from __future__ import annotations

import html
import json
import re
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "docs"))

import make_map


def test_the_map_is_drawn_from_todays_imports() -> None:
    description = re.search(r"<dc:description>(.*?)</dc:description>", make_map.FIGURE.read_text("utf-8"), re.DOTALL)
    assert description is not None, "run `make map`"
    drawn = json.loads(html.unescape(description.group(1)))
    arrows = make_map.reduced(make_map.floor_graph())
    assert drawn == {floor: sorted(targets) for floor, targets in arrows.items()}, "run `make map`"


def test_every_floor_has_words_and_stands_above_what_it_imports() -> None:
    assert set(make_map.CONTENTS) == set(make_map.LAW)  # type: ignore[attr-defined]
    arrows = make_map.reduced(make_map.floor_graph())
    height = make_map.levels(arrows)
    assert all(height[floor] > height[target] for floor, targets in arrows.items() for target in targets)


def test_an_arrow_that_others_imply_is_left_out() -> None:
    floors = {"a": {"b", "c"}, "b": {"c"}, "c": set()}
    assert make_map.reduced(floors) == {"a": {"b"}, "b": {"c"}, "c": set()}
