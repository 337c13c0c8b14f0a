"""Options: a wrong choice or keyword is told the nearest right one, and old keywords work for one version."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import pytest

from pyro_lift.inference.baselines.mbc import MBC
from pyro_lift.inference.baselines.retriever import LoRARetriever
from pyro_lift.inference.checkpoint.session import Session
from pyro_lift.methods.fixed_theta import FixedTheta
from pyro_lift.support.options import check_choice, check_literal, check_number, named_options, renamed_keywords

Solver = Literal["cg", "neumann"]


@renamed_keywords(zoo="library")
@dataclass(frozen=True)
class Method:
    library: int = 0
    other: str = "a"


def test_a_literal_is_its_own_list_of_choices() -> None:
    check_literal("solver", "cg", Solver)
    with pytest.raises(ValueError, match=r"solver='newman' .* did you mean 'neumann'\? \(one of: 'cg', 'neumann'\)"):
        check_literal("solver", "newman", Solver)
    with pytest.raises(ValueError, match="solver='xyz' is not known"):
        check_choice("solver", "xyz", ["cg"])


def test_an_old_keyword_warns_and_means_the_new_one() -> None:
    with pytest.warns(FutureWarning, match="Method: 'zoo' is now called 'library'"):
        old = Method(zoo=3)  # type: ignore[call-arg]
    assert old == Method(library=3) == Method(3)
    assert replace(old, other="b") == Method(3, "b")
    with pytest.raises(TypeError, match="give the new one alone"):
        Method(zoo=3, library=4)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword"):
        Method(zo=3)  # type: ignore[call-arg]


def test_the_warning_points_at_the_caller() -> None:
    with pytest.warns(FutureWarning) as caught:
        Method(zoo=3)  # type: ignore[call-arg]
    assert caught[0].filename == __file__


@pytest.mark.parametrize("method", [LoRARetriever, MBC, FixedTheta])
def test_methods_on_a_library_take_it_by_its_old_name(method: type) -> None:
    with pytest.warns(FutureWarning, match="'zoo' is now called 'library'"):
        old = method(None, zoo="a library")
    assert old.library == "a library"


def test_a_session_takes_its_hint_by_its_old_name(tmp_path) -> None:  # type: ignore[no-untyped-def]
    with pytest.warns(FutureWarning, match="'way_on' is now called 'resume_hint'"):
        session = Session(tmp_path, way_on="go on")  # type: ignore[call-arg]
    assert session.resume_hint == "go on"


def test_a_wrong_keyword_is_told_the_nearest_right_one() -> None:
    @named_options
    def function(step_size: float = 0.1, draws: int = 3) -> float:
        return step_size * draws

    assert function(step_size=2.0) == 6.0
    with pytest.raises(TypeError, match="unknown option 'stepsize'=1; did you mean 'step_size'"):
        function(stepsize=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("value", "options", "error"),
    [
        (0.0, {}, ValueError),
        (float("nan"), {}, ValueError),
        (float("inf"), {}, ValueError),
        (1.5, {"whole": True}, TypeError),
        (True, {}, TypeError),
        (0, {"least": 1, "open_below": False, "whole": True}, ValueError),
    ],
)
def test_numbers_out_of_range_are_refused(value: float, options: dict, error: type[Exception]) -> None:  # type: ignore[type-arg]
    with pytest.raises(error, match="number="):
        check_number("number", value, **options)
    check_number("number", 2, **options)
