"""Number and classes of the samples in shards: counted once, then cached in an index file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mdistiller.dataset.files.shard_reader import INDEX, as_tensor, read_shard
from mdistiller.files.atomic import write_cache
from mdistiller.registry import UserError


def index_shards(
    urls: Sequence[str],
    target: str,
    threads: int,
    readable: Sequence[str] = (),
    scale_16_bit: bool = False,
    images: Sequence[str] = (),
) -> list[list[int | None]]:
    """Classes of the samples of every shard; each shard is read once, then cached.

    The index is a JSON file. By path of the shard, relative to the folder of the first one, it
    holds a stamp (suffix of the class, size, modification time; for a URL the suffix alone) and the
    classes.

    Args:
        urls: of the shards.
        target: suffix of the class in a sample; empty: every sample with an image is of class 0.
        threads: number of threads.
        readable: suffixes of images to decode; a sample whose image is unreadable gets None.
        scale_16_bit: accept images of 16 bits.
        images: suffixes of images.
    """
    wanted = (target,) if target else tuple(images)
    files = [Path(url) if os.path.isfile(url) else None for url in urls]
    key = target or f"images {';'.join(images)}"
    stamps = [_stamp(key, file, readable, scale_16_bit) for file in files]
    names = _names(files, urls)
    path = _index_file(files[0], urls[0])
    index: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        # Indices of earlier versions have no folders in their names: those are counted again.
        index = dict(json.loads(path.read_text())["shards"])
    missing = [k for k, name in enumerate(names) if index.get(name, [None])[0] != stamps[k]]
    if missing:
        with ThreadPoolExecutor(threads) as pool:
            rest = (target, wanted, readable, scale_16_bit)
            counted = pool.map(lambda k: _classes(urls[k], *rest), missing)
            bar = tqdm(counted, "counting shards", len(missing), leave=False, disable=None)
            for k, classes in zip(missing, bar, strict=True):
                index[names[k]] = [stamps[k], classes]
        # Where it cannot be written, every run counts the shards.
        write_cache(path, json.dumps({"shards": index}))
    return [index[name][1] for name in names]


def _names(files: Sequence[Path | None], urls: Sequence[str]) -> list[str]:
    """The shards as the index names them."""
    folder = files[0].parent if files[0] else Path()
    return [
        Path(os.path.relpath(file, folder)).as_posix() if file else url
        for file, url in zip(files, urls, strict=True)
    ]


def _stamp(
    target: str, file: Path | None, readable: Sequence[str], scale_16_bit: bool
) -> list[Any]:
    kind = "readable or 16 bits" if scale_16_bit else "readable, 8 bits"
    checked = [f"{kind} {';'.join(readable)}"] if readable else []
    if file is None:
        return [target, *checked]
    status = file.stat()
    return [target, status.st_size, status.st_mtime_ns, *checked]


def _classes(
    url: str, target: str, wanted: Sequence[str], readable: Sequence[str], scale_16_bit: bool
) -> list[int | None]:
    classes: list[int | None] = []
    for sample in read_shard(url, only="" if readable else target):
        if any(key in sample for key in wanted):
            try:
                label = int(sample[target]) if target else 0
                classes.append(label if _is_readable(sample, readable, scale_16_bit) else None)
            except ValueError:
                raise UserError(
                    f"{url}: {sample['__key__']}.{target} holds {bytes(sample[target][:20])!r}, "
                    "not a class in digits (DATASET.SHARDS.TARGET)"
                ) from None
    return classes


def _is_readable(sample: dict[str, Any], readable: Sequence[str], scale_16_bit: bool) -> bool:
    data = next((sample[key] for key in readable if key in sample), None)
    if data is None:  # not requested, or missing: reported when it is read
        return True
    from mdistiller.dataset.files.images import UnreadableError, decode

    try:
        decode(as_tensor(data), "", scale_16_bit=scale_16_bit)
    except UnreadableError:
        return False
    return True


def _index_file(first: Path | None, url: str) -> Path:
    if first is not None and os.access(first.parent, os.W_OK):
        return first.parent / INDEX
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    return Path.home() / ".cache" / "mdistiller" / f"{digest}-{INDEX}"
