"""What the section DATASET of a config says: its values, checked, and the source it names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mdistiller.dataset.data_source import CHANNELS, DATASET_CONFIG, DATASETS, DataSource
from mdistiller.dataset.files.folder import FileSource
from mdistiller.dataset.files.preprocessing import check_keys, choose_preprocessing, keeps_shape
from mdistiller.dataset.memory.augment import AUGMENTS, Identity
from mdistiller.dataset.sources.shards import Shards
from mdistiller.preprocessing import ImageSize, Preprocessing, Statistics, read_image_size
from mdistiller.registry import UserError, is_builtin
from mdistiller.runtime import project_root


def read_node(cfg: Any) -> dict[str, Any]:
    """cfg.DATASET merged over the defaults, since configs of the original lack keys."""
    node = {**DATASET_CONFIG, **cfg.DATASET}
    for key in (
        *("VAL_SPLIT", "IMAGE_SIZE", "NUM_WORKERS", "WORKER_TIMEOUT"),
        *("MIXUP", "CUTMIX", "ERASING"),
    ):
        if not isinstance(node[key], (list, tuple)) and node[key] < 0:
            raise UserError(f"DATASET.{key} {node[key]} must not be negative")
    if not 0 < node["FRACTION"] <= 1:
        raise UserError(f"DATASET.FRACTION {node['FRACTION']} must be above 0 and at most 1")
    try:
        node["IMAGE_SIZE"] = read_image_size(node["IMAGE_SIZE"])
    except ValueError as error:
        raise UserError(f"DATASET.IMAGE_SIZE must be {error}") from None
    if node["ERASING"] > 1:
        raise UserError(f"DATASET.ERASING {node['ERASING']} is a probability and must be at most 1")
    _check_randaugment(node["RANDAUGMENT"])
    check_keys(node)
    _check_channels(node)
    return node


def _check_channels(node: Mapping[str, Any]) -> None:
    if node["CHANNELS"] not in CHANNELS:
        raise UserError(f"DATASET.CHANNELS must be 1, 3 or 4, got {node['CHANNELS']!r}")
    if node["CHANNELS"] == 3:
        return
    for key, wanted in (("RANDAUGMENT", node["RANDAUGMENT"]), ("TYPE", _is_shards(node))):
        if wanted:
            raise UserError(
                f"DATASET.{key} {node[key]} needs images in colour: set DATASET.CHANNELS 3, not "
                f"{node['CHANNELS']}"
            )


def _is_shards(node: Mapping[str, Any]) -> bool:
    return isinstance(source_of(node), Shards)


def _check_randaugment(value: Sequence[Any]) -> None:
    numbers = all(type(item) is int for item in value)
    if value and not (numbers and len(value) == 2 and value[0] >= 1 and 0 <= value[1] <= 30):
        raise UserError(
            f"DATASET.RANDAUGMENT {list(value)} must be the number of operations and their "
            "magnitude of 0 to 30, such as [2, 9], or empty"
        )


def data_root(node: dict[str, Any], source: DataSource) -> Path:
    """The folder of the data."""
    if node["ROOT"]:
        root = Path(node["ROOT"]).expanduser()
        return root if root.exists() else project_root() / root
    if source.root is None:
        raise UserError(f"DATASET.TYPE {node['TYPE']} needs DATASET.ROOT, the folder of the data")
    return project_root() / source.root


def source_of(node: Mapping[str, Any]) -> DataSource:
    """The source that DATASET.TYPE names."""
    entry = DATASETS[node["TYPE"]]
    source: DataSource = entry() if isinstance(entry, type) else entry
    return source


def augment_of(node: dict[str, Any], source: DataSource) -> type[Identity]:
    """The augmentation that DATASET.AUGMENT names, by default the source's."""
    return AUGMENTS[source.augment if node["AUGMENT"] == "default" else node["AUGMENT"]]


def given_statistics(node: dict[str, Any], source: DataSource) -> Statistics | None:
    """Mean and std from the config, else of the data set; None if they must be computed."""
    mean, std, channels = tuple(node["MEAN"]), tuple(node["STD"]), node["CHANNELS"]
    if not mean and not std:
        return (source.mean, source.std) if len(source.mean) == channels else None
    if len(mean) != channels or len(std) != channels or max(*mean, *std) > 1 or min(std) <= 0:
        number = {1: "one value", 3: "three values", 4: "four values"}[channels]
        raise UserError(
            f"DATASET.MEAN {list(mean)} and DATASET.STD {list(std)} must both have {number} up "
            "to 1 (images in [0, 1]), those of STD above 0, or both be empty"
        )
    return mean, std


