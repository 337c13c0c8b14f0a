"""The documents stay true: blocks run as they are copied, commands exist, links lead somewhere, messages are ours."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import submitit  # noqa: F401  # closes all log handlers, and so their streams: here, before a test has made any
from conftest import ROOT
from typer.testing import CliRunner

DOCS = ROOT / "docs"
PAGES = sorted(
    [
        *DOCS.glob("*.md"),
        *DOCS.glob("howto/*.md"),
        *DOCS.glob("reference/*.md"),
        *DOCS.glob("results/*.md"),
        ROOT / "CONTRIBUTING.md",
    ],
    key=lambda path: str(path),
)
TUTORIALS = sorted(path for path in DOCS.glob("tutorials/*.md") if path.stem != "index")
#: Pages whose programs take more than a few seconds: they are run by `make test-slow`.
LONG = {"index", "calibration", "report", "from_nuts", "sampler"}
ELSEWHERE = {"workflow"}  # run by tests/house/test_workflow.py, which looks at what they print as well
#: Languages of blocks, and what looks at them. `text` also holds what programs print, and one server's command.
LOOKED_AT = {
    "python": "run", "{code-cell}": "run", "bash": "commands", "text": "commands", "": "commands", "toml": "read",
    "json": "read", "{toctree}": "Sphinx", "{include}": "Sphinx", "{image}": "Sphinx",
}  # fmt: skip


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, *languages: str) -> list[str]:
    text = re.sub(r"```\{include\}.*?```", "", path.read_text("utf-8"), flags=re.DOTALL)
    found = re.findall(r"^( *)```(\S*)[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [body for _, language, body in found if language in languages]


def programs() -> list[Any]:
    found = [path for path in PAGES if blocks(path, "python") and path.stem not in ELSEWHERE]
    return [
        pytest.param(path, id=name_of(path), marks=[pytest.mark.slow] if path.stem in LONG else []) for path in found
    ]


@pytest.mark.parametrize("path", programs())
@pytest.mark.filterwarnings("ignore:Estimated shape parameter", "ignore:.*hape validation.*", "ignore:.*DataLoader")
def test_the_programs_of_a_page_run_one_after_the_other(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for number, program in enumerate(blocks(path, "python")):
        exec(compile(program, f"{name_of(path)}, block {number}", "exec"), names)
    capsys.readouterr()


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS, ROOT / "README.md"], ids=name_of)
def test_every_block_of_a_page_is_of_a_language_that_a_test_looks_at(path: Path) -> None:
    fences = re.findall(r"^ *```+(\S*)", path.read_text("utf-8"), re.MULTILINE)
    assert len(fences) % 2 == 0, "a block that is not closed"
    assert set(fences[::2]) <= LOOKED_AT.keys()
    assert not any(fences[1::2]), "a block inside a block"
    for block in blocks(path, "text", ""):
        assert not re.search(r"^(from \S+ )?import ", block, re.MULTILINE), "a program that no test runs"


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=name_of)
def test_a_tutorial_runs(path: Path, tmp_path: Path) -> None:
    """In a process of its own, as a notebook is; the site executes them too, and shows what they print."""
    import os
    import subprocess
    import sys

    cells = re.findall(r"^```\{code-cell\}[^\n]*\n((?::[^\n]*\n)*)(.*?)^```", path.read_text("utf-8"), re.S | re.M)
    assert cells
    (tmp_path / "cells.py").write_text("\n".join(body for _, body in cells), "utf-8")
    environment = {**os.environ, "MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "cells.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def commands() -> list[tuple[str, str]]:
    found = []
    for path in (*PAGES, *TUTORIALS, ROOT / "README.md"):
        for block in blocks(path, "", "bash", "text"):
            for line in block.replace("\\\n", " ").splitlines():
                command = line.split("#")[0].strip()
                command = re.sub(r"^torchrun .*--no-python ", "", command)
                if re.match(r"(pyro-lift|make|python examples/\S+) ?", command):
                    found.append((name_of(path), command))
    return sorted(set(found))


@pytest.mark.parametrize(("page", "command"), commands(), ids=lambda value: value)
def test_the_commands_of_a_page_and_their_options_exist(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pyro_lift.cli import app

    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), f"{page}: {command}"
        return
    if words[0] == "python":
        monkeypatch.setattr("sys.argv", [words[1], "--help"])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert ended.value.code == 0, f"{page}: {command}"
        printed = capsys.readouterr().out
        for option in (word for word in words if word.startswith("--")):
            assert option in printed, f"{page}: {option} in {command}"
        return
    name = words[1:3] if words[1] == "bench" else words[1:2]
    if not name[0].isupper():
        result = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "300", "TERM": "dumb"})
        assert result.exit_code == 0, f"{page}: {command}"
        for option in (word for word in words if word.startswith("--")):
            assert option in result.output, f"{page}: {option} in {command}"


def files() -> list[Any]:
    found = []
    for path in (*PAGES, *TUTORIALS):
        for language in ("toml", "json"):
            for number, block in enumerate(blocks(path, language)):
                found.append(pytest.param(language, block, id=f"{name_of(path)}-{language}-{number}"))
    return found


@pytest.mark.parametrize(("language", "text"), files())
def test_the_files_of_a_page_can_be_read(language: str, text: str) -> None:
    from pyro_lift.config import RunConfig
    from pyro_lift.support.schema import from_dict

    if language == "json":
        assert all(json.loads(line) for line in text.splitlines() if line.strip())
        return
    found = tomllib.loads(text)
    from_dict(RunConfig, {"backbone": {"name": "digits", "kind": "timm"}, **found}, "the page's file")


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS], ids=name_of)
def test_the_links_of_a_page_lead_somewhere(path: Path) -> None:
    words = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:|#|/)([^)#\s]+)", words):
        assert (path.parent / target).exists(), target


def slugs(path: Path) -> set[str]:
    """The names by which headings of a page are linked to, as GitHub and MyST make them."""
    text = re.sub(r"^ *```.*?^ *```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    named = {name.replace(" ", "-") for name in re.findall(r"^\((\S+)\)=$", text, re.MULTILINE)}
    return named | {
        re.sub(r"[^\w\- ]", "", heading.strip().lower().replace(" ", "-"))
        for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pytest.mark.parametrize("path", [*PAGES, *TUTORIALS, ROOT / "README.md", ROOT / "CHANGELOG.md"], ids=name_of)
def test_the_sections_that_a_page_links_to_exist(path: Path) -> None:
    words = re.sub(r"^ *```.*?^ *```|`[^`\n]*`", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    for page, section in re.findall(r"\]\((?!https?:|/)([^)#\s]*)#([^)\s]+)\)", words):
        assert section in slugs(path.parent / page if page else path), f"{page}#{section}"


def test_the_messages_on_the_page_of_errors_are_in_the_code() -> None:
    source = " ".join(
        path.read_text("utf-8") for home in ("pyro_lift", "models", "inference") for path in (ROOT / home).rglob("*.py")
    )
    source = re.sub(r'"\s*\n?\s*f?"', "", source.replace("\\'", "'"))
    page = (DOCS / "reference" / "errors.md").read_text("utf-8").split("## Frequent messages")[1]
    messages = [row.split("|")[1].strip(" `") for row in page.splitlines() if row.startswith("| `")]
    assert len(messages) > 8
    for message in messages:
        assert message in source or message.replace('"', "'") in source, message


def test_every_page_is_reached_from_the_home_page() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page in reached or not page.exists():
            continue
        reached.add(page)
        for tree in re.findall(r"```\{toctree\}(.*?)```", page.read_text("utf-8"), re.DOTALL):
            for line in tree.splitlines():
                if line.strip() and not line.startswith(":"):
                    target = (re.findall(r"<(.*)>", line) or [line.strip()])[0]
                    waiting.append((DOCS if target.startswith("/") else page.parent) / f"{target.strip('/')}.md")
    written = {"generated", "paper"}  # by the build, and by `pyro-lift report`
    listed = {path for path in DOCS.rglob("*.md") if not written & set(path.relative_to(DOCS).parts)}
    assert listed <= reached, sorted(name_of(path) for path in listed - reached)


def test_the_version_stands_the_same_in_three_files() -> None:
    import pyro_lift

    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text("utf-8"), re.MULTILINE)
    assert cited is not None
    assert project["version"] == pyro_lift.__version__ == cited[1]
