"""The speed benchmark: its records, its arithmetic, its figure."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pyro_lift.bench import speed, speed_report
from pyro_lift.bench.affordable import plain_adaptation
from pyro_lift.bench.shapes import BACKBONES
from pyro_lift.bench.speed import Part, SpeedSettings
from pyro_lift.bench.steps import TimedLiFT, plain
from pyro_lift.bench.timing import Times, interleaved, quartiles
from pyro_lift.models.backbones import adapt_backbone, recipe


def test_the_short_form_writes_records_and_a_figure(tmp_path: Path) -> None:
    lines: list[str] = []
    records = speed.run(tmp_path, SpeedSettings.smoke(), log=lines.append)
    assert json.loads((tmp_path / "speed.json").read_text()) == records
    assert (tmp_path / "speed.png").stat().st_size > 10_000
    steps = [r for r in records if r["part"] == "step"]
    assert {r["method"] for r in steps} == {"SGD", "Adam", "LiFT", "LiFT, RMS", "MAML"}
    assert {r["backbone"] for r in steps} == {"bart-tiny", "vit-tiny"}
    assert all(r["ratio_to_plain"] == 1.0 for r in steps if r["method"] == "SGD")
    for r in (r for r in records if r["part"] == "breakdown"):
        assert set(r["cpu_seconds"]) >= {"forward", "backward", "handlers", "theta", "phi", "store", "mixture"}
    assert {r["curve"] for r in records if r["part"] == "curve"} == {"N", "D", "K", "B"}
    assert all(r["visits_to_one_by_one"] == 1.0 for r in records if r.get("block_size") == 1 and r["part"] == "curve")
    assert [r["method"] for r in records if r["part"] == "large"] == ["SGD", "LiFT", "MAML"]
    assert {(r["backbone"], r["adapted"]) for r in records if r["part"] == "prefix"} == {
        ("minilm-tiny", 2),
        ("vit-tiny", 1),
    }
    adapted = [r for r in records if r["part"] == "adapt"]
    assert {r["adapted"] for r in adapted} == {2, 3} and len(adapted) == 6
    assert all(r["cpu_times_as_fast"] == 1.0 for r in adapted if r["method"] == "PEFT + AdamW")
    assert any("LiFT" in line for line in lines)


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="did you mean 'vit-b16'"):
        SpeedSettings(backbones=("vit-b",))


def test_rounds_are_paired_and_begin_at_each_step_in_turn() -> None:
    calls: list[str] = []
    found = interleaved({name: lambda n=name: calls.append(n) for name in "abc"}, 3, warm_up=0)  # type: ignore[misc]
    assert calls == list("abcbcacab")
    assert all(len(times.wall) == 3 for times in found.values())


def test_ratios_are_round_by_round() -> None:
    ours, plain = Times([2.0, 9.0], [1.0, 3.0]), Times([1.0, 3.0], [1.0, 1.0])
    assert ours.ratios(plain) == ([2.0, 3.0], [1.0, 3.0])
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)


def test_the_plain_loop_and_the_chain_leave_the_backbone_as_they_found_it() -> None:
    shape = BACKBONES["bart-tiny"]
    net = shape.make()
    adapter = adapt_backbone(net, recipe(net, rank=2))
    tasks = [shape.task(i) for i in range(2)]
    step = plain(adapter, tasks, torch.optim.SGD)
    frozen = {name: p.clone() for name, p in adapter.backbone.named_parameters() if "lora" not in name}
    step()
    TimedLiFT(adapter, tasks).step()
    assert all(torch.equal(p, frozen[n]) for n, p in adapter.backbone.named_parameters() if n in frozen)
    assert not any(p.requires_grad for p in adapter.backbone.parameters())


@pytest.mark.parametrize(("part", "kind"), [("curves", "curve"), ("em", "em"), ("large", "large"), ("adapt", "adapt")])
def test_a_part_alone_has_files_of_its_own(tmp_path: Path, part: Part, kind: str) -> None:
    records = speed.run(tmp_path, replace(SpeedSettings.smoke(), parts=(part,)), log=lambda text: None)
    assert {r["part"] for r in records} == {kind}
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"speed-{part}.json", f"speed-{part}.png"]


def test_a_curve_s_term_is_the_line_it_came_from() -> None:
    points = [{"at": x, "cpu_seconds_per_step": 0.002 + 3e-9 * x} for x in (1e4, 1e5, 1e6, 1e7)]
    assert speed_report.term(points) == pytest.approx((0.002, 3e-9))
    flat = [{"at": x, "cpu_seconds_per_step": 0.002 - 1e-12 * x} for x in (1e4, 1e7)]
    assert speed_report.term(flat)[1] == 0.0


def test_plain_adaptation_learns_a_task() -> None:
    """The loop that we compare with is one that works: at a rate that moves, its loss falls."""
    import peft

    torch.manual_seed(0)
    shape = BACKBONES["minilm-tiny"]
    net, task = shape.make().eval(), shape.task(0)
    config = peft.LoraConfig(r=2, target_modules=["query", "value"])
    iterates, head = plain_adaptation(net, config, task, 60, 3, rate=0.05)
    assert iterates.shape[0] == 3
    inputs = task.train.inputs
    weight = inputs["attention_mask"].unsqueeze(-1).float()
    with torch.no_grad():
        features = (net(**inputs).last_hidden_state * weight).sum(1) / weight.sum(1)
        loss = torch.nn.functional.cross_entropy(head(features), task.train.target)
    assert float(loss) < 0.9 * torch.log(torch.tensor(3.0))
