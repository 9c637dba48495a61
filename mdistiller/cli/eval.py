"""eval: top-1 and top-5 accuracy of a network's checkpoint on a data set."""

from __future__ import annotations

import argparse

from mdistiller.cli._run import add_overrides, guarded


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="eval", description=__doc__)
    parser.add_argument("-m", "--model", required=True, help="name in the model zoo")
    parser.add_argument(
        "-c",
        "--ckpt",
        default="pretrain",
        help="file with the weights; default: the released ones under download_ckpts/",
    )
    parser.add_argument("-d", "--dataset", default="", help="data set (default cifar100)")
    parser.add_argument("-bs", "--batch-size", type=int, default=64)
    parser.add_argument(
        "--cfg", default="", metavar="FILE", help="config to take DATASET and STUDENT_ARGS from"
    )
    add_overrides(parser)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Load, validate, print one line."""
    from torch import nn

    from mdistiller.dataset import load_test_loader
    from mdistiller.distillers import Vanilla
    from mdistiller.engine.build import make_network
    from mdistiller.engine.cfg import load_config
    from mdistiller.engine.utils import log_msg, validate
    from mdistiller.models import get_model_entry
    from mdistiller.runtime import resolve_device
    from mdistiller.weights import load_network

    dataset = ["DATASET.TYPE", args.dataset] if args.dataset else []
    batch = ["DATASET.TEST.BATCH_SIZE", str(args.batch_size)]
    cfg = load_config(args.cfg, [*dataset, *batch, *args.opts], args.imports)
    device = resolve_device(cfg.DEVICE)
    test = load_test_loader(cfg, device)
    entry = get_model_entry(args.model, test.zoo)
    net: nn.Module
    if args.ckpt == "pretrain":
        net = entry(num_classes=test.num_classes, pretrained=True)
    else:
        settings = cfg.DISTILLER.STUDENT_ARGS
        net = make_network(
            entry, test.num_classes, test.image_size, settings, "DISTILLER.STUDENT_ARGS"
        )
        load_network(net, args.ckpt, args.model, test.num_classes)
    top1, top5, loss = validate(test.loader, Vanilla(net.to(device)))
    size = len(test.loader.dataset)
    print(
        log_msg(
            f"{args.model} on {cfg.DATASET.TYPE} ({size} images): "
            f"top-1 {top1:.2f}  top-5 {top5:.2f}  loss {loss:.4f}",
            "EVAL",
        )
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parser().parse_intermixed_args(argv)
    return guarded(lambda: evaluate(args))
