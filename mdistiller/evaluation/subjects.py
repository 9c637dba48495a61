"""The networks to look at: of run folders, of files, or released ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mdistiller.config.roles import checkpoint_config, teacher_configs
from mdistiller.dataset import (
    DataSpec,
    TestData,
    data_spec,
    eval_preprocessing,
    lacks_test,
    load_test_loader,
)
from mdistiller.engine.cfg import Config
from mdistiller.evaluation.exported import ExportedNetwork, stated_preprocessing
from mdistiller.files.names import EXPORTED
from mdistiller.models import get_model_entry
from mdistiller.networks.network import build_network
from mdistiller.networks.released import PRETRAINED, own_preprocessing
from mdistiller.networks.teacher_images import teacher_image_size
from mdistiller.networks.teacher_weights import find_teacher
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError
from mdistiller.run_folder.folder import (
    checkpoint_file,
    read_json,
    recorded_config,
    refuse_commands,
)
from mdistiller.run_folder.record import read_record, recorded_teacher_acc
from mdistiller.weights import recorded_facts, split_key

Overrides = Sequence[str]


@dataclass(frozen=True)
class Source:
    """Where a network comes from.

    Attributes:
        label: what to call it in tables and pictures.
        cfg: its architecture, in a role of DISTILLER.
        weights: a file, PRETRAINED, or "" for random ones.
        note: of a run's best checkpoint, its epoch and what it was selected on.
        run: the run folder it is from.
    """

    label: str
    cfg: Config
    weights: Path | Literal["pretrained", ""]
    note: str = ""
    role: str = "STUDENT"
    run: Path | None = None

    @property
    def name(self) -> str:
        """The network's name in its zoo."""
        name: str = self.cfg.DISTILLER[self.role]
        return name


@dataclass(frozen=True)
class Subject:
    """A network in eval mode, and where it comes from.

    Attributes:
        loader: the test set prepared for this network, where the other networks' is not.
    """

    source: Source
    net: nn.Module
    loader: Iterable[Sequence[Tensor]] | None = None


def run_sources(folder: Path, checkpoints: Sequence[str], imports: Overrides = ()) -> list[Source]:
    """The students of these checkpoints of a run folder."""
    cfg = recorded_config(folder, imports=imports)
    summary = read_json(folder / "summary.json")
    sources = []
    for choice in checkpoints:
        note = ""
        if choice == "best" and summary:
            by = summary.get("selected_by", "top1")
            by = "" if by == "top1" else f"by {by.replace('_', ' ')} "
            note = f"epoch {summary['best_epoch']}, selected {by}on the {summary['selected_on']}"
        label = f"{'/'.join(folder.resolve().parts[-2:])} {choice}"
        path = checkpoint_file(folder, choice)
        sources.append(Source(label, checkpoint_config(cfg, path.name), path, note, run=folder))
    return sources


def run_teachers(
    sources: Sequence[Source], data: TestData
) -> list[tuple[Source, dict[Path, float | None]]]:
    """The different teachers of runs, each with its recorded accuracy in percent by run folder.

    None: not recorded.

    Args:
        sources: of run folders whose method used a teacher.

    Raises:
        UserError: the weights of one are not where they were.
    """
    teachers: dict[str, tuple[Source, dict[Path, float | None]]] = {}
    for one in {source.run: source for source in sources}.values():
        assert one.run is not None
        for number, cfg in enumerate(teacher_configs(one.cfg)):
            source = _run_teacher(one.run, cfg, data, number)
            settings = [cfg.DISTILLER[f"TEACHER{key}"] for key in ("", "_ARGS", "_NORM")]
            file = source.weights
            weights = file if isinstance(file, str) else file.resolve()
            accuracies = teachers.setdefault(repr((settings, weights)), (source, {}))[1]
            accuracies[one.run] = recorded_teacher_acc(one.run)
    return list(teachers.values())


