"""Training batches: endless, grouped, shared among processes, resumed to the bit."""

import gc
import itertools
import json
import multiprocessing
from collections import Counter

import numpy as np
import pytest
import torch
from synth import make_coco
from yacs.config import CfgNode

from mdistiller.detection.batches import TrainBatches, ValBatches
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.data import DATA, train_batches, val_loader
from mdistiller.detection.sampler import AspectRatioSampler
from mdistiller.registry import UserError


@pytest.fixture(scope="module")
def synth(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("batches"), 11, size=(48, 64), empty=2)


@pytest.fixture(scope="module")
def data(synth):
    return CocoDetectionSet(synth.images, synth.annotations, masks=True)


def batches(data, batch_size=2, **options):
    keys = {"min_sizes": (40, 48, 56), "max_size": 80, "seed": 5, **options}
    return TrainBatches(data, batch_size, **keys)


def same(one, other):
    """Whether two batches are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one[0], other[0], strict=True)) and all(
        a.keys() == b.keys()
        and all(
            torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
        )
        for a, b in zip(one[1], other[1], strict=True)
    )


def take(stream, number):
    return list(itertools.islice(stream, number))


def ids(made):
    return [[target["image_id"] for target in targets] for _, targets in made]


def test_batches_are_the_promised_ones(data):
    images, targets = next(iter(batches(data)))
    assert [image.dtype for image in images] == [torch.float32] * 2
    assert all(image.min() >= 0 and 0.5 < image.max() <= 1 for image in images)
    assert set(targets[0]) == {"boxes", "labels", "image_id", "size", "masks"}
    for image, target in zip(images, targets, strict=True):
        assert image.shape[0] == 3
        assert target["masks"].shape == (len(target["labels"]), *image.shape[1:])


@pytest.mark.parametrize("grouped", [True, False])
def test_every_image_comes_once_in_a_round(data, grouped):
    """Also those that wait for others of their orientation."""
    stream = batches(data, batch_size=2, grouping=grouped)
    seen = Counter(number for row in ids(take(stream, 55)) for number in row)  # ten rounds
    assert sum(seen.values()) == 110
    assert set(seen) == {data.image_id(i) for i in range(11)}
    spread = max(seen.values()) - min(seen.values())
    assert spread <= (1 if grouped else 0)


def test_batches_hold_one_orientation(data):
    for grouped in (True, False):
        shapes = [
            [i.shape[1] > i.shape[2] for i in x]
            for x, _ in take(batches(data, 3, grouping=grouped), 30)
        ]
        mixed = sum(len(set(row)) > 1 for row in shapes)
        assert (mixed == 0) == grouped


def test_orders_and_views_are_drawn_anew_in_each_round(data):
    stream = take(batches(data, 1, grouping=False), 44)
    rounds = [[row[0] for row in ids(stream)[k : k + 11]] for k in range(0, 44, 11)]
    assert len({tuple(order) for order in rounds}) == 4
    views = {}
    for (image,), (target,) in stream:
        views.setdefault(target["image_id"], set()).add(image.sum().item())
    assert all(len(seen) > 1 for seen in views.values())


def test_views_follow_the_drawn_sizes_and_flips(data):
    stream = batches(data)
    views = [stream.requests.view(position, 0) for position in range(3000)]
    sizes = Counter(view.min_size for view in views)
    assert set(sizes) == {40, 48, 56}
    assert min(sizes.values()) > 900
    assert 1400 < sum(view.flip for view in views) < 1600
    assert not any(batches(data, flip=0.0).requests.view(p, 0).flip for p in range(50))
    assert all(batches(data, flip=1.0).requests.view(p, 0).flip for p in range(50))
    other = batches(data, seed=6)
    assert [other.requests.view(p, 0) for p in range(50)] != views[:50]


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_what_one_would_take(data, world):
    """Rank by rank a global batch is that of one process with a batch so much larger."""
    alone = take(batches(data, 2 * world), 8)
    parts = [take(batches(data, 2, rank=r, world_size=world), 8) for r in range(world)]
    for step, whole in enumerate(alone):
        images = [image for part in parts for image in part[step][0]]
        targets = [target for part in parts for target in part[step][1]]
        assert same(whole, (images, targets))


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(data, workers):
    alone, shared = batches(data, 3), batches(data, 3, num_workers=workers)
    stream = iter(shared)
    for one, other in zip(take(alone, 12), take(stream, 12), strict=True):
        assert same(one, other)
    assert alone.state_dict() == shared.state_dict()  # not that of the batches made ahead


@pytest.mark.parametrize("workers", [0, 2])
def test_what_follows_a_state_is_the_same_again(data, workers):
    """Resumed through JSON with images waiting, in another number of workers and processes."""
    first = batches(data, 4)
    stream = iter(first)
    resumed = 0
    for _ in range(6):
        next(stream)
        state = json.loads(json.dumps(first.state_dict()))
        resumed += any(state["waiting"])
    assert resumed > 3
    follows = take(stream, 5)
    again = batches(data, 4, num_workers=workers)
    again.load_state_dict(state)
    assert again.state_dict() == state
    assert all(map(same, follows, take(again, 5)))
    halves = [batches(data, 2, rank=r, world_size=2) for r in range(2)]
    for half in halves:
        half.load_state_dict(state)
    for whole, a, b in zip(follows, *(take(half, 5) for half in halves), strict=True):
        assert same(whole, (a[0] + b[0], a[1] + b[1]))


def test_iterating_again_continues(data):
    straight = take(batches(data), 9)
    stream = batches(data, num_workers=1)
    broken = take(stream, 4) + take(stream, 5)
    assert all(map(same, straight, broken))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"seed": 6}, "seed 5"),
        ({"batch_size": 3}, "batch_size 2"),
        ({"grouping": False}, "grouped"),
    ],
)
def test_a_state_of_other_batches_is_refused(data, changes, name):
    state = batches(data).state_dict()
    with pytest.raises(UserError, match=name):
        batches(data, **changes).load_state_dict(state)


def test_a_state_of_another_set_is_refused(data, synth):
    fewer = CocoDetectionSet(synth.images, synth.annotations, keep_empty=False, masks=True)
    with pytest.raises(UserError, match="at images 11, now it is 9"):
        batches(fewer).load_state_dict(batches(data).state_dict())


def test_draws_reach_far_positions_at_once():
    """A resumed run does not draw again what came before."""
    draws = AspectRatioSampler(np.zeros(7, bool), 2, seed=1)
    draws.load_state_dict({"position": 7 * 10**9 + 3, "waiting": [[], []]})
    assert [position for position, _ in draws.next()] == [7 * 10**9 + 3, 7 * 10**9 + 4]
    whole = AspectRatioSampler(np.zeros(7, bool), 7, seed=1)
    assert sorted(image for _, image in whole.next()) == list(range(7))


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_takes_every_image_once_in_order(data, workers):
    whole = list(ValBatches(data, 2, min_size=40, num_workers=workers))
    assert len(whole) == len(ValBatches(data, 2)) == 6
    assert [n for row in ids(whole) for n in row] == [data.image_id(i) for i in range(11)]
    parts = [ValBatches(data, 2, min_size=40, rank=r, world_size=3) for r in range(3)]
    assert [n for part in parts for row in ids(part) for n in row] == [
        data.image_id(i) for i in range(11)
    ]
    for images, targets in whole:
        assert all(min(image.shape[1:]) == 40 for image in images)
        assert all("masks" not in target for target in targets)
    assert ids(whole) == ids(ValBatches(data, 2, min_size=40))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_a_line(tmp_path, workers):
    broken = make_coco(tmp_path, 3, size=(48, 64), empty=0)
    (broken.images / "0001.png").write_bytes(b"\x89PNG nothing")
    stream = ValBatches(CocoDetectionSet(broken.images, broken.annotations), num_workers=workers)
    with pytest.raises(UserError, match=r"0001\.png cannot be read as an image") as error:
        list(stream)
    assert "\n" not in str(error.value)


def config(synth, **keys):
    node = {
        **DATA,
        "TRAIN_IMAGES": str(synth.images),
        "TRAIN_ANNOTATIONS": str(synth.annotations),
        "VAL_IMAGES": str(synth.images),
        "VAL_ANNOTATIONS": str(synth.annotations),
        "MIN_SIZES": [40],
        "TEST_MIN_SIZE": 44,
        **keys,
    }
    return CfgNode(
        {
            "DETECTION": {"DATA": node, "STUDENT": {"MASK": False}, "EVALUATOR": "pycocotools"},
            "SOLVER": {"BATCH_SIZE": 2},
            "EXPERIMENT": {"SEED": 3},
            "DATASET": {"NUM_WORKERS": 0, "WORKER_TIMEOUT": 0, "SKIP_CORRUPT": False},
        }
    )


def test_a_config_gives_both_streams(synth):
    train, val = train_batches(config(synth)), val_loader(config(synth))
    assert (len(train.dataset), len(val.dataset)) == (9, 11)  # training leaves out empty images
    assert (train.batch_size, train.requests.sampler.seed, val.batch_size) == (2, 3, 1)
    assert min(next(iter(train))[0][0].shape[1:]) == 40
    assert min(next(iter(val))[0][0].shape[1:]) == 44
    assert len(train_batches(config(synth, KEEP_EMPTY=True)).dataset) == 11


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MIN_SIZES", [], r"MIN_SIZES \[\] must be"),
        ("MIN_SIZES", [0], r"MIN_SIZES \[0\] must be"),
        ("MAX_SIZE", 0, "MAX_SIZE 0 must be at least 1"),
        ("TEST_MIN_SIZE", 0, "TEST_MIN_SIZE 0 must be at least 1"),
        ("TEST_BATCH_SIZE", 0, "TEST_BATCH_SIZE 0 must be at least 1"),
        ("FLIP", 1.5, "FLIP 1.5 is a probability"),
        ("BAD_ANNOTATIONS", "drop", "BAD_ANNOTATIONS 'drop' is unknown; use error or fix"),
        ("TRAIN_ANNOTATIONS", "none.json", "TRAIN_ANNOTATIONS: there is no annotation file"),
        ("TRAIN_IMAGES", "/none", "set DETECTION.DATA.TRAIN_IMAGES"),
    ],
)
def test_values_that_cannot_be_meant_are_refused(synth, key, value, message):
    with pytest.raises(UserError, match=message):
        train_batches(config(synth, **{key: value}))


def test_batch_sizes_below_one_are_refused(data):
    with pytest.raises(UserError, match=r"SOLVER\.BATCH_SIZE 0"):
        batches(data, 0)


def test_a_large_image_shrinks_to_the_longer_side(tmp_path):
    """Its height is rounded up, so boxes are scaled by another factor in y than in x."""
    long = make_coco(tmp_path, 1, size=(31, 200), empty=0, crowds=0)
    data = CocoDetectionSet(long.images, long.annotations)
    (image,), (target,) = next(iter(ValBatches(data, min_size=60, max_size=100)))
    assert image.shape[1:] == (16, 100)
    x, y, w, h = long.contents["annotations"][0]["bbox"]
    expected = [x / 2, y * 16 / 31, (x + w) / 2, (y + h) * 16 / 31]
    assert target["boxes"][0].tolist() == pytest.approx(expected, rel=1e-6)


def test_workers_end_with_the_batches_they_make(data):
    """At once, although more were asked for: nothing that they work on keeps them."""
    before = set(multiprocessing.active_children())
    stream = batches(data, num_workers=2)
    next(iter(stream))
    ours = set(multiprocessing.active_children()) - before
    assert len(ours) == 2
    gc.disable()  # references alone have to do
    try:
        del stream
        assert not ours & set(multiprocessing.active_children())
    finally:
        gc.enable()
    assert [child.exitcode for child in ours] == [0, 0]  # none had to be killed
