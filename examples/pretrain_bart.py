"""Train a small BART on public-domain English: first its tokenizer, then the model.

The text has a paragraph a line. Two kinds of batch in turn. *Passages*: the encoder reads a stretch of text, the
decoder writes what follows. *Lines*: the text is cut at its punctuation, the encoder reads the previous lines, the
decoder writes the current one and ends it. In a tenth of the rows the encoder sees only ``<mask>``, as at the first
line of a role. Teacher forcing, AdamW with a cosine schedule, the forward pass in bfloat16. The run may be stopped and
started again: it goes on from the last checkpoint in the output folder.

Layers normalised after the residual, as BART's, collapse at a high rate: at 1.5e-3 the encoder ended up giving the same
states for every input. ``--decoder-of`` begins with the decoder of such a model, and an encoder and cross-attention of
its own.

    python examples/pretrain_bart.py corpus.txt.gz --out backbones/bart-novels --minutes 45
    python examples/pretrain_bart.py --smoke
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

if TYPE_CHECKING:
    from transformers import BartForConditionalGeneration, PreTrainedTokenizerFast

BOS, PAD, EOS, MASK = 0, 1, 2, 4
SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
IGNORED = -100
#: Every so-many-th paragraph is held out, to judge by.
HELD_OUT = 100

SIZES = {
    "small": {"vocab_size": 8192, "d_model": 224, "encoder_layers": 2, "decoder_layers": 4, "heads": 4},
    "smoke": {"vocab_size": 300, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "heads": 2},
}


class Corpus(NamedTuple):
    """Token numbers of the running text ``[M]``, and where in it a line begins."""

    tokens: Tensor
    lines: Tensor


def read_paragraphs(path: Path) -> list[str]:
    """The paragraphs of a text file, plain or gzipped."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as stream:
        return [line.strip() for line in stream if len(line.strip()) > 1]


def cut(paragraph: str) -> list[str]:
    """A paragraph as lines of some ten words, cut behind punctuation where there is any near."""
    pieces = re.findall(r"[^,;:.!?]+[,;:.!?'\")\-]*\s*|\S+\s*", paragraph)
    lines, current = [], ""
    for piece in pieces:
        words = piece.split()
        while len(words) > 14:  # a long clause without punctuation
            lines.append(" ".join([current, *words[:9]]).strip())
            current, words = "", words[9:]
        current = f"{current} {' '.join(words)}".strip()
        if len(current.split()) >= 6:
            lines.append(current)
            current = ""
    return [*lines, current] if current else lines


def train_tokenizer(paragraphs: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE with BART's special tokens in BART's places."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(paragraphs, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<s>",
        sep_token="</s>",
        model_max_length=126,
    )


def make_model(size: str) -> BartForConditionalGeneration:
    """BART with tied embeddings and no dropout (the corpus is never seen twice)."""
    from transformers import BartConfig, BartForConditionalGeneration

    s = SIZES[size]
    config = BartConfig(
        vocab_size=s["vocab_size"],
        d_model=s["d_model"],
        encoder_layers=s["encoder_layers"],
        decoder_layers=s["decoder_layers"],
        encoder_attention_heads=s["heads"],
        decoder_attention_heads=s["heads"],
        encoder_ffn_dim=4 * s["d_model"],
        decoder_ffn_dim=4 * s["d_model"],
        max_position_embeddings=128,
        dropout=0.0,
        attention_dropout=0.0,
        forced_eos_token_id=EOS,
    )
    return BartForConditionalGeneration(config)


def encode(tokenizer: PreTrainedTokenizerFast, paragraphs: list[str]) -> Corpus:
    """The running text in token numbers; a line is a run of text between two marks in ``lines``."""
    lines = [line for paragraph in paragraphs for line in cut(paragraph)]
    pieces = []
    for start in range(0, len(lines), 20_000):
        pieces += tokenizer(lines[start : start + 20_000], add_special_tokens=False)["input_ids"]
    lengths = torch.tensor([0, *(len(piece) for piece in pieces)])
    return Corpus(torch.tensor([token for piece in pieces for token in piece]), lengths.cumsum(0))


def wrap(rows: list[Tensor], end: bool = True) -> Tensor:
    """Rows between ``<s>`` and ``</s>``, padded to one length."""
    width = max(len(row) for row in rows) + 2
    padded = torch.full((len(rows), width), PAD)
    for i, row in enumerate(rows):
        padded[i, 0] = BOS
        padded[i, 1 : len(row) + 1] = row
        if end:
            padded[i, len(row) + 1] = EOS
    return padded


