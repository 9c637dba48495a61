"""From config keys to loaders: held-out images, overrides, out-of-tree data sets, refusals."""

import pytest
import torch
from data_support import collect, config, image_set, write_folders

from mdistiller.dataset import (
    DATASETS,
    DataSource,
    ImageSet,
    get_dataset,
    load_data,
    load_test_loader,
)
from mdistiller.dataset.split import hold_out
from mdistiller.registry import UserError


@pytest.fixture
def shapes(monkeypatch):
    """A data set from outside the package: 90 and 20 images, classes of unequal size."""

    class Shapes(DataSource):
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)
        reads = []  # noqa: RUF012

        def load(self, root, split, options):
            self.reads.append(split)
            if split == "test":
                return image_set(20, classes=3)
            targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 10)
            return ImageSet(image_set(90).images, targets, ["a", "b", "c"])

    monkeypatch.setitem(DATASETS, "shapes", Shapes)
    return Shapes


def pixels(images):
    return {image.numpy().tobytes() for image in images}


def test_get_dataset_returns_what_the_original_returned(shapes):
    train, val, num_data, num_classes = get_dataset(config("shapes"))
    assert (num_data, num_classes) == (90, 3)
    assert len(train.dataset) == 90
    image, target, index = next(iter(train))
    assert image.shape == (4, 3, 32, 32)
    assert len(index) == len(target) == 4
    assert len(next(iter(val))) == 2


def test_a_node_of_the_original_is_enough(shapes):
    cfg = config("shapes")
    for key in set(cfg.DATASET) - {"TYPE", "NUM_WORKERS", "TEST"}:
        del cfg.DATASET[key]
    del cfg["EXPERIMENT"]["SEED"]
    assert load_data(cfg).num_data == 90


def test_held_out_images_are_stratified_and_disjoint(shapes):
    plain = load_data(config("shapes"))
    data = load_data(config("shapes", VAL_SPLIT=18))
    train, held = data.train.dataset, data.val.dataset
    assert held.targets.bincount().tolist() == [10, 6, 2]
    assert train.targets.bincount().tolist() == [40, 24, 8]
    assert data.num_data == 72
    assert sorted(collect(data.train)[2].tolist()) == list(range(72))
    assert not pixels(train.images) & pixels(held.images)
    assert pixels(train.images) | pixels(held.images) == pixels(plain.train.dataset.images)


def test_held_out_images_are_not_augmented_and_the_test_set_is_the_real_one(shapes):
    plain = load_data(config("shapes"))
    data = load_data(config("shapes", VAL_SPLIT=18))
    images, _ = collect(data.val)
    expected = (data.val.dataset.images / 255 - 0.5) / 0.25
    torch.testing.assert_close(images, expected, rtol=2.5e-7, atol=1e-6)
    assert pixels(data.val.dataset.images) <= pixels(plain.train.dataset.images)
    assert torch.equal(data.test.dataset.images, plain.val.dataset.images)
    assert plain.test is None


def test_which_images_are_held_out_depends_on_val_seed_alone(shapes):
    def held(**keys):
        return load_data(config("shapes", VAL_SPLIT=18, **keys)).val.dataset.images

    assert torch.equal(held(seed=0), held(seed=1))
    assert not torch.equal(held(), held(VAL_SEED=1))


def test_a_fraction_of_each_class_is_trained_on_and_all_else_stays(shapes):
    def sets(fraction, **keys):
        data = load_data(config("shapes", VAL_SPLIT=18, FRACTION=fraction, **keys))
        return data, data.train.dataset

    (whole, all_images), (data, half), (_, few) = sets(1.0), sets(0.5), sets(0.06)
    assert half.targets.bincount().tolist() == [20, 12, 4]
    assert few.targets.bincount().tolist() == [2, 1, 1]
    assert pixels(few.images) <= pixels(half.images) <= pixels(all_images.images)
    assert (data.num_data, data.mean, data.std) == (36, whole.mean, whole.std)
    assert torch.equal(data.val.dataset.images, whole.val.dataset.images)
    assert not torch.equal(half.images, sets(0.5, VAL_SEED=1)[1].images)
    with pytest.raises(UserError, match=r"DATASET\.FRACTION 0\.0 must be above 0 and at most 1"):
        sets(0.0)


@pytest.mark.parametrize("num", [0, 1, 7, 30, 86])
def test_hold_out_takes_the_number_asked_and_empties_no_class(num):
    targets = torch.tensor([0] * 50 + [1] * 30 + [2] * 9 + [3])
    kept, held = hold_out(targets, num, seed=0)
    assert len(held) == num
    assert sorted(kept.tolist() + held.tolist()) == list(range(90))
    counts, whole = targets[held].bincount(minlength=4), targets.bincount()
    assert (targets[kept].bincount(minlength=4) >= 1).all()
    if num < 80:
        assert (counts - whole * num / 90).abs().max() < 1


@pytest.mark.parametrize("num", [-1, 88, 90])
def test_a_val_split_that_empties_a_class_is_refused(shapes, num):
    with pytest.raises(UserError, match=rf"DATASET\.VAL_SPLIT {num} "):
        load_data(config("shapes", VAL_SPLIT=num))


def test_splits_with_other_classes_are_refused(shapes):
    load = shapes.load

    def renamed(self, root, split, options):
        images = load(self, root, split, options)
        return (
            ImageSet(images.images, images.targets, ["a", "b", "d"]) if split == "test" else images
        )

    shapes.load = renamed
    with pytest.raises(UserError, match=r"differ \(only in train: c; only in test/val: d\)"):
        load_data(config("shapes"))


