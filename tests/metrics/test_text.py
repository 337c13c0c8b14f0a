"""Scores equal their reference implementations on generated cases, and hold at the edges."""

from __future__ import annotations

import math
import random
import re
import string
import warnings
from collections import Counter

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import pearsonr, ttest_ind
from sklearn.metrics import f1_score, matthews_corrcoef

from pyro_lift.metrics.significance import pooled_t_test, welch_t_test
from pyro_lift.metrics.text import METRICS, normalize_answer, score, token_f1

WORDS = ["the", "a", "an", "The", "cat", "Cat", "dog", "U.S.", "don't", "--", "élan", "42", "a-b", "theatre", "", "?"]
CASES = 200


def phrase(rng: random.Random, longest: int = 6) -> str:
    return rng.choice([" ", "  "]).join(rng.choice(WORDS) for _ in range(rng.randint(0, longest)))


def rows(rng: random.Random) -> tuple[list[str], list[list[str]]]:
    n = rng.randint(1, 12)
    references = [[phrase(rng) for _ in range(rng.randint(1, 3))] for _ in range(n)]
    predictions = [rng.choice(r) if rng.random() < 0.3 else phrase(rng) for r in references]
    return predictions, references


def squad_normal(text: str) -> str:
    """The published rule, written as its four named steps."""
    lowered = text.lower()
    bare = "".join(c for c in lowered if c not in string.punctuation)
    without = re.sub(r"\b(a|an|the)\b", " ", bare)
    return " ".join(without.split())


