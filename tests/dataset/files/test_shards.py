"""Images in tar shards: every sample once, in an order that nothing but seed and epoch decides."""

import io
import json
import os
import sys
import tarfile

import numpy as np
import pytest
import torch
from data_support import collect, config, one_line
from PIL import Image

from mdistiller.dataset import load_data, load_test_loader
from mdistiller.dataset.files.shard_sampler import MAX_STREAMS, ShardSampler
from mdistiller.registry import UserError

wds = pytest.importorskip("webdataset")

INDEX = "mdistiller-index.json"


def png(level, size=(8, 8)):
    """A file of one colour: red level, 100, 200."""
    pixels = np.full((*size, 3), (level, 100, 200), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write_shards(root, split="train", num=53, per_shard=7, **extra):
    """Shards of samples whose red level is their number and whose class is that modulo 4."""
    root.mkdir(parents=True, exist_ok=True)
    pattern = str(root / f"{split}-%04d.tar")
    with wds.ShardWriter(pattern, maxcount=per_shard, verbose=0) as writer:
        for k in range(num):
            writer.write({"__key__": f"{k:05d}", "png": png(k), "cls": k % 4, **extra})
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """8 training shards of 53 samples, 3 validation shards of 17."""
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder)
    return write_shards(folder, "val", 17)


def shards(root, workers=0, rank=None, world_size=None, **keys):
    """Data without augmentation; as one of several processes if a rank is given."""
    keys = {"IMAGE_SIZE": 8, "AUGMENT": "none", "MEAN": [0.0] * 3, "STD": [1.0] * 3, **keys}
    with pytest.MonkeyPatch.context() as patch:
        if rank is not None:
            patch.setattr("mdistiller.runtime.rank", lambda: rank)
            patch.setattr("mdistiller.runtime.world_size", lambda: world_size)
        return load_data(config("webdataset", ROOT=root, NUM_WORKERS=workers, **keys))


def levels(images):
    """The red levels, which number the samples."""
    return (images[:, 0, 0, 0] * 255).round().long()


def test_round_trip(root):
    data = shards(root)
    images, targets, index = collect(data.train)
    assert sorted(index.tolist()) == list(range(53))
    assert torch.equal(levels(images), index)
    assert torch.equal(targets, index % 4)
    assert (data.num_data, data.num_classes, data.zoo) == (53, 4, "imagenet")
    images, targets = collect(data.val)
    assert sorted(levels(images).tolist()) == list(range(17))
    assert torch.equal(targets, levels(images) % 4)
    assert len(data.val.dataset) == 17
    assert torch.equal(data.train.dataset.targets, torch.arange(53) % 4)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_the_number_of_workers_changes_nothing(root):
    """Three do not divide the eight streams, so two of them read the same one."""
    keys = {"AUGMENT": "crop_flip", "IMAGE_SIZE": 16}
    alone, shared = shards(root, **keys), shards(root, 3, **keys)
    for name in ("train", "train", "val"):
        pair = [collect(getattr(data, name)) for data in (alone, shared)]
        for ours, theirs in zip(*pair, strict=True):
            assert torch.equal(ours, theirs)
    list(alone.val)
    assert torch.equal(collect(alone.val)[0], pair[0][0])  # the second pass


def test_order_is_shuffled_and_another_in_every_epoch_and_for_every_seed(root):
    data = shards(root)
    first, second = (collect(data.train)[2] for _ in range(2))
    other = collect(shards(root, seed=1).train)[2]
    for a, b in ((first, second), (first, other), (first, torch.arange(53))):
        assert (a == b).sum() < 15
    again = shards(root).train
    again.set_epoch(2)
    assert torch.equal(collect(again)[2], second)


