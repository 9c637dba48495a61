"""predict: the classes of your own images, by a trained network.

predict output/digits/kd IMAGE FOLDER ...          a run folder (its best checkpoint)
predict student.onnx FOLDER --csv answers.csv      a file of `mdistiller export`
find . -name '*.jpg' | mdistiller predict RUN -    paths from standard input, one a line

An image in FOLDER/CLASS/ has this class as its truth: accuracy and --mistakes are of these images.
Exit code 1: some images could not be read; the others have their answer.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mdistiller.cli.support.command import FAILED, add_overrides, guarded
from mdistiller.cli.support.tables import check_places
from mdistiller.config.early import check_early
from mdistiller.config.files import require_path
from mdistiller.files.tables import csv_table
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.evaluation.predict import Prediction, Predictor


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="predict", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "network", metavar="RUN|FILE", help="run folder, .onnx, .pt2, .safetensors or checkpoint"
    )
    parser.add_argument("--topk", type=int, default=5, metavar="K", help="classes an image")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write a row an image")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all answers")
    parser.add_argument(
        "--mistakes",
        type=Path,
        metavar="FILE",
        help="draw wrongly classified images of a labelled folder, the worst first (.png or .svg)",
    )
    parser.add_argument(
        "--checkpoint", default="best", help="of a run folder: best, latest, epoch_N, ema_best"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    add_overrides(parser, "IMAGE|FOLDER|-")
    return parser


def predict(args: argparse.Namespace) -> int:
    """Classify the images, print and write the answers; returns how many could not be read."""
    paths, overrides = _split(args.opts)
    if not paths:
        raise UserError("name images, folders of images, or - for paths from standard input")
    if min(args.topk, args.batch_size) < 1:
        raise UserError("--topk and --batch-size must be at least 1")
    check_places([path for path in (args.csv, args.json) if path])
    require_path(args.network)
    for path in paths:
        if path != "-" and not Path(path).exists():
            raise UserError(f"image or folder {path} does not exist")
    check_early("", overrides, args.imports)
    if args.mistakes:
        from mdistiller.evaluation import draw

        draw.check_out(args.mistakes, "--mistakes")
    from mdistiller.evaluation.load import load_predictor

    predictor = load_predictor(args.network, args.checkpoint, args.device, overrides, args.imports)
    images = _find(paths, predictor.classes)
    if args.mistakes and not any(truth for _, truth in images):
        raise UserError(
            "--mistakes needs a folder with one folder per class "
            f"({', '.join(predictor.classes[:5])}, ...), of which images take their true class"
        )
    unreadable: list[dict[str, str]] = []

    def report(image: Any, error: UserError) -> None:
        print(f"error: {error}", file=sys.stderr, flush=True)
        unreadable.append({"image": str(image), "error": str(error)})

    found = []
    for one in predictor.stream(images, args.topk, args.batch_size, report):
        found.append(one)
        if not (args.csv or args.json):
            print(_line(one), flush=True)
    print(_summary(found, len(unreadable)))
    if args.csv:
        args.csv.write_text(csv_table([_row(one) for one in found]), encoding="utf-8")
    if args.json:
        args.json.write_text(_json(predictor, found, unreadable), encoding="utf-8")
    if args.mistakes:
        _draw(predictor, found, args.mistakes)
    return len(unreadable)


def _split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Images and folders, and the config overrides behind them."""
    for i, word in enumerate(words):
        if re.fullmatch(r"DEVICE|(DATASET|DISTILLER)\.[\w.]+", word) and not Path(word).exists():
            return list(words[:i]), list(words[i:])
    return list(words), []


def _find(paths: Sequence[str], classes: Sequence[str]) -> list[tuple[str, str]]:
    """Images with their true class, empty if it is not known."""
    from mdistiller.evaluation.predict import find_images

    images: list[tuple[str, str]] = []
    for path in paths:
        if path == "-":
            images += [(line.strip(), "") for line in sys.stdin if line.strip()]
        elif Path(path).is_dir():
            images += find_images(Path(path), classes)
        else:
            images.append((path, ""))
    if not images:
        raise UserError("standard input names no images (one path a line)")
    return images


def _line(one: Prediction) -> str:
    truth = f"  (is {one.truth})" if one.wrong else ""
    return f"{one.image}  {'  '.join(f'{name} {100 * p:.1f} %' for name, p in one.top)}{truth}"


def _summary(found: Sequence[Prediction], unreadable: int) -> str:
    labelled = [one for one in found if one.truth]
    text = f"{len(found)} image{'s' * (len(found) != 1)}"
    if labelled:
        wrong = sum(one.wrong for one in labelled)
        text += f"; of {len(labelled)} with a true class {wrong} wrong: top-1 "
        text += f"{100 * (1 - wrong / len(labelled)):.2f} %"
    return text + (f"; {unreadable} could not be read" if unreadable else "")


def _row(one: Prediction) -> dict[str, Any]:
    row: dict[str, Any] = {"image": one.image, "truth": one.truth}
    for k, (name, probability) in enumerate(one.top, 1):
        row |= {f"class_{k}": name, f"probability_{k}": probability}
    return row


def _json(
    predictor: Predictor, found: Sequence[Prediction], unreadable: Sequence[dict[str, str]]
) -> str:
    answers = [
        {
            "image": one.image,
            "truth": one.truth or None,
            "top": [{"class": name, "probability": p} for name, p in one.top],
        }
        for one in found
    ]
    facts = {"network": predictor.name, "classes": list(predictor.classes), "images": answers}
    return json.dumps({**facts, "unreadable": unreadable}, indent=1, allow_nan=False) + "\n"


def _draw(predictor: Predictor, found: Sequence[Prediction], path: Path) -> None:
    from mdistiller.evaluation import draw, pictures

    if any(one.wrong for one in found):
        draw.save(pictures.mistakes_picture(predictor, found), path)
        print(path)
    else:
        print(f"no image is classified wrongly, so {path} is not written")


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    unreadable: list[int] = []
    code = guarded(lambda: unreadable.append(predict(args)))
    return code or (FAILED if any(unreadable) else 0)
