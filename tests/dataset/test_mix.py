"""Mixup, CutMix and random erasing: images and labels against values computed by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from data_support import collect, config, train_loader
from torchvision.transforms import v2

from mdistiller.dataset import load_data
from mdistiller.dataset.mixup import BatchAugment, cutmix, erase, mixup

SIZE = (32, 32)


def constant_images(*levels, size=(4, 5)):
    return torch.stack([torch.full((3, *size), float(level)) for level in levels])


LABELS = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])


def test_mixup_by_hand():
    images, labels = mixup(constant_images(0, 10, 100), LABELS, 0.75)
    levels = [0.25 * 100, 0.75 * 10, 0.75 * 100 + 0.25 * 10]  # each with the one before it
    torch.testing.assert_close(images, constant_images(*levels))
    expected = torch.tensor([[0.75, 0, 0.25], [0.25, 0.75, 0], [0, 0.25, 0.75]])
    torch.testing.assert_close(labels, expected)


def test_cutmix_by_hand():
    images, labels = cutmix(constant_images(0, 10, 100), LABELS, (1, 2, 3, 5))
    expected = constant_images(0, 10, 100)
    for k, level in enumerate([100, 0, 10]):
        expected[k, :, 1:3, 2:5] = level
    assert torch.equal(images, expected)
    own = 1 - 6 / 20  # 2 x 3 of 4 x 5 pixels
    expected = torch.tensor([[own, 0, 1 - own], [1 - own, own, 0], [0, 1 - own, own]])
    torch.testing.assert_close(labels, expected)


@pytest.mark.parametrize("kind", ["MixUp", "CutMix"])
def test_the_mix_is_torchvisions_for_the_same_weight(kind):
    generator = torch.Generator().manual_seed(0)
    images, targets = torch.rand(6, 3, 16, 12, generator=generator), torch.arange(6) % 4
    transform = getattr(v2, kind)(num_classes=4, alpha=0.7)
    drawn = {}
    make = transform.make_params

    def spy(flat):
        drawn.update(make(flat))
        return drawn

    transform.make_params = spy
    torch.manual_seed(3)
    expected = transform(images, targets)
    labels = F.one_hot(targets, 4).float()
    if kind == "MixUp":
        ours = mixup(images, labels, drawn["lam"])
    else:
        left, top, right, bottom = drawn["box"]
        ours = cutmix(images, labels, (top, left, bottom, right))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_erasing_by_hand():
    boxes = torch.tensor([[1, 2, 3, 5], [0, 0, 0, 0], [0, 0, 4, 5]], dtype=torch.int32)
    images = erase(constant_images(1, 2, 3), boxes)
    assert images[0].sum() == 3 * (20 - 6)
    assert (images[0, :, 1:3, 2:5] == 0).all()
    assert (images[1] == 2).all()
    assert (images[2] == 0).all()


def test_erased_parts_are_distributed_as_torchvisions():
    size, num = (60, 40), 4000
    boxes = BatchAugment(size, 2, erasing=0.5).draw_boxes(num, np.random.default_rng(0))
    top, left, bottom, right = boxes.double().unbind(1)
    height, width = bottom - top, right - left
    erased = height > 0
    assert erased.double().mean() == pytest.approx(0.5, abs=0.03)
    assert (bottom <= 60).all()
    assert (right <= 40).all()
    assert (top[erased] == 0).any()
    assert (bottom[erased] == 60).any()
    torch.manual_seed(0)
    image = torch.zeros(3, *size)
    rows = [v2.RandomErasing(p=1.0).make_params([image]) for _ in range(num // 2)]
    for ours, theirs in ((height, "h"), (width, "w"), (top, "i"), (left, "j")):
        expected = torch.tensor([float(row[theirs]) for row in rows])
        tolerance = 4 * expected.std() * (2 / len(rows)) ** 0.5  # of the difference of two means
        assert ours[erased].mean() == pytest.approx(expected.mean().item(), abs=tolerance.item())
        assert ours[erased].std() == pytest.approx(expected.std().item(), rel=0.1)


def test_patches_are_distributed_as_the_paper_says():
    mix = BatchAugment((40, 60), 2, cutmix=1.0)
    rng = np.random.default_rng(0)
    boxes = torch.tensor([mix.draw_patch(0.75, rng) for _ in range(3000)]).double()
    top, left, bottom, right = boxes.unbind(1)
    assert (bottom - top).max() == 20  # half of 40, since a quarter of the area is cut
    assert (right - left).max() == 30
    assert (top.min(), left.min(), bottom.max(), right.max()) == (0, 0, 40, 60)
    middle = ((bottom - top) == 20) & ((right - left) == 30)
    assert middle.double().mean() == pytest.approx(0.25, abs=0.04)  # centres in the inner half


def test_a_loader_mixes_what_it_gives_without():
    plain = collect(train_loader(num=24, augment="crop_flip"))
    batches = list(train_loader(num=24, mix=BatchAugment(SIZE, 4, mixup=0.8)))
    start, weights = 0, []
    for images, labels, index in batches:
        before = plain[0][start : start + 8]
        assert torch.equal(index, plain[2][start : start + 8])
        hard = F.one_hot(plain[1][start : start + 8], 4).float()
        other = hard.roll(1, 0)
        rows = (hard != other).any(1)
        weight = labels[rows][hard[rows].bool()][0]
        weights.append(float(weight))
        torch.testing.assert_close(labels, weight * hard + (1 - weight) * other)
        expected = weight * before + (1 - weight) * before.roll(1, 0)
        torch.testing.assert_close(images, expected, rtol=1e-5, atol=1e-5)
        start += 8
    assert len(set(weights)) == 3


def test_mixing_follows_from_seed_epoch_and_step():
    def loader(**options):
        return train_loader(
            mix=BatchAugment(SIZE, 4, mixup=0.8, cutmix=1.0, erasing=0.5), **options
        )

    first, second = loader(), loader()
    epochs = [collect(first) for _ in range(2)]
    second.set_epoch(2)
    for ours, again in zip(epochs[1], collect(second), strict=True):
        assert torch.equal(ours, again)
    assert not torch.equal(epochs[0][1].sort(1).values, epochs[1][1].sort(1).values)
    other = collect(loader(seed=1))
    assert not torch.equal(epochs[0][1].sort(1).values, other[1].sort(1).values)
    assert first.num_views is None
    assert (first.views == -1).all()  # no key of the pixels any more


def test_both_kinds_occur_where_both_are_on():
    mix = BatchAugment(SIZE, 4, mixup=1.0, cutmix=1.0)
    rng = np.random.default_rng(0)
    images, labels = constant_images(0, 9, size=SIZE), F.one_hot(torch.tensor([0, 1]), 4).float()
    kinds = [len(mix.mix(images, labels, rng)[0][0].unique()) > 1 for _ in range(60)]
    assert 15 < sum(kinds) < 45  # a patch leaves two levels in an image, a blend one


def test_erasing_does_not_depend_on_processes():
    mix = BatchAugment(SIZE, 4, erasing=0.6)
    whole = collect(train_loader(num=48, batch_size=8, mix=mix))
    ranks = [
        collect(train_loader(num=48, batch_size=4, mix=mix, rank=r, world_size=2)) for r in range(2)
    ]
    images = torch.cat([part[0] for part in ranks])[torch.cat([p[2] for p in ranks]).argsort()]
    assert torch.equal(images, whole[0][whole[2].argsort()])
    assert (images.flatten(2) == 0).all(1).any()  # some pixels have the mean colour
    assert whole[1].dtype == torch.int64  # labels stay


@pytest.mark.parametrize("randaugment", [[], [2, 15]])
def test_the_teachers_view_lacks_what_the_students_has_more(randaugment):
    """Erasing in memory; after RandAugment by workers, here the loading process."""

    def images(*flags, **keys):
        cfg = config("digits", batch_size=256, NUM_WORKERS=0, **keys)
        return next(iter(load_data(cfg, None, False, None, *flags).train))[0]

    kind = "workers" if randaugment else "memory"
    plain = images(LOADER=kind)
    keys = {"ERASING": 0.5, "RANDAUGMENT": randaugment, "LOADER": kind}
    both, strong = images(True, **keys), images(**keys)
    assert torch.equal(both, strong)
    assert torch.equal(both.teacher_view, plain)
    assert not torch.equal(strong, plain)
    assert not hasattr(strong, "teacher_view")


def test_config_keys_make_soft_labels():
    for keys in ({"MIXUP": 0.8}, {"CUTMIX": 1.0}):
        data = load_data(config("digits", batch_size=32, **keys))
        images, labels, _ = next(iter(data.train))
        assert (labels.shape, labels.dtype) == ((32, 10), torch.float32)
        torch.testing.assert_close(labels.sum(1), torch.ones(32))
        assert (labels > 0).sum(1).max() == 2
        assert images.shape == (32, 3, 32, 32)
        assert next(iter(data.val))[1].dtype == torch.int64


@pytest.mark.gpu
def test_no_step_waits_for_cuda():
    from data_support import image_set

    from mdistiller.dataset.memory.augment import AUGMENTS
    from mdistiller.dataset.memory.loader import TrainLoader

    mix = BatchAugment(SIZE, 4, erasing=0.5, mixup=0.8, cutmix=1.0)
    stats = (0.5, 0.5, 0.5), (0.2, 0.2, 0.2)
    cuda = torch.device("cuda")
    loader = TrainLoader(image_set(50), 8, AUGMENTS["crop"](SIZE), *stats, cuda, mix=mix)
    steps = iter(loader)
    next(steps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