def draw_batch(corpus: Corpus, kind: str, rows: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
    """One batch of ``passages`` or ``lines``; a line's encoder input ends where the line begins.

    Args:
        corpus: to draw from.
        kind: of the two above.
        rows: in the batch.
        length: the most tokens of an encoder or a decoder row.
        generator: of the places.
    """
    count = len(corpus.lines) - 1
    line = torch.randint(count // 20, count - 1, (rows,), generator=generator)
    context, unseen = torch.rand(2, rows, generator=generator)
    sources, targets = [], []
    for i in range(rows):
        begin = int(corpus.lines[line[i]])
        stop = begin + length if kind == "passages" else min(int(corpus.lines[line[i] + 1]), begin + length // 2)
        reach = int(length * (0.1 + 0.9 * float(context[i])))
        source = corpus.tokens[max(begin - reach, 0) : begin]
        sources.append(torch.tensor([MASK]) if float(unseen[i]) < 0.1 else source)
        targets.append(corpus.tokens[begin:stop])
    inputs = wrap(sources)
    target = wrap(targets, end=kind == "lines")
    return {
        "input_ids": inputs,
        "attention_mask": (inputs != PAD).long(),
        "decoder_input_ids": torch.cat([torch.full((rows, 1), EOS), target[:, :-1]], 1),
        "target": target.masked_fill(target == PAD, IGNORED),
    }


def loss_of(model: BartForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Mean loss of a token; the output layer sees only the tokens that count."""
    inputs = {name: x for name, x in batch.items() if name != "target"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    counts = batch["target"] != IGNORED
    logits = model.lm_head(hidden[counts])
    return cross_entropy(logits.float(), batch["target"][counts])


@torch.no_grad()
def held_out_loss(model: BartForConditionalGeneration, corpus: Corpus, length: int) -> dict[str, float]:
    """Mean loss of a token over fixed batches of each kind; of lines also with the encoder inputs exchanged."""
    model.eval()
    losses = {}
    for kind in ("passages", "lines", "lines, wrong context"):
        generator = torch.Generator().manual_seed(1)
        fixed = [draw_batch(corpus, kind.split(",")[0], 32, length, generator) for _ in range(8)]
        if kind.endswith("wrong context"):
            fixed = [b | {k: b[k].roll(1, 0) for k in ("input_ids", "attention_mask")} for b in fixed]
        losses[kind] = float(torch.stack([loss_of(model, batch) for batch in fixed]).mean())
    model.train()
    return losses


def take_decoder(model: BartForConditionalGeneration, folder: Path) -> None:
    """Take another model's weights, but for the encoder's layers and the decoder's attention to them."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    kept = {k: x.float() for k, x in tensors.items() if "encoder.layers" not in k and "encoder_attn" not in k}
    model.load_state_dict(kept, strict=False)
    model.tie_weights()


def schedule(peak: float, warm_up: float = 0.05, floor: float = 0.02) -> Any:
    """Rate at a share of the run: linear up, cosine down to a floor."""
    return lambda share: (
        peak * min(share / warm_up, floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * min(share, 1.0))))
    )


class Checkpoint(NamedTuple):
    """What a stopped run needs to go on: how far it was, in seconds of work and in steps."""

    seconds: float
    step: int
    tokens: int


def save_checkpoint(folder: Path, model: Any, optimizer: Any, generator: torch.Generator, at: Checkpoint) -> None:
    """Write to a temporary name, then rename: a run killed here still has the last checkpoint."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state |= {"generator": generator.get_state(), "at": tuple(at)}
    torch.save(state, folder / "checkpoint.tmp")
    os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def load_checkpoint(folder: Path, model: Any, optimizer: Any, generator: torch.Generator) -> Checkpoint:
    """The last checkpoint, or the beginning."""
    path = folder / "checkpoint.pt"
    if not path.exists():
        return Checkpoint(0.0, 0, 0)
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    generator.set_state(state["generator"])
    return Checkpoint(*state["at"])


def batches(corpus: Corpus, length: int, rows: int, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Passages and lines in turn; twice the rows of lines, which are short."""
    while True:
        yield draw_batch(corpus, "passages", rows, length, generator)
        yield draw_batch(corpus, "lines", 2 * rows, length, generator)


def train(
    model: BartForConditionalGeneration,
    corpus: Corpus,
    held_out: Corpus,
    folder: Path,
    *,
    minutes: float,
    rows: int,
    length: int,
    peak: float,
) -> tuple[Checkpoint, list[dict[str, float]]]:
    """Train for so many minutes of work, checkpoints included; the schedule is a function of the time spent."""
    model.train()
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decay, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98))
    generator = torch.Generator().manual_seed(0)
    rate_at = schedule(peak)
    at = load_checkpoint(folder, model, optimizer, generator)
    total, began, saved, curve = 60 * minutes, time.monotonic() - at.seconds, at.seconds, []
    bar = tqdm(total=round(total), initial=round(at.seconds), unit="s", desc="bart")
    for batch in batches(corpus, length, rows, generator):
        spent = time.monotonic() - began
        if spent >= total:
            break
        rate = rate_at(spent / total)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        at = Checkpoint(spent, at.step + 1, at.tokens + int((batch["target"] != IGNORED).sum()))
        shown = {"loss": f"{loss.item():.3f}", "lr": f"{rate:.1e}", "tokens": f"{at.tokens / 1e6:.1f}M"}
        bar.set_postfix(shown, refresh=False)
        bar.update(round(spent) - bar.n)
        if spent - saved > 60:
            saved = spent
            save_checkpoint(folder, model, optimizer, generator, at)
            curve.append({"minutes": spent / 60, "step": at.step, **held_out_loss(model, held_out, length)})
            bar.write(json.dumps({k: round(v, 3) for k, v in curve[-1].items()}))
    bar.close()
    save_checkpoint(folder, model, optimizer, generator, at)
    return at, curve


