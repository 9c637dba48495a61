"""Loaders with worker processes: the same batches for any number of them, and those of memory."""

import multiprocessing
import os
import pickle
import signal
import time
from dataclasses import dataclass

import pytest
import torch
from data_support import collect, config, image_set, one_line, write_folders, write_image
from worker_support import STATISTICS, WNIDS, imagenet, photo

from mdistiller.dataset import DATASETS, DataSource, load_data
from mdistiller.dataset.files.loader import (
    BatchRequest,
    ImageBatchBuilder,
    WorkerPool,
    WorkerTrainLoader,
)
from mdistiller.dataset.files.transforms import TrainTransform
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.registry import UserError


def by_index(batches):
    """Images and targets of joined batches, by the images' numbers."""
    images, targets, index = batches
    order = index.argsort()
    return images[order], targets[order], index[order]


def test_batches_are_the_promised_ones(folder):
    data = imagenet(folder)
    image, target, index = next(iter(data.train))
    assert (image.shape, image.dtype, image.is_contiguous()) == (
        (4, 3, 32, 32),
        torch.float32,
        True,
    )
    assert (target.dtype, index.dtype) == (torch.int64, torch.int64)
    assert torch.equal(target, index // 8)
    assert (data.num_data, data.num_classes, data.classes) == (24, 3, list(WNIDS))
    assert (data.zoo, data.image_size) == ("imagenet", (32, 32))
    assert data.mean == (0.485, 0.456, 0.406)
    assert len(data.val.dataset) == 9
    assert data.val.dataset.targets.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_the_number_of_workers_changes_nothing(folder):
    alone, shared = imagenet(folder), imagenet(folder, 2)
    for _ in range(2):  # the workers stay for the second epoch
        for ours, theirs in zip(collect(alone.train), collect(shared.train), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(collect(alone.val), collect(shared.val), strict=True):
        assert torch.equal(ours, theirs)


def test_workers_give_what_memory_gives(tmp_path):
    write_folders(tmp_path, per_class=5, size=(9, 12))
    keys = {"ROOT": tmp_path, "IMAGE_SIZE": 16, "AUGMENT": "crop_flip", "VAL_SPLIT": 2}
    keys["NUM_WORKERS"] = 0
    memory = load_data(config("imagefolder", LOADER="memory", **keys))
    workers = load_data(config("imagefolder", LOADER="workers", **keys))
    assert type(memory.train) is TrainLoader
    assert type(workers.train) is WorkerTrainLoader
    assert memory.mean == pytest.approx(workers.mean, rel=1e-12)
    for name in ("train", "val", "test"):
        pair = [collect(getattr(data, name)) for data in (memory, workers)]
        for ours, theirs in zip(*pair, strict=True):
            assert torch.equal(ours, theirs), name
    assert torch.equal(memory.train.views, workers.train.views)


def test_a_set_in_memory_goes_through_workers_as_well(monkeypatch):
    class Shapes(DataSource):
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

        def load(self, root, split, options):
            return image_set(12)

    monkeypatch.setitem(DATASETS, "shapes", Shapes)
    keys = {"NUM_WORKERS": 0}
    for keys["AUGMENT"] in ("none", "crop", "rotate_flip"):
        pair = [
            load_data(config("shapes", LOADER=kind, **keys)).train for kind in ("memory", "workers")
        ]
        for ours, theirs in zip(*map(collect, pair), strict=True):
            assert torch.equal(ours, theirs), keys["AUGMENT"]
        enlarged = load_data(config("shapes", LOADER="workers", IMAGE_SIZE=48, **keys))
        assert next(iter(enlarged.train))[0].shape == (4, 3, 48, 48)


@pytest.mark.parametrize("keys", [{}, {"RANDAUGMENT": [2, 9]}])
def test_a_view_follows_from_seed_epoch_and_index_alone(folder, keys):
    whole = by_index(collect(imagenet(folder, **keys).train))
    assert whole[2].tolist() == list(range(24))
    ranks = [collect(imagenet(folder, rank=r, world_size=2, **keys).train) for r in range(2)]
    joined = by_index([torch.cat(parts) for parts in zip(*ranks, strict=True)])
    for ours, theirs in zip(whole, joined, strict=True):
        assert torch.equal(ours, theirs)
    assert not set(ranks[0][2].tolist()) & set(ranks[1][2].tolist())
    other = by_index(collect(imagenet(folder, seed=1, **keys).train))
    assert not (other[0] == whole[0]).flatten(1).all(1).any()


def test_set_epoch_repeats_an_epoch_also_one_that_was_left_half_way(folder):
    data = imagenet(folder)
    epochs = [collect(data.train) for _ in range(3)]
    assert not torch.equal(epochs[0][2], epochs[1][2])
    fresh = imagenet(folder, workers=1).train
    fresh.set_epoch(3)
    steps = iter(fresh)
    next(steps), next(steps)
    for epoch in (2, 3):
        fresh.set_epoch(epoch)
        for ours, again in zip(epochs[epoch - 1], collect(fresh), strict=True):
            assert torch.equal(ours, again)
    assert fresh.epoch == 3


def test_evaluation_takes_every_image_once(folder):
    whole = collect(imagenet(folder).val)
    for world in (2, 11):  # the last processes have no image
        parts = [
            list(imagenet(folder, rank=r, world_size=world, batch_size=1).val) for r in range(world)
        ]
        batches = [batch for part in parts for batch in part]
        for k in range(2):
            assert torch.equal(torch.cat([batch[k] for batch in batches]), whole[k])
        assert len(parts[-1]) == (0 if world == 11 else 1)


def test_the_last_batch_is_dropped_if_asked_and_held_out_images_stay_out(folder):
    data = imagenet(folder, DROP_LAST=True, VAL_SPLIT=3)
    index = collect(data.train)[2]
    assert (data.num_data, len(index), len(data.train)) == (21, 20, 5)
    kept = {data.train.dataset.path(i) for i in range(21)}
    held = {data.val.dataset.path(i) for i in range(3)}
    assert len(kept | held) == 24
    assert data.val.dataset.targets.tolist() == [0, 1, 2]
    assert len(data.test.dataset) == 9


def break_image(path):
    path.write_bytes(path.read_bytes()[:300])


def replace_by_text(path):
    path.write_text("not an image")


def remove(path):
    path.unlink()


def test_a_corrupt_image_is_named_in_one_line(tmp_path):
    for split in ("train", "val"):
        for wnid in WNIDS[:2]:
            for k in range(2):
                write_image(tmp_path / split / wnid / f"{k}.JPEG", photo(k))
    data, in_worker = imagenet(tmp_path), imagenet(tmp_path, 1)
    for split in ("train", "val"):
        path = tmp_path / split / WNIDS[1] / "0.JPEG"
        for fault in (break_image, replace_by_text, remove):
            fault(path)
            loaders = [getattr(data, split)]
            if fault is replace_by_text and split == "train":
                loaders.append(in_worker.train)
            for loader in loaders:
                with pytest.raises(UserError) as error:
                    list(loader)
                assert one_line(error).startswith(f"{path} cannot be read as an image (")


def test_the_global_generator_is_left_alone(folder):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    collect(imagenet(folder, RANDAUGMENT=[2, 9]).train)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_view_may_be_a_stack_of_views(folder):
    """What a method that compares two views of an image needs."""

    class Twice(TrainTransform):
        def __call__(self, image, name, parameters):
            return super().__call__(image, name, parameters).expand(2, -1, -1, -1)

    train = imagenet(folder).train
    view = Twice(train.augment.augment, train.augment.resize)
    twice = WorkerTrainLoader(
        train.dataset, 4, view, *STATISTICS, torch.device("cpu"), num_workers=0
    )
    for (one, *rest), (two, *same) in zip(train, twice, strict=True):
        assert two.shape == (4, 2, 3, 32, 32)
        for k in range(2):
            assert torch.equal(two[:, k], one)
        assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))


