"""Pages that are made from the code at each build, so that they cannot fall behind it: docs/generated/."""

from __future__ import annotations

import dataclasses
import importlib
import json
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from extensions import home_figure, paper
from extensions.public import PACKAGES, modules_of, public_names
from pyro_lift.config import RunConfig
from pyro_lift.support.schema import named_type

__all__ = ["api_pages", "command_page", "keys_page", "setup"]


def keys_page() -> str:
    """Every key of a run's TOML file, by table."""
    lines = [
        "# Keys of a run's TOML file\n",
        "`pyro-lift train`, `tune` and `compare` read one file. Only `[backbone]` is required. An unknown key is an "
        "error that names the nearest known one. `pyro-lift keys` prints the same list.\n",
    ]
    hints = typing.get_type_hints(RunConfig)
    for table in dataclasses.fields(RunConfig):
        cls = hints[table.name]
        lines += [f"## `[{table.name}]`\n", (cls.__doc__ or "").strip().splitlines()[0] + "\n"]
        lines += ["| key | value | default | meaning |", "|---|---|---|---|"]
        types = typing.get_type_hints(cls)
        for f in dataclasses.fields(cls):
            value, meaning = named_type(types[f.name]), f.metadata.get("help", "")
            lines.append(f"| `{f.name}` | {_cell(value)} | {_cell(_default(f))} | {_cell(meaning)} |")
        lines.append("")
    return "\n".join(lines)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default_factory is not dataclasses.MISSING:
        return f"`{json.dumps(f.default_factory())}`"
    if f.default is dataclasses.MISSING:
        return "required"
    return "left open" if f.default is None else f"`{json.dumps(f.default)}`"


def _cell(text: Any) -> str:
    return str(text).replace("|", "\\|").replace("\n", " ")


def command_page() -> str:
    """Every command with its arguments and options, from the parser itself."""
    import typer

    from pyro_lift.cli import app

    lines = [
        "# The command line\n",
        "`pyro-lift COMMAND --help` prints the same. A mistake is one line on stderr and exit code 2. A run that was "
        "stopped by SIGTERM or Ctrl-C saves itself and exits with 128 plus the signal's number.\n",
    ]
    for words, command in _commands("pyro-lift", typer.main.get_command(app)):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = " ".join([words, *(str(p.name).upper() for p in arguments), *(["[OPTIONS]"] if options else [])])
        lines += [f"## `{words}`\n", f"{command.help}\n", f"```text\n{usage}\n```\n"]
        if arguments or options:
            lines += ["| | meaning | default |", "|---|---|---|"]
        for p in [*arguments, *options]:
            name = str(p.name).upper() if p in arguments else ", ".join(p.opts)
            again = " (may be repeated)" if getattr(p, "multiple", False) else ""
            default = "required" if p.required else "" if p.default in (None, False) else f"`{p.default}`"
            lines.append(f"| `{name}` | {_cell(p.help or '')}{again} | {default} |")
        lines.append("")
    return "\n".join(lines)


def _commands(words: str, command: Any) -> Iterator[tuple[str, Any]]:
    for name, sub in command.commands.items():
        if hasattr(sub, "commands"):
            yield from _commands(f"{words} {name}", sub)
        else:
            yield f"{words} {name}", sub


def api_pages() -> dict[str, str]:
    """A page for each part of the package and for each module, by file name."""
    pages = {}
    for package, (title, sentence) in PACKAGES.items():
        modules = modules_of(package)
        lines = [f"# {title}\n", f"{sentence}\n"]
        if package == "pyro_lift":
            lines += _front_door()
        for module in modules:
            found = importlib.import_module(module)
            first = (found.__doc__ or "").strip().splitlines()[0]
            lines += [f"{{doc}}`{module}`", f": {first.replace('``', '`')}", ""]
            pages[f"{module}.rst"] = _module_page(module, public_names(found))
        pages[f"part-{package}.md"] = "\n".join(lines)
    return pages


def _front_door() -> list[str]:
    import pyro_lift

    lines = ["| name | what it is |", "|---|---|"]
    for name in sorted(pyro_lift._HOME, key=str.lower):
        thing = getattr(pyro_lift, name)
        role = "class" if isinstance(thing, type) else "func"
        first = (thing.__doc__ or "").strip().splitlines()[0].replace("``", "`")
        lines.append(f"| {{py:{role}}}`~{thing.__module__}.{thing.__qualname__}` | {_cell(first)} |")
    return [*lines, ""]


def _module_page(module: str, names: list[str]) -> str:
    title = f"``{module}``"
    listed = "\n".join(f"   {name}" for name in names if _directive(module, name) != "autodata")
    return (
        f":orphan:\n\n{title}\n{'=' * len(title)}\n\n.. currentmodule:: {module}\n\n"
        f".. automodule:: {module}\n   :no-members:\n\n"
        + (f".. autosummary::\n   :nosignatures:\n\n{listed}\n\n----\n\n" if listed else "")
        + "\n".join(f".. {_directive(module, name)}:: {module}.{name}\n" for name in names)
    )


def _directive(module: str, name: str) -> str:
    thing = getattr(importlib.import_module(module), name)
    if isinstance(thing, type):
        return "autoexception" if issubclass(thing, BaseException) else "autoclass"
    return "autofunction" if callable(thing) and hasattr(thing, "__code__") else "autodata"


def without_types_own(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Leave out what Python says of every dict, tuple or field, where a constant or a field has no words of its own."""
    del app, name, options
    if lines and lines[0].startswith("Alias for field number"):
        lines.clear()
    of_type = type(obj).__doc__
    if what in ("data", "attribute") and isinstance(of_type, str) and "\n".join(lines).split() == of_type.split():
        lines.clear()


def write_all(app: Sphinx) -> None:
    """Write the pages that have changed; Sphinx reads only those again."""
    folder = Path(app.srcdir) / "generated"
    readme = (Path(app.srcdir).parent / "README.md").read_text("utf-8")
    home_figure.draw(readme, folder / "figures" / "demo.svg")
    pages = {"keys.md": keys_page(), "commands.md": command_page(), "paper.md": paper.page()}
    pages |= {f"api/{name}": text for name, text in api_pages().items()}
    for old in (folder / "api").glob("*"):
        if f"api/{old.name}" not in pages:
            old.unlink()
    for name, text in pages.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text("utf-8") != text:
            path.write_text(text, "utf-8")


def complete(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Resolve a reference by its end where only one object has that end: ``LiFTPrior.calibrate`` from any module."""
    if node.get("refdomain") != "py":
        return None
    domain, target = env.get_domain("py"), node.get("reftarget", "")
    ends = [name for name in domain.objects if name.endswith(f".{target}")]
    if not target or len(ends) != 1:
        return None
    return domain.resolve_xref(env, node["refdoc"], app.builder, "obj", ends[0], node, content)


def setup(app: Sphinx) -> dict[str, bool]:
    """Make the pages before Sphinx looks for sources."""
    app.connect("builder-inited", write_all)
    app.connect("missing-reference", complete)
    app.connect("autodoc-process-docstring", without_types_own)
    app.connect("autodoc-process-docstring", paper.add_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
