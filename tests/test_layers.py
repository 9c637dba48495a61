"""Imports point one way: the table below is DESIGN's, and every module is held to it."""

import ast

import pytest
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
    """Dotted names a module imports, relative ones made absolute."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            if module == "mdistiller":
                yield from (f"mdistiller.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(REPO).as_posix())
def test_imports_point_down(path):
    parts = path.relative_to(REPO).parts
    own = layer(parts)
    if own == "__init__":
        return
    for name in imported(ast.parse(path.read_text()), list(parts[:-1])):
        words = name.split(".")
        if words[0] == "mdistiller" and len(words) > 1 and words[1] not in (own, "__version__"):
            assert words[1] in MAY_IMPORT[own], f"{own} imports {name}"


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
        parts = path.relative_to(REPO).parts
        used = methods & set(imported(ast.parse(path.read_text()), list(parts[:-1])))
        assert not used, f"{path} imports {', '.join(used)}"