def has_labels(node: Mapping[str, Any], source: DataSource) -> bool:
    """Whether the images have classes; shards with an empty DATASET.SHARDS.TARGET have none."""
    targets = node["SHARDS"].get("TARGET", "cls") if isinstance(source, Shards) else True
    return source.labels and bool(targets)


def is_labelled(node: Mapping[str, Any], source: DataSource) -> bool:
    """Whether training uses labels."""
    return bool(node["LABELS"]) and has_labels(node, source)


def has_no_test(node: dict[str, Any], source: DataSource) -> bool:
    """Whether DATASET.VAL_SPLIT replaces test images that the data lack."""
    return bool(node["VAL_SPLIT"]) and not source.has_test(data_root(node, source))


def is_balanced(node: dict[str, Any], source: DataSource) -> bool:
    """Whether DATASET.SAMPLER asks for classes that are equally frequent."""
    if node["SAMPLER"] not in ("default", "balanced"):
        raise UserError(f"DATASET.SAMPLER must be default or balanced, got {node['SAMPLER']!r}")
    if node["SAMPLER"] == "balanced" and isinstance(source, Shards):
        raise UserError(
            f"DATASET.SAMPLER balanced needs images in any order, but DATASET.TYPE {node['TYPE']} "
            "reads its shards from front to back: set SAMPLER default (DISTILLER.CLASS_WEIGHTS "
            "inverse weighs classes instead), or use an image folder"
        )
    if node["SAMPLER"] == "balanced" and not is_labelled(node, source):
        raise UserError("DATASET.SAMPLER balanced needs images with classes: set it to default")
    return node["SAMPLER"] == "balanced"


def has_files(source: DataSource) -> bool:
    """Whether images are files, of any size."""
    return isinstance(source, (FileSource, Shards))


def unread_keys(node: Mapping[str, Any]) -> list[str]:
    """Beginnings of keys of a section DATASET that reading these data ignores; a source of the
    user's may read any."""
    keys = [] if node["VAL_SPLIT"] or node["FRACTION"] != 1 else ["VAL_SEED"]
    if not is_builtin(DATASETS.get(node["TYPE"])):
        return keys
    source = source_of(node)
    if not isinstance(source, Shards):
        keys.append("SHARDS.")
    if not has_files(source):
        keys += ["EXIF", "SCALE_16_BIT", "JPEG_SCALING", "SKIP_CORRUPT"]
    return keys


class DataSpec(NamedTuple):
    """Properties of a data set that need no data: from the config and the registered class.

    Attributes:
        zoo: as of :class:`Data`.
        statistics: mean and std of each channel; None if they must be computed.
        side: DATASET.IMAGE_SIZE; 0: images keep their size.
        keeps_shape: whether evaluation takes the centre crop of images of any shape.
        files: whether images are files, of any size.
        labels: whether training uses labels.
    """

    zoo: str
    statistics: Statistics | None
    side: ImageSize
    keeps_shape: bool
    files: bool
    labels: bool


def data_spec(cfg: Any) -> DataSpec:
    """The properties of `cfg.DATASET` that need no data."""
    node = read_node(cfg)
    source = source_of(node)
    return DataSpec(
        node["ZOO"] or source.zoo,
        given_statistics(node, source),
        node["IMAGE_SIZE"],
        keeps_shape(source, augment_of(node, source)),
        has_files(source),
        is_labelled(node, source),
    )


def lacks_test(cfg: Any) -> bool:
    """Whether the data have no test images, so that those of DATASET.VAL_SPLIT take their place."""
    node = read_node(cfg)
    return has_no_test(node, source_of(node))


def mixes_labels(cfg: Any) -> bool:
    """Whether training targets are class probabilities: mixup or CutMix is on."""
    node = read_node(cfg)
    return bool(node["MIXUP"] or node["CUTMIX"])


def eval_preprocessing(cfg: Any, network: Preprocessing | None = None) -> Preprocessing:
    """Preprocessing that :func:`load_test_loader` uses for a network, without mean and std."""
    node = read_node(cfg)
    source = source_of(node)
    how = choose_preprocessing(
        node, source, data_root(node, source), augment_of(node, source), network
    )
    return replace(how, interpolation=how.interpolation or "bilinear")
