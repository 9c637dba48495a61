"""download: released teachers, fetched to where the zoo looks for them.

Those of the original project come from its release page, or from a mirror given by --from; those of
ImageNet are torchvision's. Size and SHA-256 of what came are noted in hashes.json when a file is
first fetched, and compared ever after.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock

from mdistiller.cli.support.command import command_line
from mdistiller.config.early import stored_names
from mdistiller.files import Limits, file_hash, move_in, unpacked
from mdistiller.files.atomic import replacing
from mdistiller.files.fetch import address, fetch
from mdistiller.registry import Registry, UserError
from mdistiller.runtime import project_root

RELEASES = "https://github.com/megvii-research/mdistiller/releases/download/checkpoints"
ARCHIVES = {"cifar_teachers": "cifar_teachers.tar"}  # what the release page has, by its folder
RECORD = "hashes.json"
TOLERANCE = 0.3  # points between an accuracy and the published one: decoders and kernels differ
DATA = {  # data set of a zoo, and what is in its folder if the data are there
    "cifar": ("cifar100", ("cifar-100-python", "cifar-100-python.tar.gz")),
    "tiny_imagenet": ("tiny_imagenet", ("val",)),
    "imagenet": ("imagenet", ("val",)),
}


@dataclass(frozen=True)
class Release:
    """Released weights of a network.

    Attributes:
        zoo, name: of the network.
        checkpoint: what the zoo's entry says: a file, or torchvision's name of the weights.
        file: the file below `download_ckpts/`; empty for torchvision's.
    """

    zoo: str
    name: str
    checkpoint: str
    file: str = ""

    @property
    def archive(self) -> str:
        """The archive that has the file; empty if none is known to."""
        return ARCHIVES.get(self.file.split("/")[0], "")


def parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = argparse.ArgumentParser(prog="download", description=__doc__)
    parser.add_argument("names", nargs="*", help="networks, ZOO/NAME or NAME; all: every one")
    parser.add_argument("--list", action="store_true", help="say what there is, fetch nothing")
    parser.add_argument(
        "--from",
        dest="source",
        default="",
        metavar="URL|FOLDER",
        help="a mirror: where the release page's files lie, or the single files of download_ckpts/",
    )
    parser.add_argument(
        "--to", type=Path, default=None, metavar="FOLDER", help="default: download_ckpts/"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="evaluate where the data set is there; fails if it is not the published accuracy",
    )
    return parser


def releases() -> Registry:
    """All released weights, by ZOO/NAME."""
    from mdistiller.models import get_model_entry, zoo_names
    from mdistiller.models.released import TORCHVISION

    usual, networks = project_root() / "download_ckpts", Registry("released network")
    for zoo in DATA:
        for name in zoo_names(zoo):
            checkpoint = get_model_entry(name, zoo).checkpoint
            if checkpoint:
                inside = checkpoint.startswith(TORCHVISION)
                file = "" if inside else Path(checkpoint).relative_to(usual).as_posix()
                networks.add(f"{zoo}/{name}", Release(zoo, name, checkpoint, file))
    return networks


def chosen(names: list[str], known: Registry) -> list[Any]:
    """The releases that `names` mean; a bare name is the first zoo's that has it."""
    if names == ["all"]:
        return list(known.values())
    short: dict[str, Any] = {}
    for key, release in known.items():
        short.setdefault(key.rpartition("/")[2], release)
    return [short[name] if name in short else known[name] for name in names]