def test_an_epoch_left_half_way_starts_anew(root):
    data = shards(root)
    whole = collect(data.train)
    data.train.set_epoch(1)
    steps = iter(data.train)
    next(steps), next(steps)
    data.train.set_epoch(1)
    for ours, again in zip(whole, collect(data.train), strict=True):
        assert torch.equal(ours, again)


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_every_sample_once(root, world):
    keys = {"AUGMENT": "crop", "IMAGE_SIZE": 16}
    ranks = [shards(root, rank=r, world_size=world, **keys) for r in range(world)]
    assert len({len(data.train) for data in ranks}) == 1
    parts = [collect(data.train) for data in ranks]
    assert sorted(torch.cat([part[2] for part in parts]).tolist()) == list(range(53))
    whole = collect(shards(root, **keys).train)
    images = torch.cat([p[0] for p in parts])[torch.cat([p[2] for p in parts]).argsort()]
    assert torch.equal(images, whole[0][whole[2].argsort()])  # the views are the same too
    batches = [batch for data in ranks for batch in data.val]
    assert sorted(levels(torch.cat([images for images, _ in batches])).tolist()) == list(range(17))


def test_more_processes_than_samples(root):
    parts = [list(shards(root, rank=r, world_size=19, batch_size=1).val) for r in (0, 17, 18)]
    assert [len(part) for part in parts] == [1, 0, 0]


def test_the_last_batch_is_dropped_if_asked(root):
    index = collect(shards(root, DROP_LAST=True).train)[2]
    assert len(index) == len(set(index.tolist())) == 52


@pytest.mark.parametrize("window", [0, 10, 1000])
def test_a_sample_moves_less_than_the_window(window):
    counts = torch.tensor([40] * 20)
    streams = ShardSampler(counts, [16] * 50, 0, 1, window)
    assert streams.num_streams == MAX_STREAMS
    requests = streams.draw(torch.Generator().manual_seed(0))
    assert torch.cat([request.index for request in requests]).sort().values.tolist() == list(
        range(800)
    )
    for stream in range(MAX_STREAMS):
        own = [request for request in requests if request.stream == stream]
        moved = [abs(o - k) for k, o in enumerate(o for request in own for o in request.offsets)]
        assert max(moved) <= max(window - 1, 0)
        assert (max(moved) > 3) == (window > 0)
        waiting = {o for request in own for o in request.offsets}
        for request in own:
            waiting -= set(request.offsets)
            assert request.oldest_needed <= min(waiting, default=request.oldest_needed)
    assert [request.stream for request in requests[:18]] == [*range(16), 0, 1]


def test_the_window_comes_from_the_config(root):
    cfg = config("webdataset", ROOT=root, NUM_WORKERS=0, IMAGE_SIZE=8)
    cfg.DATASET.SHARDS.SHUFFLE = 0
    index = collect(load_data(cfg).train)[2]
    steps = index[1:][(torch.arange(52) + 1) % 4 != 0] - index[:-1][(torch.arange(52) + 1) % 4 != 0]
    assert (steps == 1).float().mean() > 0.6  # shard_ranges of neighbours, broken where shards end


def test_samples_are_counted_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    import mdistiller.dataset.files.shard_index as module

    write_shards(tmp_path, num=14)
    write_shards(tmp_path, "val", 7)
    reads, read = [], module.read_shard

    def spy(url, only=""):
        reads.append(url)
        return read(url, only)

    monkeypatch.setattr(module, "read_shard", spy)
    shards(tmp_path)
    assert len(reads) == 3
    known = json.loads((tmp_path / INDEX).read_text())["shards"]
    assert known["train-0001.tar"][1] == [k % 4 for k in range(7, 14)]
    shards(tmp_path)
    assert len(reads) == 3
    write_shards(tmp_path, num=12)
    assert shards(tmp_path).num_data == 12
    assert len(reads) == 5


def write_twins(root):
    """Shards of the same names in two folders: classes 0 and 1, and 3 alone; returns the first."""
    for folder, first, num in (("a", 0, 9), ("b", 100, 5)):
        (root / folder).mkdir()
        for name, own in (("0000", num), ("0001", 2)):
            with wds.TarWriter(str(root / folder / f"{name}.tar")) as writer:
                for k in range(own):
                    label = 3 if first else k % 2
                    writer.write({"__key__": f"{k}", "png": png(first + k), "cls": label})
    return root / "a" / "0000.tar"


