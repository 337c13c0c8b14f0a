"""One sentence of advice from made-up tables of losses: who is named, and what is claimed."""

from __future__ import annotations

import math
import random
import re

import pytest

from pyro_lift.comparison.advice import Contestant, advise, difference

TASKS = 12
BASE = [0.6 + 0.05 * k for k in range(TASKS)]
CHANCE = [1.5] * TASKS


def table(**shift: float) -> dict[str, Contestant]:
    """Losses of five methods: the tasks' own level, a shift a method, and a little noise."""
    names = {"probe": ("Linear Probe", 0), "lora": ("Tuned LoRA", 1), "union": ("Union Train", 2)}
    names |= {"reptile": ("Reptile", 3), "lift": ("LiFT", 4)}
    noise = random.Random(0)
    contestants = {}
    for key, (title, rank) in names.items():
        losses = [base + shift.get(key, 0.0) + noise.gauss(0.0, 0.02) for base in BASE]
        contestants[title] = Contestant(losses, rank)
    return contestants


def test_a_probe_that_is_best_is_to_be_used_and_nothing_is_shared() -> None:
    sentence = advise(table(lora=0.2, union=0.3, reptile=0.3, lift=0.25), CHANCE)
    assert sentence.startswith("Linear Probe: 0.2")
    assert "p < 0.001" in sentence and "use it" in sentence
    assert sentence.endswith("these tasks share nothing that meta-learning can use in this time.")


def test_in_a_tie_the_simplest_method_is_to_be_used() -> None:
    contestants = {name: Contestant([x + (0.001 if rank else 0.0) for x in BASE], rank) for name, rank in
                   {"Linear Probe": 0, "Tuned LoRA": 1, "LiFT": 4}.items()}  # fmt: skip
    reversed_tie = {**contestants, "LiFT": Contestant([x - 0.001 for x in BASE], 4)}
    for tie in (contestants, reversed_tie):
        sentence = advise(tie, CHANCE)
        assert sentence.startswith("Linear Probe is as good as anything here") and "share nothing" in sentence
    assert "LiFT, 0.001 nats lower" in advise(reversed_tie, CHANCE)


def test_lift_that_is_best_beyond_doubt_is_named_with_its_lead_and_its_p_value() -> None:
    sentence = advise(table(probe=0.3, lora=0.3, union=0.11, reptile=0.25, lift=0.0), CHANCE)
    assert sentence.startswith("LiFT: ") and "meta-learning pays here" in sentence
    assert "0.11 nats better than the next (Union Train, p < 0.001)" in sentence.replace("0.12", "0.11").replace(
        "0.10", "0.11"
    )


def test_of_two_meta_learners_alike_the_simpler_one_is_named_and_the_other_too() -> None:
    sentence = advise(table(probe=0.3, lora=0.3, union=0.0, reptile=0.2, lift=0.0), CHANCE)
    assert sentence.startswith("Union Train: 0.3") or sentence.startswith("Union Train: 0.2")
    assert re.search(r"(it is not clearly better than LiFT \(0\.0|; LiFT, 0\.0\d+ nats lower, is not clear)", sentence)
    assert "meta-learning pays here" in sentence


def test_a_lead_is_told_over_guessing_where_guessing_is_the_best_without_meta_learning() -> None:
    contestants = table(probe=0.9, lora=0.8, union=0.3, reptile=0.3, lift=0.0)
    guess = [base + 0.15 + 0.01 * (-1) ** k for k, base in enumerate(BASE)]
    sentence = advise(contestants, guess)
    assert sentence.endswith("better than the next (guess, p < 0.001): meta-learning pays here, use it.")
    lead = difference(guess, contestants["LiFT"].losses).difference
    assert sentence.startswith(f"LiFT: {lead:.2f} nats better")
    assert "(Tuned LoRA, p < 0.001)" in advise(contestants)


def test_one_regression_over_all_rows_is_not_called_meta_learning() -> None:
    contestants = {
        "Linear Probe": Contestant([x + 0.3 + 0.01 * (-1) ** k for k, x in enumerate(BASE)], 0),
        "Pooled Probe": Contestant(BASE, 2, steps=False),
        "LiFT": Contestant([x + 0.1 for x in BASE], 4),
    }
    sentence = advise(contestants, CHANCE)
    assert sentence.startswith(
        "Pooled Probe: 0.30 nats better than the best without other tasks (Linear Probe, p < 0.0"
    )
    assert "one regression over the rows of all tasks is enough here, use it; it is 0.10 nats better" in sentence
    assert "meta-learning" not in sentence


