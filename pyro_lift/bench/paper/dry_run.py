"""What a table would take, without running it: the configuration, the network's shapes, memory and time.

Networks are built at their full size on PyTorch's meta device, from their configuration alone: nothing is downloaded
and nothing allocated. One minibatch goes forward and backward there; what autograd would keep and the floating-point
operations are counted as it does. Seconds are these operations over what a device sustains.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pyro_lift.bench.paper.cells import PaperCell
from pyro_lift.bench.paper.contestants import ALONE, CONTESTANTS, GROUPS
from pyro_lift.bench.paper.costs import FAMILY, ROUNDS, TASKS, TIMED, rank_of
from pyro_lift.bench.paper.families import Setting, setting_of
from pyro_lift.bench.paper.sizes import Scale, Sizes
from pyro_lift.bench.records import format_table
from pyro_lift.bench.shapes import LABEL_TOKENS
from pyro_lift.models.backbones import recipe

__all__ = ["PASSES", "Shapes", "dry_run", "shapes_of"]

#: Regressions on frozen features: one pass of a row, and nothing is trained through the network.
PROBES = ("linear-probe", "pooled-probe")
#: What a device sustains, in floating-point operations a second: a third of a V100's peak in float32, and two cores.
SUSTAINED: dict[Scale, tuple[str, float]] = {"paper": ("one V100", 5e12), "small": ("two CPU cores", 6e10)}
#: Over one forward and backward pass of a minibatch: passes a visit, and activations alive at once
#: (docs/results/methods.md).
PASSES: dict[str, tuple[float, float]] = {
    "maml": (2.5, 3.1),
    "maml-2": (4.6, 4.6),
    "maml-3": (6.7, 6.0),
    "maml-5": (11.0, 9.0),
    "fo-maml": (1.6, 1.6),
    "imaml": (7.5, 3.6),
    "imaml-mix-k5": (21.0, 3.7),
    "maml-mix-k5": (11.0, 3.2),
    "boot-maml": (11.0, 3.1),
    "bmaml-m1": (4.6, 3.4),
    "bmaml-m3": (15.0, 6.4),
    "bmaml": (25.0, 9.5),
    "abml": (11.0, 8.4),
    "reptile": (2.0, 1.0),
    "protonet": (1.4, 2.1),
    "lift": (1.2, 1.0),
}
#: Tasks to learn from and to be judged by, in round numbers, for the memory of theta and the seconds of adaptation.
COUNTS = {"crossfit": (45, 10), "flan-t5-xl": (45, 10), "vtab": (12, 7), "shakespeare": (122, 15)}


class Shapes(NamedTuple):
    """What one minibatch of a network takes.

    Attributes:
        weights: of the frozen network.
        adapter: D, weights of the adapter.
        kept: bytes that autograd keeps for the backward pass.
        operations: floating-point operations of a forward and a backward pass.
        output: shape of what the network gives.
    """

    weights: int
    adapter: int
    kept: int
    operations: int
    output: tuple[int, ...]


def _bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50265, d_model=768, encoder_layers=6, decoder_layers=6, encoder_attention_heads=12,
        decoder_attention_heads=12, encoder_ffn_dim=3072, decoder_ffn_dim=3072, dropout=0.0,
    )  # fmt: skip
    model: nn.Module = BartForConditionalGeneration(config)
    return model


def _vit() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    model: nn.Module = ViTModel(ViTConfig(), add_pooling_layer=False)  # its defaults are those of ViT-B/16
    return model


def _t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=32128, d_model=2048, d_kv=64, d_ff=5120, num_layers=24, num_heads=32, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model: nn.Module = T5ForConditionalGeneration(config)
    return model


#: Networks of the paper's scale by their name on the hub.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "facebook/bart-base": _bart,
    "google/vit-base-patch16-224-in21k": _vit,
    "google/flan-t5-xl": _t5,
}


@cache
def shapes_of(backbone: str, rank: int, rows: int, tokens: int) -> Shapes:
    """Build a network on the meta device, put LoRA on it, and send a minibatch through it and back.

    Args:
        backbone: its name on the hub, of :data:`NETWORKS`.
        rank: of the adapter.
        rows: of the minibatch.
        tokens: of a text; pictures have their own size.
    """
    import peft
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        network = NETWORKS[backbone]().eval()
        # The plain attention: the others look at the values of their masks. It keeps the products of queries and keys,
        # as the paper's machines did, so that the bytes are an upper bound for today's.
        network.set_attn_implementation("eager")  # type: ignore[operator]
        weights = sum(p.numel() for p in network.parameters())
        adapted = peft.get_peft_model(network, recipe(network, rank))  # type: ignore[arg-type]
        inputs = _inputs(network, rows, tokens)
        kept: dict[int, int] = {}

        def keep(x: Tensor) -> Tensor:
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
            return x

        own = {p.untyped_storage()._cdata for p in network.parameters()}
        with FlopCounterMode(display=False) as counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            output = adapted(**inputs)
            first = output.logits if hasattr(output, "logits") else output.last_hidden_state
            first.float().sum().backward()
    adapter = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    total = sum(size for place, size in kept.items() if place not in own)
    return Shapes(weights, adapter, total, counter.get_total_flops(), tuple(first.shape))


def _inputs(network: nn.Module, rows: int, tokens: int) -> dict[str, Tensor]:
    config: Any = network.config
    if not getattr(config, "is_encoder_decoder", False):
        return {"pixel_values": torch.zeros(rows, 3, config.image_size, config.image_size)}
    ids = torch.zeros(rows, tokens, dtype=torch.long)
    answer = torch.zeros(rows, LABEL_TOKENS, dtype=torch.long)
    # No mask: transformers would look at its values, and tensors on the meta device have none.
    return {"input_ids": ids, "decoder_input_ids": answer}


def dry_run(cells: Sequence[PaperCell]) -> str:
    """Resolve the cells' configurations, build their networks, and estimate memory and time; as text.

    At the small scale the networks are those on the disk, which need no estimate of their shapes: what is shown is the
    configuration and where its data are looked for.
    """
    lines: list[str] = []
    plain = [cell for cell in cells if cell.family not in ("toy", "cost")]
    for scale, family, split in dict.fromkeys((cell.scale, cell.family, cell.split) for cell in plain):
        setting = setting_of(scale, family, split)
        lines += [f"{family} {split}, {scale} scale", *_configuration(setting)]
        groups = list(dict.fromkeys(c.group for c in plain if (c.scale, c.family, c.split) == (scale, family, split)))
        if setting.backbone in NETWORKS:
            lines += _estimates(setting, scale, family, groups)
        else:
            local = Path(setting.backbone).is_dir() or setting.backbone in ("digits", "regression")
            lines.append(f"  network: {'here' if local else 'from the hub'}; cells: {', '.join(groups)}")
        lines.append("")
    for cell in (cell for cell in cells if cell.family == "cost"):
        lines += [f"cost {cell.split}, {cell.scale} scale", *_costs(cell.scale, cell.split), ""]
    toys = [cell.cell.name for cell in cells if cell.family == "toy"]
    if toys:
        lines.append(f"toys, which have no network and take seconds to minutes: {', '.join(toys)}")
    return "\n".join([f"{len(cells)} cells", "", *lines])


def _configuration(setting: Setting) -> list[str]:
    s: Sizes = setting.sizes
    rates = ", ".join(f"{rate:g}" for rate in s.rates) + (" times the network's own step" if s.relative else "")
    where = "hub name" if setting.backbone in NETWORKS else "backbone"
    burn_in = s.visits // 3 if s.burn_in is None else s.burn_in
    return [
        f"  {where}: {setting.backbone.rsplit('site-packages/', 1)[-1]} ({setting.kind}, {setting.form})",
        f"  rank {s.rank}, layers {'all' if setting.layers is None else list(setting.layers)}",
        f"  {s.warm_up} warm-up steps, {s.visits} visits of {s.batch_size} rows (LiFT burns in for {burn_in}, every "
        f"{s.thinning}. is a draw), {s.steps} adaptation steps, {s.draws} networks a prediction",
        f"  rates of adaptation {rates}, chosen on at most "
        f"{s.dev_tasks} tasks; {s.seeds} seeds; at most {s.test_rows} test rows",
        f"  LiFT: {', '.join(f'{k}={v}' for k, v in s.lift.items()) or 'its defaults'}",
    ]


def _costs(scale: Scale, split: str) -> list[str]:
    """Say what :func:`~pyro_lift.bench.paper.costs.run_costs` would time: iterations of three methods at one rank."""
    setting = setting_of(scale, FAMILY[scale], "CLS-45")
    setting = replace(setting, sizes=replace(setting.sizes, rank=rank_of(split)))
    lines = [*_configuration(setting), f"  timed: iterations of {', '.join(TIMED)}, in {ROUNDS} rounds"]
    if setting.backbone not in NETWORKS:
        return lines
    shapes, (device, sustained) = _shapes(setting), SUSTAINED[scale]
    rows = []
    for name in TIMED:
        contestant = CONTESTANTS[name]
        seconds = PASSES.get(contestant.method, (1.0, 1.0))[0] * shapes.operations / sustained
        memory = _bytes(shapes, contestant.method, TASKS, contestant.components)
        rows.append([name, f"{memory / 2**30:.1f}", f"{seconds:.2f}", f"{(ROUNDS + 1) * seconds:.1f}"])
    return [
        *lines,
        *_built(shapes, device, sustained),
        *_indented(["iteration", "GiB", "seconds", "of all rounds"], rows),
    ]


def _shapes(setting: Setting) -> Shapes:
    s = setting.sizes
    return shapes_of(setting.backbone, s.rank, s.batch_size, min(s.max_length, 128))


def _bytes(shapes: Shapes, method: str, tasks: int, components: int) -> float:
    """Estimate the memory of a method: the network, its activations, and what it keeps of the adapter."""
    alive = PASSES.get(method, (1.0, 1.0))[1]
    vectors = tasks + 4 + 3 * components if method.startswith("lift") else 1
    return 4 * shapes.weights + alive * shapes.kept + 4 * shapes.adapter * vectors


def _built(shapes: Shapes, device: str, sustained: float) -> list[str]:
    return [
        f"  on the meta device: {shapes.weights:,} frozen weights, {shapes.adapter:,} of the adapter, output "
        f"{list(shapes.output)}; a minibatch {shapes.operations / 1e12:.2f} TFLOP, {shapes.kept / 2**30:.2f} GiB kept",
        f"  estimates for {device} at {sustained:.0e} operations a second, texts of at most 128 tokens:",
    ]


def _indented(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"    {line}" for line in format_table(header, rows).split("\n")]


def _estimates(setting: Setting, scale: Scale, family: str, groups: Sequence[str]) -> list[str]:
    s, (device, sustained) = setting.sizes, SUSTAINED[scale]
    shapes = _shapes(setting)
    train, test = COUNTS[family]
    one = shapes.operations / sustained
    components = max((CONTESTANTS[name].components for group in groups for name in GROUPS[group]), default=1)
    rows = []
    for group in groups:
        name = GROUPS[group][0]
        method = CONTESTANTS[name].method
        passes = PASSES.get(method, (1.0, 1.0))[0]
        meta = 0 if method in (*PROBES, *ALONE) else 1
        adaptations = (
            len(GROUPS[group]) * (test + len(s.rates) * s.dev_tasks) * (s.steps if method not in PROBES else 1)
        )
        seconds = one * (meta * (s.warm_up + passes * s.visits) + adaptations)
        memory = _bytes(shapes, method, train, components)
        rows.append([group, f"{len(GROUPS[group])}", f"{memory / 2**30:.1f}", f"{seconds / 3600:.1f}"])
    return [*_built(shapes, device, sustained), *_indented(["cell", "contestants", "GiB", "hours"], rows)]
