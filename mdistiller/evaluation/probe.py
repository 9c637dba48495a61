"""Features of several networks judged on one labelled data set (`mdistiller/engine/probe.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mdistiller.dataset import TestData, data_spec
from mdistiller.engine.cfg import Config
from mdistiller.engine.networks.network import build_network
from mdistiller.engine.probe import labelled_sets, probe
from mdistiller.evaluation.subjects import Source, own_preprocessing_of
from mdistiller.preprocessing import Preprocessing


@dataclass(frozen=True)
class Probed:
    """What was found of a network.

    Attributes:
        accuracies: top-1 in percent, by the probe's name.
        images: labelled images for training the probe, and for testing it.
        width: of the features.
    """

    source: Source
    accuracies: dict[str, float]
    images: tuple[int, int]


def probe_all(
    sources: Sequence[Source], cfg: Config, device: torch.device, kinds: Sequence[str]
) -> list[Probed]:
    """Probe networks, each on images prepared its own way; classifiers are left out.

    Args:
        cfg: with the labelled data (:func:`labelled_config`).
    """
    facts = data_spec(cfg)
    sets: dict[Preprocessing | None, tuple[TestData, TestData]] = {}
    probed = []
    for source in sources:
        how = own_preprocessing_of(source, facts)
        if how not in sets:
            sets[how] = labelled_sets(cfg, device, how)
        train, test = sets[how]
        data = test._replace(zoo=data_spec(source.cfg).zoo, classes=[])
        net = build_network(source.cfg, source.role, data, source.weights, any_head=True)
        accuracies = probe(net.to(device).requires_grad_(False), train, test, device, kinds)
        counts = len(train.loader.dataset), len(test.loader.dataset)
        probed.append(Probed(source, accuracies, counts))
    return probed
