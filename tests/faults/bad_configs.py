"""Malformed configs by the thousand: each must load as it says, or be refused in one line.

`python -m faults.bad_configs --count 5000` tries that many; the package hypothesis (of the
extra `dev`) makes them.
"""

from __future__ import annotations

import argparse
import ast
import math
import tempfile
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mdistiller.config.values import flatten, lookup
from mdistiller.engine.cfg import CFG, load_config
from mdistiller.registry import UserError

Case = tuple[bytes, list[str]]  # a file's content, and overrides
LONGEST = 1500  # characters of an error


def cases() -> Any:
    """The strategy of hypothesis that gives cases."""
    from hypothesis import strategies as st

    known = sorted(set(flatten(CFG)) - {"IMPORTS"})
    sections = sorted({key.split(".")[0] for key in known} - {"IMPORTS"})
    names = st.one_of(
        st.sampled_from(known),
        st.sampled_from(sections),
        st.sampled_from(known).map(lambda key: key.lower()),
        st.sampled_from(known).map(lambda key: key + "X"),
        st.sampled_from(["DISTILLER.STUDENT_ARGS.a", "DISTILLER.TEACHER_ARGS.b.c", "_BASE_"]),
        st.text(max_size=8),
    )
    words = st.sampled_from(
        ["True", "false", "on", "None", "nan", "inf", "1e400", "0x1F", "1_0", "01", "[", "[1, 2",
         "{}", "(1,)", "1j", "b'x'", "{1: 2}", "{'a': 1}", "{'a': {1}}", "~", "a\nb", "\udc80", "é",
         "\0", "1:30", "2001-01-01", "lambda: 0", "__import__('os')", "x" * 5000, "a/b.py",
         "../x.yaml"]
    )  # fmt: skip
    scalars = st.one_of(
        st.none(), st.booleans(), st.integers(), st.integers(-5, 5), st.floats(),
        st.text(max_size=8), st.binary(max_size=4), st.dates(), words, st.just(10**30),
        st.just(-(2**63) - 1),
    )  # fmt: skip
    values = st.recursive(
        scalars,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3),
        max_leaves=6,
    )
    numbers = st.one_of(st.integers(0, 9), st.floats(0, 1), st.lists(st.integers(0, 9), max_size=3))

    def plausible(name: str) -> Any:
        default = lookup(CFG, name)
        kinds: dict[type, Any] = {
            bool: st.booleans(),
            int: st.integers(1, 9),
            float: st.floats(0.01, 0.9) | st.integers(1, 9) | st.sampled_from(["1e-3", ".5"]),
            str: st.text(max_size=6) | st.integers(0, 9) | st.floats(0, 1),
            list: st.lists(st.integers(1, 9), max_size=3) | st.lists(st.floats(0.1, 1), max_size=3),
        }
        return st.tuples(st.just(name), kinds.get(type(default), values))

    def nested(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for name, value in pairs:
            node = table
            *path, last = name.split(".")
            for part in path:
                if not isinstance(node.get(part), dict):
                    node[part] = {}
                node = node[part]
            node[last] = value
        return table

    def dumped(table: Any) -> bytes:
        try:
            return yaml.safe_dump(table, allow_unicode=True).encode("utf-8", "surrogatepass")
        except (yaml.YAMLError, TypeError):  # what safe YAML cannot spell, in Python's own tags
            return yaml.dump(table).encode("utf-8", "surrogatepass")

    pairs = st.lists(st.tuples(names, values | numbers), max_size=4)
    likely = st.lists(st.sampled_from(known).flatmap(plausible), max_size=4)
    tokens = st.sampled_from(
        [*"{}[]:-&*!|>%@`\n\t '\"#?,<", ": ", "\n  ", "- ", "<<: *a", "&a ", "*a", "!!set",
         "!!omap", "!!timestamp x", "!!float x", "!!int ''", "!!bool x", "!!binary é",
         "!!python/tuple [1]",
         "!!python/object/apply:os.getcwd []", "---", "...", "SOLVER", "LR", "EPOCHS", "1", "~"]
    )  # fmt: skip
    depth = st.integers(1, 3000)
    files = st.one_of(
        st.binary(max_size=60),
        st.lists(tokens, max_size=25).map(lambda t: "".join(t).encode()),
        pairs.map(nested).map(dumped),
        values.map(dumped),
        st.tuples(
            st.sampled_from(["[", "{a: ", "- ", "? ", "!!set {", "&a [", "SOLVER: {"]), depth
        ).map(lambda t: (t[0] * t[1]).encode()),
        st.tuples(st.integers(1, 3), st.integers(1, 6), st.booleans()).map(lambda t: _laughs(*t)),
        st.sampled_from(
            [b"a: &a [*a]", b"a: &a {b: *a}", b"SOLVER: &a {LR: *a}", b"\xff\xfe", b""]
        ),
    )
    texts = st.one_of(
        words,
        st.text(max_size=10),
        values.map(repr),
        numbers.map(str),
        st.tuples(st.sampled_from("[({-~1 '\\"), st.integers(1, 30_000)).map(lambda t: t[0] * t[1]),
    )
    overrides = st.lists(st.tuples(names, texts), max_size=3)
    flat = overrides.map(lambda found: [word for pair in found for word in pair])
    odd = st.lists(texts, max_size=3)
    spelled = likely.map(lambda found: [str(word) for pair in found for word in pair])
    return st.one_of(
        st.tuples(files, st.just([])),
        st.tuples(st.just(b"{}"), flat),
        st.tuples(pairs.map(nested).map(dumped), flat),
        st.tuples(st.just(b"{}"), odd),
        st.tuples(likely.map(nested).map(dumped), spelled),
        st.tuples(likely.map(nested).map(dumped), st.just([])),
    )


def _laughs(levels: int, width: int, merged: bool) -> bytes:
    """Aliases of aliases: `width ** levels` values."""
    lines = ["a0: &a0 {x: 1}"]
    for k in range(1, levels + 1):
        inside = ", ".join([f"*a{k - 1}"] * width)
        lines.append(f"a{k}: &a{k} " + (f"{{<<: [{inside}]}}" if merged else f"[{inside}]"))
    return "\n".join(lines).encode()


def verdict(case: Case, folder: Path) -> str:
    """What is wrong with how a case was taken; empty if nothing is."""
    content, overrides = case
    path = folder / "case.yaml"
    path.write_bytes(content)
    try:
        cfg = load_config(path, overrides)
    except UserError as error:
        text = str(error)
        if len(text.splitlines()) != 1 or len(text) > LONGEST:
            return f"not one line: {text[:300]!r}"
        return ""
    except Exception:
        return traceback.format_exc(limit=-3)
    table = yaml.safe_load(content) or {}
    given = dict(zip(overrides[::2], overrides[1::2], strict=True))
    for name, value in _leaves(table):
        hidden = any(
            f"{key}.".startswith(f"{name}.") or name.startswith(f"{key}.") for key in given
        )
        if value is not None and not hidden and not _same(value, lookup(cfg, name)):
            return f"{name}: given {value!r}, read {lookup(cfg, name)!r}"
    last = overrides[-2:]
    if last and not _same(last[1], lookup(cfg, last[0])):
        return f"{last[0]}: given {last[1]!r}, read {lookup(cfg, last[0])!r}"
    return ""


def _leaves(table: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{key}.")
        elif key not in ("_BASE_", "IMPORTS"):
            yield f"{path}{key}", value


def _same(given: Any, read: Any) -> bool:
    """Whether a value was read as it was given: as it is, or as the text that spells it."""
    if isinstance(given, str) and not isinstance(read, str):
        if isinstance(read, bool) and given.lower() == str(read).lower():
            return True
        given = ast.literal_eval(given)
    if isinstance(read, Mapping):
        whole = isinstance(given, Mapping)
        return whole and all(
            value is None or _same(value, read[key]) for key, value in given.items()
        )
    if isinstance(read, (list, tuple)):
        same_size = isinstance(given, (list, tuple)) and len(given) == len(read)
        return same_size and all(map(_same, given, read))
    if isinstance(read, str):
        return str(given) == read or (isinstance(given, str) and ast.literal_eval(given) == read)
    if isinstance(given, float) and math.isnan(given):
        return isinstance(read, float) and math.isnan(read)
    return bool(given == read and isinstance(given, bool) == isinstance(read, bool))


def bad_configs(seed: int, count: int) -> Iterator[tuple[str, bool]]:
    """Try `count` cases; (what was tried and went wrong, whether all is well) of each.

    The same seed gives the same cases. An error found is shown as it was met, not made smaller.
    """
    import hypothesis

    results: list[tuple[str, bool]] = []
    with tempfile.TemporaryDirectory() as folder:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=count,
            database=None,
            deadline=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(cases())
        def run(case: Case) -> None:
            problem = verdict(case, Path(folder))
            what = f"config {len(results)}"
            results.append((f"{what}: {case!r:.300}: {problem}" if problem else what, not problem))

        run()
    yield from results


def main() -> None:
    """Try configs, print what went wrong and how many were tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=2000)
    args = parser.parse_args()
    results = list(bad_configs(args.seed, args.count))
    for name in [name for name, passed in results if not passed]:
        print(name)
    print(f"{len(results)} configs tried, {sum(not passed for _, passed in results)} taken wrongly")
    raise SystemExit(not all(passed for _, passed in results))


if __name__ == "__main__":
    main()
