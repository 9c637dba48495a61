"""Features of several networks judged on one labelled data set (`mdistiller/engine/probe.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdistiller.dataset import TestData, data_spec
from mdistiller.engine.cfg import Config
from mdistiller.engine.networks.network import build_network
from mdistiller.engine.networks.teacher_images import teacher_image_size
from mdistiller.engine.probe import labelled_sets, probe
from mdistiller.evaluation.subjects import Source, own_preprocessing_of, sized
from mdistiller.preprocessing import Preprocessing

Size = tuple[int, int] | None


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

    A run's teacher sees images of DISTILLER.TEACHER_SIZE if that is set.

    Args:
        cfg: with the labelled data (:func:`labelled_config`).
    """
    facts = data_spec(cfg)
    sets: dict[tuple[Preprocessing | None, Size], tuple[TestData, TestData]] = {}
    probed = []
    for source in sources:
        how = own_preprocessing_of(source, facts)
        is_sized = source.role == "TEACHER" and facts.files  # else the network resizes
        size = teacher_image_size(source.cfg) if is_sized else None
        if (how, size) not in sets:
            sets[how, size] = labelled_sets(sized(cfg, size) if size else cfg, device, how)
        train, test = sets[how, size]
        data = test._replace(zoo=data_spec(source.cfg).zoo, classes=[])
        net = build_network(source.cfg, source.role, data, source.weights, any_head=True)
        accuracies = probe(net.to(device).requires_grad_(False), train, test, device, kinds)
        counts = len(train.loader.dataset), len(test.loader.dataset)
        probed.append(Probed(source, accuracies, counts, test.image_size))
    return probed