def _run_teacher(folder: Path, cfg: Config, data: TestData, number: int) -> Source:
    """The teacher of a run, from the file that `run.json` names, else from where its config says.

    The config that trained it is not read: with a folder of somebody else's it might name code.

    Args:
        number: of its entry in DISTILLER.TEACHERS, from 0.
    """
    record = read_record(folder)
    several = record.get("teachers")
    recorded = several[number]["weights"] if several else record.get("teacher")
    weights: Any = recorded if recorded == PRETRAINED else None
    if weights is None and isinstance(recorded, str) and split_key(folder / recorded)[0].is_file():
        weights = (folder / recorded).resolve()
    if weights is None:
        weights = find_teacher(cfg, data)
    name = cfg.DISTILLER.TEACHER
    if weights is None:
        raise UserError(
            f"the weights of {folder}'s teacher {name} are not there ({recorded or 'not recorded'})"
        )
    label = str(weights)
    if weights == PRETRAINED:
        label = f"{name} released"
    elif (weights.parent / "config.yaml").is_file():
        choice = weights.name.removeprefix("student_")
        label = f"{'/'.join(weights.parent.resolve().parts[-2:])} {choice}"
    return Source(label, cfg, weights, role="TEACHER")


def file_source(
    path: str, name: str, cfg: Config, imports: Overrides = (), role: str = "STUDENT"
) -> Source:
    """The network in a file, or the released one.

    Args:
        path: the file, or "pretrain" for released weights.
        name: its name in the zoo; empty for a file of a run folder, whose config has it.
        cfg: the config with the network's ARGS and NORM, for one with a name.
    """
    if name and Path(path).suffix in EXPORTED:
        raise UserError(f"-m is for files of weights; {path} states its network")
    if name:
        node = cfg.clone()
        node.defrost()
        node.DISTILLER[role] = name
        node.freeze()
        if path == "pretrain":
            return Source(f"{name} released", node, PRETRAINED, role=role)
        return Source(path, node, Path(path), role=role)
    if Path(path).suffix in EXPORTED:
        node = cfg.clone()
        node.defrost()
        node.DISTILLER[role] = stated_preprocessing(Path(path))[0]
        node.freeze()
        return Source(path, node, Path(path), role=role)
    folder = Path(path).parent
    if path == "pretrain" or not (folder / "config.yaml").is_file():
        raise UserError(f"-m must name the network of {path}, which is of no run folder")
    run = checkpoint_config(recorded_config(folder, imports=imports), Path(path).name)
    return Source(path, run, Path(path), run=folder)


def data_config(sources: Sequence[Source], overrides: Overrides, imports: Overrides) -> Config:
    """The config of the data to evaluate runs on: that of the runs, if they share it.

    Raises:
        UserError: they do not.
    """
    runs = [source for source in sources if source.run is not None]
    first, facts = runs[0], _data_facts(runs[0].cfg)
    for other in runs[1:]:
        theirs = _data_facts(other.cfg)
        differ = [key for key, value in theirs.items() if value != facts.get(key, value)]
        if differ:
            key = f"DATASET.{differ[0]}"
            raise UserError(
                f"{first.run} and {other.run} were trained on different data ({key} "
                f"{first.cfg.DATASET[differ[0]]!r} and {other.cfg.DATASET[differ[0]]!r}); name the "
                "data for both by -d or --cfg"
            )
    assert first.run is not None
    cfg = recorded_config(first.run, overrides, imports)
    refuse_commands(first.run, cfg, overrides)
    return cfg


def _data_facts(cfg: Config) -> dict[str, Any]:
    keys = ["TYPE", "ROOT", "IMAGE_SIZE", "RESIZE", "CROP_PCT", "INTERPOLATION", "EXIF", "SHARDS"]
    keys += ["CHANNELS"]
    keys += ["VAL_SPLIT", "VAL_SEED"] if lacks_test(cfg) else []
    facts = {key: cfg.DATASET[key] for key in keys}
    return facts | {"ROOT": str(Path(facts["ROOT"]).resolve()) if facts["ROOT"] else ""}


