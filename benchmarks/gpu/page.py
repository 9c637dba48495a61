"""The report of the GPU check as Markdown."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def page(report: Row) -> str:
    """Hardware, versions, and a table for each part."""
    keys = ("hardware", "memory_gib", "cpus", "python", "torch", "torchvision", "cuda", "cudnn")
    facts = [f"{key} {_number(report[key])}" for key in keys if report.get(key) is not None]
    command = f"python tools/gpu_check.py --device {report['device']}"
    command += " --quick" if report["quick"] else ""
    lines = ["# On a GPU" if report["device"] == "cuda" else "# The GPU check, on a CPU", ""]
    lines += [f"`{command}`. {', '.join(facts)}.", ""]
    for name, part in report["parts"].items():
        lines += [f"## {TITLES[name]}", ""]
        if part["state"] != "done":
            lines += [f"The part {part['state']} ({part['seconds']:.0f} s).", ""]
        rows = [row for row in part["rows"] if not row.get("error") and "left_out" not in row]
        if rows and "skipped" in rows[0]:
            lines += [f"Skipped: {rows[0]['skipped']}.", ""]
        elif rows:
            lines += [TABLES[name](rows), ""]
        lines += [_trouble(row) for row in part["rows"] if row not in rows]
    return "\n".join(lines).rstrip() + "\n"


TITLES = {
    "tests": "Tests",
    "sync": "Does a step wait for the GPU?",
    "together": "Students in lock-step",
    "recorded": "Steps recorded as a CUDA graph",
    "steps": "Training steps",
    "compiled": "Training steps, compiled",
}


def _trouble(row: Row) -> str:
    if "left_out" in row:
        return f"Not reached in the time: {row['left_out']} of {row['of']} cases.\n"
    what = ", ".join(
        str(row[key]) for key in ("pair", "method", "batch", "setting", "precision") if key in row
    )
    return f"Failed: {what}: {row['error']}\n"


def _tests(rows: list[Row]) -> str:
    return f"`pytest -m gpu`: {rows[0]['summary']}."


def _sync(rows: list[Row]) -> str:
    table = [
        [row["pair"], row["method"], row["setting"], ", ".join(row["calls"]) or "none"]
        for row in rows
    ]
    return "No step below raised under `set_sync_debug_mode`.\n\n" + _table(
        ["pair", "method", "setting", "waiting CUDA calls in the profile"], table
    )


def _together(rows: list[Row]) -> str:
    table = [
        [
            row["pair"],
            " ".join(row["methods"]),
            row["amp"],
            f"{row['seconds']['alone']:.1f}",
            f"{row['seconds']['together']:.1f}",
            f"{row['ratio']:.2f}",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    titles = ["pair", "methods", "AMP", "one after another, s", "lock-step, s", "ratio"]
    return _table([*titles, "difference of losses"], table)


def _recorded(rows: list[Row]) -> str:
    table = [
        [
            row["pair"],
            row["method"],
            str(row["batch"]),
            row["precision"],
            f"{row['usual_ms']:.2f}",
            f"{row['wall_ms']:.2f}",
            f"{row['speed_up']:.1f}x",
            f"{row['images_per_second']:.0f}",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    titles = ["pair", "method", "batch", "precision", "usual, ms", "recorded, ms", "speed"]
    return _table([*titles, "images/s", "difference of weights"], table)


def _steps(rows: list[Row]) -> str:
    table = [
        [
            row["pair"],
            row["method"],
            str(row["batch"]),
            row["precision"],
            f"{row['wall_ms']:.2f}",
            f"{row['images_per_second']:.0f}",
            _number(row.get("peak_mib")),
            f"{row['classic_ms']:.2f} ({row['classic_ms'] / row['wall_ms']:.1f}x)"
            if "classic_ms" in row
            else "",
        ]
        for row in rows
    ]
    titles = ["pair", "method", "batch", "precision", "ms/step", "images/s", "peak, MiB"]
    return _table([*titles, "classic loop, ms"], table)


TABLES = {
    "tests": _tests,
    "sync": _sync,
    "together": _together,
    "recorded": _recorded,
    "steps": _steps,
    "compiled": _steps,
}


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if isinstance(value, float) else str(value)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    from mdistiller.files.tables import markdown_table

    return markdown_table(titles, rows)
