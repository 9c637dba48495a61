"""Judging frozen features by labelled images: weighted k-NN, and a linear classifier.

The features are a network's summary vectors (`pooled_feat`) of images without augmentation.

knn: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, CVPR 2018,
arXiv 1805.01978. Of the k training images with the highest cosine similarity s to a test image,
each votes for its class with weight exp(s / 0.07); k is 20, or the number of training images if
that is smaller.

linear: a linear layer on features of mean 0 and variance 1, trained by L-BFGS on cross-entropy plus
weight_decay / 2 |W|^2. A fifth of the training images chooses the weight decay, then all train.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.console import progress
from mdistiller.dataset import DATASETS, TestData, load_test_loader
from mdistiller.dataset.split import hold_out
from mdistiller.distillers.helpers.features.shapes import preserve_state
from mdistiller.distillers.helpers.features.shapes import probe as shapes_of
from mdistiller.distillers.helpers.losses.numerics import full_precision, unit
from mdistiller.distillers.helpers.training.checks import logits_and_features
from mdistiller.distributed import sum_over_ranks
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import Registry, UserError

NEIGHBOURS, TEMPERATURE = 20, 0.07
WEIGHT_DECAYS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
_STEPS = 100  # of L-BFGS for each weight decay
_CHUNK = 1024  # test images whose similarities are held at once

PROBES = Registry("probe (--probe)")


@PROBES.register("knn")
def knn_accuracy(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor) -> float:
    """Top-1 accuracy in percent of the weighted k-NN classifier.

    Args:
        train, test: features, [N, D] and [M, D].
        train_classes, test_classes: class indices, int64, [N] and [M].
    """
    train, k = unit(train), min(NEIGHBOURS, len(train))
    classes = int(train_classes.max()) + 1
    hits = 0
    for rows, targets in zip(test.split(_CHUNK), test_classes.split(_CHUNK), strict=True):
        similarity, nearest = (unit(rows) @ train.T).topk(k, dim=1)
        votes = similarity.new_zeros(len(rows), classes)
        votes.scatter_add_(1, train_classes[nearest], (similarity / TEMPERATURE).exp())
        hits += int((votes.argmax(dim=1) == targets).sum())
    return 100.0 * hits / len(test)


@PROBES.register("linear")
def linear_accuracy(
    train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor
) -> float:
    """Top-1 accuracy in percent of a linear classifier; arguments as of :func:`knn_accuracy`."""
    classes = int(torch.maximum(train_classes.max(), test_classes.max())) + 1
    mean, std = train.mean(dim=0), train.std(dim=0, correction=0)
    std = std.masked_fill(std <= 1e-6 * std.max(), 1.0)  # constant features stay 0
    train, test = (train - mean) / std, (test - mean) / std
    count = max(1, len(train_classes) // 5)
    decays: tuple[float, ...]
    try:
        kept, held = hold_out(train_classes.cpu(), count, seed=0)
    except ValueError:  # too few images of each class: the strongest weight decay
        decays = WEIGHT_DECAYS[:1]
    else:
        kept, held = kept.to(train.device), held.to(train.device)
        layers = _fit(train[kept], train_classes[kept], classes, WEIGHT_DECAYS)
        scores = [_accuracy(*layer, train[held], train_classes[held]) for layer in layers]
        decays = WEIGHT_DECAYS[: scores.index(max(scores)) + 1]
    return _accuracy(*_fit(train, train_classes, classes, decays)[-1], test, test_classes)


def _fit(
    x: Tensor, targets: Tensor, classes: int, decays: tuple[float, ...]
) -> list[tuple[Tensor, Tensor]]:
    """Weight [C, D] and bias [C] for each weight decay, each begun from the one before."""
    weight = x.new_zeros(classes, x.shape[1]).requires_grad_()
    bias = x.new_zeros(classes).requires_grad_()
    layers = []
    for decay in decays:
        optimizer = torch.optim.LBFGS(
            [weight, bias], max_iter=_STEPS, line_search_fn="strong_wolfe"
        )

        def objective(decay: float = decay, optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(F.linear(x, weight, bias), targets)
            loss = loss + decay / 2 * weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        with torch.enable_grad():
            optimizer.step(objective)  # type: ignore[arg-type]
        layers.append((weight.detach().clone(), bias.detach().clone()))
    return layers


def _accuracy(weight: Tensor, bias: Tensor, x: Tensor, targets: Tensor) -> float:
    hits = (F.linear(x, weight, bias).argmax(dim=1) == targets).sum()
    return 100.0 * float(hits) / len(targets)


@torch.no_grad()
def embed(net: nn.Module, data: TestData, device: torch.device) -> tuple[Tensor, Tensor]:
    """A network's summary vectors, float32 [N, D], and the classes, int64 [N], on every process.

    The network runs in eval mode; its state does not change.
    """
    loader = data.loader
    width = shapes_of(net, data.image_size)["pooled_feat"][1:].numel()
    rows, place = torch.zeros(len(loader.dataset), width, device=device), loader.start
    with preserve_state(net):
        for images, *_ in progress(loader, "features"):
            _, features = logits_and_features(net(images.to(device)), net)
            vectors = full_precision(features["pooled_feat"]).flatten(1)
            rows[place : place + len(vectors)] = vectors
            place += len(vectors)
    return sum_over_ranks(rows), loader.dataset.targets.to(device)


def probe(
    net: nn.Module, train: TestData, test: TestData, device: torch.device, kinds: Any = ("knn",)
) -> dict[str, float]:
    """Accuracies in percent by the name of the probe, "knn" and "linear".

    Raises:
        UserError: a probe is unknown, or features are not finite.
    """
    probes = {kind: PROBES[kind] for kind in kinds}
    sets = (*embed(net, train, device), *embed(net, test, device))
    if not (sets[0].isfinite().all() and sets[2].isfinite().all()):
        raise UserError("the features to probe have NaN or infinite values: the network diverged")
    return {kind: judge(*sets) for kind, judge in probes.items()}


def labelled_config(cfg: Any, labelled: str) -> Any:
    """The config with the labelled data of LOG.PROBE or --labelled.

    Args:
        labelled: an image folder (train/CLASS/..., val/CLASS/...), or the name of a data set.
    """
    sized = cfg.clone()
    sized.defrost()
    node = sized.DATASET
    folder = Path(labelled).expanduser()
    if folder.is_dir():
        if not any((folder / name).is_dir() for name in ("val", "test")):
            raise UserError(
                f"{labelled} has no test images: a folder of labelled images holds train/CLASS/ "
                "and val/CLASS/ (LOG.PROBE, --labelled)"
            )
        node.TYPE, node.ROOT = "imagefolder", labelled
    elif labelled in DATASETS:
        node.TYPE, node.ROOT = labelled, node.ROOT if labelled == node.TYPE else ""
    else:
        raise UserError(
            f"{labelled} is neither a folder of labelled images (train/CLASS, val/CLASS) nor the "
            "name of a data set (DATASET.TYPE)"
        )
    node.LABELS, node.CLASSES, node.AUGMENT, node.VAL_SPLIT = True, [], "none", 0
    sized.freeze()
    return sized


def labelled_sets(
    cfg: Any, device: torch.device, network: Preprocessing | None = None
) -> tuple[TestData, TestData]:
    """Training and test images of a labelled data set, without augmentation, prepared alike.

    Args:
        network: see :func:`load_test_loader`.
    """
    test = load_test_loader(cfg, device, network)
    train = load_test_loader(cfg, device, network, "train")
    if train.image_size != test.image_size:
        raise UserError(
            f"labelled training images are {train.image_size[1]}x{train.image_size[0]} and test "
            f"images {test.image_size[1]}x{test.image_size[0]} pixels; set DATASET.IMAGE_SIZE"
        )
    return train, test
