"""The pages: links, files, names, commands and config keys that they mention exist."""

import argparse
import ast
import functools
import importlib
import re

from support import REPO

import mdistiller
from mdistiller.cli import COMMANDS, module_of
from mdistiller.detection.config import default_config as detection_config
from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import CFG
from mdistiller.registry import is_builtin

DOCS = REPO / "docs"
PACKAGE = REPO / "mdistiller"
FOLDERS = ("data", "download_ckpts", "findings")
PAGES = sorted(
    [
        *REPO.glob("*.md"),
        *(REPO / folder / "README.md" for folder in FOLDERS),
        *DOCS.rglob("*.md"),
    ]
)
CURRENT = [page for page in PAGES if page.name != "CHANGELOG.md"]
"""Pages about the library as it is; the changelog may name what has gone."""

NOT_HERE = {"my_method.py", "config.yaml"}  # written by users, and by runs
TOP = ["mdistiller", "tests", "configs", "tools", "docs", "benchmarks", "findings"]
WITHIN = sorted(path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "files")


def label(page):
    return page.relative_to(REPO).as_posix()


def spans(page):
    """What stands in backticks, outside of blocks of code."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL))


def blocks(page, kind=r"\w*"):
    """The blocks of code, lines that end in a backslash joined."""
    found = re.findall(rf"^```{kind}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    return [text.replace("\\\n", " ") for text in found]


def anchors(page):
    """GitHub's names of a page's headings."""
    heads = re.findall(
        r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), re.M
    )
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            path, _, anchor = target.partition("#")
            if re.match(r"\w+:", target):
                continue
            file = page.parent / path if path else page
            if not file.exists() or (anchor and anchor not in anchors(file)):
                broken.append(f"{label(page)}: {target}")
    assert broken == []


def test_the_maps_list_every_page():
    for folder, pages in (
        (DOCS, {*DOCS.rglob("*.md")} - {*(DOCS / "results").glob("*.md")}),
        (DOCS / "results", (DOCS / "results").glob("*.md")),
    ):
        links = re.findall(r"\]\(([^)#\s]+)\)", (folder / "README.md").read_text())
        listed = {(folder / link).resolve() for link in links}
        assert {page for page in pages if page.name != "README.md"} <= listed


def exists(path):
    """Whether a path of the checkout exists, or one in the package; capitals stand for any name."""
    pattern = re.sub(r"\b[A-Z]{4,}\b|\{[^}]*\}|<[^>]*>", "*", path.rstrip("/"))
    return any(next(root.glob(pattern), None) for root in (REPO, PACKAGE))


def test_files_exist():
    missing = []
    for page in CURRENT:
        for span in spans(page):
            head, _, rest = span.partition("/")
            is_path = re.fullmatch(r"[\w./*{},-]+", span) and rest and head in (*TOP, *WITHIN)
            if is_path and not exists(span):
                missing.append(f"{label(page)}: {span}")
            if re.fullmatch(r"\w+\.(py|yaml)", span) and span not in NOT_HERE:
                places = (PACKAGE, REPO / "tests", DOCS, REPO / "configs", REPO / "benchmarks")
                if not any(next(place.rglob(span), None) for place in places):
                    missing.append(f"{label(page)}: {span}")
    assert missing == []


@functools.cache
def defined(file):
    """Names at the top of a module: defined, assigned or imported."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def resolves(name):
    """Whether a dotted name of the package is a module, or something that a module defines."""
    place = REPO
    for i, word in enumerate(parts := name.split(".")):
        if (place / word).is_dir():
            place /= word
        elif (place / f"{word}.py").is_file():
            return i + 1 == len(parts) or parts[i + 1] in defined(place / f"{word}.py")
        else:
            lazy = [*dir(mdistiller), *distiller_dict]
            return word in defined(place / "__init__.py") or word in lazy
    return True


def test_names_of_the_package_exist():
    wrong, pattern = [], r"(?<![\w/.])mdistiller(?:\.[A-Za-z_]\w*)+"
    for page in CURRENT:
        text = page.read_text()
        names = set(re.findall(pattern, text))
        for module, imported in re.findall(r"from (mdistiller[\w.]*) import ([\w, ]+)", text):
            names |= {f"{module}.{name}" for name in imported.replace(" ", "").split(",")}
        wrong += [f"{label(page)}: {name}" for name in names if not resolves(name)]
    assert wrong == []


def test_pages_name_no_private_modules():
    """Forks import `_base` and `_common`; a page about the source may name the file `_base.py`."""
    private = r"mdistiller(?:\.\w+)*\._[a-z]\w*|from \._|(?<![\w.])_[a-z]+\.[a-z_]+\b"
    wrong = [
        f"{label(page)}: {name}"
        for page in CURRENT
        for name in re.findall(private, page.read_text())
        if name != "_base.py"
    ]
    wrong += [
        f"{path.name}: {line}"
        for path in (DOCS / "examples").glob("*/*.py")
        for line in path.read_text().splitlines()
        if re.search(r"import.*\b_[a-z]|\._[a-z]\w* import", line)
    ]
    assert wrong == []


def options(name):
    """The options of a command."""
    module = {"benchmark": "benchmarks.main", "faults": "faults.main"}
    module["train_detection"] = "mdistiller.cli.train"
    module |= {"gpu_check": "benchmarks.gpu.main", "methods": "benchmarks.methods_page"}
    parser = importlib.import_module(module.get(name) or module_of(name)).parser()
    parsers = [parser]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parsers += action.choices.values()
    return {option for p in parsers for option in p._option_string_actions}


