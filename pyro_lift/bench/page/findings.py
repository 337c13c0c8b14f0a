"""What the evidence says of LiFT, family by family: its rank, its lead, and where it falls short."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pyro_lift.bench.page.evidence import LOWER, Evidence
from pyro_lift.bench.page.ranks import Ranking, ranked
from pyro_lift.bench.paper.contestants import CONTESTANTS, title_of
from pyro_lift.bench.paper.families import FAMILIES
from pyro_lift.bench.paper.tables import Column
from pyro_lift.metrics.significance import PairedTest, paired_test, pooled_t_test, welch_t_test

__all__ = [
    "OURS",
    "Case",
    "FamilyVerdict",
    "TableTests",
    "by_task",
    "cases",
    "family_names",
    "observations",
    "row_tests",
    "shortfalls",
    "verdict_of",
]

#: Rows that are LiFT as it comes; its ablations are judged as other methods are.
OURS = ("lift", "lift-k2", "lift-k3", "lift-k5")
REFERENCE = "lift"
PROBE = "linear-probe"
#: Methods that the paper compares calibration with.
CALIBRATED = ("maml", "bmaml", "abml")
#: Losses in words.
NAMED = {"nll": "NLL in nats", "unexplained": "unexplained variance"}
#: Below which a difference counts.
LEVEL = 0.05
#: Tasks below which nothing is said to lead: of two or three, differences that agree by chance have small p-values.
LEAST = 4


class TableTests(NamedTuple):
    """p-values of a row against the reference: over seeds as the paper has it, Welch's, and paired over tasks.

    Where seeds make tasks of their own, the pairs are seeds (:func:`observations`).
    """

    pooled: float | None
    welch: float | None
    paired: PairedTest | None


class FamilyVerdict(NamedTuple):
    """LiFT on one family.

    Attributes:
        family: name.
        measure: key of the loss that methods are ranked by; less is better.
        losses: by method and case, means over seeds.
        ranking: of all methods over the tasks that all have; None where there is nothing to rank.
        place: of LiFT among the others, from 1.
        runner_up: the best of the others.
        against: LiFT's loss minus another method's, paired over tasks or seeds (:func:`observations`), by method.
        calibration: LiFT's ECE minus that of methods that the paper compares it with.
        seeds: how many.
        guessing: mean loss of the same probability for each class, or of each task's own mean for all rows; None where
            records do not say.
    """

    family: str
    measure: str
    losses: dict[str, dict[Case, float]]
    ranking: Ranking | None
    place: int | None
    runner_up: str | None
    against: dict[str, PairedTest]
    calibration: dict[str, PairedTest]
    seeds: int
    guessing: float | None

    @property
    def cases(self) -> int:
        """Number of tasks that LiFT was judged by; one that several splits judge by is one."""
        return len(by_task(self.losses.get(REFERENCE, {})))

    def mean(self, row: str) -> float:
        """Return a method's mean loss over tasks."""
        return statistics.fmean(by_task(self.losses[row]).values())

    def sentence(self) -> str:
        """Say in one sentence where LiFT stands, with the numbers."""
        if self.runner_up is None or self.place is None:
            return f"{self.family}: LiFT or everything beside it was not run."
        test = self.against.get(self.runner_up)
        ours = self.mean(REFERENCE)
        beside = f"{title_of(self.runner_up)} {self.mean(self.runner_up):.3f}"
        told = f"{self.family}: LiFT {ours:.3f}, {beside} ({NAMED.get(self.measure, self.measure)}, less is better)"
        if test is None:
            return f"{told}; one task, so there is no test."
        verdict = "ahead" if test.difference < 0 else "behind"
        sure = "" if test.p_value < LEVEL else ", which these tasks do not tell apart"
        place = f"place {self.place} of {len(self.ranking.methods) if self.ranking else 0}"
        ignorant = f" Guessing costs {self.guessing:.3f}: LiFT has learned nothing here." if self.no_better else ""
        return (
            f"{told}: {abs(test.difference):.3f} ± {test.standard_error:.3f} {verdict}, p = {test.p_value:.2g}{sure}; "
            f"{place} by mean rank over {self.cases} tasks, {self.seeds} seed{'s' * (self.seeds != 1)}.{ignorant}"
        )

    @property
    def no_better(self) -> bool:
        """Whether LiFT's mean loss is no less than that of guessing."""
        if REFERENCE not in self.losses or self.guessing is None:
            return False
        return self.mean(REFERENCE) >= self.guessing

    @property
    def leads(self) -> bool:
        """Whether LiFT has learned something and is ahead of every other by more than chance, on tasks enough."""
        if self.no_better:
            return False
        test = None if self.runner_up is None else self.against.get(self.runner_up)
        return self.cases >= LEAST and test is not None and test.difference < 0 and test.p_value < LEVEL


