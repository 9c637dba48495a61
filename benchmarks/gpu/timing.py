"""Times of training steps and of students in lock-step, for the GPU check."""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.runs import write_runs
from benchmarks.step import make_loops, per_step, prepare
from mdistiller.cli.support.timing import race, seconds
from mdistiller.engine.cfg import Config, load_config
from mdistiller.run.train import train, train_together

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Check

Row = dict[str, Any]

PAIRS = {  # teacher -> student: data set, images
    "resnet56 -> resnet20": ("cifar100", 20_000),
    "resnet32x4 -> resnet8x4": ("cifar100", 20_000),
    "ResNet34 -> ResNet18": ("imagenet", 1_024),
}
QUICK_PAIRS = {"resnet8 -> resnet8": ("cifar100", 64), "ResNet18 -> ResNet18": ("imagenet", 4)}
PRECISIONS = ("fp32", "TF32", "bf16")
METHODS = ("KD", "DKD", "CRD")


def cases(check: Check, compiled: bool) -> list[Row]:
    """The steps to time, the most telling first."""
    if check.quick:
        small, large = QUICK_PAIRS
        chosen = [("KD", 16, "fp32", small), ("DKD", 2, "TF32", large), ("CRD", 16, "bf16", small)]
        chosen = chosen[2:] if compiled else chosen
    else:
        precisions = ("bf16", "TF32", "fp32") if compiled else PRECISIONS
        chosen = list(itertools.product(METHODS, (64, 512), precisions, PAIRS))
    keys = ("method", "batch", "precision", "pair")
    found: list[Row] = [dict(zip(keys, values, strict=True)) for values in chosen]
    for case in found:
        case["compiled"] = compiled
        case["classic"] = case["precision"] == "fp32" and case["batch"] < 512 and not compiled
    return found