def squad_f1(prediction: str, truth: str) -> float:
    ours, theirs = squad_normal(prediction).split(), squad_normal(truth).split()
    same = sum((Counter(ours) & Counter(theirs)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(theirs)
    return 2 * precision * recall / (precision + recall)


def lcs(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1, j + 1] = table[i, j] + 1 if x == y else max(table[i, j + 1], table[i + 1, j])
    return int(table[-1, -1])


@pytest.mark.parametrize("seed", range(CASES))
def test_scores_equal_the_reference_implementations(seed: int) -> None:
    rng = random.Random(seed)
    predictions, references = rows(rng)
    pairs = list(zip(predictions, references, strict=True))
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = {
        "ACC": np.mean([max(p.lower() == r.lower() for r in rs) for p, rs in pairs]),
        "EM": np.mean([max(squad_normal(p) == squad_normal(r) for r in rs) for p, rs in pairs]),
        "QA-F1": np.mean([max(squad_f1(p, r) for r in rs) for p, rs in pairs]),
        "Rouge-L": np.mean(
            [
                max(scorer.score(r, p)["rougeL"].fmeasure for r in rs) if p.strip(string.punctuation) else 0.0
                for p, rs in pairs
            ]
        ),
    }
    for name, value in expected.items():
        assert score(name, predictions, references) == pytest.approx(float(value), abs=1e-12), name


@pytest.mark.parametrize("seed", range(CASES))
def test_class_scores_equal_scikit_learn_with_off_label_strings(seed: int) -> None:
    rng = random.Random(seed)
    labels = ["acceptable", "unacceptable", "neutral"][: rng.randint(1, 3)]
    n = rng.randint(1, 20)
    truth = [rng.choice(labels) for _ in range(n)]
    guess = [rng.choice([*labels, f"noise {rng.randint(0, 2)}", " acceptable", ""]) for _ in range(n)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        f1 = f1_score(truth, guess, average="macro", zero_division=0)
        phi = matthews_corrcoef([t == "acceptable" for t in truth], [g.strip() == "acceptable" for g in guess])
    references = [[t, "another reference that is not looked at"] for t in truth]
    assert score("Classification-F1", guess, references) == pytest.approx(f1, abs=1e-12)
    assert score("Matthew-Correlation", guess, references) == pytest.approx(phi, abs=1e-12)


@pytest.mark.parametrize("seed", range(CASES))
def test_pearson_equals_scipy_and_is_zero_where_undefined(seed: int) -> None:
    rng = random.Random(seed)
    n = rng.randint(1, 12)
    truth = [float(rng.randint(1, 3)) for _ in range(n)]
    guess = [str(rng.choice([t, rng.gauss(0, 1), 2])) for t in truth]
    if rng.random() < 0.2:
        guess[rng.randrange(n)] = rng.choice(["good", "", "nan", "inf"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = pearsonr(truth, [float(g) for g in guess]).statistic
        except ValueError:
            expected = math.nan
    value = score("Pearson-Correlation", guess, [[str(t)] for t in truth])
    assert value == (pytest.approx(expected, abs=1e-12) if math.isfinite(expected) else 0.0)


@pytest.mark.parametrize("seed", range(CASES))
def test_rouge_l_is_the_longest_common_subsequence_of_lower_case_words(seed: int) -> None:
    rng = random.Random(seed)
    a, b = ([rng.choice("abcd") for _ in range(rng.randint(1, 9))] for _ in range(2))
    common = lcs(a, b)
    f = 2 * common / (len(a) + len(b))
    assert score("Rouge-L", [" ".join(a).upper()], [[" ".join(b)]]) == pytest.approx(f, abs=1e-12)


@pytest.mark.parametrize(
    ("metric", "prediction", "references", "value"),
    [
        ("ACC", "YES", ["yes"], 1.0),
        ("ACC", "yes ", ["yes"], 0.0),
        ("EM", "The cat.", ["cat"], 1.0),
        ("EM", "theatre", ["atre"], 0.0),
        ("EM", "the", [""], 1.0),
        ("QA-F1", "", [""], 0.0),
        ("QA-F1", "the", ["a"], 0.0),
        ("QA-F1", "cat cat dog", ["cat", "dog dog cat"], 2 / 3),
        ("Rouge-L", "?!", ["?!"], 0.0),
        ("Rouge-L", "", ["x"], 0.0),
        ("Classification-F1", "x", ["y"], 0.0),
        ("Matthew-Correlation", "acceptable", ["acceptable"], 0.0),
        ("Pearson-Correlation", "3", ["3"], 0.0),
    ],
)
def test_edges(metric: str, prediction: str, references: list[str], value: float) -> None:
    assert score(metric, [prediction], [references]) == pytest.approx(value)


def test_every_off_label_string_is_one_more_class_of_f1_zero() -> None:
    truth = [["a"], ["a"], ["b"], ["b"]]
    assert score("Classification-F1", ["a", "a", "b", "b"], truth) == 1.0
    one = score("Classification-F1", ["a", "a", "b", "junk"], truth)
    two = score("Classification-F1", ["a", "rubbish", "b", "junk"], truth)
    assert one == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert two == pytest.approx((2 / 3 + 2 / 3 + 0 + 0) / 4)


def test_bad_rows_are_refused() -> None:
    for metric in METRICS:
        with pytest.raises(ValueError, match="2 predictions and 1 rows"):
            score(metric, ["a", "b"], [["a"]])
        with pytest.raises(ValueError, match="at least one"):
            score(metric, [], [])
        with pytest.raises(TypeError, match="row 0: references is the string 'abc'"):
            score(metric, ["abc"], ["abc"])
        with pytest.raises(ValueError, match="row 0: no reference"):
            score(metric, ["abc"], [[]])
    with pytest.raises(ValueError, match="row 1: reference 'high' is not a number"):
        score("Pearson-Correlation", ["1", "2"], [["1"], ["high"]])
    with pytest.raises(ValueError, match="did you mean 'QA-F1'"):
        score("QA-F", ["a"], [["a"]])


def test_normal_form_and_token_f1_are_symmetric_where_they_should_be() -> None:
    rng = random.Random(0)
    for _ in range(CASES):
        a, b = phrase(rng), phrase(rng)
        assert normalize_answer(normalize_answer(a)) == normalize_answer(a)
        assert token_f1(a, b) == token_f1(b, a)


#: Mean, sd and p-value as printed in the paper's Table 14 (CLS-45, five runs each), against LiFT K = 5, 63.87 +- 0.31.
TABLE_14 = {
    "No Meta Train": (56.27, 1.30, 3.26e-6),
    "Union Train": (56.79, 0.59, 3.63e-8),
    "MAML": (52.82, 1.05, 3.72e-8),
    "FO-MAML": (57.70, 1.18, 8.02e-6),
    "i-MAML": (59.03, 0.65, 8.81e-7),
    "Reptile": (58.26, 0.66, 3.36e-7),
    "BMAML": (57.98, 0.59, 1.09e-7),
    "ABML": (55.74, 1.25, 1.47e-6),
    "MAML-Mix": (53.87, 0.12, 7.19e-12),
    "i-MAML-Mix": (58.99, 1.20, 4.85e-5),
    "Retriever Mix, 5": (55.82, 1.42, 4.06e-6),
    "Retriever Mix, all": (52.58, 1.11, 4.87e-8),
    "Retriever Fuse, 5": (56.03, 1.69, 1.69e-5),
    "Retriever Fuse, all": (53.77, 1.29, 3.52e-7),
    "MBC, 5": (56.17, 1.05, 6.23e-7),
    "MBC, 10": (55.41, 0.87, 8.08e-8),
}


@pytest.mark.parametrize("method", [m for m in TABLE_14 if m != "Union Train"])
def test_the_pooled_test_gives_the_p_values_of_table_14_within_rounding(method: str) -> None:
    mean, sd, printed = TABLE_14[method]
    half = 0.005
    low = pooled_t_test(63.87 + half, 0.31 - half, 5, mean - half, sd - half, 5).p_value
    high = pooled_t_test(63.87 - half, 0.31 + half, 5, mean + half, sd + half, 5).p_value
    assert low <= printed <= high
    assert pooled_t_test(63.87, 0.31, 5, mean, sd, 5).p_value == pytest.approx(printed, rel=0.1)


def test_one_row_of_table_14_does_not_follow_from_its_printed_numbers() -> None:
    """Union Train: no rounding of the printed moments gives the printed p-value; the largest is a quarter below it."""
    mean, sd, printed = TABLE_14["Union Train"]
    largest = pooled_t_test(63.865, 0.315, 5, mean + 0.005, sd + 0.005, 5).p_value
    assert 0.7 * printed < largest < 0.8 * printed


def test_many_distinct_strings_raise_no_warning() -> None:
    strings = [f"answer {i}" for i in range(60)]
    assert score("Classification-F1", strings, [[s] for s in strings]) == 1.0


def test_tests_of_means_equal_scipy_on_the_runs_themselves() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = rng.normal(0, 1, rng.integers(2, 9)), rng.normal(0.5, 2, rng.integers(2, 9))
        moments = (a.mean(), a.std(), len(a), b.mean(), b.std(), len(b))
        for test, equal in ((pooled_t_test, True), (welch_t_test, False)):
            theirs = ttest_ind(a, b, equal_var=equal)
            ours = test(*moments)
            assert (ours.t, ours.p_value) == pytest.approx((theirs.statistic, theirs.pvalue))
            assert ours.degrees == pytest.approx(theirs.df)
    assert pooled_t_test(1.0, 0.0, 5, 1.0, 0.0, 5).p_value == 1.0
    assert pooled_t_test(2.0, 0.0, 5, 1.0, 0.0, 5).p_value == 0.0
    with pytest.raises(ValueError, match="at least two runs"):
        pooled_t_test(1.0, 0.1, 1, 1.0, 0.1, 5)
