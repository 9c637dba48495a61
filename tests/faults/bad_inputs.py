"""Hostile and damaged files of every kind that the library reads; none may run, escape or crash it.

`python -m faults.bad_inputs --count 2000` tries that many, configs among them.
"""

from __future__ import annotations

import argparse
import gzip
import io
import os
import pickle
import random
import struct
import tarfile
import tempfile
import traceback
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mdistiller.dataset.files.images import decode
from mdistiller.files import Limits, unpacked
from mdistiller.registry import UserError
from mdistiller.weights import load_checkpoint, network_state

LIMITS = Limits(bytes=8 << 20, files=50)  # of the archives here
Attack = tuple[str, Callable[[], Any]]


class _Call:
    """A pickle that calls something when it is read the usual way."""

    def __init__(self, function: Any, *words: Any):
        self.words = function, words

    def __reduce__(self) -> Any:
        return self.words


def bad_inputs(seed: int, count: int, configs: bool = True) -> Iterator[tuple[str, bool]]:
    """Try `count` files: (what it was, with what went wrong; whether all is well) of each.

    Args:
        seed: decides which.
        configs: let half of them be configs, for which the package hypothesis is needed.
    """
    chance = random.Random(seed)
    if configs:
        from faults.bad_configs import bad_configs

        yield from bad_configs(seed, count - count // 2)
        count //= 2
    kinds = (_checkpoint, _archive, _image, _image_bomb)
    with tempfile.TemporaryDirectory() as place:
        for number in range(count):
            folder = Path(place, str(number))
            folder.mkdir()
            name, act = kinds[number % len(kinds)](chance, folder)
            problem = _verdict(act, folder)
            yield (f"{name}: {problem}" if problem else name), not problem


def _verdict(act: Callable[[], Any], folder: Path) -> str:
    """What went wrong; empty if the file was read, or refused in a line, and nothing else came."""
    before = sorted(folder.parent.iterdir()), sorted(folder.rglob("*"))
    try:
        act()
    except UserError as error:
        if len(str(error).splitlines()) != 1:
            return f"not one line: {str(error)!r}"
    except Exception:
        return traceback.format_exc(limit=-3)
    if (sorted(folder.parent.iterdir()), sorted(folder.rglob("*"))) != before:
        return "it left files behind"
    return ""


def _damaged(data: bytes, chance: random.Random) -> bytes:
    """The data cut, with flipped bits, or with a part doubled or zeroed."""
    content = bytearray(data)
    for _ in range(chance.randint(1, 4)):
        start = chance.randrange(len(content))
        part = slice(start, start + chance.randint(1, 64))
        kind = chance.randrange(4)
        if kind == 0 and start:
            del content[start:]
        elif kind == 1:
            content[start] ^= 1 << chance.randrange(8)
        elif kind == 2:
            content[part] = bytes(len(content[part]))
        else:
            content[part] = content[part] * 2
    return bytes(content)


# --- checkpoints -----------------------------------------------------------------------------


def _checkpoint(chance: random.Random, folder: Path) -> Attack:
    path, marker = folder / "file.pth", folder / "marker"
    hostile = chance.random() < 0.6
    state: dict[str, Any] = {"w": torch.ones(3), "b": torch.zeros(2)}
    contents: Any = {"model": state, "epoch": 3, "acc": np.float64(0.5)}
    if hostile:
        evil = chance.choice(
            [
                _Call(os.mkdir, str(marker)),
                _Call(os.system, f"mkdir {marker}"),
                _Call(eval, f"__import__('os').mkdir({str(marker)!r})"),
                _Call(exec, f"import os; os.mkdir({str(marker)!r})"),
                _Call(__import__, "os"),
                _Call(open, str(marker), "w"),
                _Call(torch.save, [1], str(marker)),
                _Call(pickle.loads, pickle.dumps(_Call(os.mkdir, str(marker)))),
            ]
        )
        contents = chance.choice(
            [evil, {"model": evil}, {"model": state, "x": [evil]}, {"model": {**state, "e": evil}}]
        )
    form = chance.choice(["zip", "legacy", "pickle"])
    if form == "pickle":
        path.write_bytes(pickle.dumps(contents, protocol=chance.choice([2, 4])))
    else:
        torch.save(contents, path, _use_new_zipfile_serialization=form == "zip")
    if not hostile:
        path.write_bytes(_damaged(path.read_bytes(), chance))

    def read() -> None:
        network_state(load_checkpoint(path), path)
        if hostile:
            raise AssertionError("a hostile file was taken")

    return f"{'hostile' if hostile else 'damaged'} checkpoint ({form})", read


# --- archives --------------------------------------------------------------------------------


def _archive(chance: random.Random, folder: Path) -> Attack:
    path = folder / "archive"
    kind = chance.choice(list(_HOSTILE))
    if kind == "damaged":
        _write_tar(path, [("a/b", b"x" * 5000), ("c", b"y" * 300)], chance.choice(["w", "w:gz"]))
        if chance.random() < 0.5:
            _write_zip(path, [("a/b", b"x" * 5000), ("c", b"y" * 300)])
        path.write_bytes(_damaged(path.read_bytes(), chance))
    else:
        _HOSTILE[kind](path, chance)

    def read() -> None:
        with unpacked(path, folder, "it", LIMITS) as inside:
            found = list(inside.rglob("*"))
            if any(not (file.is_file() or file.is_dir()) or file.is_symlink() for file in found):
                raise AssertionError("something other than a file was unpacked")
        if kind != "damaged":
            raise AssertionError("a hostile archive was unpacked")

    return f"archive: {kind}", read


def _write_tar(path: Path, members: list[tuple[str, bytes]], mode: Any = "w", **facts: Any) -> None:
    with tarfile.open(path, mode) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for key, value in facts.items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(data))


