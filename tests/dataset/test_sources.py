"""Each data set, read from small files in its real format."""

import hashlib
import pickle
import shutil
import sys
import tarfile

import numpy as np
import pytest
import torch
from data_support import config, flat, one_line, write_folders, write_image
from file_server import serving
from PIL import Image

from mdistiller.dataset import DATASETS, load_data, load_test_loader
from mdistiller.registry import UserError


def write_cifar(root, monkeypatch, kind):
    """CIFAR in its official pickles, 20 + 10 images, and their md5s put in place."""
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    key = "labels" if kind == "cifar10" else "fine_labels"
    classes = int(kind[5:])
    rng = np.random.default_rng(0)

    def write(name, content):
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return [name, hashlib.md5(data).hexdigest()]

    def batch(num):
        pixels = rng.integers(0, 256, (num, 3072), dtype=np.uint8)
        return {"data": pixels, key: [k % classes for k in range(num)]}

    batches = [batch(10), batch(10), batch(10)]
    names = [f"class{k}" for k in range(classes)]
    meta_name, meta_key = reader.meta["filename"], reader.meta["key"]
    _, meta_md5 = write(meta_name, {meta_key: names})
    lists = [write(f"part_{k}", content) for k, content in enumerate(batches)]
    monkeypatch.setattr(reader, "train_list", lists[:2])
    monkeypatch.setattr(reader, "test_list", lists[2:])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": meta_md5})
    return np.concatenate([b["data"] for b in batches]).reshape(-1, 3, 32, 32), names


@pytest.mark.parametrize(("kind", "classes"), [("cifar10", 10), ("cifar100", 100)])
def test_cifar_is_read_from_the_official_files(tmp_path, monkeypatch, kind, classes):
    pixels, names = write_cifar(tmp_path, monkeypatch, kind)
    data = load_data(config(kind, ROOT=tmp_path))
    assert (data.num_data, data.num_classes, data.classes) == (20, classes, names)
    assert torch.equal(data.train.dataset.images, torch.from_numpy(pixels[:20]))
    assert torch.equal(data.val.dataset.images, torch.from_numpy(pixels[20:]))
    assert data.val.dataset.targets.tolist() == list(range(10))
    assert data.train.num_views == 162
    assert (data.zoo, data.test) == ("cifar", None)


def test_cifar_constants_are_those_of_the_original():
    assert DATASETS["cifar100"].mean == (0.5071, 0.4867, 0.4408)
    assert DATASETS["cifar100"].std == (0.2675, 0.2565, 0.2761)
    assert DATASETS["cifar10"].mean == (0.4914, 0.4822, 0.4465)
    assert DATASETS["cifar10"].std == (0.2470, 0.2435, 0.2616)


def publish_cifar(folder, monkeypatch, site):
    """CIFAR-10's archive on a local server; its folder is gone."""
    from torchvision import datasets

    write_cifar(folder, monkeypatch, "cifar10")
    base = folder / datasets.CIFAR10.base_folder
    with tarfile.open(folder / "made.tar.gz", "w:gz") as tar:
        tar.add(base, base.name)
    data = (folder / "made.tar.gz").read_bytes()
    site.files["cifar-10-python.tar.gz"] = data
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{site.url}/cifar-10-python.tar.gz")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(data).hexdigest())
    shutil.rmtree(base)
    return base


def test_cifar_is_downloaded_and_unpacked(tmp_path, monkeypatch):
    with serving(cut=[500]) as site:
        monkeypatch.setattr(sys.modules["mdistiller.files.fetch"], "PAUSE", 0)
        base = publish_cifar(tmp_path, monkeypatch, site)
        base.mkdir()
        (base / "part_1").write_bytes(b"broken")
        for _ in range(2):
            assert load_data(config("cifar10", ROOT=tmp_path)).num_data == 20
    assert len(site.log) == 2
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == [base.name, "cifar-10-python.tar.gz", "made.tar.gz"]


def test_a_failed_cifar_download_says_what_to_put_where(tmp_path, monkeypatch):
    with serving() as site:
        base = publish_cifar(tmp_path, monkeypatch, site)
        site.files.clear()
        with pytest.raises(UserError) as error:
            load_data(config("cifar10", ROOT=tmp_path))
    text = one_line(error)
    for part in (str(tmp_path), "404", "http://", ".tar.gz", base.name, "DATASET.ROOT"):
        assert part in text


def test_a_cifar_archive_of_another_hash_is_not_opened(tmp_path, monkeypatch):
    with serving() as site:
        base = publish_cifar(tmp_path, monkeypatch, site)
        (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"something")
        with pytest.raises(UserError, match=r"wrong hash: md5 .*; remove it"):
            load_data(config("cifar10", ROOT=tmp_path))
    assert not base.exists()


def test_a_broken_cifar_file_is_not_used(tmp_path, monkeypatch):
    """Its pickle is not even opened; nor does the archive, which is as bad, replace it."""
    with serving() as site:
        base = publish_cifar(tmp_path, monkeypatch, site)
        monkeypatch.setattr("torchvision.datasets.CIFAR10.train_list", [["part_0", "0" * 32]])
        with pytest.raises(UserError, match=r"CIFAR10 in .* is not as published .*corrupted"):
            load_data(config("cifar10", ROOT=tmp_path))
    assert base.is_dir()