def test_what_workers_get_can_be_sent_to_them(folder):
    """Where processes are spawned, it is pickled."""
    train = imagenet(folder, RANDAUGMENT=[1, 5]).train
    train.set_epoch(1)
    request = train._request(0, train._drawn)
    builder = train._workers._loader.dataset
    assert torch.equal(pickle.loads(pickle.dumps(builder))[request], builder[request])


def test_only_loaders_over_memory_make_any_image_at_any_time(folder):
    assert not imagenet(folder).train.makes_images
    assert TrainLoader.makes_images


@dataclass
class Fails:
    """A reader whose process dies, or sleeps for a long time."""

    sleeps: bool

    def __call__(self, request):
        if self.sleeps:
            time.sleep(2)  # longer than the timeout
        else:
            os.kill(os.getpid(), signal.SIGKILL)
        return ()


@pytest.mark.parametrize(
    ("sleeps", "says"),
    [
        (False, "a data loading worker died .* killed, or out of memory"),
        (True, "data loading timed out .*DATASET.WORKER_TIMEOUT"),
    ],
)
def test_a_dead_or_hanging_worker_ends_the_run_in_one_line(sleeps, says):
    workers = WorkerPool(ImageBatchBuilder(Fails(sleeps), None), 1, torch.device("cpu"), timeout=1)
    with pytest.raises(UserError, match=says) as error:
        list(workers.batches([BatchRequest(torch.arange(2))]))
    assert "\n" not in str(error.value)


def test_signals_to_the_whole_group_leave_workers_alone(folder):
    others = set(multiprocessing.active_children())
    loader = imagenet(folder, workers=1).train
    batches = iter(loader)
    next(batches)
    (worker,) = set(multiprocessing.active_children()) - others
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        os.kill(worker.pid, name)
    assert len(list(batches)) == len(loader) - 1
    assert worker.is_alive()