def smoke_text() -> list[str]:
    """A few sentences, many times over, for a run of seconds."""
    line = "It was the best of times, it was the worst of times; it was the age of wisdom, the age of foolishness."
    return [f"{line} Number {i} of the tale, and so on." for i in range(400)]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", type=Path, nargs="?", help="text, one paragraph a line; .gz is read too")
    parser.add_argument("--out", type=Path, default=Path("bart-novels"))
    parser.add_argument("--minutes", type=float, default=45.0)
    parser.add_argument("--rows", type=int, default=48, help="of a batch of passages")
    parser.add_argument("--length", type=int, default=64, help="most tokens of a row")
    parser.add_argument("--rate", type=float, default=6e-4, help="peak learning rate")
    parser.add_argument("--decoder-of", type=Path, help="folder of a model whose decoder to begin with")
    parser.add_argument("--smoke", action="store_true", help="seconds, a made-up text, nothing is kept")
    options = parser.parse_args()
    if options.corpus is None and not options.smoke:
        parser.error("give the corpus, or --smoke")
    if options.smoke:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            run(smoke_text(), Path(folder), "smoke", minutes=0.05, rows=4, length=32, rate=1e-3)
        return
    paragraphs = read_paragraphs(options.corpus)
    begin = options.decoder_of
    run(paragraphs, options.out, "small", options.minutes, options.rows, options.length, options.rate, begin)


def run(
    paragraphs: list[str],
    folder: Path,
    size: str,
    minutes: float,
    rows: int,
    length: int,
    rate: float,
    decoder_of: Path | None = None,
) -> dict[str, Any]:
    """Tokenizer, model, weights in half precision, and a record of the run."""
    from transformers import AutoTokenizer

    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    if decoder_of is not None:
        AutoTokenizer.from_pretrained(decoder_of).save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        train_tokenizer(paragraphs, SIZES[size]["vocab_size"]).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = encode(tokenizer, paragraphs[::HELD_OUT])
    corpus = encode(tokenizer, [p for i, p in enumerate(paragraphs) if i % HELD_OUT])
    model = make_model(size)
    if decoder_of is not None:
        take_decoder(model, decoder_of)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.2f} M parameters, {len(corpus.tokens) / 1e6:.1f} M tokens, vocabulary {len(tokenizer)}")
    at, curve = train(model, corpus, held_out, folder, minutes=minutes, rows=rows, length=length, peak=rate)
    record = {
        "parameters": parameters,
        "corpus_tokens": len(corpus.tokens),
        "minutes": round(at.seconds / 60, 1),
        "steps": at.step,
        "target_tokens": at.tokens,
        "held_out_loss": held_out_loss(model, held_out, length),
        "curve": curve,
    }
    model.half().save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({k: v for k, v in record.items() if k != "curve"}))
    return record


if __name__ == "__main__":
    main()
