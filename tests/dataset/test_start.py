"""An epoch begun at a later batch gives the rest of the whole one, whatever makes the batches."""

import pytest
import torch
from data_support import config, image_set
from test_shards import shards, wds, write_shards
from worker_support import imagenet, write_imagenet

from mdistiller.dataset import load_data
from mdistiller.dataset.memory.augment import AUGMENTS
from mdistiller.dataset.memory.two_views import TwoViewLoader

CPU = torch.device("cpu")


def two_views(folder):
    augment = AUGMENTS["crop_flip"]((32, 32))
    return TwoViewLoader(image_set(50), 6, augment, (0.3,) * 3, (0.4,) * 3, CPU)


def mixed(folder):
    keys = {"MIXUP": 0.4, "CUTMIX": 1.0, "ERASING": 0.5}
    return load_data(config("digits", batch_size=200, **keys)).train


def files(folder):
    return imagenet(write_imagenet(folder)).train


def tars(folder):
    return shards(write_shards(write_shards(folder), "val", 17), **{"SHARDS": {"SHUFFLE": 5}}).train


def flat(batch):
    (*views, image) = batch[0] if isinstance(batch[0], tuple) else (batch[0],)
    return [*views, image, *batch[1:]]


@pytest.mark.parametrize("make", [mixed, two_views, files, tars])
def test_the_rest_of_an_epoch_is_the_same(tmp_path, make, monkeypatch):
    monkeypatch.setattr("mdistiller.dataset.memory.two_views._BLOCK_BYTES", 10**5)  # several blocks
    loader = make(tmp_path)
    loader.set_epoch(3)
    whole = [flat(batch) for batch in loader]
    assert len(whole) == len(loader) > 3
    for start in (1, 3, len(loader)):
        loader.set_epoch(3, start)
        rest = [flat(batch) for batch in loader]
        assert len(rest) == len(whole) - start
        for one, other in zip(whole[start:], rest, strict=True):
            assert all(map(torch.equal, one, other))
    assert loader.epoch == 3
    assert len(list(loader)) == len(whole)  # the next epoch is whole again


def test_what_is_left_out_of_shards_is_not_read(tmp_path, monkeypatch):
    loader = tars(tmp_path)
    read = []
    original = type(loader.dataset).read
    monkeypatch.setattr(
        type(loader.dataset),
        "read",
        lambda self, *run: read.append(run[2] - run[1]) or original(self, *run),
    )
    loader.set_epoch(1, len(loader) - 1)
    assert len(list(loader)) == 1
    assert sum(read) < 20  # of 53 samples


assert wds  # skips this file where shards cannot be read