def test_digits_are_split_alike_everywhere():
    data = load_data(config("digits"))
    train, test = data.train.dataset, data.val.dataset
    assert (len(train), len(test), data.num_classes) == (1437, 360, 10)
    assert test.targets.bincount().tolist() == [36, 37, 35, 37, 36, 36, 36, 36, 35, 36]
    assert train.targets[:8].tolist() == [0, 3, 4, 5, 7, 8, 9, 1]  # these images, on any machine
    assert test.targets[:8].tolist() == [1, 2, 6, 0, 3, 6, 1, 2]
    assert train.channel_statistics()[0] == pytest.approx(data.mean, abs=5e-5)
    assert train.channel_statistics()[1] == pytest.approx(data.std, abs=5e-5)
    assert (train.images[:, 0] == train.images[:, 2]).all()
    assert train.images.max() == 255
    assert data.train.num_views == 25  # no mirror


def tiny_pixels(label, k):
    return flat((60 * label + 10 * k, 90, 30), (64, 64))


def write_tiny(root, official):
    """Two classes, three training and two validation images each; a flat colour for each image."""
    wnids = ["n02", "n01"]
    rows = []
    for label, wnid in enumerate(wnids):
        for k in range(3):
            middle = "images/" if official else ""
            write_image(root / "train" / wnid / f"{middle}{k}.JPEG", tiny_pixels(label, k))
        for k in range(2):
            name = f"val_{label}{k}.JPEG"
            rows.append(f"{name}\t{wnid}\t0\t0\t9\t9")
            folder = "images" if official else wnid
            write_image(root / "val" / folder / name, tiny_pixels(label, k))
    (root / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    (root / "val" / "images").mkdir(exist_ok=True)  # people leave it behind when they re-organise
    return root


@pytest.mark.parametrize("official", [True, False])
def test_tiny_imagenet_is_read_in_both_layouts(tmp_path, official):
    data = load_data(config("tiny_imagenet", ROOT=write_tiny(tmp_path, official)))
    assert data.classes == ["n01", "n02"]
    assert (data.num_data, data.zoo, data.image_size) == (6, "tiny_imagenet", (64, 64))
    for images, targets in (
        (data.train.dataset.images, data.train.dataset.targets),
        (data.val.dataset.images, data.val.dataset.targets),
    ):
        labels = 1 - (images[:, 0, 32, 32] >= 55).long()  # n02, written first, is the darker one
        assert torch.equal(targets, labels)
    assert len(data.val.dataset) == 4
    assert data.train.num_views is None  # rotations


def test_tiny_imagenets_zip_file_is_unpacked(tmp_path):
    write_tiny(tmp_path / "made" / "tiny-imagenet-200", official=True)
    archive = shutil.make_archive(tmp_path / "tiny-imagenet-200", "zip", tmp_path / "made")
    data = load_data(config("tiny_imagenet", ROOT=tmp_path / "here"))
    assert (data.num_data, data.classes) == (6, ["n01", "n02"])
    assert sorted(file.name for file in tmp_path.iterdir()) == ["here", "made", archive[-21:]]


def test_tiny_imagenet_missing_says_what_to_put_where(tmp_path):
    with pytest.raises(UserError) as error:
        load_data(config("tiny_imagenet", ROOT=tmp_path / "nowhere"))
    text = one_line(error)
    assert "nowhere" in text
    assert "tiny-imagenet-200.zip" in text


def test_tiny_imagenet_without_labels_of_the_validation_images(tmp_path):
    root = write_tiny(tmp_path, official=True)
    (root / "val" / "val_annotations.txt").unlink()
    with pytest.raises(UserError, match=r"neither class folders nor val_annotations\.txt"):
        load_data(config("tiny_imagenet", ROOT=root))


def test_evaluation_notices_a_class_that_training_lacks(tmp_path):
    """The training images are not read then, but a shifted class list would spoil every target."""
    tiny = write_tiny(tmp_path / "tiny", official=True)
    (tiny / "train" / "n02").rename(tiny / "train" / "n03")
    folders = write_folders(tmp_path / "own")
    (folders / "val" / "dog").rename(folders / "val" / "ant")
    known = {"MEAN": [0.5, 0.5, 0.5], "STD": [0.2, 0.2, 0.2]}
    with pytest.raises(UserError, match=r"only in train: n03; only in test/val: n02"):
        load_test_loader(config("tiny_imagenet", ROOT=tiny))
    with pytest.raises(UserError, match=r"only in train: dog; only in test/val: ant"):
        load_test_loader(config("imagefolder", ROOT=folders, **known))


def test_images_of_16_bits_are_refused_instead_of_cut_off(tmp_path):
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000
    for split in ("train", "val"):
        for name in ("a", "b"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(ramp).save(tmp_path / split / name / "deep.png")
    with pytest.raises(UserError, match=r"deep\.png has more than 8 bits a channel"):
        load_data(config("imagefolder", ROOT=tmp_path))


def test_one_class_is_not_enough(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "only").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "only" / "a.png")
    with pytest.raises(UserError, match=r"only one class \(only\); at least two are required"):
        load_data(config("imagefolder", ROOT=tmp_path))
