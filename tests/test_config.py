"""Runs from TOML files: what is read, and what each mistake is answered with."""

from __future__ import annotations

import dataclasses
import tomllib
from pathlib import Path

import pytest

from pyro_lift.config import RunConfig, read_config, reference
from pyro_lift.support.schema import from_dict

BACKBONE = '[backbone]\nname = "b"\nkind = "encoder"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "run.toml"
    path.write_text(text)
    return path


def test_a_file_is_read_into_frozen_dataclasses_with_their_defaults(tmp_path: Path) -> None:
    text = BACKBONE + '[adapter]\ntarget_modules = ["q", "v"]\n[sampler]\nbeta = 1\ncomponents = 5\n'
    config = read_config(write(tmp_path, text))
    assert config.adapter.target_modules == ["q", "v"]
    assert (config.sampler.beta, config.sampler.components, config.adapt.steps) == (1.0, 5, 100)
    assert isinstance(config.sampler.beta, float)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.backbone.name = "c"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BACKBONE + "[samplr]\n", r"run.toml: unknown key 'samplr'; did you mean 'sampler'\?"),
        (BACKBONE + "[sampler]\nbetta = 1\n", r"run.toml: sampler: unknown key 'betta'; did you mean 'beta'\?"),
        (BACKBONE + "[output]\nzzz = 1\n", r"unknown key 'zzz'; known are: folder, seed, device, checkpoint_every\."),
        (BACKBONE + "[sampler]\nbeta = -1\n", r"sampler: beta=-1.0: expected a finite number above 0"),
        (BACKBONE + "[sampler]\nsamples = 1.5\n", r"samples = 1.5: expected a whole number\."),
        (BACKBONE + "[sampler]\nhead_scale = true\n", r"head_scale = True: expected a number\."),
        (BACKBONE + '[sampler]\ncovariance = "diagonal"\n', r"covariance='diagonal' is not known; did you mean 'diag'"),
        (BACKBONE + "[adapter]\ntarget_modules = [1]\n", r"target_modules = \[1\]: expected a string or a list"),
        (BACKBONE + "sampler = 3\n", r"unknown key 'sampler'"),
        ("[adapter]\nrank = 2\n", r"run.toml: 'backbone' is missing"),
        ('[backbone]\nname = "b"\n', r"backbone: 'kind' is missing \(how it is loaded\)"),
        ('[backbone]\nname = "b"\nkind = "encodr"\n', r"did you mean 'encoder'"),
        ("sampler = 3\n" + BACKBONE, r"run.toml: sampler: 3 given; expected a table"),
        ("[backbone\n", r"run.toml: not TOML: .*line 1"),
    ],
)
def test_a_mistake_is_answered_with_the_file_the_key_and_the_way_out(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_config(write(tmp_path, text))


def test_the_reference_is_toml_and_names_every_key() -> None:
    text = reference()
    uncommented = [line for line in text.splitlines() if line.startswith("[")]
    assert uncommented == ["[backbone]", "[adapter]", "[tasks]", "[sampler]", "[adapt]", "[output]", "[log]"]
    assert set(tomllib.loads(text)) == {f.name for f in dataclasses.fields(RunConfig)}
    filled = text.replace("# name = required", 'name = "b"').replace("# kind = required", 'kind = "timm"')
    lines = [
        line.removeprefix("# ") if line.startswith("# ") and "= none" not in line else line
        for line in filled.splitlines()
    ]
    default = from_dict(RunConfig, tomllib.loads("\n".join(lines)), "reference")
    assert default == from_dict(RunConfig, {"backbone": {"name": "b", "kind": "timm"}}, "short")


def test_old_names_of_settings_are_read_from_files_and_warned_of_in_code() -> None:
    from pyro_lift import LiFTSettings, SGLDGibbs

    old = {"share": 8, "phi_step_share": 0.2, "head_rate": 3.0}
    expected = LiFTSettings(ranks_block_size=8, phi_step_fraction=0.2, head_lr_scale=3.0)
    assert from_dict(LiFTSettings, old, "run.toml: sampler") == expected
    with pytest.warns(FutureWarning, match="'head_rate' is now called 'head_lr_scale'"):
        assert LiFTSettings(head_rate=3.0).head_lr_scale == 3.0  # type: ignore[call-arg]
    with pytest.warns(FutureWarning, match="'share' is now called 'distributed'"):
        assert SGLDGibbs(lambda: None, share=True).distributed  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="old name of 'ranks_block_size'"):
        LiFTSettings(share=8, ranks_block_size=8)  # type: ignore[call-arg]
