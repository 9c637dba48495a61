"""Broken images: named, or left out if the config allows it, alike in every loader."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from data_support import collect, config, one_line, write_folders
from PIL import Image
from test_shards import png, write_shards

from mdistiller.dataset import load_data
from mdistiller.dataset.files import corrupt as _corrupt
from mdistiller.dataset.files import images as _images
from mdistiller.dataset.files.images import UnreadableError, decode
from mdistiller.registry import UserError


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setattr(_corrupt, "_cache", {})


def jpeg(size=(16, 16)):
    file = io.BytesIO()
    Image.fromarray(np.full((*size, 3), 90, dtype=np.uint8)).save(file, "JPEG")
    return file.getvalue()


def png_bomb(side):
    """A PNG whose header announces side x side pixels."""
    head = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", head), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    chunks = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    ]
    return png(1)[:8] + b"".join(chunks)


def jpeg_bomb():
    data = bytearray(jpeg())
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = b"\xff\xff\xff\xff"
    return bytes(data)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
BROKEN = {
    "empty": b"",
    "text": b"not an image",
    "cut png": png(1)[:50],
    "cut jpeg": jpeg()[:200],
    "jpeg head": b"\xff\xd8\xff",
    "jpeg bomb": jpeg_bomb(),
    "png bomb": png_bomb(9_000),
    "larger png bomb": png_bomb(2**31 - 1),
    "a program's": EPS,
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_sound_image_is_named(kind):
    data = torch.tensor(list(BROKEN[kind]), dtype=torch.uint8)
    with pytest.raises(UnreadableError) as error:
        decode(data, "the/file.png")
    text = one_line(error)
    assert text.startswith("the/file.png ")
    assert ("announces" in text or "exceeds limit" in text) == ("bomb" in kind)


def test_a_bomb_reaches_no_decoder(monkeypatch):
    monkeypatch.setattr(_images, "decode_jpeg", lambda *args, **kwargs: pytest.fail("decoded"))
    monkeypatch.setattr(Image, "open", lambda *args, **kwargs: pytest.fail("decoded"))
    with pytest.raises(UnreadableError, match="announces 65535x65535 pixels"):
        decode(torch.tensor(list(jpeg_bomb()), dtype=torch.uint8), "x")


def test_a_file_that_would_start_a_program_is_of_no_known_format():
    with pytest.raises(UnreadableError, match="no image of a known format"):
        decode(torch.tensor(list(EPS), dtype=torch.uint8), "x")


def broken_folders(root):
    """Six training and six validation images, three of the former and one of the latter broken."""
    write_folders(root)
    for name, kind in (("cat/0", "empty"), ("cat/2", "png bomb"), ("dog/1", "cut jpeg")):
        (root / "train" / f"{name}.png").write_bytes(BROKEN[kind])
    (root / "val" / "dog" / "2.png").write_bytes(BROKEN["text"])
    return root


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_they_are_left_out_of_folders(tmp_path, capsys, loader):
    keys = {"LOADER": loader, "NUM_WORKERS": 0, "AUGMENT": "none"}
    constants = {"MEAN": [0.0] * 3, "STD": [1.0] * 3}
    cfg = config("imagefolder", 2, ROOT=broken_folders(tmp_path), **keys, **constants)
    with pytest.raises(UserError, match=r"train/cat/0\.png cannot be read as an image"):
        list(load_data(cfg).train)
    cfg.DATASET.SKIP_CORRUPT = True
    for _ in range(2):
        data = load_data(cfg)
        images, targets, index = collect(data.train)
        order = index.argsort()
        reds = (images[order, 0, 0, 0] * 255).round().int().tolist()
        assert reds == [1, 10, 12]
        assert targets[order].tolist() == [0, 1, 1]
        assert (data.num_data, data.classes, len(data.val.dataset)) == (3, ["cat", "dog"], 5)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2
    assert "3 of 6 images cannot be read and are skipped: " in said[0]
    assert f"{tmp_path}/train/cat/0.png, {tmp_path}/train/cat/2.png" in said[0]
    assert "1 of 6 images" in said[1]


def test_what_was_found_is_remembered_until_a_file_changes(tmp_path, monkeypatch, capsys):
    cfg = config("imagefolder", 2, ROOT=broken_folders(tmp_path), SKIP_CORRUPT=True)
    assert load_data(cfg).num_data == 3

    def forbidden(*args):
        raise AssertionError("the images are read again")

    with monkeypatch.context() as patch:
        patch.setattr(_corrupt, "_cache", {})  # as in another process
        patch.setattr(_corrupt, "_scan", forbidden)
        assert load_data(cfg).num_data == 3
    (tmp_path / "train" / "cat" / "0.png").write_bytes(png(0))
    assert load_data(cfg).num_data == 4
    assert "2 of 6" in capsys.readouterr().err


def test_a_class_is_not_left_out(tmp_path):
    root = write_folders(tmp_path, per_class=1)
    (root / "train" / "dog" / "0.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"no image of class dog in .*train can be read"):
        load_data(config("imagefolder", 1, ROOT=root, SKIP_CORRUPT=True))


def test_they_are_left_out_of_shards(tmp_path, capsys):
    root = write_shards(write_shards(tmp_path, num=14), "val", 7)
    shard = root / "train-0001.tar"
    whole = shard.read_bytes()
    for k in (7, 12):
        whole = whole.replace(png(k), bytes(len(png(k))))
    shard.write_bytes(whole)
    keys = {"IMAGE_SIZE": 8, "AUGMENT": "none", "MEAN": [0.0] * 3, "STD": [1.0] * 3}
    cfg = config("webdataset", ROOT=root, NUM_WORKERS=0, **keys)
    with pytest.raises(UserError, match="cannot be read as an image"):
        list(load_data(cfg).train)
    cfg.DATASET.SKIP_CORRUPT = True
    data = load_data(cfg)
    assert "2 of 14 images" in capsys.readouterr().err
    images, targets, index = collect(data.train)
    order = index.argsort()
    reds = (images[order, 0, 0, 0] * 255).round().int()
    assert reds.tolist() == [k for k in range(14) if k not in (7, 12)]
    assert torch.equal(targets[order], reds.long() % 4)
    assert len(data.val.dataset) == 7
