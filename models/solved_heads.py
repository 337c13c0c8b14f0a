r"""Heads that are solved where a program would sample them: the adapter sees rows that their head has not.

A head at the mode of its own rows fits them nearly perfectly as soon as features outnumber rows, and an adapter that is
trained through it learns nothing but to let it. So the rows of a pass are dealt into folds, each fold is predicted by a
head that the others have solved, and the likelihood of the program is that of the predictions,

.. math:: \log p(D \mid \theta) = \sum_n \log p\big(y_n \mid f_\theta(x_n), \hat h_{-k(n)}(\theta)\big),

one pass through the network whatever the number of folds. In the gradient heads are held fixed. The head of the task
itself, for predictions, is the mode on all its rows.

A regression's head is a ridge of values in place of classes (:mod:`~pyro_lift.models.value_head`), predicted likewise
by heads that other rows have solved, under the program's noise.

Under label matching the head stands beside the similarities to the label texts (:mod:`~pyro_lift.models.heads`), whose
scale each task chooses with the width of its prior, at the start; then the gradient goes through the encoded inputs and
the encoded label texts both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.block_likelihood import Block, block_outputs
from pyro_lift.models.class_head import ClassHead
from pyro_lift.models.dispersion import left_out_squares
from pyro_lift.models.features import all_features
from pyro_lift.models.few_values import MOVES_FROM
from pyro_lift.models.head_choice import HeadChoice, choose_head, choose_matching_head
from pyro_lift.models.head_problem import apply_head
from pyro_lift.models.heads import BIAS_SD, ODD, HeadModel, ScalePrior, laplace_head, solve_head
from pyro_lift.models.likelihoods import LossKind, log_likelihood
from pyro_lift.models.observation import batch_of, has_head, head_features_of, network_output
from pyro_lift.models.readouts import LabelMatching
from pyro_lift.models.task import Rows, Task, head_outputs
from pyro_lift.models.tensor_digest import digest_of
from pyro_lift.models.value_head import choose_value_head, few_value_head
from pyro_lift.models.value_spread import ValueSpread, spread_of
from pyro_lift.support.options import check_choice, check_number

__all__ = [
    "SolvedHeads",
    "has_solved_head",
    "held_out_log_prob",
    "solved_heads",
]

#: Heads of a pass: each sees three quarters of its rows.
FOLDS = 4
#: Rows from which on a task's own may ask for biases that are freer than the other tasks' are.
MANY = 32
#: Features that are remembered, and the most numbers of each: the draws behind a prediction are read twice.
REMEMBERED, LARGEST = 16, 2**21


class SolvedHeads:
    """The heads of some tasks, each with a prior whose width its own rows have chosen.

    Args:
        adapter: the network as a function of theta.
        tasks: classifications or regressions; each with its training rows.
        start: weights ``[D]`` at whose features the widths are chosen, once, when they are first asked for.
        choices: of each task, where they have been made already.
        scale: of label matching where a task has no rows; None takes the readout's.
        folds: heads of a pass.
        mean: the head that heads of its classes have their prior around; None is zero. A task whose own rows are
            predicted better by a head around zero has that.
        noise_scale: standard deviation of the noise in regression.

    Attributes:
        noise_scale: as given; a program that finds its noise sets it.
        through_mean: whether theta sees the head that is the mean, where there is one for the tasks of a pass, in place
            of heads of their own. What tasks share is learned that way: a head of a few rows hides how well the
            features go with it.
    """

    def __init__(
        self,
        adapter: RandomAdapter,
        tasks: Sequence[Task],
        start: Tensor,
        *,
        choices: Sequence[HeadChoice] | None = None,
        scale: float | None = None,
        folds: int = FOLDS,
        mean: ClassHead | None = None,
        noise_scale: float = 1.0,
    ) -> None:
        check_number("folds", folds, least=2, open_below=False, whole=True)
        if scale is not None:
            check_number("scale", scale)
        self.adapter, self.tasks, self.folds, self.mean = adapter, list(tasks), folds, mean
        self.start, self.through_mean, self.noise_scale = start.detach(), False, noise_scale
        self.scale = zero_shot_scale(adapter) if scale is None else scale
        self._choices: dict[int, HeadChoice] = dict(enumerate(choices or ()))
        self._features: dict[tuple[int, bytes], Tensor] = {}

    def on(self, tasks: Sequence[Task], choices: Sequence[HeadChoice]) -> SolvedHeads:
        """Return the same for other rows, under choices that have been made."""
        return SolvedHeads(
            self.adapter,
            tasks,
            self.start,
            choices=choices,
            scale=self.scale,
            folds=self.folds,
            mean=self.mean,
            noise_scale=self.noise_scale,
        )

    def choice(self, task: int) -> HeadChoice:
        """Return what a task's head is solved under, by cross-validation at the start's features."""
        if task not in self._choices:
            rows, outputs = self.tasks[task].train, head_outputs(self.tasks[task])
            assert outputs is not None
            found = head_features_of(self.adapter, self.tasks[task], rows, self.start)
            self._remember(task, self.start, found)
            scale = self.scale if self.adapter.matches(rows.named) else None
            mean = None if self.mean is None or scale is not None else self.mean.of(self.tasks[task])
            few = None if self.mean is None else self.mean.few_values
            by_few = None if few is None else few_value_head(found, rows.target, few, self.noise_scale)
            if by_few is not None:
                self._choices[task] = by_few
                return by_few
            if scale is not None:
                usual = None if self.mean is None else self.mean.usual_of(len(rows))
                choice = choose_matching_head(found, rows.target, outputs, scale, usual)
            else:
                choice = self._chosen(task, found, None)
            around = None
            if mean is not None:
                around = self._chosen(task, found, mean)
            elif scale is None:
                around = self._of_few_rows(task, found)
            if around is not None and not self._is_odd(task, choice.score - around.score):
                choice = around
            self._choices[task] = choice
        return self._choices[task]

    def _of_few_rows(self, task: int, features: Tensor) -> HeadChoice | None:
        """Choose the prior around the head for few rows; None where a task has more of them, or other classes."""
        few, whole = None if self.mean is None else self.mean.few_classes, self.tasks[task]
        around, classes = None if few is None else few.of(whole), head_outputs(whole)
        if few is None or around is None or classes is None:
            return None
        return choose_head(features, whole.train.target, classes, around=around, usual=few.usual_of(len(whole.train)))

    def _chosen(self, task: int, features: Tensor, around: Tensor | None) -> HeadChoice:
        """Choose a task's prior around zero, or around a head."""
        target, outputs, mean = self.tasks[task].train.target, head_outputs(self.tasks[task]), self.mean
        assert outputs is not None
        if self.tasks[task].kind == "regression":
            told: dict[str, Any] = {}
            if mean is not None:
                width = mean.width if around is None else mean.around_width
                told = {"width": width, "feature_sd": mean.feature_sd, "by_all": mean.rows > 0}
            return choose_value_head(features, target, noise_scale=self.noise_scale, around=around, **told)
        # What tasks say of a prior is of where theirs stand: around the head of all, or around zero.
        told_of = mean is not None and (around is not None or len(mean.head) == 0)
        usual = mean.usual_of(len(target)) if mean is not None and told_of else None
        sure = 1.0 if mean is None else mean.sureness_of(len(target))
        choice = choose_head(features, target, outputs, around=around, usual=usual, sureness=sure)
        if usual is None or mean is None or not mean.few or usual.bias_sd >= BIAS_SD or len(target) < MANY:
            return choice
        free = choose_head(
            features, target, outputs, around=around, usual=usual._replace(bias_sd=BIAS_SD), sureness=sure
        )
        return free if (free.score - choice.score) * len(target) > ODD else choice

    def _is_odd(self, task: int, gain: float) -> bool:
        """Whether a task's rows are so much better predicted by a head around zero that it has that."""
        known = self.mean is not None and self.mean.usual is not None
        return gain * len(self.tasks[task].train) > (ODD if known else 0.0)

    def stays(self, task: int) -> bool:
        """Whether a regression that goes by all tasks has too few rows to say how theta should move."""
        few = None if self.mean is None else self.mean.few_values
        by_few = few is not None and self.choice(task).model.around is few.head
        return by_few and len(self.tasks[task].train) < MOVES_FROM

    def mean_scale(self) -> float | None:
        """Average the scales of label matching that the tasks chose; None where none of them has label texts.

        No less than a twentieth of where they began, so that a text says something where there are no rows.
        """
        matched = [k for k, task in enumerate(self.tasks) if self.adapter.matches(task.train.named)]
        scales = [self.choice(k).model.scale for k in matched]
        means = [float(scale.mean) for scale in scales if scale is not None]
        return max(sum(means) / len(means), 0.05 * self.scale) if means else None

    def prior_sd(self, task: int) -> float:
        """Return s of a task's head, by cross-validation at the start's features."""
        return self.choice(task).sd

    def score(self, task: int) -> float:
        """Return the mean log probability of left-out rows at the start's features, by the width that is best there.

        Of a regression, under the program's noise.
        """
        model, _, score = self.choice(task)
        if model.kind != "regression":
            return score
        variance = self.noise_scale**2
        missed = model.noise_scale**2 / variance if score == score else math.nan
        return -0.5 * model.num_outputs * (math.log(2.0 * math.pi * variance) + missed)

    def rows(self, task: Task, batch_size: int | None) -> int:
        """Return the rows of a pass: at least one of each class for every fold, and no more than the task has.

        Options of a row's own are no classes, nor are values, of which a fold has two.
        """
        least = 2 * self.folds if task.num_classes is None else self.folds * task.num_classes
        if "option_input_ids" in task.train.inputs:
            least = self.folds
        return batch_of(task, max(batch_size, least) if batch_size else batch_size)

    def log_prob(self, tasks: Sequence[int], features: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
        """Held-out log probability of each row of a pass, ``[B, b]``; differentiable in the features.

        Args:
            tasks: numbers of the B tasks of the pass, of one kind and one number of classes or values.
            features: ``[B, b, E]``.
            target: class numbers ``[B, b]``, or values ``[B, b]`` or ``[B, b, M]``.
            weight: zero for rows that are padding, ``[B, b]``.
        """
        if not bool(torch.isfinite(features.detach()).all()):
            # The chain has run away. Its integrator looks at the likelihood, and says so with the way out.
            return features.sum(-1) * math.nan
        if self.through_mean and self.mean is not None:
            known = [mean for mean in (self.mean.of(self.tasks[k]) for k in tasks) if mean is not None]
            if len(known) == len(tasks):
                kind = self.tasks[tasks[0]].kind
                output = apply_head(features, torch.stack(known).to(features))
                return _log_prob_of(kind, output, target, self.noise_scale)
        model, widths = self._of_pass([self.choice(k) for k in tasks], features)
        return held_out_log_prob(
            features, target, model, widths, folds=self.folds, weight=weight, noise_scale=self.noise_scale
        )

    def _of_pass(self, choices: Sequence[HeadChoice], features: Tensor) -> tuple[HeadModel, Tensor]:
        """Bring the choices of tasks that share a pass into one model and the widths ``[B]`` of their priors."""

        def each(values: Sequence[Any]) -> Tensor:
            return torch.tensor([float(x) for x in values], dtype=torch.float64, device=features.device)

        model, widths = choices[0].model, each([choice.sd for choice in choices])
        scales = [choice.model.scale for choice in choices]
        if model.scale is not None:  # tasks that share a pass may differ in their scale
            means = each([scale.mean for scale in scales if scale is not None])
            model = model._replace(scale=ScalePrior(means, model.scale.sd))
        arounds = [choice.model.around for choice in choices]
        given = next((around for around in arounds if around is not None), None)
        biases = [choice.model.bias_sd for choice in choices]
        if len(set(biases)) > 1:  # in how free their biases are, where some do not stand around the head of all
            model = model._replace(bias_sd=each(biases))
        if given is not None:  # or in the head that their prior stands at
            each_around = [torch.zeros_like(given) if around is None else around for around in arounds]
            model = model._replace(around=torch.stack(each_around))
        if model.kind == "regression":  # in units of each task's noise, on which the mode does not depend
            noise = each([choice.model.noise_scale for choice in choices])
            centred = each([a is None for a in arounds])
            spreads = [choice.model.least_spread for choice in choices if choice.model.least_spread is not None]
            least = torch.stack(spreads) if len(spreads) == len(choices) else None
            model = model._replace(noise_scale=1.0, bias_sd=each(biases) / noise, centred=centred, least_spread=least)
            widths = widths / noise
        return model, widths

    def log_prob_at(self, task: int, rows: Rows, theta: Tensor) -> Tensor:
        """Held-out log probability of some rows of a task at theta ``[D]``, one a row ``[b]``."""
        found = network_output(self.adapter, rows, theta).unsqueeze(0)
        return self.log_prob([task], found, rows.target.unsqueeze(0)).squeeze(0)

    def block_log_likelihood(self, tasks: Sequence[int], block: Block, theta: Tensor) -> Tensor:
        """Held-out log likelihood of each task of a block ``[B]`` at theta ``[B, D]``, scaled to the tasks' rows."""
        found = block_outputs(self.adapter, block, theta, head_inputs=True)
        return (self.log_prob(tasks, found, block.rows.target, block.weight) * block.weight).sum(-1)

    def solve(self, task: int, theta: Tensor, weight: Tensor | None = None) -> Tensor:
        """Return the mode of a task's head ``[C, E + 1]`` at theta ``[D]``, on its training rows.

        Args:
            task: number of the task.
            theta: weights.
            weight: how often each row counts, ``[n]``; None counts all once.
        """
        found, target = self._read(task, theta), self.tasks[task].train.target
        return solve_head(found, target, self.choice(task).model, prior_sd=self.prior_sd(task), weight=weight).head

    def log_prob_without(self, task: int, theta: Tensor, left_out: Tensor) -> Tensor:
        """Return log probabilities of the rows that are left out, by the head of a task's other rows at theta ``[D]``.

        Args:
            task: number of the task.
            theta: weights.
            left_out: which of the task's training rows, ``[n]``; the result has one number for each of them.
        """
        head, found = self.solve(task, theta, (~left_out).double()), self._read(task, theta)[left_out]
        output, target = apply_head(found.double(), head.double()), self.tasks[task].train.target[left_out]
        return _log_prob_of(self.tasks[task].kind, output, target, self.noise_scale)

    def _read(self, task: int, theta: Tensor) -> Tensor:
        """Return the features of a task's rows; those of the last few weights are remembered."""
        found = self._features.get((task, digest_of(theta)))
        if found is None:
            found = all_features(self.adapter, self.tasks[task].train, theta, network_output)
            self._remember(task, theta, found)
        return found

    def _remember(self, task: int, theta: Tensor, features: Tensor) -> None:
        if features.numel() <= LARGEST:
            while len(self._features) >= REMEMBERED:
                del self._features[next(iter(self._features))]
            self._features[(task, digest_of(theta))] = features

    def take_over(self, task: int, other: SolvedHeads) -> None:
        """Take over the features of a task's rows at another's start, where a prediction begins too."""
        found = other._features.get((task, digest_of(other.start)))
        if found is not None:
            self._remember(task, other.start, found)

    def solve_each(self, task: int, thetas: Tensor) -> Tensor:
        """Return the modes ``[S, C, E + 1]`` at some weights ``[S, D]``; equal neighbours are solved once."""
        modes: list[Tensor] = []
        for s, theta in enumerate(thetas):
            again = s > 0 and torch.equal(theta, thetas[s - 1])
            modes.append(modes[-1] if again else self.solve(task, theta))
        return torch.stack(modes)

    def spread(self, task: int, theta: Tensor) -> ValueSpread | None:
        """Return how far a regression's mode may be off at theta ``[D]``; None for classes, which say it themselves."""
        if self.tasks[task].kind != "regression":
            return None
        return spread_of(self._read(task, theta), self.choice(task), self.noise_scale)

    def left_out(self, task: int, theta: Tensor) -> Tensor | None:
        """Return what a regression's rows miss of one another at theta ``[D]``, for each value; None for classes.

        In units of what is expected, see :mod:`~pyro_lift.models.dispersion`.
        """
        if self.tasks[task].kind != "regression":
            return None
        target = self.tasks[task].train.target
        return left_out_squares(self._read(task, theta), target, self.choice(task), self.noise_scale)

    def draw_each(self, task: int, thetas: Tensor, seed: int | None) -> Tensor:
        """Draw a task's head at each of some weights ``[S, D]``: ``[S, C, E + 1]``; seed None takes torch's stream."""
        chosen = int(torch.randint(2**62, ())) if seed is None else seed
        generator = torch.Generator().manual_seed(chosen + task)
        return torch.stack([self.draw(task, theta, generator) for theta in thetas])

    def draw(self, task: int, theta: Tensor, generator: torch.Generator) -> Tensor:
        """Draw a task's head ``[C, E + 1]`` at theta ``[D]`` from its Gaussian approximation."""
        rows, (model, sd, _) = self.tasks[task].train, self.choice(task)
        found = all_features(self.adapter, rows, theta, network_output)
        mode = solve_head(found, rows.target, model, prior_sd=sd).head
        return laplace_head(found, rows.target, model, mode, 1, prior_sd=sd, generator=generator)[0]


def zero_shot_scale(adapter: RandomAdapter) -> float:
    """The scale of label matching without any row: the readout's, or the usual one."""
    readout = adapter.readout if isinstance(adapter.readout, LabelMatching) else LabelMatching()
    return readout.scale


def has_solved_head(adapter: RandomAdapter, task: Task, scale: float | None) -> bool:
    """Whether a task has a head of its own where heads are solved: label matching always has one, beside its texts."""
    return has_head(task, scale) or (task.kind == "matching" and adapter.matches(task.train.named))


def solved_heads(
    head: Literal["sample", "solve"],
    adapter: RandomAdapter,
    tasks: Sequence[Task],
    scale: float | None,
    start: Tensor,
    mean: ClassHead | None = None,
    noise_scale: float = 1.0,
) -> SolvedHeads | None:
    """Make the solved heads of a program; None where heads are sampled, or where no task has one of its own."""
    check_choice("head", head, ["sample", "solve"])
    if head == "sample" or not any(has_solved_head(adapter, task, scale) for task in tasks):
        return None
    return SolvedHeads(adapter, tasks, start, mean=mean, noise_scale=noise_scale)


def held_out_log_prob(
    features: Tensor,
    target: Tensor,
    model: HeadModel,
    prior_sd: float | Tensor,
    *,
    folds: int = FOLDS,
    weight: Tensor | None = None,
    noise_scale: float = 1.0,
) -> Tensor:
    """Log probability of each row by a head that the other folds have solved, ``[..., b]``.

    Rows are dealt into folds class by class, in their order. A row that is alone in its class counts nothing: without
    it nothing is known of its class. Where all are, and for a single row, the log probability is zero. Under label
    matching the label's text says something still, so that every row counts; options of the rows' own are no classes.
    So does every row of a regression, but those whose head has rows of one value alone and knows no slope.

    Args:
        features: ``[..., b, E]``, under label matching ``[..., b, E + C]``; differentiated through, the heads held
            fixed.
        target: class numbers ``[..., b]``; values ``[..., b]`` or ``[..., b, M]``.
        model: the likelihood under which heads are solved.
        prior_sd: s, one number or one a problem, ``[...]``.
        folds: K.
        weight: zero for rows that are padding, ``[..., b]``.
        noise_scale: standard deviation of the noise under which values are then predicted.
    """
    counts = torch.ones_like(features[..., 0]) if weight is None else (weight > 0).to(features)
    values, matched = model.kind == "regression", model.scale is not None
    options = matched and features.shape[-1] == model.num_outputs
    y = target.reshape(*counts.shape, -1) if values else target
    fold = _dealt(torch.zeros_like(counts, dtype=torch.long) if values or options else y, counts, folds)
    kept = counts.unsqueeze(-2) * (fold.unsqueeze(-2) != torch.arange(folds, device=target.device).unsqueeze(-1))
    some = kept.sum(-1, keepdim=True) > 0  # a fold that has all rows leaves none: let its head have them, uncounted
    kept = kept if matched else torch.where(some, kept, torch.ones_like(kept))
    sd = torch.as_tensor(prior_sd, dtype=torch.float64, device=features.device)
    solved = solve_head(
        features.detach().unsqueeze(-3).expand(*kept.shape[:-1], *features.shape[-2:]),
        y.unsqueeze(counts.dim() - 1).expand(*kept.shape, *y.shape[counts.dim() :]),
        _of_each_fold(model),
        prior_sd=sd.unsqueeze(-1).expand(kept.shape[:-1]),
        weight=kept,
    ).head
    output = apply_head(features.unsqueeze(-3), solved)  # [..., K, b, C]
    place = fold[..., None, :, None].expand(*fold.shape[:-1], 1, *output.shape[-2:])
    own = _log_prob_of(model.kind, output.gather(-3, place).squeeze(-3), y, noise_scale)
    told = counts > 0
    if values:
        told = told & _knows_more_than_a_level(y, kept, model).gather(-1, fold)
    elif not matched:
        member = torch.nn.functional.one_hot(target, model.num_outputs).to(features) * counts.unsqueeze(-1)
        told = told & (member.sum(-2).gather(-1, target) > 1)
    return torch.where(told, own, torch.zeros_like(own))


def _knows_more_than_a_level(y: Tensor, kept: Tensor, model: HeadModel) -> Tensor:
    """Whether the rows of each fold's head ``[..., K]`` say more than where values lie, which no feature changes.

    A head around another has that one's slopes.
    """
    low, high = (
        torch.where(kept.unsqueeze(-1) > 0, y.unsqueeze(-3), bound).aminmax(dim=-2) for bound in (math.inf, -math.inf)
    )
    varies = (high.max > low.min).any(-1)
    around = ~torch.as_tensor(model.centred, device=y.device).bool()
    return varies | (around.unsqueeze(-1) if around.dim() else around)


def _of_each_fold(model: HeadModel) -> HeadModel:
    """Give what each problem of a pass has of its own, ``[...]``, to each of its folds, ``[..., K]``."""
    if model.scale is not None and isinstance(model.scale.mean, Tensor):
        model = model._replace(scale=model.scale._replace(mean=model.scale.mean.unsqueeze(-1)))
    if model.around is not None:
        model = model._replace(around=model.around.unsqueeze(-3))
    if isinstance(model.bias_sd, Tensor):
        model = model._replace(bias_sd=model.bias_sd.unsqueeze(-1))
    if isinstance(model.centred, Tensor):
        model = model._replace(centred=model.centred.unsqueeze(-1))
    if model.least_spread is not None:
        model = model._replace(least_spread=model.least_spread.unsqueeze(-2))
    return model


def _log_prob_of(kind: LossKind, output: Tensor, target: Tensor, noise_scale: float) -> Tensor:
    """Return the log probability of each row, ``[..., b]``."""
    if kind == "regression":
        density = log_likelihood(kind, output.flatten(0, -2), target.reshape(-1, output.shape[-1]), noise_scale)
        return density.view(output.shape[:-1])
    return output.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)


def _dealt(target: Tensor, counts: Tensor, folds: int) -> Tensor:
    """The fold of each row ``[..., b]``: rows of a class in turn, padding last."""
    key = torch.where(counts > 0, target, target.max() + 1)
    order = torch.argsort(key, dim=-1, stable=True)
    place = torch.arange(target.shape[-1], device=target.device).expand_as(order) % folds
    return torch.empty_like(order).scatter_(-1, order, place)