def shortfalls(verdicts: Sequence[FamilyVerdict]) -> list[str]:
    """Say where LiFT is not clearly first, where the probe is ahead of it, and where others are better calibrated."""
    told = [v.sentence() for v in verdicts if v.runner_up is not None and not v.leads]
    for v in verdicts:
        probe = v.against.get(PROBE)
        if probe is not None and probe.difference > 0 and v.runner_up != PROBE:
            told.append(
                f"{v.family}: {probe.difference:.3f} ± {probe.standard_error:.3f} behind the linear probe, "
                f"p = {probe.p_value:.2g}."
            )
    told += [
        f"{v.family}: ECE {test.difference:+.3f} ± {test.standard_error:.3f} over {title_of(row)}'s, "
        f"p = {test.p_value:.2g}."
        for v in verdicts
        for row, test in v.calibration.items()
        if test.difference >= 0
    ]
    return told


def family_names(evidence: Evidence) -> list[str]:
    """Return the families of which anything was judged, in the registry's order."""
    present = {family for family, _, _ in evidence.scores}
    return [name for name in FAMILIES if name in present]


def verdict_of(evidence: Evidence, family: str) -> FamilyVerdict:
    """Judge LiFT on a family by its loss: NLL, of regressions the unexplained variance."""
    measure = "unexplained" if "unexplained" in {m for (f, _), m in evidence.measures.items() if f == family} else "nll"
    methods = list(dict.fromkeys(row for f, _, row in evidence.scores if f == family))
    methods.sort(key=list(CONTESTANTS).index)
    losses = {row: losses_by_case(evidence, family, row, measure) for row in methods}
    if ours := losses.get(REFERENCE):  # tasks that LiFT was not judged by say nothing of its place
        losses = {row: {case: x for case, x in found.items() if case in ours} for row, found in losses.items()}
    losses = {row: found for row, found in losses.items() if found}
    others = [row for row in losses if row not in OURS and not row.startswith(("lift-", "fixed", "variance"))]
    compared = {row: losses[row] for row in (*others, REFERENCE) if row in losses}
    # A method without some of the tasks (no probe of tokens) would take these from everyone's ranks.
    most = max((len(found) for found in compared.values()), default=0)
    full = {row: found for row, found in compared.items() if len(found) == most}
    ranking = ranked({row: by_task(found) for row, found in full.items()}) if REFERENCE in full else None
    rows = [row for row in losses if row != REFERENCE]
    against = {row: test for row in rows if (test := _paired(losses.get(REFERENCE, {}), losses[row]))}
    runner_up = min(
        (row for row in others if row in full),
        key=lambda row: statistics.fmean(by_task(losses[row]).values()),
        default=None,
    )
    ece = {row: losses_by_case(evidence, family, row, "ece") for row in (*CALIBRATED, REFERENCE)}
    calibration = {row: test for row in CALIBRATED if (test := _paired(ece[REFERENCE], ece[row]))}
    seeds = {seed for (f, _, row), of in evidence.about.items() if f == family and row == REFERENCE for seed in of}
    place = None
    if ranking is not None:
        place = 1 + ranking.methods.index(REFERENCE)
    return FamilyVerdict(
        family, measure, losses, ranking, place, runner_up if REFERENCE in losses else None, against, calibration,
        len(seeds), _guessing(evidence, family, measure, losses.get(REFERENCE, {})),
    )  # fmt: skip


def _guessing(evidence: Evidence, family: str, measure: str, ours: Mapping[Case, float]) -> float | None:
    """Return the mean loss of guessing over LiFT's tasks; None where their records do not have it."""
    if measure == "unexplained":
        return 1.0
    found = losses_by_case(evidence, family, REFERENCE, "uniform_nll")
    return statistics.fmean(by_task(found).values()) if found and set(found) == set(ours) else None


def losses_by_case(evidence: Evidence, family: str, row: str, measure: str) -> dict[Case, float]:
    """Return a method's scores by case over all splits of a family, means over seeds.

    Splits with the same tasks to be judged by, of which a method that learns nothing from others is run on one, have
    its numbers on each.
    """
    found: dict[Case, float] = {}
    for split in FAMILIES[family].splits:
        if any(f == family and s == split for f, s, _ in evidence.scores):
            found |= cases(evidence, Column(split, family, split), row, measure)
    return found


