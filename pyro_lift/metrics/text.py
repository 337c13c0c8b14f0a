r"""Scores of predicted strings against references, by the names and with the edge cases of CrossFit.

All are shares in [0, 1] (correlations in [-1, 1]) over the rows of one task; tables show them times 100. A row may have
several references: accuracy, exact match, QA-F1 and ROUGE-L take the best of them, the others look at the first.

References:
    CrossFit: a few-shot learning challenge for cross-task generalization in NLP, Ye et al., 2021, arXiv:2104.08835.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from pyro_lift.metrics.words import NO_PUNCTUATION, bare, composed, rouge_words, words
from pyro_lift.support.options import check_choice

__all__ = [
    "METRICS",
    "accuracy",
    "exact_match",
    "macro_f1",
    "matthews",
    "normalize_answer",
    "pearson",
    "qa_f1",
    "rouge_l",
    "score",
    "token_f1",
]

References = Sequence[Sequence[str]]

_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalize_answer(text: str) -> str:
    """Convert to SQuAD's normal form: lower case, no ASCII punctuation, no articles a, an, the, single spaces.

    Accented letters are one character each, and a text with letters of other scripts than Latin loses their punctuation
    too (SQuAD's rule is for English).

    Example:
        >>> normalize_answer(" The  U.S.A. (an atlas)")
        'usa atlas'
    """
    return " ".join(_ARTICLES.sub(" ", bare(composed(text.lower()))).split())


def token_f1(prediction: str, reference: str) -> float:
    """Compute F1 of the bags of normalised words; 0 if no word is shared, two empty answers included (SQuAD 1.1).

    In scripts that put no blanks between words a character is a word.
    """
    ours, theirs = words(normalize_answer(prediction)), words(normalize_answer(reference))
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2.0 * shared / (len(ours) + len(theirs)) if shared else 0.0


def accuracy(predictions: Sequence[str], references: References) -> float:
    """Return the share of rows whose prediction is a reference; letter case is ignored, blanks are not."""
    return _mean_of_best(predictions, references, lambda p, r: float(composed(p.lower()) == composed(r.lower())))


def exact_match(predictions: Sequence[str], references: References) -> float:
    """Return the share of rows whose prediction equals a reference in SQuAD's normal form."""
    return _mean_of_best(predictions, references, lambda p, r: float(normalize_answer(p) == normalize_answer(r)))


def qa_f1(predictions: Sequence[str], references: References) -> float:
    """Return the mean of :func:`token_f1` with the best reference."""
    return _mean_of_best(predictions, references, token_f1)


def rouge_l(predictions: Sequence[str], references: References) -> float:
    """Return the mean ROUGE-L F with the best reference, by rouge-score without stemming.

    0 for a prediction that is empty once punctuation is taken off. CrossFit's own figures come from the package
    `rouge`, which splits at blanks and full stops and keeps letter case, so they are not the same numbers. Letters of
    other scripts than Latin, which rouge-score drops, are words too (:func:`~pyro_lift.metrics.words.rouge_words`).
    """
    scorer = _rouge_scorer()

    def f1(prediction: str, reference: str) -> float:
        if not prediction.translate(NO_PUNCTUATION):
            return 0.0
        return float(scorer.score(reference, prediction)["rougeL"].fmeasure)

    return _mean_of_best(predictions, references, f1)


def macro_f1(predictions: Sequence[str], references: References) -> float:
    """Return the unweighted mean of the classes' F1, by scikit-learn, strings compared as they are.

    The classes are all strings that occur, as truth *or as prediction*: a generated string that is no label is a class
    with F1 zero, so each distinct one lowers the mean.
    """
    from sklearn.metrics import f1_score

    _check_rows(predictions, references)
    return float(f1_score([r[0] for r in references], list(predictions), average="macro", zero_division=0.0))


def matthews(predictions: Sequence[str], references: References, positive: str = "acceptable") -> float:
    """Compute Matthews' correlation of "is ``positive``", blanks at the ends stripped; 0 where either is constant.

    Args:
        predictions: one string a row; whatever is not ``positive`` counts as negative, off-label strings included.
        references: the first of each row is the truth.
        positive: the label that counts as 1; the default is GLUE CoLA's.
    """
    from sklearn.metrics import matthews_corrcoef

    _check_rows(predictions, references)
    truth = [int(r[0] == positive) for r in references]
    guess = [int(p.strip() == positive) for p in predictions]
    if len(set(truth)) < 2 or len(set(guess)) < 2:
        return 0.0
    return float(matthews_corrcoef(truth, guess))


def pearson(predictions: Sequence[str], references: References) -> float:
    """Compute Pearson's correlation of the strings read as numbers; 0 where it is undefined.

    Undefined is: a prediction that is no finite number (CrossFit's own score is then NaN), fewer than two rows, or
    either side constant.

    Raises:
        ValueError: a reference that is no finite number.
    """
    from scipy.stats import pearsonr

    _check_rows(predictions, references)
    truth = [_number(r[0]) for r in references]
    for row, value in enumerate(truth):
        if not math.isfinite(value):
            raise ValueError(f"row {row}: reference {references[row][0]!r} is not a number; Pearson needs numbers.")
    guess = [_number(p) for p in predictions]
    if len(truth) < 2 or not all(map(math.isfinite, guess)) or len(set(truth)) < 2 or len(set(guess)) < 2:
        return 0.0
    return float(pearsonr(truth, guess).statistic)


#: The scores by CrossFit's names.
METRICS: dict[str, Callable[[Sequence[str], References], float]] = {
    "ACC": accuracy,
    "Classification-F1": macro_f1,
    "EM": exact_match,
    "QA-F1": qa_f1,
    "Rouge-L": rouge_l,
    "Matthew-Correlation": matthews,
    "Pearson-Correlation": pearson,
}


def score(metric: str, predictions: Sequence[str], references: References) -> float:
    """Score one task by the name of its metric.

    Args:
        metric: a key of :data:`METRICS`.
        predictions: one string a row.
        references: one or more strings a row.

    Raises:
        ValueError: an unknown metric, unequal numbers of rows, no row, or a row without a reference.

    Example:
        >>> score("EM", ["the cat", "dog"], [["Cat"], ["a dog", "wolf"]])
        1.0
    """
    check_choice("metric", metric, METRICS)
    return METRICS[metric](predictions, references)


def _mean_of_best(predictions: Sequence[str], references: References, compare: Callable[[str, str], float]) -> float:
    _check_rows(predictions, references)
    best = [max(compare(p, r) for r in accepted) for p, accepted in zip(predictions, references, strict=True)]
    return sum(best) / len(best)


def _check_rows(predictions: Sequence[str], references: References) -> None:
    for name, value in (("predictions", predictions), ("references", references)):
        if isinstance(value, str):
            raise TypeError(f"{name} is the string {value!r}; expected a list, one entry a row.")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(
            f"{len(predictions)} predictions and {len(references)} rows of references: expected as many, at least one."
        )
    for row, accepted in enumerate(references):
        if isinstance(accepted, str):
            raise TypeError(f"row {row}: references is the string {accepted!r}; expected a list of strings.")
        if not accepted:
            raise ValueError(f"row {row}: no reference.")
        wrong = next((text for text in (predictions[row], *accepted) if not isinstance(text, str)), None)
        if wrong is not None:
            raise TypeError(f"row {row}: {wrong!r} is a {type(wrong).__name__}; expected strings.")


def _number(text: str) -> float:
    try:
        return float(text.strip())
    except ValueError:
        return math.nan


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], tokenizer=_RougeWords())


class _RougeWords:
    """A tokenizer as rouge-score takes one."""

    def tokenize(self, text: str) -> list[str]:
        """Split a text into words."""
        return rouge_words(text)
