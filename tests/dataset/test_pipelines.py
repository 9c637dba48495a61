"""Which loader a config leads to, and what is refused."""

import pytest
import torch
from data_support import collect, config, one_line, write_folders, write_image
from worker_support import WNIDS, imagenet, photo

from mdistiller.dataset import load_data, load_test_loader
from mdistiller.dataset.files.loader import WorkerTrainLoader
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.registry import UserError


def test_auto_takes_memory_where_images_fit(tmp_path):
    write_folders(tmp_path)
    kinds = {
        "fit": {"MAX_MEMORY_GB": 1.2e-6},  # 6 images of 8 x 8 take 1.152 kB
        "large": {"MAX_MEMORY_GB": 1.1e-6},
        "randaugment": {"RANDAUGMENT": [1, 5]},
        "any size": {"AUGMENT": "resized_crop_flip"},
    }
    found = {
        name: type(load_data(config("imagefolder", ROOT=tmp_path, **keys)).train)
        for name, keys in kinds.items()
    }
    assert found.pop("fit") is TrainLoader
    assert set(found.values()) == {WorkerTrainLoader}


def test_a_resized_crop_has_the_usual_size_unless_told(tmp_path):
    write_folders(tmp_path)
    keys = {"AUGMENT": "resized_crop_flip", "NUM_WORKERS": 0}
    data = load_data(config("imagefolder", ROOT=tmp_path, **keys))
    assert data.image_size == (224, 224)
    assert next(iter(data.val))[0].shape == (6, 3, 224, 224)


def test_images_of_other_sizes_are_refused_by_name(tmp_path):
    write_folders(tmp_path)
    path = write_image(tmp_path / "train" / "dog" / "1.png", photo(0, (8, 9)))
    keys = {"LOADER": "workers", "NUM_WORKERS": 0, "MEAN": [0.5] * 3, "STD": [1.0] * 3}
    data = load_data(config("imagefolder", ROOT=tmp_path, **keys))
    with pytest.raises(UserError, match=r"cat/0\.png is 8x8 pixels but .*dog/1\.png is 9x8;"):
        list(data.train)
    assert path.is_file()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"LOADER": "worker"}, r"DATASET\.LOADER must be auto, memory or workers, got 'worker'"),
        ({"LOADER": "memory", "RANDAUGMENT": [2, 9]}, "RANDAUGMENT needs DATASET.LOADER workers"),
        (
            {"LOADER": "memory", "AUGMENT": "resized_crop_flip"},
            "resized_crop_flip needs DATASET.LOADER workers",
        ),
        ({"RANDAUGMENT": [2]}, r"RANDAUGMENT \[2\] must be the number of operations"),
        ({"RANDAUGMENT": [2, 31]}, r"magnitude of 0 to 30"),
        ({"RANDAUGMENT": [0, 9]}, r"RANDAUGMENT \[0, 9\] must be"),
        ({"ERASING": 1.5}, r"ERASING 1\.5 is a probability"),
        ({"MIXUP": -1.0}, r"MIXUP -1\.0 must not be negative"),
    ],
)
def test_keys_that_cannot_be_meant_are_one_line(tmp_path, keys, message):
    write_folders(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        load_data(config("imagefolder", ROOT=tmp_path, **keys))
    one_line(error)


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        (lambda root: (root / "val").rename(root / "gone"), ["(no val/)", "DATASET.ROOT"]),
        (lambda root: (root / "val" / WNIDS[0]).rename(root / "val" / "n2"), ["val: n2"]),
    ],
)
def test_a_faulty_imagenet_is_one_line(tmp_path, fault, parts):
    for split in ("train", "val"):
        for wnid in WNIDS[:2]:
            write_image(tmp_path / split / wnid / "0.JPEG", photo(0))
    fault(tmp_path)
    with pytest.raises(UserError) as error:
        imagenet(tmp_path)
    assert all(part in one_line(error) for part in parts)


def test_an_unsorted_validation_folder_is_explained(tmp_path):
    write_image(tmp_path / "train" / "n1" / "0.JPEG", photo(0))
    write_image(tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG", photo(0))
    with pytest.raises(UserError, match="val are not sorted; move them into a folder of each"):
        imagenet(tmp_path)


def test_the_test_set_alone_is_read_by_workers_too(folder):
    loader, classes, zoo, *_ = load_test_loader(
        config("imagenet", ROOT=folder, IMAGE_SIZE=32, NUM_WORKERS=0)
    )
    assert (classes, zoo) == (3, "imagenet")
    for ours, theirs in zip(collect(loader), collect(imagenet(folder).val), strict=True):
        assert torch.equal(ours, theirs)


def test_the_zoo_can_be_chosen(folder):
    assert imagenet(folder, ZOO="cifar").zoo == "cifar"