def test_a_runner_up_that_is_not_clearly_behind_is_said_with_its_gap() -> None:
    gaps = [0.05 * (-1) ** k + 0.02 for k in range(TASKS)]
    contestants = {
        "Linear Probe": Contestant([x + 0.3 for x in BASE], 0),
        "Pooled Probe": Contestant([x + gap for x, gap in zip(BASE, gaps, strict=True)], 2, steps=False),
        "LiFT": Contestant(BASE, 4),
    }
    sentence = advise(contestants, CHANCE)
    assert sentence.startswith("LiFT: 0.30 nats better")
    assert re.search(r"use it; it is not clearly better than Pooled Probe \(0\.020 nats, p = 0\.\d+\)\.$", sentence)


def test_a_lead_within_chance_is_not_called_one() -> None:
    gaps = [0.5, -0.1, 0.6, -0.2, 0.4, -0.1]
    losses = BASE[:6]
    contestants = {
        "Linear Probe": Contestant([x + gap for x, gap in zip(losses, gaps, strict=True)], 0),
        "LiFT": Contestant(losses, 4),
    }
    assert difference(contestants["Linear Probe"].losses, losses).p_value > 0.05
    assert difference(contestants["Linear Probe"].losses, losses).difference > 0.1
    sentence = advise(contestants, CHANCE[:6])
    assert sentence.startswith("LiFT is ahead by 0.18 nats") and "may pay here" in sentence and "pays" not in sentence


def test_methods_that_are_all_at_chance_are_not_advised() -> None:
    near = [1.5 + 0.01 * (-1) ** k for k in range(TASKS)]
    contestants = {"Linear Probe": Contestant(near, 0), "LiFT": Contestant(CHANCE, 4)}
    sentence = advise(contestants, CHANCE)
    assert sentence.startswith("Nothing here is clearly better than guessing") and "use it" not in sentence


def test_one_task_decides_nothing() -> None:
    sentence = advise({"Linear Probe": Contestant([0.9], 0), "LiFT": Contestant([0.2], 4)}, [1.0])
    assert sentence == (
        "LiFT has the lowest NLL (0.200), but one task to be judged by decides nothing: give more tasks."
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_method_without_a_finite_loss_is_passed_over_and_named(bad: float) -> None:
    contestants = table(probe=0.0, lora=0.2, union=0.2, reptile=0.2)
    contestants["LiFT"] = Contestant([bad, *BASE[1:]], 4)
    sentence = advise(contestants, CHANCE)
    assert sentence.startswith("Linear Probe") and "LiFT: no finite NLL" in sentence
    only = {"LiFT": Contestant([bad] * TASKS, 4)}
    assert advise(only).startswith("No method gave a finite NLL")
    assert advise({}).startswith("No method gave a finite NLL")


def test_without_a_method_of_the_tasks_own_nothing_is_said_of_meta_learning() -> None:
    contestants = {name: c for name, c in table(union=0.2).items() if c.meta}
    assert "nothing without meta-learning was compared" in advise(contestants, CHANCE)
    alone = {name: c for name, c in table(lora=0.3).items() if not c.meta}
    assert "meta-learning" not in advise(alone, CHANCE)


def test_the_names_order_of_the_table_does_not_matter() -> None:
    contestants = table(probe=0.2, lora=0.1, union=0.3)
    backwards = dict(reversed(contestants.items()))
    assert advise(contestants, CHANCE) == advise(backwards, CHANCE)


def test_identical_losses_are_a_tie_and_not_a_division_by_zero() -> None:
    contestants = {"LiFT": Contestant(BASE, 4), "Linear Probe": Contestant(BASE, 0)}
    assert advise(contestants, CHANCE).startswith("Linear Probe is as good as anything here")


def test_a_few_tasks_that_differ_much_and_are_all_far_better_than_guessing_are_advised_on() -> None:
    chance = [0.69, 1.61, 2.30, 1.80]
    losses = [0.39, 1.11, 0.70, 0.70]
    contestants = {"Linear Probe": Contestant(losses, 0), "LiFT": Contestant([x + 0.02 for x in losses], 4)}
    assert difference(losses, chance).p_value > 0.05
    assert "Linear Probe" in (sentence := advise(contestants, chance)) and "guessing" not in sentence
