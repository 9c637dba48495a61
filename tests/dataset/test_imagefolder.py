"""Image folders: what is read, and one line for each thing that can be wrong with them."""

import numpy as np
import pytest
import torch
from data_support import collect, config, flat, one_line, write_folders, write_image
from PIL import Image

from mdistiller.dataset import DATASETS, Options, load_data, load_test_loader
from mdistiller.registry import UserError


@pytest.mark.parametrize("test", ["val", "test"])
def test_image_folders_are_read_by_class_and_path(tmp_path, test):
    data = load_data(config("imagefolder", ROOT=write_folders(tmp_path, test=test)))
    assert data.classes == ["cat", "dog"]
    for images in (data.train.dataset, data.val.dataset):
        assert images.targets.tolist() == [0, 0, 0, 1, 1, 1]
        assert images.images[:, 0, 0, 0].tolist() == [0, 1, 2, 10, 11, 12]
        assert (images.images[:, 2] == 200).all()  # blue stays blue


def test_statistics_of_a_folder_are_those_of_its_training_images(tmp_path):
    write_folders(tmp_path, size=(8, 8))
    rng = np.random.default_rng(0)
    for k in range(3):
        write_image(tmp_path / "train" / "cat" / f"{k}.png", rng.integers(0, 256, (8, 8, 3)))
    data = load_data(config("imagefolder", ROOT=tmp_path))
    pixels = data.train.dataset.images.double().transpose(0, 1).flatten(1) / 255
    assert data.mean == pytest.approx(pixels.mean(1).tolist(), rel=1e-12)
    assert data.std[0] == pytest.approx(float(pixels[0].std(correction=0)), rel=1e-12)
    loader, *_ = load_test_loader(config("imagefolder", ROOT=tmp_path))
    assert torch.equal(collect(loader)[0], collect(data.val)[0])  # evaluated as trained


def test_other_modes_become_rgb_and_hidden_files_are_skipped(tmp_path):
    root = write_folders(tmp_path)
    write_image(root / "train" / "cat" / "3.png", np.full((8, 8), 77))
    Image.fromarray(flat((1, 2, 3))).convert("P").save(root / "train" / "cat" / "4.png")
    (root / "train" / "cat" / "._5.png").write_bytes(b"not an image")
    (root / "train" / "cat" / "notes.txt").write_text("not an image")
    (root / "train" / ".cache").mkdir()
    (root / "train" / "__MACOSX").mkdir()
    images = load_data(config("imagefolder", ROOT=root)).train.dataset
    assert images.targets.tolist() == [0] * 5 + [1] * 3
    assert (images.images[3] == 77).all()


def test_more_files_than_a_thread_takes_at_once_keep_their_order(tmp_path):
    write_folders(tmp_path)
    for k in range(200):
        write_image(tmp_path / "train" / "cat" / f"{k:03d}.png", flat((k, 0, 0), (4, 4)))
    for k in range(3):
        (tmp_path / "train" / "cat" / f"{k}.png").unlink()
    images = DATASETS["imagefolder"]().load(tmp_path, "train", Options(image_size=4, workers=4))
    assert images.images[:200, 0, 0, 0].tolist() == list(range(200))


def test_image_size_resizes_to_a_square(tmp_path):
    write_folders(tmp_path, size=(8, 8))
    write_image(tmp_path / "train" / "cat" / "wide.png", flat((9, 9, 9), (10, 30)))
    data = load_data(config("imagefolder", ROOT=tmp_path, IMAGE_SIZE=16))
    assert data.train.dataset.images.shape == (7, 3, 16, 16)
    assert data.image_size == (16, 16)


def delete_class_images(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def rename_class(root):
    (root / "val" / "dog").rename(root / "val" / "wolf")


def delete_split(name):
    def delete(root):
        (root / name).rename(root / f"{name}_gone")

    return delete


def empty_split(root):
    delete_split("train")(root)
    (root / "train").mkdir()
    delete_split("val")(root)
    (root / "val").mkdir()


def break_file(root):
    path = root / "train" / "dog" / "1.png"
    path.write_bytes(path.read_bytes()[:45])


def other_size(root):
    write_image(root / "train" / "dog" / "1.png", flat((1, 1, 1), (8, 9)))


def other_test_size(root):
    write_folders(root / "new", size=(9, 9))
    delete_split("val")(root)
    (root / "new" / "val").rename(root / "val")


FAULTS = [
    (delete_class_images, ["train/dog", "no images"]),
    (rename_class, ["train: dog", "val: wolf"]),
    (delete_split("train"), ["train/", "DATASET.ROOT"]),
    (delete_split("val"), ["neither val/ nor test/", "DATASET.ROOT"]),
    (empty_split, ["train", "no class folders"]),
    (break_file, ["train/dog/1.png", "cannot be read"]),
    (other_size, ["cat/0.png is 8x8", "dog/1.png is 9x8", "DATASET.IMAGE_SIZE"]),
    (other_test_size, ["8x8", "9x9", "DATASET.IMAGE_SIZE"]),
]


@pytest.mark.parametrize(("fault", "parts"), FAULTS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_faulty_folder_is_one_clear_line(tmp_path, fault, parts):
    fault(write_folders(tmp_path))
    with pytest.raises(UserError) as error:
        load_data(config("imagefolder", ROOT=tmp_path))
    for part in parts:
        assert part in one_line(error)


def test_a_folder_too_large_for_memory_is_refused_before_decoding(tmp_path):
    write_folders(tmp_path)
    break_file(tmp_path)  # would be found if files were decoded first
    with pytest.raises(UserError, match=r"6 images .* 2\.4 GB.*MAX_MEMORY_GB 2;"):
        load_data(
            config(
                "imagefolder", ROOT=tmp_path, IMAGE_SIZE=11548, MAX_MEMORY_GB=2.0, LOADER="memory"
            )
        )


def test_an_image_folder_needs_a_root():
    with pytest.raises(UserError, match=r"imagefolder needs DATASET\.ROOT"):
        load_data(config("imagefolder"))
