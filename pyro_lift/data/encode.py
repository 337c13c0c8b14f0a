"""From strings and pictures to the tensors of one backbone: encoders, one a way of learning.

An encoder is made once for a backbone and called with each task. Text that is longer than the limit is cut; how many
texts were, stands in ``notes`` and so in the summary of a collection.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from pyro_lift.data.chats import Conversation, Message, chat_segments, with_system
from pyro_lift.data.encoding import Given, TextEncoding
from pyro_lift.data.images import Images, ImageTask
from pyro_lift.data.pixels import read_pixels
from pyro_lift.data.text import CHOICES, TextRow, TextTask, read_as_classes
from pyro_lift.models.likelihoods import IGNORED, shift_right
from pyro_lift.models.task import Rows, Task
from pyro_lift.support.options import check_number

__all__ = ["LabelMatching", "NextToken", "Pictures", "TextToText", "check_tokenizer"]


def check_tokenizer(tokenizer: Any, vocabulary: int) -> None:
    """Refuse a tokenizer that can give numbers beyond a backbone's embeddings, or that cannot pad.

    Raises:
        ValueError: both sizes, in the message.
    """
    if len(tokenizer) > vocabulary:
        raise ValueError(
            f"the tokenizer does not fit the model: it has {len(tokenizer)} tokens, the model {vocabulary} embeddings. "
            "Load both from the same folder or name."
        )
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no padding token; set tokenizer.pad_token (tokenizer.eos_token will do).")


class _TextEncoder:
    """What the encoders of text share: the tokenizer, the limit, and the count of what was cut."""

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        check_number("max_length", max_length, least=2, open_below=False, whole=True)
        self.tokenizer, self.max_length = tokenizer, max_length
        self.cut: dict[str, int] = {}
        #: Rows whose answer has the tokens of another of their options, by task.
        self.alike: dict[str, int] = {}
        #: Pairs of labels of the same tokens, by task.
        self.same_labels: dict[str, list[str]] = {}
        #: Classes of a task that does not say it has some, by task.
        self.inferred: dict[str, int] = {}

    def prompts(self, texts: Sequence[Given], encoding: TextEncoding) -> dict[str, Tensor]:
        """Encode inputs without their answers."""
        raise NotImplementedError

    def answers(self, texts: Sequence[str], encoding: TextEncoding) -> list[list[int]]:
        """Encode answers as the network was taught to write them."""
        raise NotImplementedError

    @property
    def notes(self) -> tuple[str, ...]:
        """How many texts were cut, and how many rows have options that the tokenizer takes for one, by task."""
        notes = []
        if self.cut:
            notes.append(f"{_total(self.cut)} texts longer than {self.max_length} tokens were cut ({_most(self.cut)})")
        if self.alike:
            notes.append(
                f"{_total(self.alike)} rows have another option with the tokens of their answer ({_most(self.alike)})"
            )
        if self.inferred:
            notes.append(
                f"{len(self.inferred)} tasks name no classes: their distinct answers are read as such "
                f"({_most(self.inferred)})"
            )
        notes += [
            f"{name}: the tokenizer does not tell these labels apart, only a head of the task's own can: "
            + ", ".join(pairs[:3])
            + (f" and {len(pairs) - 3} more" if len(pairs) > 3 else "")
            for name, pairs in self.same_labels.items()
        ]
        return tuple(notes)

    def _begin(self, task: TextTask) -> None:
        """Forget the counts of a task that is encoded again."""
        self.cut.pop(task.name, None)
        self.alike.pop(task.name, None)
        self.same_labels.pop(task.name, None)
        self.inferred.pop(task.name, None)

    def tokens(self, texts: Sequence[str], task: str) -> list[list[int]]:
        """Tokenize texts, special tokens included, cut to the limit."""
        encoded: list[list[int]] = self.tokenizer(list(texts), verbose=False)["input_ids"]
        long = [i for i, ids in enumerate(encoded) if len(ids) > self.max_length]
        if long:
            self.cut[task] = self.cut.get(task, 0) + len(long)
            again = self.tokenizer([texts[i] for i in long], truncation=True, max_length=self.max_length)["input_ids"]
            for i, ids in zip(long, again, strict=True):
                encoded[i] = ids
        return encoded

    @property
    def padding(self) -> int:
        """The number behind shorter texts: the tokenizer's, else its end token, else 0; the mask hides it anyway."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id)
        return next((number for number in known if number is not None), 0)

    def padded(self, encoded: Sequence[Sequence[int]], value: int | None = None) -> tuple[Tensor, Tensor]:
        """Pad numbers to ``[n, L]`` on the right, and make their mask."""
        return _padded(encoded, self.padding if value is None else value)

    def inputs(self, texts: Sequence[str], task: str) -> dict[str, Tensor]:
        """Make ``input_ids`` and ``attention_mask`` of texts."""
        ids, mask = self.padded(self.tokens(texts, task))
        return {"input_ids": ids, "attention_mask": mask}

    def encoding(self, task: TextTask) -> TextEncoding:
        """Note how the task's texts are encoded, for new inputs of it."""
        return TextEncoding(self, task.name, task.form, task.system, task.labels)


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _most(counts: Mapping[str, int]) -> str:
    worst = sorted(counts.items(), key=lambda item: -item[1])[:3]
    return "most: " + ", ".join(f"{name} {count}" for name, count in worst)


