"""eval: how good networks are on a data set, alone and beside their teacher.

eval -m MODEL -c FILE -d DATASET            a checkpoint
eval RUN --probe knn,linear --labelled DIR  frozen features (docs/foundation.md)
eval student_int8.onnx -d DATASET           an exported file
eval output/digits/*                        the students of run folders, on their own data, beside
                                            their own teacher (or --teacher RUN|NAME|none)
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from mdistiller.cli.support import tables
from mdistiller.cli.support.command import command_line
from mdistiller.cli.support.networks import (
    Loaded,
    add_networks,
    labelled_networks,
    load_networks,
)
from mdistiller.cli.support.teachers import check_teachers, distinct
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.evaluation.evaluate import Evaluation
    from mdistiller.evaluation.probe import Probed


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(
        prog="eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_networks(parser)
    parser.add_argument(
        "--features", action="store_true", help="neural collapse and, with --teacher, CKA"
    )
    parser.add_argument(
        "--per-class", action="store_true", help="print precision, recall and F1 of each class"
    )
    parser.add_argument(
        "--probe",
        default="",
        metavar="KINDS",
        help="judge features by labelled images instead: knn, linear, or knn,linear",
    )
    parser.add_argument(
        "--labelled",
        default="",
        metavar="FOLDER|NAME",
        help="those images: a folder with train/CLASS and val/CLASS, or a data set",
    )
    for name, what in (
        ("json", "all that is found"),
        ("csv", "a row a network, without what is found of single classes"),
        ("confusion", "the confusion matrix: a picture (.png, .svg; needs mdistiller[viz]) or CSV"),
    ):
        parser.add_argument(f"--{name}", type=Path, metavar="FILE", help=f"write {what}")
    return parser


def evaluate(args: argparse.Namespace) -> list[Evaluation]:
    """Load, run over the data once, print a line a network and the tables, write the files."""
    tables.check_places([path for path in (args.json, args.csv, args.confusion) if path])
    if _is_picture(args.confusion):
        from mdistiller.evaluation import draw

        draw.check_out(args.confusion, "--confusion")
    given = load_networks(args, ["latest", "best"])
    from mdistiller.console import print_log
    from mdistiller.evaluation.evaluate import evaluate

    test = given.test
    loader, classes, device = test.loader, test.num_classes, given.device
    evaluations = evaluate(given.subjects, loader, classes, device, given.teachers, args.features)
    check_teachers(evaluations, given.subjects, given.recorded)
    names = [one.subject.source.name for one in evaluations]
    for one in evaluations:
        quality, source = one.quality, one.subject.source
        which = f", {source.label}," if names.count(source.name) > 1 else ""
        images = test.name if test.name != "test set" else f"{quality.images} images"
        print_log(
            f"{source.name}{which} on {given.dataset} ({images}): top-1 "
            f"{quality.top1:.2f}  top-5 {quality.top5:.2f}  loss {quality.nll:.4f}",
            "EVAL",
        )
    print(f"\n{tables.markdown(evaluations, test.classes)}")
    if args.per_class:
        print(f"\n{tables.per_class(evaluations, test.classes)}")
    _write_files(args, given, evaluations)
    return evaluations


def _is_picture(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() in (".png", ".svg")


def _write_files(args: argparse.Namespace, given: Loaded, evaluations: list[Evaluation]) -> None:
    test, teachers = given.test, distinct(given.teachers)
    facts = {
        "dataset": given.dataset,
        "classes": test.classes,
        "split": test.name,
        "teacher": teachers[0].source.label if len(teachers) == 1 else None,
        "own_teacher_of": [str(run) for run in given.recorded],
    }
    if args.json:
        args.json.write_text(tables.json_text(facts, evaluations))
    if args.csv:
        args.csv.write_text(tables.csv_text(evaluations))
    if _is_picture(args.confusion):
        from mdistiller.evaluation import draw

        panels = [("\n".join(names), q.confusion) for names, q in tables.merged(evaluations)]
        draw.save(draw.confusions(panels, test.classes), args.confusion)
    elif args.confusion:
        args.confusion.write_text(tables.confusion_text(evaluations, test.classes))


def probe(args: argparse.Namespace) -> list[Probed]:
    """Judge the features of networks and of the runs' own teachers, and print a table."""
    if not (args.probe and args.labelled):
        raise UserError("--probe and --labelled belong together: give both")
    if args.csv or args.confusion or args.features:
        raise UserError("--probe prints a table and writes --json; leave out --csv, --confusion")
    tables.check_places([args.json] if args.json else [])
    sources, cfg, device = labelled_networks(args)
    from mdistiller.evaluation.probe import probe_all

    kinds = [kind.strip() for kind in args.probe.split(",")]
    probed = probe_all(sources, cfg, device, kinds)
    print(tables.probed_markdown(probed, kinds))
    if args.json:
        args.json.write_text(tables.probed_json(probed, args.labelled))
    return probed


def run(args: argparse.Namespace) -> None:
    """Evaluate, or probe features."""
    if args.probe or args.labelled:
        probe(args)
    else:
        evaluate(args)


main = command_line(parser, run)
