"""demo: a teacher, a student alone, and KD and DKD students on the embedded digits."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from mdistiller.cli.support.command import command_line
from mdistiller.files.tables import markdown_table
from mdistiller.registry import UserError
from mdistiller.runtime import keep_freed_memory

METHODS = {"student alone": "vanilla", "KD": "kd", "DKD": "dkd"}
Curves = dict[str, list[list[float]]]


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="demo", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs per method (default 3)")
    parser.add_argument("--epochs", type=int, default=0, help="epochs per run (default: configs')")
    parser.add_argument("--out", type=Path, default=Path("output/demo"), help="results folder")
    return parser


def finished_run(config: str, overrides: list[str], out: Path) -> dict[str, Any]:
    """Summary and accuracy curve of a run, trained unless it is there; unfinished ones continue."""
    from mdistiller.engine.cfg import load_config
    from mdistiller.run.train import train_or_continue
    from mdistiller.run_folder.folder import read_lines
    from mdistiller.run_folder.naming import experiment_name

    overrides = ["LOG.PREFIX", str(out), *overrides]
    cfg = load_config(f"configs/digits/{config}.yaml", overrides)
    folder = out / experiment_name(cfg, overrides)
    with (out / f"{folder.name}.log").open("a") as log, contextlib.redirect_stdout(log):
        summary = train_or_continue(cfg, overrides)
    rows = read_lines(folder / "metrics.jsonl")
    return {**summary, "curve": [row["test_acc"] for row in rows]}


def one_thread() -> None:
    """Small networks run best on one thread, several runs side by side."""
    import torch

    keep_freed_memory()
    torch.set_num_threads(1)


def student_runs(seeds: int, epochs: list[str], out: Path) -> dict[str, list[dict[str, Any]]]:
    """All students' runs by method, in as many processes as there are cores."""
    workers = max(1, min(os.cpu_count() or 1, seeds * len(METHODS)))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, one_thread) as pool:
        waiting = {
            (name, seed): pool.submit(
                finished_run, config, ["EXPERIMENT.SEED", str(seed), *epochs], out
            )
            for seed in range(seeds)
            for name, config in METHODS.items()
        }
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in METHODS}
        for (name, seed), run in waiting.items():
            results[name].append(run.result())
            print(f"{name}, seed {seed}: {results[name][-1]['last_acc']:.2f} %", flush=True)
    return results


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    """A Markdown table: last-epoch accuracy (mean ± sample std over seeds), parameters, seconds."""
    from mdistiller.sweep.table import mean_std

    rows = []
    for name, runs in results.items():
        last = mean_std([run["last_acc"] for run in runs])
        seconds = statistics.mean(run["seconds"] for run in runs)
        rows.append([name, last, len(runs), f"{runs[0]['parameters']:,}", f"{seconds:.1f}"])
    return markdown_table(["run", "last top-1 %", "seeds", "parameters", "seconds per run"], rows)


def plot(curves: Curves, path: Path) -> None:
    """Accuracy by epoch: the mean over seeds, and the range as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for name, runs in curves.items():
        epochs = range(1, len(runs[0]) + 1)
        by_epoch: Sequence[tuple[float, ...]] = list(zip(*runs, strict=True))
        (line,) = axes.plot(epochs, [statistics.mean(v) for v in by_epoch], label=name, lw=2)
        low, high = [min(v) for v in by_epoch], [max(v) for v in by_epoch]
        axes.fill_between(epochs, low, high, color=line.get_color(), alpha=0.15)
    axes.set(xlabel="epoch", ylabel="test accuracy, %", title="digits: students of a resnet20")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def demo(args: argparse.Namespace) -> None:
    """Train what is missing, then print the table and write it and the plot."""
    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    epochs = ["SOLVER.EPOCHS", str(args.epochs)] if args.epochs else []
    teacher = finished_run("teacher", [], args.out)
    print(f"teacher: {teacher['last_acc']:.2f} %", flush=True)
    results = {"teacher": [teacher], **student_runs(args.seeds, epochs, args.out)}
    text = table(results)
    (args.out / "table.md").write_text(text + "\n")
    students = {name: [run["curve"] for run in results[name]] for name in METHODS}
    plot(students, args.out / "accuracy.png")
    seconds = time.perf_counter() - started
    print(f"\n{text}\n\n{seconds:.0f} s; table.md, accuracy.png and all runs are in {args.out}")


main = command_line(parser, demo)