def _write_zip(path: Path, members: list[tuple[str, bytes]], mode: int = 0, flag: int = 0) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bundle:
        for name, data in members:
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            info.external_attr = mode << 16
            bundle.writestr(info, data)
            info.flag_bits |= flag  # in the table at the end, which is written last


def _escape(path: Path, chance: random.Random) -> None:
    base = path.parent.parent / "escaped"
    name = chance.choice(
        [
            "../evil",
            "a/../../evil",
            str(base),
            f"/{base}",
            "..\\evil",
            "C:\\evil",
            "a/b/../../../evil",
        ]
    )
    (_write_tar if chance.random() < 0.5 else _write_zip)(path, [("ok", b"1"), (name, b"evil")])


def _special(path: Path, chance: random.Random) -> None:
    kind = chance.choice([tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
    target = chance.choice(["../..", "/etc/passwd", "ok"])
    _write_tar(path, [("ok", b""), ("link", b"")], type=kind, linkname=target)


def _bomb_tar(path: Path, chance: random.Random) -> None:
    _write_tar(path, [("zeros", bytes(LIMITS.bytes + 1))], chance.choice(["w:gz", "w:bz2", "w:xz"]))


def _bomb_header(path: Path, chance: random.Random) -> None:
    """A header that announces gigabytes of attributes, in a file of a few bytes."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = chance.choice([tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME]), 8 << 30
    path.write_bytes(gzip.compress(info.tobuf() + bytes(6 << 20)))


def _sparse(path: Path, chance: random.Random) -> None:
    _write_tar(path, [("holes", b"x")], pax_headers={
        "GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(1 << 40),
    })  # fmt: skip


_HOSTILE: dict[str, Callable[[Path, random.Random], object]] = {
    "damaged": lambda path, chance: None,
    "escape": _escape,
    "link or device": _special,
    "link in a zip": lambda path, _: _write_zip(path, [("l", b"/etc/passwd")], mode=0o120777),
    "bomb": _bomb_tar,
    "bomb in a zip": lambda path, _: _write_zip(path, [("z", bytes(LIMITS.bytes + 1))]),
    "bomb in a header": _bomb_header,
    "sparse": _sparse,
    "too many": lambda path, _: _write_tar(path, [(f"{k}", b"") for k in range(60)], "w:gz"),
    "twice": lambda path, _: _write_tar(path, [("a", b"1"), ("a", b"2")]),
    "file as folder": lambda path, _: _write_tar(path, [("a", b"1"), ("a/b", b"2")]),
    "long name": lambda path, _: _write_tar(path, [("x" * 2000, b"1")]),
    "encrypted": lambda path, _: _write_zip(path, [("a", b"1")], flag=1),
    "none": lambda path, chance: path.write_bytes(chance.randbytes(200)),
}


# --- images ----------------------------------------------------------------------------------


def _image(chance: random.Random, folder: Path) -> Attack:
    kind = chance.choice(["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
    stream = io.BytesIO()
    pixels = np.frombuffer(chance.randbytes(16 * 16 * 3), dtype=np.uint8).reshape(16, 16, 3)
    Image.fromarray(pixels).save(stream, kind)
    data = _damaged(stream.getvalue(), chance)

    def read() -> None:
        image = decode(torch.tensor(list(data), dtype=torch.uint8), f"image.{kind}")
        assert image.dtype == torch.uint8
        assert image.ndim == 3
        assert len(image) == 3

    return f"damaged image ({kind})", read


def _image_bomb(chance: random.Random, folder: Path) -> Attack:
    """A small file whose header announces far more pixels than any image has."""
    kind, side = chance.choice(["PNG", "BMP", "GIF", "JPEG"]), chance.randint(20_000, 65_000)
    stream = io.BytesIO()
    Image.new("RGB", (16, 16)).save(stream, kind)
    data = bytearray(stream.getvalue())
    if kind == "PNG":
        data[16:24] = struct.pack(">II", side, side)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    elif kind == "BMP":
        data[18:26] = struct.pack("<ii", side, side)
    elif kind == "GIF":
        data[6:10] = struct.pack("<HH", side, side)
    else:
        start = data.index(b"\xff\xc0") + 5
        data[start : start + 4] = struct.pack(">HH", side, side)

    def read() -> None:
        decode(torch.tensor(list(data), dtype=torch.uint8), f"image.{kind}")
        raise AssertionError(f"an image of {side} x {side} pixels was read")

    return f"image bomb ({kind})", read


def main() -> None:
    """Try files, print what went wrong and how many were tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    tried = wrong = 0
    for name, passed in bad_inputs(args.seed, args.count):
        tried += 1
        if not passed:
            wrong += 1
            print(name, flush=True)
    print(f"{tried} bad inputs tried, {wrong} taken wrongly")
    raise SystemExit(wrong > 0)


if __name__ == "__main__":
    main()
