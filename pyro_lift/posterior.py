"""The posterior of one task: draws of its weights, and the predictions they average to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from pyro_lift.data.encoding import TextEncoding
from pyro_lift.generation.decode import generate
from pyro_lift.generation.inputs import are_strings, check_texts
from pyro_lift.generation.scoring import TextScores, score_texts
from pyro_lift.inference.adaptation.class_rates import class_rates
from pyro_lift.inference.adaptation.predict import predict_inputs, rows_of
from pyro_lift.inference.adaptation.temperature import Predicted, tempered
from pyro_lift.inference.top_level import at_top_level
from pyro_lift.models.adapters import RandomAdapter
from pyro_lift.models.conventions import DECODER, base_of, writes_answers
from pyro_lift.models.features import all_features
from pyro_lift.models.observation import network_output
from pyro_lift.models.out_of_proportion import InputSize, sizes_of_inputs, warn_of_other_sizes
from pyro_lift.models.rows import ENCODE
from pyro_lift.models.task import Rows, Task
from pyro_lift.models.value_spread import ValueSpread
from pyro_lift.saving.folders import export_posterior, load_posterior, save_posterior
from pyro_lift.saving.hub import push
from pyro_lift.saving.served import save_merged

__all__ = ["TaskPosterior"]

_WRITES = (
    "the task {!r} is one of written answers. posterior.generate(inputs) writes them; posterior.score(inputs, answers) "
    "gives the probability of answers of yours."
)


class TaskPosterior:
    """Draws of one task's weights, and the predictions they average to.

    Attributes:
        thetas: draws ``[S, D]``.
        heads: draws of the task's own head ``[S, C, width + 1]``, or None.
        component: the mixture component the chain started from; -1 where the task was none of the kind and began at
            the untouched adapter.
        results: measures to be saved with it, by name.
        encoding: how the task's strings are encoded, for new ones; None where the task was given in tensors.
        prediction_temperature: of predictions, fitted by :meth:`LiFTPrior.calibrate`; 1 where nobody has. Of a
            regression the factor on their variance.
        noise_scale: standard deviation of a regression's targets around the network's output.
        head_spread: how far a regression's solved head may be off, at the last draw (:mod:`.value_spread`); or None.
        input_sizes: how large the task's rows are, by input (:func:`.sizes_of_inputs`), against which those to predict
            are held.
        left_out: what the rows of a regression miss of one another for each value, ``[M]``, over what its head's prior
            and the noise expect (:mod:`~pyro_lift.models.dispersion`); None where nobody has asked, and in one that was
            loaded.
        dispersion: factors on the variance of a regression's predictions, one a value ``[M]``, where the prior's tasks
            say how unevenly they vary, or rows kept from a second chain what is missed; None is one for all.
        class_counts: rows of each class, ``[C]``, around whose rates predictions are tempered where these are plainly
            uneven (:mod:`~pyro_lift.inference.adaptation.class_rates`); or None.
    """

    def __init__(
        self,
        adapter: RandomAdapter,
        task: Task,
        thetas: Tensor,
        heads: Tensor | None = None,
        component: int = 0,
        mcmc: Any = None,
        *,
        results: Mapping[str, Any] | None = None,
        encoding: TextEncoding | None = None,
        prediction_temperature: float = 1.0,
        noise_scale: float = 1.0,
        head_spread: ValueSpread | None = None,
        input_sizes: Mapping[str, InputSize] | None = None,
        class_counts: Tensor | None = None,
        left_out: Tensor | None = None,
        dispersion: Tensor | None = None,
    ) -> None:
        self.adapter, self.task, self.thetas, self.heads = adapter, task, thetas, heads
        self.component, self.mcmc = component, mcmc
        self.results = dict(results or {})
        self.encoding: TextEncoding | None = task.encoding if encoding is None else encoding
        self.prediction_temperature, self.noise_scale = prediction_temperature, noise_scale
        self.head_spread, self.class_counts = head_spread, class_counts
        self.left_out, self.dispersion = left_out, dispersion
        self._input_sizes = None if input_sizes is None else dict(input_sizes)

    def __repr__(self) -> str:
        return f"TaskPosterior(task={self.task.name!r}, draws={len(self.thetas)}, dim={self.adapter.dim})"

    @property
    def input_sizes(self) -> dict[str, InputSize]:
        """How large the task's rows are, by input; of a posterior that was loaded without them, as they were saved."""
        if self._input_sizes is None:
            self._input_sizes = sizes_of_inputs(self.task.train)
        return self._input_sizes

    def predict(self, inputs: Any, *, calibrated: bool = True) -> Tensor:
        """Return probabilities ``[n, C]`` averaged over the draws; of a regression the means, shaped as its targets.

        Args:
            inputs: a list of strings, for a task that was encoded from strings; a tensor or an array; any mapping of
                these by input name, such as what a tokenizer returns; or :class:`~pyro_lift.models.task.Rows`.
            calibrated: whether the averaged probabilities are brought to the temperature that the prior was calibrated
                with, around the rates of the task's classes where these are plainly uneven; without one, and for a
                regression, whose :meth:`predict_sd` it changes, it changes nothing.

        Raises:
            TypeError, ValueError: inputs that are no rows of numbers; names the input.
        """
        rows = self._rows(inputs)
        p = predict_inputs(self.adapter, self.thetas, rows, self.task, self.heads)
        if not calibrated or self.task.kind == "regression":
            return p
        # Classes that the task has not keep a probability of zero, which no temperature raises.
        q = self._of_its_classes(p, rows)
        q = tempered(q, self.prediction_temperature, class_rates(self.class_counts, q.shape[-1]))
        return pad(q, (0, p.shape[-1] - q.shape[-1]))

    def predicted(self, rows: Rows) -> Predicted:
        """Predict rows whose targets are known as they come, at no temperature: what one is fitted to."""
        p = self._of_its_classes(self.predict(rows, calibrated=False), rows_of(rows, self.task))
        return Predicted(p, rows.target, class_rates(self.class_counts, p.shape[-1]))

    def of_draws(self, which: slice) -> TaskPosterior:
        """Return the posterior of some of the draws alone."""
        some = copy(self)
        some.thetas, some.heads = self.thetas[which], None if self.heads is None else self.heads[which]
        return some

    def _of_its_classes(self, p: Tensor, rows: Rows) -> Tensor:
        """Leave out the network's outputs that are no classes of the task."""
        return p if self.heads is not None else p[..., : rows.classes]

    def predict_sd(self, inputs: Any, *, calibrated: bool = True) -> Tensor:
        r"""Return the standard deviation of new targets of a regression, of the shape of :meth:`predict`'s means.

        .. math:: s^2(x) = T c\,\big(\tau^2 + \operatorname{Var}_s f_{\theta^{(s)}}(x) + \operatorname{Var} h(x)\big)

        with the noise :math:`\tau` (``noise_scale``), the variance of the outputs over the draws, and that of a head
        that was solved (:mod:`.value_spread`), which is nothing where there is none; and with what the task's own rows
        say of its noise, c (``dispersion``, :mod:`.dispersion`).

        Args:
            inputs: as of :meth:`predict`.
            calibrated: whether T is the temperature that the prior found, rather than 1.

        Raises:
            TypeError: a task that is no regression: its probabilities say how sure they are; inputs as of
                :meth:`predict`.
        """
        if self.task.kind != "regression":
            raise TypeError(f"the task {self.task.name!r} is no regression: the probabilities of predict() say it all.")
        rows = self._rows(inputs)
        means = torch.stack(
            [
                predict_inputs(self.adapter, self.thetas[s : s + 1], rows, self.task, self._head(s))
                for s in range(len(self.thetas))
            ]
        )
        variance = self.noise_scale**2 + means.var(0, correction=0)
        if self.head_spread is not None:
            found = all_features(self.adapter, rows.to(self.thetas.device), self.thetas[-1], network_output)
            variance = variance + self.head_spread.variance(found).to(variance).view(-1, *[1] * (variance.dim() - 1))
        if self.dispersion is not None:
            factors = self.dispersion.to(variance)
            variance = variance * (factors if variance.dim() > 1 else factors.squeeze(0))
        return ((self.prediction_temperature if calibrated else 1.0) * variance).sqrt()

    def _head(self, draw: int) -> Tensor | None:
        """Return the task's own head at a draw ``[1, C, E + 1]``, if it has one."""
        return None if self.heads is None else self.heads[draw : draw + 1]

    def _rows(self, inputs: Any) -> Rows:
        rows = rows_of(self._read(inputs), self.task)
        warn_of_other_sizes(rows, self.input_sizes, self.task.name)
        return rows

    def _read(self, inputs: Any) -> Any:
        """Encode strings; refuse what lacks the answers that a network which writes them reads."""
        if are_strings(inputs):
            return self._encoded(inputs)
        if self.encoding is not None:
            check_texts(inputs, self.task.name)
        if self.task.kind == "tokens" and self.adapter.readout is None:
            given = inputs.inputs if isinstance(inputs, Rows) else inputs if isinstance(inputs, Mapping) else {}
            if not DECODER & given.keys() and writes_answers(base_of(self.adapter.backbone)):
                raise TypeError(f"inputs without 'decoder_input_ids': {_WRITES.format(self.task.name)}")
        return inputs

    def _encoded(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Encode strings whose classes are to be predicted.

        Raises:
            TypeError: a task whose answers are written, not chosen, or that was given in tensors.
        """
        if self.task.kind == "tokens":
            raise TypeError(f"inputs: strings, and {_WRITES.format(self.task.name)}")
        if self.encoding is None:
            raise TypeError(
                f"inputs: strings; {ENCODE}. The task {self.task.name!r} was given in tensors; one that "
                "pyro_lift.data.encode made takes strings."
            )
        if self.task.kind == "matching" and self.task.label_texts is None:
            raise TypeError(
                f"inputs: strings, but every row of task {self.task.name!r} has options of its own. Encode rows with "
                "their options: posterior.encoding.encoder(TextTask(...))."
            )
        return self.encoding.new_prompts(texts)

    def generate(self, inputs: Any, which: Literal["mean", "draws"] | int = "mean", **options: Any) -> Any:
        """Write a text for each input, through transformers' ``generate``; for encoder-decoders and causal models.

        Args:
            inputs: a list of strings; what a tokenizer returns; ``input_ids`` ``[n, L]``; or
                :class:`~pyro_lift.models.task.Rows`. A causal model's prompts may be padded on either side.
            which: the adapter that writes: ``"mean"`` of the draws, a draw's number, or ``"draws"``: token
                probabilities are averaged over all of them at every step, each with a cache of its own.
            options: of transformers' ``generate`` (beams, sampling, stopping, lengths); ``consensus="mbr"`` with
                ``"draws"``: each draw writes a text, and the one that the others agree with most (mean token F1) is
                taken; ``seed`` of sampling, 0 if not given; ``batch_size``, inputs of one call.

        Returns:
            Strings for strings, for tensors the new tokens ``[n, L]`` alone.

        Raises:
            TypeError: a backbone that writes no text; inputs of another form.
            ValueError: a draw that there is not; inputs or options that cannot be used.

        See Also:
            :func:`pyro_lift.generation.decode.generate` for every option.
        """
        if "consensus" in options and which != "draws":
            raise ValueError(f"consensus={options['consensus']!r} with which={which!r}: it is of which='draws'.")
        return generate(self.adapter, self._chosen(which), inputs, self.encoding, **options)

    def score(self, inputs: Any, outputs: Any, *, batch_size: int = 16) -> TextScores:
        """Score given texts: their log probability averaged over the draws, and by token how sure the draws are.

        Args:
            inputs: as of :meth:`generate`.
            outputs: one text an input: strings, or tokens ``[n, L]`` as :meth:`generate` gives them.
            batch_size: rows of one pass.

        Returns:
            ``log_prob`` ``[n]`` of the whole texts; by token ``token_log_prob``, ``entropy`` and
            ``mutual_information`` ``[n, L]``, the part of the entropy that the draws disagree on
            (:class:`~pyro_lift.generation.scoring.TextScores`), in nats.

        Raises:
            TypeError: a backbone that writes no text; inputs or outputs of another form.
            ValueError: another number of outputs than of inputs, or one without a token.
        """
        return score_texts(self.adapter, self.thetas, inputs, outputs, self.encoding, batch_size=batch_size)

    def _chosen(self, which: str | int) -> Tensor:
        """Return the weights ``[k, D]`` of the draws' mean, of one draw, or of all."""
        if which == "mean":
            return self.thetas.mean(0, keepdim=True)
        if which == "draws":
            return self.thetas
        draws = len(self.thetas)
        if isinstance(which, int) and not isinstance(which, bool) and 0 <= which < draws:
            return self.thetas[which : which + 1]
        raise ValueError(f"which={which!r}: expected 'mean', 'draws' or a draw's number, 0 .. {draws - 1}.")

    def save_pretrained(self, folder: str | Path, *, results: Mapping[str, Any] | None = None) -> Path:
        """Write a folder: the draws, what predictions need, a model card, and a PEFT adapter of the mean."""
        self.results |= dict(results or {})
        return save_posterior(self, Path(folder))

    @classmethod
    @at_top_level(runs=False)
    def from_pretrained(
        cls,
        source: str | Path,
        backbone: nn.Module,
        task: Task | None = None,
        *,
        check_base: bool = True,
        **options: Any,
    ) -> TaskPosterior:
        """Load a posterior from its folder or the hub, as :meth:`LiFTPrior.from_pretrained` does a prior.

        Args:
            source: a folder, or ``"user/name"``.
            backbone: the base model.
            task: the task itself; None makes one without data, which is all that predictions need.
            check_base: whether another base model is refused.
            options: as of :meth:`LiFTPrior.from_pretrained`.
        """
        return cls(**load_posterior(source, backbone, task, check=check_base, **options)._asdict())

    def push_to_hub(self, repo_id: str, *, private: bool | None = None, **options: Any) -> str:
        """Upload the folder of :meth:`save_pretrained` to the hub; returns the commit's address."""
        return push(self, repo_id, private=private, **options)

    def to_peft(self, folder: str | Path, which: str | int = "mean") -> Path:
        """Write an ordinary PEFT adapter folder: ``"mean"``, or a draw's number."""
        return export_posterior(self, Path(folder), which)

    def merge_and_save(self, folder: str | Path, which: str | int = "mean") -> Path:
        """Write a whole model, the adapter merged into its weights, that ``AutoModel...from_pretrained`` loads.

        The backbone and the adapter stay as they are. The tokenizer is written beside the model where there is one.

        Args:
            folder: of the model.
            which: ``"mean"`` of the draws, or a draw's number.

        Raises:
            ValueError: draws of a head of the task's own, which such a model has no place for; a network that is not
                of transformers.
        """
        if which == "draws":
            raise ValueError("which='draws': a merged model is one network; give 'mean' or a draw's number.")
        if self.heads is not None:
            raise ValueError(
                f"task {self.task.name!r} has a head of its own, which a merged model has no place for. Export adapter "
                "and head with to_peft; or, where the network has the classes itself, adapt with many_rows=0."
            )
        tokenizer = None if self.encoding is None else self.encoding.encoder.tokenizer
        return save_merged(self.adapter, self._chosen(which)[0], Path(folder), tokenizer)
