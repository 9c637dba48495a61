"""Images in tar files, for sets that fit no disk or live elsewhere: ``DATASET.TYPE: webdataset``.

A shard holds, for each sample, an image and its class in digits under one name (``0017.jpg``,
``0017.cls``), as the package webdataset writes them. ``DATASET.SHARDS.TRAIN`` and ``VAL`` name the
shards: a pattern below ``DATASET.ROOT`` with braces (``train-{0000..0099}.tar``) or with ``*`` and
``?``, or a URL that webdataset opens. With an empty ``TARGET`` the samples need no class, for
methods that need no labels (docs/foundation.md). Samples are counted once and remembered beside the
shards.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from mdistiller.dataset.data_source import (
    DATASET_CONFIG,
    DATASETS,
    IMAGENET_MEAN,
    IMAGENET_STD,
    DataSource,
    Options,
    Split,
)
from mdistiller.dataset.files.corrupt import report_skipped
from mdistiller.dataset.files.shard_index import index_shards
from mdistiller.dataset.files.shard_reader import ShardSet, import_webdataset
from mdistiller.registry import UserError
from mdistiller.runtime import local_rank_zero_first


@DATASETS.register("webdataset")
class Shards(DataSource):
    """Classes are numbers from 0; normalised with ImageNet's constants unless others are given."""

    root = "data"
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    augment = "resized_crop_flip"
    keep_shape = True
    zoo = "imagenet"

    def shards(self, root: Path, split: Split, options: Options) -> ShardSet:
        """One split, its samples counted."""
        import_webdataset()
        settings = {**DATASET_CONFIG["SHARDS"], **options.shards}
        if split == "test" and not settings["TARGET"]:
            raise UserError(
                f"the shards in {root} have no labels to evaluate on (DATASET.SHARDS.TARGET is "
                "empty): name a labelled data set, or judge the features by mdistiller eval RUN "
                "--probe knn --labelled FOLDER"
            )
        key = "TRAIN" if split == "train" else "VAL"
        if settings["SHUFFLE"] < 0 or settings["CLASSES"] < 0:
            raise UserError("DATASET.SHARDS.SHUFFLE and CLASSES must not be negative")
        urls = expand(settings[key], root, f"DATASET.SHARDS.{key}")
        images = tuple(settings["IMAGE"].split(";"))
        checked = images if options.skip_corrupt else ()
        with local_rank_zero_first():
            index = index_shards(
                urls, settings["TARGET"], options.workers, checked, options.scale_16_bit, images
            )
        classes, skipped = _without_corrupt(urls, index)
        empty = next((url for url, labels in zip(urls, classes, strict=True) if not labels), None)
        if empty:
            what = f"a class (.{settings['TARGET']})" if settings["TARGET"] else "an image"
            raise UserError(f"shard {empty} has no sample with {what}")
        targets = torch.tensor([label for labels in classes for label in labels])
        num = settings["CLASSES"] or int(targets.max()) + 1
        if not 0 <= int(targets.min()) <= int(targets.max()) < num:
            raise UserError(
                f"the classes in {settings[key]} run from {int(targets.min())} to "
                f"{int(targets.max())}; they must number {num} from 0 (DATASET.SHARDS.CLASSES)"
            )
        return ShardSet(
            urls,
            torch.tensor([len(labels) for labels in classes]),
            targets,
            [str(label) for label in range(num)],
            images,
            settings["TARGET"],
            settings["SHUFFLE"],
            skipped,
            options.upright,
            options.scale_16_bit,
            options.jpeg_scaling,
        )


def _without_corrupt(
    urls: list[str], classes: list[list[int | None]]
) -> tuple[list[list[int]], dict[int, set[int]]]:
    """The classes of readable samples, and the places of the others, by shard."""
    skipped = {
        shard: {place for place, label in enumerate(labels) if label is None}
        for shard, labels in enumerate(classes)
        if None in labels
    }
    bad = [
        f"{urls[shard]}: sample {k + 1}"
        for shard, places in skipped.items()
        for k in sorted(places)
    ]
    report_skipped(bad, sum(map(len, classes)))
    kept = [[label for label in labels if label is not None] for labels in classes]
    return kept, skipped


def expand(pattern: str, root: Path, key: str) -> list[str]:
    """The shards that a pattern names, in order; paths are below `root`."""
    from webdataset.shardlists import expand_urls

    urls: list[str] = []
    for url in expand_urls(pattern):
        if re.match(r"[a-z0-9]+:", url):
            urls.append(url)
        elif set(url) & set("*?["):
            urls += sorted(str(path) for path in root.glob(url))
        else:
            urls.append(str(root / url))
    missing = [url for url in urls if not re.match(r"[a-z0-9]+:", url) and not Path(url).is_file()]
    if missing or not urls:
        what = f"{missing[0]} is not there" if missing else f"no file fits it in {root}"
        raise UserError(f"{key} {pattern!r}: {what}; set DATASET.ROOT and {key}")
    return urls
