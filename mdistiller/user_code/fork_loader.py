"""Import of a fork's modules beside the library's own, under a package of their own.

In the module `mdistiller_fork_1a2b3c4d.distillers.KD`, the import `from .utils import x` finds the
fork's `distillers/utils.py`, and `from mdistiller.engine.utils import y` the fork's
`engine/utils.py`: absolute imports are rewritten as the file is read. Where the fork has no such
file, the library's module is taken. Nothing of the library is changed.

Two classes are the library's whatever the fork's files say, since its commands rest on them:
`Distiller` (with `Vanilla`) and `BaseTrainer`. A class of that name in the fork becomes a subclass
with what the fork adds to it: methods, and attributes that its `__init__` sets. A `train_iter` of
its BaseTrainer counts if it does more than add up the terms of the loss.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import textwrap
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, TypeGuard

import torch

from mdistiller.distillers import Distiller, Vanilla
from mdistiller.engine.trainer import BaseTrainer

_OURS = {"Distiller": Distiller, "Vanilla": Vanilla, "BaseTrainer": BaseTrainer}
_PREFIX = "mdistiller_fork_"
# What a train_iter calls that only measures, sums the terms, and steps.
_PLAIN_CALLS = {
    *("zero_grad", "time", "update", "float", "cuda", "distiller", "sum", "mean", "values"),
    *("backward", "step", "cpu", "detach", "numpy", "size", "accuracy", "format", "item"),
    "_to_cuda",
}
_PLAIN_ARGUMENTS = {"image", "target", "index", "epoch"}


def to_cuda(value: Any, *args: Any, **kwargs: Any) -> Any:
    """`value.cuda(...)` where there is CUDA, else `value`: for code that takes it for granted."""
    return value.cuda(*args, **kwargs) if torch.cuda.is_available() else value


def fork_package(folder: Path) -> str:
    """Name of the package of a fork's modules; they can be imported from here on.

    Args:
        folder: the one with `distillers/` in it, an absolute path.
    """
    name = _PREFIX + hashlib.sha256(str(folder).encode()).hexdigest()[:8]
    if not any(isinstance(f, ForkFinder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, ForkFinder(name, folder))  # before the one that reads any file
    if name not in sys.modules:
        package = ModuleType(name)
        package.__path__ = []
        sys.modules[name] = package
    return name


class ForkFinder(MetaPathFinder):
    """Finds a fork's modules: its files, else modules of the library."""

    def __init__(self, name: str, folder: Path):
        self.name, self.folder = name, folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The import system asks here first for every name."""
        if not fullname.startswith(f"{self.name}."):
            return None
        words = fullname.split(".")[1:]
        place = self.folder.joinpath(*words)
        for file in (place / "__init__.py", place.parent / f"{place.name}.py"):
            if file.is_file():
                inside = [str(place)] if file.name == "__init__.py" else None
                loader = ForkLoader(fullname, str(file))
                return spec_from_file_location(
                    fullname, file, loader=loader, submodule_search_locations=inside
                )
        if place.is_dir():
            spec = ModuleSpec(fullname, None, is_package=True)
            spec.submodule_search_locations = [str(place)]
            return spec
        return ModuleSpec(fullname, _LibraryLoader(".".join(["mdistiller", *words])))


class _LibraryLoader(Loader):
    """Gives a module of the library, unchanged, under its name in the fork's package."""

    def __init__(self, name: str):
        self.name = name

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(self.name)


class ForkLoader(SourceFileLoader):
    """Compiles a fork's file with its imports and base classes rewritten; caches no bytecode."""

    def path_stats(self, path: Any) -> Any:
        raise OSError("compiled anew each time: a cached file would be that of another rewriting")

    def source_to_code(self, data: Any, path: Any, *more: Any, **words: Any) -> Any:  # type: ignore[override]
        tree = ast.parse(data, filename=path)
        package, _, rest = self.name.partition(".")
        tree = _Rewriter(package).visit(tree)
        tree.body = [_rebased(node, rest) for node in tree.body]
        start = _after_future_imports(tree)
        ours = [
            f"from {cls.__module__} import {name} as _our_{name}" for name, cls in _OURS.items()
        ]
        lines = [*ours, f"from {__name__} import to_cuda as _to_cuda"]
        tree.body[start:start] = ast.parse("\n".join(lines)).body
        ast.fix_missing_locations(tree)
        return compile(tree, path, "exec", dont_inherit=True)


def _after_future_imports(tree: ast.Module) -> int:
    """Where in a module's body other imports may begin."""
    future = [
        i
        for i, node in enumerate(tree.body)
        if isinstance(node, ast.ImportFrom) and node.module == "__future__"
    ]
    return future[-1] + 1 if future else int(ast.get_docstring(tree) is not None)


