"""The README stays true: its programs run, its commands exist, its links lead somewhere."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT
from typer.testing import CliRunner

README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def programs() -> Iterator[str]:
    yield from re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_opens_with_the_two_commands() -> None:
    assert [command.split()[:2] for command in COMMANDS[:2]] == [["make", "demo"], ["make", "test"]]


def test_its_programs_run_one_after_the_other(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where they save
    names: dict[str, object] = {}
    for program in programs():
        exec(compile(program, "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "phi[0]" in printed and "tensor(" in printed


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("make ")])
def test_its_make_targets_exist(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("pyro-lift ")])
def test_its_commands_and_options_exist(command: str) -> None:
    from pyro_lift.cli import app

    words = shlex.split(command)[1:]
    name = [w for w in words[:2] if w == words[0] or words[0] == "bench"]
    result = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output
    for option in [w for w in words if w.startswith("--")]:
        assert option in result.output, option


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_its_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).exists()
