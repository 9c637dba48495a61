"""Images in tar files, read from front to back with the package webdataset."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mdistiller.dataset.files.shard_sampler import ShardBatchRequest, ShardRange
from mdistiller.registry import UserError

if TYPE_CHECKING:
    from mdistiller.dataset.files.scaled_jpeg import EncodedImage

INDEX = "mdistiller-index.json"  # number and classes of the samples of shards


@dataclass
class ShardSet:
    """A split as shards, whose samples are read in order.

    Attributes:
        urls: files, or URLs that webdataset opens.
        counts: samples of each, int64, [S].
        targets: classes of all samples, in the order of the shards, int64, [N].
        classes: class names.
        image_keys: suffixes of the image in a sample; the first one present is used.
        target_key: suffix of its class; samples without one are skipped. Empty: of samples without
            classes, where those without an image are.
        window: shuffling distance of a sample within its stream.
        upright, scale_16_bit, jpeg_scaling: see :class:`EncodedImage`.
        skipped: by shard, positions of samples with unreadable images.
    """

    urls: list[str]
    counts: Tensor
    targets: Tensor
    classes: list[str]
    image_keys: Sequence[str] = ("jpg",)
    target_key: str = "cls"
    window: int = 0
    skipped: dict[int, set[int]] = field(default_factory=dict)
    upright: bool = True
    scale_16_bit: bool = False
    jpeg_scaling: str = "none"

    @property
    def left_out(self) -> tuple[str, ...]:
        """What is left out of the shards, and why."""
        count = sum(map(len, self.skipped.values()))
        return (f"{count} unreadable",) if count else ()

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, indices: Tensor) -> ShardSet:
        """Raises UserError: shards are read whole."""
        raise UserError(
            "DATASET.VAL_SPLIT and FRACTION cannot take images out of shards; leave shards out of "
            "DATASET.SHARDS.TRAIN, and name those held out in DATASET.SHARDS.VAL"
        )

    def read(self, shard: int, first: int, last: int) -> Iterator[tuple[bytes, str]]:
        """Samples `first` to `last` of a shard: bytes of the image file, and a name for errors."""
        url = self.urls[shard]
        wanted = (self.target_key,) if self.target_key else self.image_keys
        samples = (sample for sample in read_shard(url) if any(key in sample for key in wanted))
        skipped = self.skipped.get(shard, ())
        samples = (sample for place, sample in enumerate(samples) if place not in skipped)
        count = 0
        for sample in islice(samples, first, last):
            yield self._file(sample), f"{url}: {sample['__key__']}"
            count += 1
        if count < last - first:
            raise UserError(
                f"shard {url} holds fewer samples than were counted; remove {INDEX} beside it to "
                "count again"
            )

    def _file(self, sample: dict[str, Any]) -> bytes:
        """The bytes of the image file in a sample."""
        for key in self.image_keys:
            if key in sample:
                data: bytes = sample[key]
                return data
        suffixes = ", ".join(sorted(key for key in sample if not key.startswith("__")))
        raise UserError(
            f"{sample['__url__']}: {sample['__key__']} has {suffixes}, but no "
            f"{';'.join(self.image_keys)} (DATASET.SHARDS.IMAGE)"
        )

    def image(self, index: int) -> Tensor:
        """The image at a position, uint8 [3, H, W]; reads its shard up to there."""
        shard = int((self.counts.cumsum(0) <= index).sum())
        place = index - int(self.counts[:shard].sum())
        data, name = next(self.read(shard, place, place + 1))
        return self.encoded(data, name).pixels()

    def encoded(self, data: bytes, name: str) -> EncodedImage:
        """The image in the bytes of a file, not decoded yet."""
        from mdistiller.dataset.files.scaled_jpeg import EncodedImage

        settings = self.upright, self.scale_16_bit, self.jpeg_scaling
        return EncodedImage(as_tensor(data), name, *settings)


def as_tensor(data: bytes) -> Tensor:
    """The bytes of a file, uint8."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def import_webdataset() -> Any:
    """The optional package webdataset, or a UserError that names it."""
    try:
        import webdataset
    except ImportError:
        raise UserError(
            "DATASET.TYPE webdataset needs the package webdataset: pip install mdistiller[shards]"
        ) from None
    return webdataset


def read_shard(url: str, only: str = "") -> Iterator[dict[str, Any]]:
    """The samples of a shard in order; with `only`, only files with that suffix.

    Files that macOS adds to archives (`._NAME` beside each file, `__MACOSX/`) are skipped:
    webdataset takes `folder/._1.png` for the sample `folder/`, which splits sample 1.
    """
    wds = import_webdataset()

    def selected(name: str) -> bool:
        *folders, file = name.split("/")
        macos = file.startswith("._") or "__MACOSX" in folders
        return not macos and (not only or file.lower().endswith(f".{only}"))

    try:
        yield from wds.DataPipeline(
            wds.SimpleShardList([url]), wds.tarfile_to_samples(select_files=selected)
        )
    except Exception as error:  # tarfile's, the system's, those of a command in a pipe
        texts = [arg for arg in error.args if isinstance(arg, str)]  # webdataset adds objects
        reason = (texts[0] if texts else "") or type(error).__name__
        raise UserError(f"shard {url} cannot be read ({reason.split(' @ ')[0]})") from error


@dataclass
class ShardStreamReader:
    """Reads the images of a :class:`ShardBatchRequest`.

    Each stream continues after the batch before.
    """

    shards: ShardSet
    _streams: dict[int, tuple[int, _Stream]] = field(default_factory=dict)

    def __call__(self, request: ShardBatchRequest) -> Iterator[tuple[EncodedImage, str]]:
        pass_number, stream = self._streams.get(request.stream, (0, None))
        if stream is None or pass_number != request.pass_number:
            start = min(request.oldest_needed, *request.offsets)
            stream = _Stream(self.shards, request.shard_ranges, start)
            self._streams[request.stream] = request.pass_number, stream
        for offset in request.offsets:
            data, name = stream.take(offset)
            yield self.shards.encoded(data, name), name
        stream.discard(request.oldest_needed)


class _Stream:
    """A stream of samples with a buffer for those that a later batch needs.

    Args:
        start: the lowest offset that any batch needs; earlier samples are skipped.
    """

    def __init__(self, shards: ShardSet, ranges: Sequence[ShardRange], start: int = 0):
        self._samples = self._read(shards, ranges, start)
        self._buffer: dict[int, tuple[bytes, str]] = {}

    @staticmethod
    def _read(
        shards: ShardSet, ranges: Sequence[ShardRange], start: int
    ) -> Iterator[tuple[int, tuple[bytes, str]]]:
        offset = 0
        for shard, first, last in ranges:
            skipped = min(max(start - offset, 0), last - first)
            if skipped < last - first:
                samples = shards.read(shard, first + skipped, last)
                yield from enumerate(samples, offset + skipped)
            offset += last - first

    def take(self, offset: int) -> tuple[bytes, str]:
        while offset not in self._buffer:
            number, sample = next(self._samples)
            self._buffer[number] = sample
        return self._buffer.pop(offset)

    def discard(self, oldest_needed: int) -> None:
        """Drop samples that another process takes."""
        for offset in [offset for offset in self._buffer if offset < oldest_needed]:
            del self._buffer[offset]
