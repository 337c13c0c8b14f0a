"""Attributes that a forward pass changes, read off its code: a count of calls, a list of shapes that were seen."""

from __future__ import annotations

import ast
import dis
import inspect
import textwrap
import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

__all__ = ["changed_by_forward", "names_read_by"]

#: Methods that change a list, a dict or a set in place.
IN_PLACE = (
    *("add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove"),
    *("reverse", "setdefault", "sort", "update"),
)


@cache
def changed_by_forward(kind: type) -> frozenset[str]:
    """Name the attributes that a class's forward pass assigns, or changes in place; its own methods' that it calls too.

    Args:
        kind: of a module. One whose source is not at hand is read by its byte code, which tells assignments alone.
    """
    found: set[str] = set()
    seen: set[str] = set()
    waiting = ["forward"]
    while waiting:
        name = waiting.pop()
        given: Any = getattr(kind, name, None)
        method = inspect.unwrap(given) if callable(given) else None
        if name in seen or not isinstance(method, types.FunctionType) or method.__module__ == "torch.nn.modules.module":
            continue
        seen.add(name)
        found |= {str(i.argval) for i in dis.get_instructions(method) if i.opname == "STORE_ATTR"}
        tree = _tree(method)
        arguments = tree.args.posonlyargs + tree.args.args if tree is not None else []
        if tree is not None and arguments:
            own = arguments[0].arg
            found |= set(_changed(tree, own))
            waiting += [x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute) and _is(x.value, own)]
    return frozenset(found)


def names_read_by(function: Callable[..., Any]) -> frozenset[str]:
    """Name the attributes and globals that a function mentions, those of functions inside it too."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    found: set[str] = set()
    waiting = [] if code is None else [code]
    while waiting:
        code = waiting.pop()
        found |= set(code.co_names)
        waiting += [x for x in code.co_consts if isinstance(x, types.CodeType)]
    return frozenset(found)


def _tree(method: types.FunctionType) -> ast.FunctionDef | None:
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    except (OSError, TypeError, SyntaxError, IndentationError):
        return None
    return body[0] if body and isinstance(body[0], ast.FunctionDef) else None


def _changed(tree: ast.AST, own: str) -> Iterator[str]:
    """Name the attributes of ``own`` that are changed in place: by a method of theirs, or at one of their places."""
    for node in ast.walk(tree):
        inside: ast.AST | None = None
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IN_PLACE:
            inside = node.func.value
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, (ast.Store, ast.Del)):
            inside = node.value
        while isinstance(inside, ast.Subscript):
            inside = inside.value
        if isinstance(inside, ast.Attribute) and _is(inside.value, own):
            yield inside.attr


def _is(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