def check_twins(root, pattern):
    """Every image has the label that was written with it."""
    cfg = config("webdataset", ROOT=root, NUM_WORKERS=0, IMAGE_SIZE=8, MEAN=[0.0] * 3)
    cfg.DATASET.update(STD=[1.0] * 3, AUGMENT="none")
    data = load_data(set_key(cfg, TRAIN=pattern, VAL="*/0001.tar"))
    for images, targets in (collect(data.train)[:2], collect(data.val)):
        expected = torch.where(levels(images) >= 100, 3, levels(images) % 2)
        assert torch.equal(targets, expected)
    assert data.train.dataset.counts.tolist() == ([5, 9] if pattern.startswith("b") else [9, 5])


PATTERNS = ["{a,b}/0000.tar", "*/0000.tar", "b/0000.tar::a/0000.tar"]


def test_shards_of_one_name_in_two_folders_keep_their_own_labels(tmp_path):
    write_twins(tmp_path)
    for pattern in (PATTERNS[0], *PATTERNS):  # counted, then from the index
        check_twins(tmp_path, pattern)


@pytest.mark.parametrize("whole", [True, False])
def test_an_index_by_names_alone_is_counted_again(tmp_path, whole):
    """One of an earlier version, which had the last folder's classes; or what is none at all."""
    first = write_twins(tmp_path)
    facts = first.stat()
    stamp = ["cls", facts.st_size, facts.st_mtime_ns]
    old = {"0000.tar": [stamp, [3] * 5], "0001.tar": [stamp, [3] * 2]} if whole else [1]
    (tmp_path / "a" / INDEX).write_text(json.dumps(old))
    check_twins(tmp_path, PATTERNS[0])


def test_a_folder_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    import mdistiller.dataset.files.shard_index as module

    write_shards(tmp_path / "data", num=14)
    write_shards(tmp_path / "data", "val", 7)
    monkeypatch.setattr(module.os, "access", lambda *_: False)
    monkeypatch.setattr(module.Path, "home", lambda: tmp_path / "home")
    assert shards(tmp_path / "data").num_data == 14
    assert not (tmp_path / "data" / INDEX).exists()
    assert len(list((tmp_path / "home" / ".cache" / "mdistiller").iterdir())) == 2


def set_key(cfg, **keys):
    cfg.DATASET.SHARDS.update(keys)
    return cfg


@pytest.mark.parametrize("skip_corrupt", [False, True])
def test_what_macos_adds_to_a_shard_is_left_out(tmp_path, skip_corrupt):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}-0000.tar", "w") as tar:
            for k in range(6):
                for suffix, data in {"png": png(k), "cls": str(k % 2).encode()}.items():
                    name = f"./{split}/{k:05d}.{suffix}"
                    added = [f"./{split}/._{k:05d}.{suffix}", f"__MACOSX/{split}/{k:05d}.{suffix}"]
                    for place in (added[0], name, added[1]):
                        info = tarfile.TarInfo(place)
                        content = data if place == name else b"\0\5\x16\7macOS"
                        info.size = len(content)
                        tar.addfile(info, io.BytesIO(content))
    data = shards(tmp_path, SKIP_CORRUPT=skip_corrupt)
    images, labels, _ = collect(data.train)
    assert sorted(zip(levels(images), labels.tolist(), strict=True)) == [
        (k, k % 2) for k in range(6)
    ]


def test_patterns_name_the_shards(root):
    def num(pattern):
        cfg = config("webdataset", ROOT=root, NUM_WORKERS=0, IMAGE_SIZE=8)
        return load_data(set_key(cfg, TRAIN=pattern)).num_data

    assert num("train-{0000..0002}.tar") == 21
    assert num("train-000[0-1].tar") == 14
    assert num("train-0000.tar::train-0003.tar") == 14
    assert num(f"file:{root}/train-{{0006..0007}}.tar") == 11


def test_the_test_set_alone(root):
    loader, classes, zoo, *_ = load_test_loader(config("webdataset", ROOT=root, NUM_WORKERS=0))
    assert (len(loader.dataset), classes, zoo) == (17, 4, "imagenet")
    assert collect(loader)[0].shape == (17, 3, 224, 224)