def test_commands_and_their_options_exist():
    wrong = []
    for page in CURRENT:
        lines = [line for text in (*blocks(page), *spans(page)) for line in text.splitlines()]
        lines += re.findall(r"^ {4}(python .*)$", page.read_text(), re.MULTILINE)
        for line in lines:
            line = line.partition("  #")[0].replace("tools/X.py", "").replace("mdistiller X", "")
            for name in re.findall(r"(?<![\w/])tools/(\w+)\.py", line):
                if not (REPO / "tools" / f"{name}.py").is_file():
                    wrong.append(f"{label(page)}: tools/{name}.py")
                    continue
                words = re.findall(r"(?<=\s)--[a-z][\w-]*", line.partition(f"tools/{name}.py")[2])
                wrong += [f"{label(page)}: {name} {w}" for w in set(words) - options(name)]
            for name in re.findall(r"^mdistiller (\w+)", line):
                wrong += [f"{label(page)}: mdistiller {name}"] if name not in COMMANDS else []
    assert wrong == []


def keys_of(node, prefix=""):
    """All dotted keys below a node of a config."""
    for key, value in node.items():
        yield f"{prefix}{key}"
        if isinstance(value, dict):
            yield from keys_of(value, f"{prefix}{key}.")


def test_config_keys_exist():
    """Dotted words in capitals, in backticks or commands; pages may leave out the first parts."""
    keys = {*keys_of(CFG), *keys_of(detection_config())}
    keys |= {".".join(key.split(".")[i:]) for key in keys for i in range(1, key.count(".") + 1)}
    unknown, pattern = set(), r"(?<![\w./-])[A-Z]{2,}[A-Z0-9]*(?:\.[A-Z][A-Z0-9_]*)+(?![\w*/-])"
    for page in CURRENT:
        commands = [text for text in blocks(page, "sh") if "mdistiller" in text or "tools/" in text]
        for text in (*spans(page), *commands):
            for key in re.findall(pattern, text):
                if key.removeprefix("METHOD.").removeprefix("NAME.") not in keys:
                    unknown.add(f"{label(page)}: {key}")
    assert sorted(unknown) == []


def default(dotted):
    """The default of a config key as tables give it; None if it is not a key of classification."""
    node = CFG
    for word in dotted.split("."):
        if not isinstance(node, dict) or word not in node:
            return None
        node = node[word]
    return f"{node:g}" if isinstance(node, float) else str(node)


def test_tables_give_the_defaults_that_configs_have():
    wrong = []
    for page in CURRENT:
        for table in re.findall(
            r"^\| key \| default \|.*\n\|[-|]*\n((?:\|.*\n)+)", page.read_text(), re.M
        ):
            rows = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines()]
            assert rows, label(page)
            for key, given in rows:
                value = default(key.strip("`"))
                if value is not None and value != given:
                    wrong.append(f"{label(page)}: {key} is {value!r}, not {given!r}")
    assert wrong == []


def test_the_page_about_the_source_names_what_is_in_it():
    page = DOCS / "architecture.md"
    source = "".join(path.read_text() for path in PACKAGE.rglob("*.py"))
    words = {span for span in spans(page) if re.fullmatch(r"[a-z_]{3,}|[A-Z][a-z]\w+", span)}
    assert {word for word in words if not re.search(rf"\b{word}\b", source)} == set()
    (tree,) = (text for text in blocks(page) if text.startswith("mdistiller/"))
    files = set(re.findall(r"\b[a-z]\w*\.py\b|\b[A-Z]+\.py\b", tree)) - {"X.py"}
    assert {name for name in files if not next(PACKAGE.rglob(name), None)} == set()
    folders = set(re.findall(r"(?<![\w/])([a-z_]\w*)/(?![a-z])", tree)) - {"mdistiller"}
    roots = (PACKAGE, REPO)
    lost = {n for n in folders if not any(p.is_dir() for r in roots for p in r.glob(f"**/{n}"))}
    assert lost == set()


def shipped_methods():
    """Without what other tests have registered."""
    return {name for name, cls in distiller_dict.items() if is_builtin(cls)}


def test_the_page_of_methods_groups_all_of_them():
    text = (DOCS / "methods.md").read_text().partition("## Ready configs")[0]
    groups = text[text.index("\n- ") :]
    assert set(re.findall(r"`([A-Z0-9]+)`", groups)) == shipped_methods()


def test_the_readme_is_short_and_counts_the_methods():
    text = (REPO / "README.md").read_text()
    assert len(text.split()) <= 1000
    assert f": {len(shipped_methods()) - 1} methods" in text  # NONE is plain training


def test_pages_show_the_examples_as_they_are():
    examples, shown = DOCS / "examples", {}
    for page in DOCS.rglob("*.md"):
        pairs = re.findall(
            r"<!-- examples/(\S+) -->\n```\w+\n(.*?)```", page.read_text(), re.DOTALL
        )
        shown |= dict(pairs)
    different = [name for name, text in shown.items() if (examples / name).read_text() != text]
    assert different == []
    files = {path.relative_to(examples).as_posix() for path in examples.glob("*/*.*")}
    assert files - set(shown) == {"data/draw_shells.py"}
    assert [p.name for p in examples.glob("*/*.yaml") if len(p.read_text().splitlines()) > 12] == []