def settings(case: Row, words: list[str], check: Check) -> argparse.Namespace:
    """The step benchmark's arguments for a case."""
    kind, images = {**PAIRS, **QUICK_PAIRS}[case["pair"]]
    teacher, student = case["pair"].split(" -> ")
    chosen = ["DISTILLER.TYPE", case["method"], "DATASET.TYPE", kind, "DEVICE", check.device]
    chosen += ["DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student]
    if check.quick and kind == "imagenet":
        chosen += ["DATASET.IMAGE_SIZE", "64"]
    if case["method"] == "CRD" and images <= 16384:
        chosen += ["CRD.NCE.K", str(images // 2)]
    return argparse.Namespace(
        cfg="",
        opts=[*chosen, *words],
        imports=[],
        batch=case["batch"],
        images=images,
        classes=4 if check.quick else 0,
        loops=["ours", "classic"] if case.get("classic") else ["ours"],
        steps=1 if check.quick else 4,
        workers=min(16, len(os.sched_getaffinity(0))),
    )


def precision(case: Row) -> list[str]:
    """The overrides for a case's precision; TF32, which convolutions use by default, is set too."""
    tf32, amp = case["precision"] == "TF32", case["precision"] == "bf16"
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = tf32
    return ["SOLVER.AMP", "bf16" if amp else "none", "SOLVER.CHANNELS_LAST", str(amp)]


def generated(case: Row, words: list[str], check: Check) -> tuple[Any, Any, Any]:
    """Config, generated data and untrained distiller of a case."""
    return prepare(settings(case, words, check), check.device)


def time_step(case: Row, check: Check) -> Row:
    """Milliseconds and images per second of a step; at batch 64 in fp32 the classic loop too."""
    words = [*precision(case), "SOLVER.COMPILE", str(case["compiled"])]
    args = settings(case, words, check)
    rounds = 1 if check.quick else 5
    cuda = check.device == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    cfg, data, distiller = prepare(args, check.device)
    loops = make_loops(args, cfg, data, distiller)
    times = race({name: loop.run for name, loop in loops.items()}, check.device, rounds)
    if case["compiled"]:
        check_compiled(loops["ours"].trainer.model)
    ours = per_step(times["ours"], args.steps)
    row: Row = {**ours, "images_per_second": 1e3 * case["batch"] / ours["wall_ms"]}
    if "classic" in times:
        row["classic_ms"] = times["classic"]["wall_ms"] / args.steps
        row["classic_workers"] = args.workers if cuda else 0
    if cuda:
        row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    return row


def recorded_cases(check: Check) -> list[Row]:
    """The steps to record, of networks that are small for a GPU."""
    few = (list(QUICK_PAIRS)[:1], ("fp32",), ("KD",))
    chosen = itertools.product(
        *few if check.quick else (list(PAIRS)[:2], ("fp32", "bf16"), METHODS)
    )
    keys = ("pair", "precision", "method")
    return [{**dict(zip(keys, values, strict=True)), "batch": 64} for values in chosen]


def time_recorded(case: Row, check: Check) -> Row:
    """Milliseconds of a step as usual and recorded (SOLVER.CUDA_GRAPHS), and whether they agree."""
    loops, weights = {}, []
    for form, graphs in (("usual", "False"), ("recorded", "True")):
        args = settings(case, [*precision(case), "SOLVER.CUDA_GRAPHS", graphs], check)
        args.steps = 6 if check.quick else 100
        torch.manual_seed(0)
        loops[form] = make_loops(args, *prepare(args, check.device))["ours"]
        loops[form].run()
        student = loops[form].trainer.model.student
        weights.append(torch.cat([param.detach().flatten() for param in student.parameters()]))
    rounds = 1 if check.quick else 3
    times = race({name: loop.run for name, loop in loops.items()}, check.device, rounds)
    taken = {name: per_step(row, args.steps)["wall_ms"] for name, row in times.items()}
    return {
        "usual_ms": taken["usual"],
        "wall_ms": taken["recorded"],
        "speed_up": taken["usual"] / taken["recorded"],
        "images_per_second": 1e3 * case["batch"] / taken["recorded"],
        "difference": float((weights[0] - weights[1]).norm() / weights[0].norm()),
    }


def check_compiled(distiller: Any) -> None:
    """Refuse the figures of a network that ran uncompiled because its compilation failed."""
    frozen = distiller.frozen
    nets = {"student": distiller.student, "teacher": frozen.net if frozen else distiller.teacher}
    for role, net in nets.items():
        if net._compiled_call_impl is None:
            raise RuntimeError(f"the {role} ran uncompiled, the log says why")


def lock_step(check: Check) -> None:
    """Runs of several methods, one after the other and together."""
    methods = ["KD", "AT"] if check.quick else ["KD", "DKD", "DIST", "AT"]
    pairs = [("resnet32x4", "resnet8x4"), ("resnet56", "resnet20")]
    pairs = [("resnet8", "resnet8")] if check.quick else pairs
    size: Row = {"images": 64 if check.quick else 6400, "batch": 16 if check.quick else 64}

    amps = ("none", "bf16")
    chosen = [(f"{a} -> {b}", amp) for amp in (amps[:1] if check.quick else amps) for a, b in pairs]
    if check.quick:
        chosen *= 2  # a second case finds what the first has registered
    with tempfile.TemporaryDirectory() as folder:  # one for all: it has the images' source

        def measure(case: Row) -> Row:
            teacher, student = case["pair"].split(" -> ")
            nets = {"teacher": teacher, "student": student, "amp": case["amp"]}
            paths = write_runs(Path(folder), methods, device=check.device, **nets, **size)
            forms = {"alone": train_alone, "together": train_as_group}
            taken, losses = {}, {}
            for form, call in forms.items():
                place = Path(tempfile.mkdtemp(dir=folder))
                configs = [load_config(path, ["LOG.PREFIX", str(place)]) for path in paths.values()]
                taken[form] = seconds(functools.partial(call, configs), check.device)[0]
                losses[form] = [_last_loss(place, name) for name in methods]
            both = zip(losses["alone"], losses["together"], strict=True)
            apart = max(abs(a - b) / abs(a) for a, b in both)
            ratio = taken["together"] / taken["alone"]
            return {"seconds": taken, "ratio": ratio, "difference": apart, **size}

        check.each(
            [{"methods": methods, "pair": pair, "amp": amp} for pair, amp in chosen], measure
        )


def train_alone(configs: list[Config]) -> None:
    """One run after the other."""
    for cfg in configs:
        train(cfg)


def train_as_group(configs: list[Config]) -> None:
    """All runs in lock-step."""
    for outcome in train_together(configs):
        if outcome.error is not None:
            raise outcome.error


def _last_loss(folder: Path, name: str) -> float:
    lines = (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()
    loss: float = json.loads(lines[-1])["train_loss"]
    return loss