def test_evaluation_never_reads_the_training_images(shapes):
    loader, num_classes, *_ = load_test_loader(config("shapes", VAL_SPLIT=18))
    assert shapes.reads == ["test"]
    assert (len(loader.dataset), num_classes) == (20, 3)


def test_evaluating_a_folder_with_given_statistics_needs_no_training_images(tmp_path):
    write_folders(tmp_path)
    (tmp_path / "train").rename(tmp_path / "elsewhere")
    keys = {"ROOT": tmp_path, "MEAN": [0.5, 0.4, 0.3], "STD": [0.2, 0.2, 0.2]}
    assert len(load_test_loader(config("imagefolder", **keys))[0].dataset) == 6
    with pytest.raises(UserError, match=r"train/.*or set DATASET\.MEAN and DATASET\.STD"):
        load_test_loader(config("imagefolder", ROOT=tmp_path))


def test_mean_and_std_of_the_config_come_first(shapes):
    data = load_data(config("shapes", MEAN=[0.1, 0.2, 0.3], STD=[0.5, 0.6, 0.7]))
    assert (data.mean, data.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    image = collect(data.val)[0][0]
    raw = data.val.dataset.images[0] / 255
    torch.testing.assert_close(image[2], (raw[2] - 0.3) / 0.7)


@pytest.mark.parametrize(
    "keys",
    [
        {"MEAN": [0.5, 0.5, 0.5]},
        {"MEAN": [0.5], "STD": [0.5]},
        {"MEAN": [125.0, 123.0, 114.0], "STD": [63.0, 62.0, 67.0]},
        {"MEAN": [0.5, 0.5, 0.5], "STD": [0.2, 0.2, 0.0]},
    ],
)
def test_statistics_that_cannot_be_meant_are_refused(shapes, keys):
    with pytest.raises(UserError, match=r"DATASET\.MEAN .*DATASET\.STD"):
        load_data(config("shapes", **keys))


@pytest.mark.parametrize(
    ("augment", "views"), [("default", 162), ("none", 1), ("crop", 25), ("rotate_flip", None)]
)
def test_augment_chooses_the_augmentation(shapes, augment, views):
    assert load_data(config("shapes", AUGMENT=augment)).train.num_views == views


def test_drop_last_and_the_batch_sizes_are_passed_on(shapes):
    cfg = config("shapes", batch_size=40, DROP_LAST=True)
    cfg.DATASET.TEST.BATCH_SIZE = 7
    data = load_data(cfg)
    assert (len(data.train), data.train.batch_size) == (2, 40)
    assert [len(target) for _, target in data.val] == [7, 7, 6]


def test_the_seed_of_the_experiment_decides_the_order(shapes):
    orders = [collect(load_data(config("shapes", seed=seed)).train)[2] for seed in (0, 0, 1)]
    assert torch.equal(orders[0], orders[1])
    assert not torch.equal(orders[0], orders[2])


@pytest.mark.parametrize("key", ["IMAGE_SIZE", "NUM_WORKERS"])
def test_negative_numbers_are_refused(shapes, key):
    with pytest.raises(UserError, match=rf"DATASET\.{key} -1 must not be negative"):
        load_data(config("shapes", **{key: -1}))


def test_a_test_batch_of_none_is_refused(shapes):
    cfg = config("shapes")
    cfg.DATASET.TEST.BATCH_SIZE = 0
    with pytest.raises(UserError, match=r"DATASET\.TEST\.BATCH_SIZE 0"):
        load_data(cfg)


def test_an_unknown_data_set_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"'cifar1000'.*did you mean 'cifar100'"):
        load_data(config("cifar1000"))


def test_images_of_another_form_are_refused_with_the_form_wanted():
    good = image_set(4)
    with pytest.raises(UserError, match=r"uint8 \[N, 3, H, W\], got torch.float32"):
        ImageSet(good.images.float(), good.targets, good.classes)
    with pytest.raises(UserError, match=r"got torch.uint8 \[4, 2, 32, 32\]; repeat a grey"):
        ImageSet(good.images[:, :2], good.targets, good.classes)
    with pytest.raises(UserError, match=r"targets must be int64 \[4\].*got torch.int64 \[3\]"):
        ImageSet(good.images, good.targets[:3], good.classes)


def test_target_out_of_the_classes_is_refused():
    good = image_set(4)
    with pytest.raises(UserError, match="from 0 to 3, but 2 classes need 0 to 1"):
        ImageSet(good.images, good.targets, ["a", "b"])


class Grey(DataSource):
    root = "."

    def load(self, root, split, options):
        good = image_set(8)
        return ImageSet(good.images[:, :1], good.targets, good.classes)


def test_channels_have_to_be_those_of_the_data(monkeypatch):
    monkeypatch.setitem(DATASETS, "grey", Grey)
    with pytest.raises(UserError, match="is 3: set it to 1"):
        load_data(config("grey"))
    data = load_data(config("grey", CHANNELS=1))
    assert len(data.mean) == next(iter(data.train))[0].shape[1] == 1
    for keys, message in (({"MEAN": [0.1] * 3}, "one value up to 1"), ({"CHANNELS": 2}, "1, 3 or")):
        with pytest.raises(UserError, match=message):
            load_data(config("grey", **{"CHANNELS": 1, **keys}))