class Store:
    """The folder where files go, and the record of their hashes."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror}") from error

    def path(self, name: str) -> Path:
        """Where a file goes."""
        return self.folder / name

    def alone(self) -> FileLock:
        """The lock that lets one process at a time fetch into this folder."""
        return FileLock(self.folder / f".{RECORD}.lock")

    def recorded(self) -> dict[str, Any]:
        """Name -> {"size": bytes, "sha256": digits}."""
        place = self.path(RECORD)
        if not place.exists():
            return {}
        try:
            table = json.loads(place.read_text(encoding="utf-8"))
            return {
                str(k): {"size": int(v["size"]), "sha256": str(v["sha256"])}
                for k, v in table.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{place} is damaged; remove it to record the hashes anew") from error

    def check(self, name: str, path: Path) -> None:
        """Record a file, or compare it with its record."""
        facts: dict[str, Any] = {"size": path.stat().st_size, "sha256": file_hash(path)}
        table = self.recorded()
        before = table.setdefault(name, facts)
        if before != facts:
            raise UserError(
                f"{name} has {facts['size']} bytes and SHA-256 {facts['sha256'][:16]}..., but "
                f"{self.path(RECORD)} says {before['size']} and {before['sha256'][:16]}...: it is "
                "damaged or was replaced; remove it, or its entry there if you trust the new one"
            )
        with replacing(self.path(RECORD)) as part:
            part.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def get(release: Release, store: Store, source: str) -> Path:
    """The file of a release, fetched if it is not there, and compared with its record."""
    from mdistiller.models.released import released_file

    if not release.file:
        return released_file(release.checkpoint, release.name)
    path = store.path(release.file)
    with store.alone():
        if not path.is_file():
            if release.archive and not _mirrors(source, release.file):
                _from_archive(release, store, source or RELEASES)
            elif source:
                fetch(address(source, release.file), path, release.name)
                with _undone(path):
                    check_network(release, path)
            else:
                raise UserError(
                    f"no address of {release.zoo}/{release.name} is known; put it at {path}, or "
                    "name a mirror that has it: --from URL or --from FOLDER"
                )
        store.check(release.file, path)
    return path


@contextlib.contextmanager
def _undone(path: Path) -> Iterator[None]:
    """Remove a file that turns out to be a wrong one, so that another try fetches it again."""
    try:
        yield
    except UserError:
        path.unlink(missing_ok=True)
        raise


def _mirrors(source: str, file: str) -> bool:
    """Whether a mirror is a folder with the single file."""
    return (
        bool(source) and "://" not in source and Path(source).expanduser().joinpath(file).is_file()
    )


def _from_archive(release: Release, store: Store, source: str) -> None:
    """Fetch the archive that has a release, and put all files of its folder in place."""
    archive, top = store.path(release.archive), release.file.split("/")[0]
    recorded = store.recorded().get(release.archive, {})
    fetch(
        address(source, release.archive),
        archive,
        release.archive,
        sha256=recorded.get("sha256", ""),
        size=recorded.get("size"),
    )
    limits = Limits(bytes=4 * 10**9, files=1000)
    with (
        contextlib.nullcontext() if recorded else _undone(archive),
        unpacked(archive, store.folder, release.archive, limits) as folder,
    ):
        inside = folder / top if (folder / top).is_dir() else folder
        members = {
            f"{top}/{f.relative_to(inside).as_posix()}": f for f in inside.rglob("*") if f.is_file()
        }
        if release.file not in members:
            raise UserError(f"{release.archive} of {source} does not contain {release.file}")
        check_network(release, members[release.file])
        for name, file in members.items():
            if not store.path(name).exists():
                store.check(name, file)
                move_in(file, store.path(name))
    store.check(release.archive, archive)
    archive.unlink()


def check_network(release: Release, path: Path) -> None:
    """Refuse weights that are not those of the network."""
    from mdistiller.models import get_model_entry
    from mdistiller.weights import load_network

    entry = get_model_entry(release.name, release.zoo)
    classes = entry.default_classes()
    load_network(entry.constructor(num_classes=classes), path, release.name, classes)


def verify(release: Release, path: Path) -> None:
    """Print the accuracy and what it should be, if the data are there.

    Raises:
        UserError: it is another one.
    """
    from mdistiller.cli import eval as eval_command
    from mdistiller.dataset import DATASETS

    dataset, signs = DATA[release.zoo]
    root = project_root() / (DATASETS[dataset].root or "")
    if not any((root / sign).exists() for sign in signs):
        print(f"  not evaluated: {dataset} is not in {root}")
        return
    (evaluation,) = eval_command.evaluate(
        eval_command.parser().parse_args(["-m", release.name, "-c", str(path), "-d", dataset])
    )
    measured, published = evaluation.quality.top1, published_accuracy(release, dataset)
    if published is None:
        print("  no accuracy is published for it")
    elif abs(measured - published) > TOLERANCE:
        raise UserError(
            f"{release.zoo}/{release.name} has {measured:.2f} % on {dataset}, published are "
            f"{published:.2f} %: {path} or the data set in {root} is another one"
        )
    else:
        print(f"  as published: {published:.2f} %")


def published_accuracy(release: Release, dataset: str) -> float | None:
    """Top-1 in % that those who released weights report, if they do."""
    from mdistiller.models.released import torchvision_accuracy
    from mdistiller.report.published import published

    if not release.file:
        return torchvision_accuracy(release.checkpoint)
    wanted = (dataset, "teacher", release.name)
    lines = [line for line in published() if (line.dataset, line.method, line.student) == wanted]
    return lines[0].top1 if lines else None


def show(known: Registry, store: Path) -> None:
    """Print what there is."""
    for name, release in known.items():
        if release.file:
            there = (store / release.file).is_file()
            origin = release.archive or "no address known, --from only"
        else:
            from mdistiller.models.released import place_of

            there, origin = place_of(release.checkpoint).is_file(), release.checkpoint
        print(f"{name:<26}{'here' if there else '-':<6}{origin}")


def run(args: argparse.Namespace) -> None:
    """List, or fetch and check."""
    chosen(args.names, stored_names("releases"))  # wrong ones, before the networks are imported
    available = releases()
    folder = args.to or project_root() / "download_ckpts"
    wanted = chosen(args.names, available)
    if args.list or not wanted:
        return show(available, folder)
    store = Store(folder)
    for release in wanted:
        path = get(release, store, args.source)
        check_network(release, path)
        print(f"{release.zoo}/{release.name}: {path}", flush=True)
        if args.verify:
            verify(release, path)
    return None


main = command_line(parser, run)