def _padded(encoded: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    length = max(1, *map(len, encoded))
    ids = torch.full((len(encoded), length), value, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, numbers in enumerate(encoded):
        ids[row, : len(numbers)] = torch.tensor(numbers, dtype=torch.long)
        mask[row, : len(numbers)] = 1
    return ids, mask


def _task(task: TextTask, parts: Mapping[str, Rows], kind: Any, encoding: TextEncoding, **options: Any) -> Task:
    if kind == "tokens" and task.dev:
        options["dev_answers"] = [row.outputs for row in task.dev]
    return Task(
        task.name, parts["train"], kind, test=parts.get("test"), dev=parts.get("dev"), metric=task.metric,
        encoding=encoding, **options,
    )  # fmt: skip


class LabelMatching(_TextEncoder):
    """Classification and multiple choice for one encoder, by similarity to label texts: no head.

    A text-to-text task, as rows without a form are, is read as a classification where its answers come again
    (:func:`~pyro_lift.data.text.read_as_classes`): an encoder cannot write them.

    Args:
        tokenizer: of the backbone.
        max_length: longest input in tokens.

    Raises:
        ValueError: when called with a task of another form, or whose answers do not come again.
    """

    def __init__(self, tokenizer: Any, max_length: int = 128) -> None:
        super().__init__(tokenizer, max_length)

    def __call__(self, task: TextTask) -> Task:
        """Encode the task as a ``matching`` one."""
        self._begin(task)
        if task.form not in CHOICES:
            task = read_as_classes(task)
            self.inferred[task.name] = len(task.labels)
        parts = {part: self._rows(task, rows) for part, rows in task.parts.items() if rows}
        if task.form == "classification":
            texts = self.inputs(task.labels, task.name)
            self._note_labels(task, texts["input_ids"])
            return _task(task, parts, "matching", self.encoding(task), labels=task.labels, label_texts=texts)
        most = max(rows.inputs["option_input_ids"].shape[1] for rows in parts.values())
        parts = {part: _with_options(rows, most) for part, rows in parts.items()}
        return _task(task, parts, "matching", self.encoding(task))

    def prompts(self, texts: Sequence[Given], encoding: TextEncoding) -> dict[str, Tensor]:
        """Encode inputs."""
        return self.inputs([encoding.text(text, self.tokenizer) for text in texts], encoding.task)

    def answers(self, texts: Sequence[str], encoding: TextEncoding) -> list[list[int]]:
        """Encode labels."""
        return self.tokens(texts, encoding.task)

    def _note_labels(self, task: TextTask, ids: Tensor) -> None:
        """Note labels that share their tokens with another: matching ties them, a head of the task's own does not."""
        first: dict[tuple[int, ...], str] = {}
        for label, tokens in zip(task.labels, map(tuple, ids.tolist()), strict=True):
            if tokens in first:
                self.same_labels.setdefault(task.name, []).append(f"{first[tokens]!r} and {label!r}")
            first.setdefault(tokens, label)

    def _rows(self, task: TextTask, rows: Sequence[TextRow]) -> Rows:
        inputs = self.encoding(task).prompts([row.input for row in rows])
        if task.form == "classification":
            return Rows(inputs, torch.tensor([task.labels.index(row.outputs[0]) for row in rows]))
        most = max(len(row.options) for row in rows)
        ids, mask = self.padded(self.tokens([option for row in rows for option in row.options], task.name))
        all_ids = torch.full((len(rows), most, ids.shape[-1]), self.padding)
        all_mask = torch.zeros_like(all_ids)
        start = 0
        for i, row in enumerate(rows):
            stop = start + len(row.options)
            all_ids[i, : len(row.options)], all_mask[i, : len(row.options)] = ids[start:stop], mask[start:stop]
            start = stop
        target = torch.tensor([row.options.index(row.outputs[0]) for row in rows])
        answers = all_ids[torch.arange(len(rows)), target]
        same = (all_ids == answers[:, None]).all(-1) & all_mask.any(-1)
        if alike := int((same.sum(1) > 1).sum()):
            self.alike[task.name] = self.alike.get(task.name, 0) + alike
        return Rows({**inputs, "option_input_ids": all_ids, "option_attention_mask": all_mask}, target)


def _with_options(rows: Rows, count: int) -> Rows:
    """Add absent options, with a mask of zeros, up to a common number."""
    missing = count - rows.inputs["option_input_ids"].shape[1]
    inputs = {
        name: torch.nn.functional.pad(x, (0, 0, 0, missing)) if name.startswith("option_") else x
        for name, x in rows.inputs.items()
    }
    return Rows(inputs, rows.target)


class TextToText(_TextEncoder):
    """Any text task for an encoder-decoder, by teacher forcing; also the next line given the previous ones.

    Inputs of a text-to-text task begin with ``[name]``, as CrossFit's. Empty context becomes the mask token.

    Args:
        tokenizer: of the backbone.
        start_token: what the decoder begins with (``config.decoder_start_token_id``).
        max_length: longest input, and longest output, in tokens.

    Raises:
        TypeError: a start token that is no number; ``config.decoder_start_token_id`` is None in some networks.
        ValueError: one that is negative.
    """

    def __init__(self, tokenizer: Any, start_token: int, max_length: int = 128) -> None:
        super().__init__(tokenizer, max_length)
        if isinstance(start_token, bool) or not hasattr(start_token, "__index__"):
            raise TypeError(
                f"start_token={start_token!r}; expected the number of the token that answers begin with: the "
                "network's config.decoder_start_token_id, or where that is None the tokenizer's bos_token_id or "
                "pad_token_id, as the network was trained."
            )
        if start_token < 0:
            raise ValueError(f"start_token={start_token}; expected the number of a token, 0 or above.")
        self.start_token = start_token

    def __call__(self, task: TextTask) -> Task:
        """Encode the task as a ``tokens`` one."""
        self._begin(task)
        encoding = self.encoding(task)
        parts = {part: self._rows(encoding, rows) for part, rows in task.parts.items() if rows}
        return _task(task, parts, "tokens", encoding)

    def _rows(self, encoding: TextEncoding, rows: Sequence[TextRow]) -> Rows:
        target = encoding.answers([row.outputs[0] for row in rows])
        inputs = encoding.prompts([row.input for row in rows])
        return Rows({**inputs, "decoder_input_ids": shift_right(target, self.start_token)}, target)

    def prompts(self, texts: Sequence[Given], encoding: TextEncoding) -> dict[str, Tensor]:
        """Encode inputs, the task's name before each; a prompt and a chat have no place for it."""
        named = encoding.task and encoding.form not in ("next_token", "completion", "chat")
        prefix = f"[{encoding.task}] " if named else ""
        empty = self.tokenizer.mask_token or ""
        written = [encoding.text(text, self.tokenizer) for text in texts]
        return self.inputs([prefix + text if text.strip() else empty for text in written], encoding.task)

    def answers(self, texts: Sequence[str], encoding: TextEncoding) -> list[list[int]]:
        """Encode answers, with the tokenizer's special tokens."""
        return self.tokens(texts, encoding.task)


class NextToken(_TextEncoder):
    """Any text task for a causal model: the input is given, the output and an end token are predicted.

    Args:
        tokenizer: of the backbone.
        max_length: longest input with its output, in tokens; the beginning of a longer input is cut. Of an output that
            is longer by itself the end is cut, its end token too. Both are counted in ``notes``.
    """

    def __init__(self, tokenizer: Any, max_length: int = 128) -> None:
        super().__init__(tokenizer, max_length)

    def __call__(self, task: TextTask) -> Task:
        """Encode the task as a ``tokens`` one."""
        self._begin(task)
        encoding = self.encoding(task)
        parts = {part: self._rows(encoding, rows) for part, rows in task.parts.items() if rows}
        return _task(task, parts, "tokens", encoding)

    def _rows(self, encoding: TextEncoding, rows: Sequence[TextRow]) -> Rows:
        texts: list[list[int]] = []
        targets: list[list[int]] = []
        cut = 0
        for number, row in enumerate(rows):
            try:
                pieces = self._pieces(row, encoding)
            except ValueError as error:
                raise ValueError(f"task {encoding.task!r}, row {number}: {error}") from error
            line = [token for tokens, _ in pieces for token in tokens]
            learnt = [is_learnt for tokens, is_learnt in pieces for _ in tokens]
            cut += len(line) > self.max_length
            last = len(line) - max(len(pieces[-1][0]) - (self.max_length - 1), 0)
            first = max(last - self.max_length, 0)
            line, learnt = line[first:last], learnt[first:last]
            texts.append(line)
            follows = zip(line[1:], learnt[1:], strict=True)
            targets.append([token if is_learnt else IGNORED for token, is_learnt in follows] + [IGNORED])
        self._count(cut, encoding)
        ids, mask = self.padded(texts)
        return Rows({"input_ids": ids, "attention_mask": mask}, self.padded(targets, IGNORED)[0])

    def _pieces(self, row: TextRow, encoding: TextEncoding) -> list[tuple[list[int], bool]]:
        """Tokenize what is given and what is learnt in turn; the last is learnt."""
        if encoding.form != "chat":
            said = self.answers([row.outputs[0]], encoding)[0]
            return [(self._given(row.input, encoding) or said[:1], False), (said, True)]
        turns = row.input.turns if isinstance(row.input, Conversation) else (Message("user", row.input),)
        messages = (*with_system(turns, encoding.system), Message("assistant", row.outputs[0]))
        segments = chat_segments(self.tokenizer, messages)
        pieces = [(self._ids(segment.text), segment.learnt) for segment in segments]
        return [*pieces[:-1], (self._ended(pieces[-1][0]), True)]

    def prompts(self, texts: Sequence[Given], encoding: TextEncoding) -> dict[str, Tensor]:
        """Encode inputs, padded on the left, so that all end where the answer begins."""
        begin = [0] if self.tokenizer.bos_token_id is None else [self.tokenizer.bos_token_id]
        given = [self._given(text, encoding) or begin for text in texts]
        room = self.max_length - 1
        self._count(sum(len(ids) > room for ids in given), encoding)
        ids, mask = self.padded([ids[-room:][::-1] for ids in given])
        return {"input_ids": ids.flip(-1), "attention_mask": mask.flip(-1)}

    def answers(self, texts: Sequence[str], encoding: TextEncoding) -> list[list[int]]:
        """Encode answers, each with the end token: after a blank, of a completion as it stands, of a chat as a turn."""
        if encoding.form == "chat":
            asked = Message("user", "?")  # what was asked changes nothing in how the template writes an answer
            turns = [chat_segments(self.tokenizer, (asked, Message("assistant", text)))[-1].text for text in texts]
            return [self._ended(self._ids(turn)) for turn in turns]
        blank = "" if encoding.form == "completion" else " "
        return [self._ids(blank + text) + self._end for text in texts]

    @property
    def _end(self) -> list[int]:
        return [] if self.tokenizer.eos_token_id is None else [self.tokenizer.eos_token_id]

    def _ended(self, ids: list[int]) -> list[int]:
        """Let a turn end with the end token, unless the template has put it there."""
        return ids if set(self._end) <= set(ids) else ids + self._end

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _given(self, given: Given, encoding: TextEncoding) -> list[int]:
        """Tokenize an input; an empty one is the end of what came before."""
        ids = self._ids(encoding.text(given, self.tokenizer))
        if encoding.form == "completion":
            ids = self._begin_tokens + ids
        return ids or self._end

    @property
    def _begin_tokens(self) -> list[int]:
        """What the tokenizer itself puts before a text, as Llama's; a chat's template writes it."""
        start = self.tokenizer.bos_token_id
        return [start] if start is not None and self.tokenizer("")["input_ids"][:1] == [start] else []

    def _count(self, cut: int, encoding: TextEncoding) -> None:
        if cut:
            self.cut[encoding.task] = self.cut.get(encoding.task, 0) + cut


class Pictures:
    """Pictures as a vision backbone wants them: resized to its square without cropping, scaled, normalised.

    Args:
        size: side in pixels.
        mean: of each channel, of values in [0, 1]; their number is the backbone's number of channels.
        sd: of each channel.
        keyword: of the backbone's input: ``"pixel_values"`` for transformers, ``""`` (by position) for timm.
    """

    def __init__(self, size: int, mean: Sequence[float], sd: Sequence[float], keyword: str = "pixel_values") -> None:
        check_number("size", size, least=1, open_below=False, whole=True)
        if len(mean) != len(sd) or len(mean) == 0:
            raise ValueError(f"{len(mean)} means and {len(sd)} sds: expected one of each for every channel.")
        for value in sd:
            check_number("sd", value)
        self.size, self.keyword = size, keyword
        self.mean, self.sd = (torch.tensor(x, dtype=torch.float32).view(-1, 1, 1) for x in (mean, sd))
        self.animated: dict[str, int] = {}

    @property
    def notes(self) -> tuple[str, ...]:
        """How many files held several frames or pages, of which the first was read, by task."""
        if not self.animated:
            return ()
        return (f"{_total(self.animated)} pictures of several frames: the first was read ({_most(self.animated)})",)

    def __call__(self, task: ImageTask) -> Task:
        """Encode the task as a ``classification``."""
        self.animated.pop(task.name, None)
        parts = {part: self.rows(task.name, images) for part, images in task.parts.items()}
        return Task(
            task.name, parts["train"], "classification", len(task.labels), parts.get("test"), dev=parts.get("dev"),
            metric=task.metric, labels=task.labels,
        )  # fmt: skip

    def rows(self, name: str, images: Images) -> Rows:
        """Make the backbone's input of pictures of a task."""
        if isinstance(images.pictures, Tensor):
            pictures = images.pictures
        else:
            pictures, animated = read_pixels(images.pictures, self.size)
            if animated:
                self.animated[name] = self.animated.get(name, 0) + animated
        x = pictures.permute(0, 3, 1, 2).float()
        if x.shape[-2:] != (self.size, self.size):
            x = interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        channels = len(self.mean)
        if x.shape[1] != channels:
            x = (x if x.shape[1] == 1 else x.mean(1, keepdim=True)).expand(-1, channels, -1, -1)
        return Rows({self.keyword: ((x / 255.0 - self.mean) / self.sd).contiguous()}, images.target)
