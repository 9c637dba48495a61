"""The benchmark of a training step: its parts, and the same step in other loops."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

from mdistiller.files.tables import markdown_table

LOOPS = ("ours", "bare", "classic")


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the suite `step` alone."""
    parser.add_argument("--cfg", default="", metavar="FILE", help="step: the config")
    parser.add_argument("--steps", type=int, default=4, help="step: steps a round (default 4)")
    parser.add_argument(
        "--images", type=int, default=2048, help="step: images in the set (default 2048)"
    )
    parser.add_argument("--classes", type=int, default=0, help="step: their classes")
    parser.add_argument(
        "--loops", nargs="+", choices=LOOPS, default=list(LOOPS), help="step: what is compared"
    )


def step(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row: the loops, the parts, the operations. Printed as tables."""
    from benchmarks.clock import PARTS, Clock, put_on_clock
    from benchmarks.memory import peak_growth
    from mdistiller.cli.support.timing import race
    from mdistiller.registry import UserError

    if min(args.steps, args.images) < 1:
        raise UserError("--steps and --images must be at least 1")
    cfg, data, distiller = prepare(args, device)
    loops = make_loops(args, cfg, data, distiller)
    times = race({key: loop.run for key, loop in loops.items()}, device, args.rounds)
    row: dict[str, Any] = {
        "config": args.cfg,
        "settings": list(args.opts),
        "method": cfg.DISTILLER.TYPE,
        "teacher": cfg.DISTILLER.TEACHER,
        "student": cfg.DISTILLER.STUDENT,
        "batch": cfg.SOLVER.BATCH_SIZE,
        "amp": cfg.SOLVER.AMP,
        "loops": {key: per_step(taken, args.steps) for key, taken in times.items()},
    }
    for key, taken in row["loops"].items():
        taken["images_per_second"] = 1e3 * row["batch"] / taken["ms"]
        if args.memory:
            taken["peak_mib"] = peak_growth(one_loop, args, key, device, device=device)
    if "classic" in loops:
        row["classic_loss"] = "textbook" if loops["classic"].textbook else "ours"
        readers = {key: loops[key].read for key in ("ours", "classic")}
        alone = race(readers, device, args.rounds)
        row["data"] = {key: per_step(taken, args.steps) for key, taken in alone.items()}
    ours, clock = loops["ours"], Clock(device)
    row |= work(ours, row, device)
    put_on_clock(ours.trainer, clock)
    for _ in range(args.rounds):
        ours.run()
    steps = args.rounds * args.steps
    row["parts"] = {part: 1e3 * clock.spent[part] / steps for part in PARTS}
    show(row)
    return [row]


def prepare(args: argparse.Namespace, device: str) -> tuple[Any, Any, Any]:
    """The config, generated data and the distiller on them."""
    import torch

    from benchmarks.step_data import generated_data, untrained_distiller
    from mdistiller.engine.cfg import load_config
    from mdistiller.run.train import set_determinism

    cfg = load_config(args.cfg, args.opts, args.imports)
    cfg.defrost()
    cfg.SOLVER.BATCH_SIZE = args.batch or cfg.SOLVER.BATCH_SIZE
    set_determinism(cfg.SOLVER.DETERMINISTIC)
    where = torch.device(device)
    data = generated_data(cfg, args.images, args.classes, where)
    return cfg, data, untrained_distiller(cfg, data, where)


def one_loop(args: argparse.Namespace, name: str, device: str) -> Callable[[], None]:
    """What runs a round of a loop, set up afresh."""
    args = argparse.Namespace(**{**vars(args), "loops": [name]})
    run: Callable[[], None] = make_loops(args, *prepare(args, device))[name].run
    return run


def make_loops(args: argparse.Namespace, cfg: Any, data: Any, distiller: Any) -> dict[str, Any]:
    """The loops asked for, ours always, each with networks of its own, all equal."""
    from benchmarks.step_loops import Bare, Classic, Ours

    makers: dict[str, Callable[[Any], Any]] = {
        "ours": lambda own: Ours(cfg, own, data, args.steps),
        "bare": lambda own: Bare(cfg, own, data, args.steps),
        "classic": lambda own: Classic(cfg, own, data, args.steps, workers),
    }
    # on a CPU the workers' time would be nobody's
    workers = args.workers if next(distiller.parameters()).is_cuda else 0
    chosen = ["ours", *(key for key in LOOPS[1:] if key in args.loops)]
    if distiller.two_views and "classic" in chosen:
        chosen.remove("classic")
    return {key: makers[key](copy.deepcopy(distiller)) for key in chosen}


def per_step(taken: dict[str, float], steps: int) -> dict[str, float]:
    """The times of a round, as those of a step."""
    return {key: value / steps for key, value in taken.items()}


def work(ours: Any, row: dict[str, Any], device: str) -> dict[str, Any]:
    """Operations an image, the machine's peak, and the share of it that the steps reach."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        ours.run()
    flops = counter.get_total_flops() / (len(ours.loader) * row["batch"])
    peaks = measured_peaks(device, row["amp"])
    reached = flops * row["loops"]["ours"]["images_per_second"]
    return {
        "mflop_per_image": flops / 1e6,
        "peak_gflops": {key: value / 1e9 for key, value in peaks.items()},
        "share_of_peak": reached / max(peaks.values()),
    }


def measured_peaks(device: str, amp: str) -> dict[str, float]:
    """Operations per second of a large matrix product and a large convolution, the best of five."""
    import torch
    import torch.nn.functional as F

    from mdistiller.cli.support.timing import seconds

    dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    side, images = (8192, 256) if device.startswith("cuda") else (1024, 16)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    x = torch.randn(images, 256, 32, 32, device=device, dtype=dtype)
    w = torch.randn(256, 256, 3, 3, device=device, dtype=dtype)
    x, w = (t.contiguous(memory_format=torch.channels_last) for t in (x, w))
    forms: dict[str, tuple[Callable[[], Any], float]] = {
        "gemm": (lambda: a @ b, 2 * side**3),
        "conv": (lambda: F.conv2d(x, w, padding=1), 2 * images * 32 * 32 * 256 * 256 * 9),
    }
    rates = {}
    with torch.no_grad():
        for name, (form, flops) in forms.items():
            own = [seconds(form, device)[1 if device == "cpu" else 0] for _ in range(6)]
            rates[name] = flops / min(own[1:])
    return rates


def show(row: dict[str, Any]) -> None:
    """Print the tables."""
    loops = row["loops"]
    pair = f"{row['teacher']} -> {row['student']}"
    print(f"{row['method']}, {pair}, batch {row['batch']}, amp {row['amp']}")
    titles = ["loop", "ms/step", "quartiles", "wall ms", "images/s", "time over ours"]
    memory = "peak_mib" in loops["ours"]
    titles += ["peak, MiB"] if memory else []
    lines = []
    for name, taken in loops.items():
        label = f"{name} ({row['classic_loss']} loss)" if name == "classic" else name
        cells = [label, f"{taken['ms']:.2f}", f"{taken['low']:.2f}-{taken['high']:.2f}"]
        cells += [f"{taken['wall_ms']:.2f}", f"{taken['images_per_second']:.0f}"]
        cells += [f"{taken['ms'] / loops['ours']['ms']:.3f}"]
        lines.append(cells + ([f"{taken['peak_mib']:.0f}"] if memory else []))
    print(markdown_table(titles, lines))
    whole = sum(row["parts"].values())
    parts = [[k, f"{v:.3f}", f"{100 * v / whole:.1f} %"] for k, v in row["parts"].items()]
    print(markdown_table(["part of ours", "ms/step", "share"], parts))
    if "data" in row:
        own, classic = (row["data"][key]["ms"] for key in ("ours", "classic"))
        print(f"data alone, ms/step: ours {own:.3f}, classic {classic:.3f} ({classic / own:.1f}x)")
    peaks = ", ".join(f"{name} {value:.0f}" for name, value in row["peak_gflops"].items())
    print(
        f"{row['mflop_per_image']:.0f} MFLOP/image, {100 * row['share_of_peak']:.0f} % of the "
        f"measured peak (GFLOP/s: {peaks})"
    )
