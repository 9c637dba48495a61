"""Command lines: `mdistiller train ...` is `python tools/train.py ...`, and so on."""

from __future__ import annotations

import importlib
import sys

from mdistiller import __version__

COMMANDS = {
    "train": "train a network, alone or under a teacher",
    "train_detection": "train a detector (Faster or Mask R-CNN), alone or under a teacher",
    "eval": "how good checkpoints are on a data set, alone and beside their teacher",
    "eval_detection": "average precision of detectors on a COCO-format set, by class",
    "visualize": "t-SNE, correlation of logits and attention maps of checkpoints, as PNG or SVG",
    "export": "a trained student as safetensors, ONNX and torch.export, with a model card",
    "pairs": "which method runs on which teacher-student pair, tried by one step each",
    "models": "networks with parameters, operations and stage shapes",
    "methods": "what every method is, uses and needs: a table",
    "sweep": "grids, seeds and searches from one file, in parallel: a table",
    "download": "released teachers, fetched to where the zoo looks for them",
    "convert_checkpoint": "the weights of an old file that the library refuses to read",
    "convert_detectron2": "a detector of detectron2's model zoo as a file for DETECTION.*.WEIGHTS",
    "report": "runs compared over seeds and with published numbers: Markdown, CSV, one HTML page",
    "demo": "teacher, KD and DKD on the embedded digits: a table and a plot in minutes",
}


_ELSEWHERE = {
    "convert_checkpoint": "convert.checkpoint",
    "convert_detectron2": "convert.detectron2",
}


def module_of(command: str) -> str:
    """The module of a subcommand."""
    return f"mdistiller.cli.{_ELSEWHERE.get(command, command)}"


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit code."""
    args = sys.argv[1:] if argv is None else argv
    if args and args[0] in COMMANDS:
        return int(importlib.import_module(module_of(args[0])).main(args[1:]))
    if args[:1] == ["--version"]:
        print(f"mdistiller {__version__}")
        return 0
    lines = [f"  {name:<20}{text}" for name, text in COMMANDS.items()]
    usage = "\n".join(["usage: mdistiller COMMAND ...  (COMMAND --help tells more)", *lines])
    if args and args[0] in ("-h", "--help"):
        print(usage)
        return 0
    if args:
        print(f"error: unknown command {args[0]!r}", file=sys.stderr)
    print(usage, file=sys.stderr)
    return 2
