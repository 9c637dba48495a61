"""Imports point one way: the table below is DESIGN's, and every module is held to it."""

import ast
import collections
import functools
import graphlib
import importlib
import re

from support import REPO

BOTTOM = {"registry", "runtime", "weights", "layouts", "files", "preprocessing"}
PRINTING = {"distributed", "console"}
PARTS = {"models", "dataset", "distillers"}
"""What a run puts together; none of them reads a config beyond its own section."""
BASE = BOTTOM | PRINTING | PARTS | {"config"}
ENGINE = BASE | {"frozen_teacher", "engine"}
RUNS = ENGINE | {"networks", "user_code", "engine.cfg", "run_folder"}
"""What reads the folder of a run, and starts none."""
MAY_IMPORT = {
    "registry": set(),
    "preprocessing": set(),
    "runtime": {"registry"},
    "weights": {"registry", "runtime", "layouts", "files"},
    "layouts": {"registry"},
    "files": {"registry"},
    "distributed": {"runtime"},
    "console": {"distributed"},
    "models": BOTTOM,
    "dataset": BOTTOM,
    "distillers": BOTTOM,
    "config": BOTTOM | {"distillers"},
    "networks": BASE,
    "frozen_teacher": BASE,
    "engine": BASE | {"frozen_teacher"},
    "user_code": BOTTOM | {"config", "distillers", "engine"},
    "engine.cfg": BOTTOM | PARTS | {"config", "engine", "user_code"},
    "run_folder": ENGINE | {"user_code", "engine.cfg"},
    "run": RUNS,
    "evaluation": RUNS,
    "export": RUNS,
    "sweep": RUNS | {"run"},
    "report": RUNS | {"sweep"},
    "detection": RUNS | {"run", "evaluation"},
    "api": RUNS | {"run", "evaluation", "detection"},
    "__main__": {"cli"},
    "cli": RUNS | {"run", "evaluation", "sweep", "report", "export", "detection"},
}
FILES = sorted((REPO / "mdistiller").rglob("*.py"))


def layer(module):
    """The package of a module; the public door `engine/cfg.py` is a layer of its own, above the
    engine: a trainer gets its config as an argument."""
    words = module.split(".")[1:]
    return "engine.cfg" if words[:2] == ["engine", "cfg"] else "".join(words[:1])


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
        own = layer(module_name(path))
        for name in imports_of(path) if own else ():
            if name.partition(".")[0] == "mdistiller" and layer(name):
                allowed = {own, "__version__"} | MAY_IMPORT[own]
                wrong += [] if layer(name) in allowed else [f"{path.name} imports {name}"]
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
    assert {layer(module_name(path)) for path in FILES} - {""} == set(MAY_IMPORT)


def test_the_table_has_no_circles():
    """Whatever is imported today, packages have an order from the bottom to the commands."""
    assert list(graphlib.TopologicalSorter(MAY_IMPORT).static_order())[-1] == "__main__"


def test_folders_have_at_most_15_files():
    """Beside each other; methods are a file each, and forks import them by their names."""
    roots = (REPO / "mdistiller", REPO / "docs", REPO / "benchmarks")
    kinds = (".py", ".md", ".yaml", ".ipynb")
    files = (path for root in roots for path in root.rglob("*.*") if path.suffix in kinds)
    sizes = collections.Counter(path.parent.relative_to(REPO).as_posix() for path in files)
    assert {f for f, n in sizes.items() if n > 15} == {"mdistiller/distillers"}


def private_imports():
    """(importer, imported) where a name of the latter begins with "_", outside its own package."""
    for path in FILES:
        importer = module_name(path).split(".")
        for name in imports_of(path):
            words = name.split(".")
            hidden = [i for i, w in enumerate(words) if w.startswith("_") and w[:2] != "__"]
            if any(words[:i] != importer[:i] for i in hidden if words[0] == "mdistiller"):
                yield ".".join(importer), name


def test_no_module_imports_a_private_module_of_another_package():
    assert sorted(private_imports()) == []


def test_documentation_names_no_private_module():
    """`forks.md` is about the original's files; `CHANGELOG.md` about those of the past.

    `_base` and `_common` are names of the original, which its forks import.
    """
    names = {path.stem for path in FILES if path.stem.startswith("_")}
    names -= {"__init__", "__main__", "_base", "_common"}
    private = re.compile(rf"\b({'|'.join(sorted(names))})\b")
    texts = [*REPO.glob("*.md"), *(p for p in (REPO / "docs").rglob("*") if p.is_file())]
    texts = [p for p in texts if p.suffix in {".md", ".py", ".yaml"}]
    texts = [p for p in texts if p.name not in {"forks.md", "CHANGELOG.md"}]
    assert REPO / "docs" / "extend" / "method.md" in texts
    assert [(p.name, m[0]) for p in texts if (m := private.search(p.read_text()))] == []


def test_the_modules_that_forks_import_from_have_their_names():
    doors = {
        "distillers._base": ["DISTILLERS", "Distiller", "Output", "Vanilla"],
        "distillers._common": ["ConvReg", "get_feat_shapes", "probe"],
        "models._base": ["ModelEntry", "StagedNet", "register_model"],
    }
    for module, names in doors.items():
        available = vars(importlib.import_module(f"mdistiller.{module}"))
        assert [name for name in names if name not in available] == []


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
