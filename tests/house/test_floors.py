"""The law of the house: which floor may import which, with no exception, and no circle anywhere."""

from __future__ import annotations

import ast

from import_graph import LAW, ROOT_MODULE, floor_of, import_graph, modules


def test_every_import_points_down() -> None:
    upward = [
        f"{module} ({floor_of(module)}) imports {target} ({floor_of(target)})"
        for module, targets in sorted(import_graph().items())
        if module != ROOT_MODULE
        for target in sorted(targets - {ROOT_MODULE})
        if floor_of(target) not in LAW[floor_of(module)] | {floor_of(module)}
    ]
    assert not upward, "\n".join(upward)


def test_nobody_imports_the_roof() -> None:
    importers = [module for module, targets in import_graph().items() if ROOT_MODULE in targets]
    assert not importers


def test_there_is_no_circle() -> None:
    graph = import_graph()
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way[way.index(module) :], module])
        if module in done:
            return
        for target in sorted(graph[module]):
            visit(target, (*way, module))
        done.add(module)

    graph.pop(ROOT_MODULE)
    for targets in graph.values():
        targets.discard(ROOT_MODULE)
    for module in sorted(graph):
        visit(module, ())


def test_files_and_the_root_stay_small() -> None:
    lengths = {name: len(path.read_text("utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}
    root = [path.name for name, path in modules().items() if name.count(".") <= 1 and path.name != "__init__.py"]
    assert len(root) <= 12, sorted(root)


def test_no_function_takes_more_than_eight_parameters() -> None:
    """Public constructors and dataclasses apart, whose arguments have names at every call."""
    long = {
        f"{name}.{node.name}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef) and node.name != "__init__"
        if len([a for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs) if a.arg != "self"]) > 8
    }
    assert not long


def test_functions_of_a_visit_take_at_most_six_parameters() -> None:
    long = {
        f"{name}.{node.name}"
        for name in ("visit", "warmup", "shared_visit", "movers", "rows")
        for node in ast.walk(ast.parse(modules()[f"pyro_lift.inference.gibbs.{name}"].read_text("utf-8")))
        if isinstance(node, ast.FunctionDef)
        if len([a for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]) > 6
    }
    assert not long