def load_all(
    sources: Sequence[Source], cfg: Config, device: torch.device
) -> tuple[TestData, list[Subject]]:
    """The test set, and networks with their weights, each on images prepared its own way.

    Images are read once for all networks that have them prepared alike. Beside a run's network all
    see images of the size that the run's have.

    Returns:
        The test set of the first network, or of the first run's, and the networks.
    """
    facts = data_spec(cfg)
    preprocessing = [own_preprocessing_of(source, facts) for source in sources]
    runs = [i for i, source in enumerate(sources) if source.run is not None]
    first = runs[0] if runs else 0
    views = {one: eval_preprocessing(cfg, one) for one in set(preprocessing)}
    tests: dict[Preprocessing, TestData] = {}
    for i in sorted(range(len(sources)), key=lambda i: i != first):
        one, view = preprocessing[i], views[preprocessing[i]]
        if view in tests:
            continue
        if one is not None and not all(
            o is not None and o.mean for o in preprocessing if views[o] == view
        ):
            one = replace(one, mean=(), std=())  # one of them is normalised by the data's
        tests[view] = load_test_loader(cfg, device, one)
        if i == first and runs and view.resize == "keep":
            views = dict.fromkeys(views, view)
        elif i == first and runs:
            cfg = sized(cfg, tests[view].image_size)
            views = {
                one: view if views[one] == view else eval_preprocessing(cfg, one) for one in views
            }
    main = tests[views[preprocessing[first]]]
    subjects = []
    for source, one in zip(sources, preprocessing, strict=True):
        test = tests[views[one]]
        subject = load(source, test, device)
        subjects.append(subject if test is main else replace(subject, loader=test.loader))
    return main, subjects


def load_beside(source: Source, cfg: Config, test: TestData, device: torch.device) -> Subject:
    """A further network, on images of the size of `test`'s that are prepared its own way."""
    facts = data_spec(cfg)
    preprocessing = own_preprocessing_of(source, facts) if facts.files else None
    own_size = teacher_image_size(source.cfg) if source.role == "TEACHER" and facts.files else None
    if not own_size and (preprocessing is None or test.preprocessing.resize == "keep"):
        return load(source, test, device)
    resized = sized(cfg, own_size or test.image_size)
    if eval_preprocessing(resized, preprocessing) == replace(test.preprocessing, mean=(), std=()):
        return load(source, test, device)
    other = load_test_loader(resized, device, preprocessing)
    return replace(load(source, other, device), loader=other.loader)


def own_preprocessing_of(source: Source, facts: DataSpec) -> Preprocessing | None:
    """How a network has its images prepared; None where that cannot matter."""
    if not facts.files:
        return None
    if _is_exported(source):
        return stated_preprocessing(Path(source.weights))[1]
    stated = None if source.weights == PRETRAINED else recorded_facts(source.weights)
    try:
        entry = get_model_entry(source.name, facts.zoo)
    except UserError:
        return None  # reported when the network is built
    return own_preprocessing(source.cfg, source.role, entry, source.weights, stated)


def sized(cfg: Config, size: tuple[int, int]) -> Config:
    """The config with DATASET.IMAGE_SIZE."""
    other = cfg.clone()
    other.defrost()
    other.DATASET.IMAGE_SIZE = list(size)
    other.freeze()
    return other


def load(source: Source, test: TestData, device: torch.device) -> Subject:
    """Build a network for the data and load its weights."""
    net: nn.Module
    if _is_exported(source):
        net = ExportedNetwork(Path(source.weights), test)
    else:
        net = build_network(source.cfg, source.role, test, source.weights)
    return Subject(source, net.to(device).eval().requires_grad_(False))


def _is_exported(source: Source) -> bool:
    return Path(source.weights).suffix in EXPORTED


def side_by_side(
    subjects: Sequence[Subject], loader: Iterable[Sequence[Tensor]]
) -> Iterator[tuple[list[Tensor], Sequence[Tensor]]]:
    """Batches of the test set: the images that each network gets, and the batch of `loader`."""
    loaders = [loader]
    which = []
    for subject in subjects:
        wanted = loader if subject.loader is None else subject.loader
        place = next((i for i, one in enumerate(loaders) if one is wanted), len(loaders))
        loaders += [wanted] if place == len(loaders) else []
        which.append(place)
    for batches in zip(*loaders, strict=True):
        yield [batches[i][0] for i in which], batches[0]