def cases(evidence: Evidence, column: Column, row: str, measure: str) -> dict[Case, float]:
    """Return a method's scores in one column by case, means over seeds."""
    found: dict[Case, list[float]] = {}
    for (seed, task), value in evidence.values(column, row, measure).items():
        found.setdefault(_case(column, seed, task), []).append(value)
    return {case: statistics.fmean(values) for case, values in found.items()}


class Case(NamedTuple):
    """What values are averaged over seeds for: a task of a split, which several seeds share unless each makes its own.

    Attributes:
        column: key of the split's column.
        task: its name.
        seed: of a task that a seed makes; None elsewhere.
    """

    column: str
    task: str
    seed: int | None

    @property
    def observed(self) -> Case | str:
        """What is one observation: the task, in whatever splits; of tasks that a seed makes each case."""
        return self.task if self.seed is None else self


def _case(column: Column, seed: int, task: str) -> Case:
    own = column.family in FAMILIES and FAMILIES[column.family].by_seed
    return Case(column.key, task, seed if own else None)


def by_task(found: Mapping[Case, float]) -> dict[Case | str, float]:
    """Average over the splits that a task is judged in: its rows are the same there, so that it is one observation."""
    kept: dict[Case | str, list[float]] = {}
    for case, value in found.items():
        kept.setdefault(case.observed, []).append(value)
    return {task: statistics.fmean(values) for task, values in kept.items()}


def observations(found: Mapping[Case, float]) -> dict[Case | str, float]:
    """Average over what belongs to one observation of a test: a task; where seeds make tasks of their own, a seed.

    Tasks of one seed and split are judged after one meta-training, whose luck they share: counted one by one they would
    say how surely this meta-training is ahead, not the method. Of a single seed its tasks are all there is.
    """
    made = {case.seed for case in found}
    if None in made or len(made) < 2:
        return by_task(found)
    by_seed: dict[Case, list[float]] = {}
    for case, value in found.items():
        by_seed.setdefault(case._replace(task=""), []).append(value)
    return {seed: statistics.fmean(values) for seed, values in by_seed.items()}


def _paired(ours: Mapping[Case, float], theirs: Mapping[Case, float]) -> PairedTest | None:
    """Test over the observations of the cases that both have."""
    first, second = (observations({case: of[case] for case in ours if case in theirs}) for of in (ours, theirs))
    if len(first) < 2:
        return None
    return paired_test([first[one] for one in first], [second[one] for one in first])


def row_tests(evidence: Evidence, columns: Sequence[Column], row: str, reference: str) -> TableTests:
    """Test a row of a table against its reference, over the seeds and the tasks that both have."""
    pooled = welch = None
    first, second = (_by_seed(evidence, columns, name) for name in (row, reference))
    if min(len(first), len(second)) > 1:
        # The paper's standard deviations are a population's: it is with these that its p-values come out.
        means, sds = ([of(found) for found in (first, second)] for of in (statistics.fmean, statistics.pstdev))
        moments = (means[0], sds[0], len(first), means[1], sds[1], len(second))
        pooled, welch = pooled_t_test(*moments).p_value, welch_t_test(*moments).p_value
    ours: dict[Case, list[float]] = {}
    theirs: dict[Case, list[float]] = {}
    for column in columns:
        if evidence.measure(column) in ("curve", "seconds"):
            continue
        for name, kept in ((row, theirs), (reference, ours)):
            for (seed, task), value in evidence.values(column, name).items():
                kept.setdefault(_case(column, seed, task), []).append(value)
    by_case = [{case: statistics.fmean(values) for case, values in kept.items()} for kept in (theirs, ours)]
    return TableTests(pooled, welch, _paired(*by_case))


def _by_seed(evidence: Evidence, columns: Sequence[Column], row: str) -> list[float]:
    """Return the mean over a table's columns by seed, of the seeds that have all of them; nothing of mixed scores."""
    if len({evidence.measure(column) for column in columns}) != 1 or evidence.measure(columns[0]) in (
        "curve",
        "seconds",
    ):
        return []
    summaries = [evidence.summary(column, row) for column in columns]
    found = [summary.by_seed for summary in summaries if summary is not None]
    if len(found) < len(columns):
        return []
    seeds = sorted(set.intersection(*(set(of) for of in found)))
    return [statistics.fmean(of[seed] for of in found) for seed in seeds]


def better_is_lower(measure: str) -> bool:
    """Whether less of a score is better."""
    return measure.removesuffix("_t") in LOWER
