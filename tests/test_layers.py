"""Imports point one way: the table below is DESIGN's, and every module is held to it."""

import ast
import functools
import graphlib

from support import REPO

BOTTOM = {
    *("registry", "runtime", "weights", "layouts", "manifest", "files", "preprocessing"),
}
ENGINE = BOTTOM | {"models", "dataset", "distillers", "engine"}
MAY_IMPORT = {
    "registry": set(),
    "preprocessing": set(),
    "runtime": {"registry"},
    "weights": {"registry", "runtime", "manifest", "layouts"},
    "layouts": {"registry"},
    "manifest": {"registry"},
    "files": {"registry"},
    "models": BOTTOM,
    "dataset": BOTTOM,
    "distillers": BOTTOM,
    "engine": BOTTOM | {"models", "dataset", "distillers"},
    "evaluation": ENGINE,
    "sweep": ENGINE,
    "report": ENGINE | {"sweep"},
    "export": ENGINE,
    "detection": ENGINE | {"evaluation"},
    "cli": ENGINE | {"evaluation", "sweep", "report", "export", "detection"},
}
FILES = sorted((REPO / "mdistiller").rglob("*.py"))


def layer(parts):
    return parts[1].removesuffix(".py") if len(parts) > 1 else ""


def imported(tree, package):
    """Dotted names of what a module imports, relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def module_name(path):
    parts = path.relative_to(REPO).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imports_of(path):
    """What a file imports, also within functions and for types alone."""
    return set(imported(ast.parse(path.read_text()), path.relative_to(REPO).parts[:-1]))


def test_imports_point_down():
    wrong = []
    for path in FILES:
        own = layer(path.relative_to(REPO).parts)
        for name in imports_of(path) if own != "__init__" else ():
            words = name.split(".")
            if words[0] == "mdistiller" and len(words) > 1:
                allowed = {own, "__version__"} | MAY_IMPORT[own]
                wrong += [f"{path.name} imports {name}"] if words[1] not in allowed else []
    assert wrong == []


def test_no_modules_import_one_another_in_a_circle():
    modules = {module_name(path) for path in FILES}
    graph = {}
    for path in FILES:
        own = module_name(path)
        names = imports_of(path)
        used = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[own] = used & modules - {own}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names them


def test_every_layer_is_in_the_table():
    assert {layer(p.relative_to(REPO).parts) for p in FILES} - {"__init__"} == set(MAY_IMPORT)


def method_files():
    """Modules of distillers/ that hold a method: those that a fork's file may take the place of."""
    folder = REPO / "mdistiller" / "distillers"
    public = [path for path in folder.glob("*.py") if not path.name.startswith("_")]
    return {path.stem for path in public if "(Distiller)" in path.read_text()}


def test_no_module_needs_a_method_file():
    """A fork's KD.py has none of our functions: what several modules use is in helper modules."""
    methods = {f"mdistiller.distillers.{name}" for name in method_files()}
    assert "mdistiller.distillers.KD" in methods
    for path in FILES:
        names = imports_of(path)
        used = methods & (names | {name.rpartition(".")[0] for name in names})
        assert not used, f"{path} imports {', '.join(used)}"