def fails(cfg):
    """The line that pass_number an epoch ends with."""

    def epoch():
        list(load_data(cfg).train)

    with pytest.raises(UserError) as error:
        epoch()
    return one_line(error)


def test_a_missing_package_is_one_line(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    assert fails(config("webdataset", ROOT=root)) == (
        "DATASET.TYPE webdataset needs the package webdataset: pip install mdistiller[shards]"
    )


def test_shards_without_classes_are_images_without_labels(tmp_path):
    with wds.ShardWriter(str(tmp_path / "train-%04d.tar"), maxcount=5, verbose=0) as writer:
        for k in range(12):
            writer.write({"__key__": f"{k:05d}", "png": png(k)})
        writer.write({"__key__": "note", "txt": "no image"})

    def cfg(image):
        cfg = config("webdataset", ROOT=tmp_path, NUM_WORKERS=0, IMAGE_SIZE=8, AUGMENT="none")
        cfg.DATASET.MEAN, cfg.DATASET.STD = [0.0] * 3, [1.0] * 3
        return set_key(cfg, IMAGE=image, TARGET="")

    data = load_data(cfg("png"))
    assert (data.num_data, data.num_classes, data.classes) == (12, 0, [])
    assert (data.val, data.test) == (None, None)
    images, _, index = collect(data.train)
    assert sorted(levels(images)) == sorted(index.tolist()) == list(range(12))
    with pytest.raises(UserError, match="have no labels to evaluate on"):
        load_test_loader(cfg("png"))
    assert "has no sample with an image" in fails(cfg("jpg"))


def test_faults_are_one_line(root, tmp_path):
    def cfg(where=root, **keys):
        return set_key(config("webdataset", ROOT=where, NUM_WORKERS=0, IMAGE_SIZE=8), **keys)

    assert "'none*.tar': no file fits it in" in fails(cfg(TRAIN="none*.tar"))
    assert "train-0008.tar is not there" in fails(cfg(TRAIN="train-{0000..0009}.tar"))
    assert "has cls, png, but no jpg (DATASET.SHARDS.IMAGE)" in fails(cfg(IMAGE="jpg"))
    assert "train-0000.tar has no sample with a class (.label)" in fails(cfg(TARGET="label"))
    assert "run from 0 to 3; they must number 3 from 0" in fails(cfg(CLASSES=3))
    for keys in ({"VAL_SPLIT": 4}, {"FRACTION": 0.5}):
        assert "cannot take images out of shards" in fails(config("webdataset", ROOT=root, **keys))
    assert "webdataset needs DATASET.LOADER workers" in fails(
        config("webdataset", ROOT=root, LOADER="memory")
    )


def test_broken_shards_and_images_are_named(tmp_path):
    write_shards(tmp_path, num=14)
    write_shards(tmp_path, "val", 7)
    cfg = config("webdataset", ROOT=tmp_path, NUM_WORKERS=0, IMAGE_SIZE=8)
    load_data(cfg)  # counts
    shard = tmp_path / "train-0001.tar"
    whole, facts = shard.read_bytes(), shard.stat()

    def change(data):
        shard.write_bytes(data)
        os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))

    change(whole.replace(png(9), bytes(len(png(9)))))
    assert "train-0001.tar: 00009 cannot be read as an image" in fails(cfg)
    fewer = (write_shards(tmp_path / "fewer", num=12) / shard.name).read_bytes()
    change(fewer.ljust(len(whole), b"\0"))  # as long, since tar files end in zeros
    assert "train-0001.tar holds fewer samples than were counted; remove" in fails(cfg)
    change(b"no tar file" * 1000)
    assert f"shard {shard} cannot be read (" in fails(cfg)


def test_a_class_that_is_no_number_is_refused(tmp_path):
    write_shards(tmp_path, num=7, txt="cat")
    write_shards(tmp_path, "val", 7, txt="cat")
    cfg = set_key(config("webdataset", ROOT=tmp_path, NUM_WORKERS=0), TARGET="txt")
    assert "train-0000.tar: 00000.txt holds b'cat', not a class in digits" in fails(cfg)
