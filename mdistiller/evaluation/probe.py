"""Features of several networks judged on one labelled data set (`mdistiller/engine/probe.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from mdistiller.dataset import TestData, data_spec
from mdistiller.engine.cfg import Config
from mdistiller.engine.probe import labelled_sets, probe
from mdistiller.evaluation.subjects import Source, own_preprocessing_of, sized
from mdistiller.networks.network import build_network
from mdistiller.networks.teacher_images import teacher_image_size
from mdistiller.preprocessing import Preprocessing, height_width

Size = tuple[int, int] | None
RANDOM = "random weights"


@dataclass(frozen=True)
class Probed:
    """What was found of a network.

    Attributes:
        accuracies: top-1 in percent, by the probe's name.
        images: labelled images for training the probe, and for testing it.
        image_size: their (height, width).
    """

    source: Source
    accuracies: dict[str, float]
    images: tuple[int, int]
    image_size: tuple[int, int]


def probe_all(
    sources: Sequence[Source], cfg: Config, device: torch.device, kinds: Sequence[str]
) -> list[Probed]:
    """Probe networks, each on images prepared its own way; classifiers are left out.

    A run's teacher sees images of the size that it saw in training. After the first of each
    student's architecture comes the same network with random weights, of seed 0, on its images.

    Args:
        cfg: with the labelled data (:func:`labelled_config`).
    """
    facts = data_spec(cfg)
    sets: dict[tuple[Preprocessing | None, Size], tuple[TestData, TestData]] = {}
    probed = []
    untrained: set[str] = set()
    for source in sources:
        how = own_preprocessing_of(source, facts)
        size = training_size(source) if facts.files else None  # else the network resizes
        if (how, size) not in sets:
            sets[how, size] = labelled_sets(sized(cfg, size) if size else cfg, device, how)
        train, test = sets[how, size]
        data = test._replace(zoo=data_spec(source.cfg).zoo, classes=[])
        counts = len(train.loader.dataset), len(test.loader.dataset)
        network = repr((source.name, source.cfg.DISTILLER[f"{source.role}_ARGS"], how))
        rows = [source]
        if source.role == "STUDENT" and network not in untrained:
            untrained.add(network)
            rows.append(replace(source, label=RANDOM, weights="", note="", run=None))
        for row in rows:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                net = build_network(row.cfg, row.role, data, row.weights, any_head=True)
            accuracies = probe(net.to(device).requires_grad_(False), train, test, device, kinds)
            probed.append(Probed(row, accuracies, counts, test.image_size))
    return probed


def training_size(source: Source) -> Size:
    """(height, width) of the images that a run's teacher taught on; None: as its weights say."""
    if source.role != "TEACHER":
        return None
    side = teacher_image_size(source.cfg) or data_spec(source.cfg).side
    return height_width(side) if side else None