class _Rewriter(ast.NodeTransformer):
    """`mdistiller` in imports becomes the fork's package; `x.cuda()` works without CUDA."""

    def __init__(self, package: str):
        self.package = package

    def _renamed(self, name: str) -> str:
        root, dot, rest = name.partition(".")
        return f"{self.package}{dot}{rest}" if root == "mdistiller" else name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        if not node.level and node.module:
            node.module = self._renamed(node.module)
        return node

    def visit_Import(self, node: ast.Import) -> Any:
        binds = [
            ast.alias(self.package, "mdistiller")
            for alias in node.names
            if alias.asname is None and alias.name.partition(".")[0] == "mdistiller"
        ]
        names = [ast.alias(self._renamed(alias.name), alias.asname) for alias in node.names]
        return [ast.Import(names), ast.Import(binds[:1])] if binds else ast.Import(names)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr == "cuda":
            name = ast.Name("_to_cuda", ast.Load())
            return ast.Call(name, [called.value, *node.args], node.keywords)
        return node


def _rebased(node: ast.stmt, module: str) -> ast.stmt:
    """A statement of a module; a class that is the library's as what the fork adds to it."""
    package = module.partition(".")[0]
    where = {"Distiller": "distillers", "Vanilla": "distillers", "BaseTrainer": "engine"}
    if not isinstance(node, ast.ClassDef) or where.get(node.name) != package:
        return node
    ours = _OURS[node.name]
    body = [part for part in node.body if _is_added(part, ours)] + _constructor(node, ours)
    base = ast.Name(f"_our_{node.name}", ast.Load())
    if not body or node.name == "Vanilla":
        return ast.Assign([ast.Name(node.name, ast.Store())], base)
    node.bases, node.body = [base], body
    return node


def _is_added(part: ast.stmt, ours: type) -> bool:
    """Whether a statement of a class of ours is the fork's: a further method, or another step."""
    if isinstance(part, ast.FunctionDef):
        changed = part.name == "train_iter" and not _is_plain(part)
        return changed or not hasattr(ours, part.name)
    if isinstance(part, ast.Assign):
        return not any(isinstance(t, ast.Name) and hasattr(ours, t.id) for t in part.targets)
    return False


def _constructor(node: ast.ClassDef, ours: type) -> list[ast.stmt]:
    """An `__init__` that calls ours, then sets the attributes that only the fork's sets, if any.

    They are set from the arguments and what the module has; what needs a local name is left out.
    """
    for part in node.body:
        if not isinstance(part, ast.FunctionDef) or part.name != "__init__":
            continue
        attributes = {*_set_in(ast.parse(textwrap.dedent(inspect.getsource(ours)))), "tf_writer"}
        stored = {n.id for n in ast.walk(part) if _is_name(n, ast.Store)}
        added = [
            line
            for line in part.body
            if isinstance(line, ast.Assign)
            and _set_in(line)
            and not any(name in attributes or hasattr(ours, name) for name in _set_in(line))
            and not any(_is_name(n, ast.Load) and n.id in stored for n in ast.walk(line))
        ]
        if not added:
            return []
        names = [a.arg for a in part.args.args if a.arg in inspect.signature(ours).parameters]
        words = ", ".join(["self", *(f"{name}={name}" for name in names)])
        call = ast.parse(f"_our_{node.name}.__init__({words})").body
        return [ast.FunctionDef("__init__", part.args, [*call, *added], [])]
    return []


def _is_name(node: ast.AST, context: type) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name) and isinstance(node.ctx, context)


def _set_in(tree: ast.AST) -> list[str]:
    """The attributes of `self` that code sets."""
    return [
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and getattr(node.value, "id", "") == "self"
    ]


def _is_plain(train_iter: ast.FunctionDef) -> bool:
    """Whether a `train_iter` only adds up the terms of the loss and steps, as the library's does.

    It has no branches and no arithmetic but differences (of times), calls what such a step calls,
    and hands the distiller nothing but images, labels, numbers and the epoch.
    """
    for node in ast.walk(train_iter):
        if isinstance(node, (ast.If, ast.For, ast.While, ast.With, ast.IfExp)):
            return False
        if isinstance(node, (ast.BinOp, ast.AugAssign)) and not isinstance(node.op, ast.Sub):
            return False
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name not in _PLAIN_CALLS:
                return False
            if name == "distiller" and not {k.arg for k in node.keywords} <= _PLAIN_ARGUMENTS:
                return False
    return True
