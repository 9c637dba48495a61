"""Pairs of views: what comes in which order, for one process and several."""

import pytest
import torch
from data_support import MEAN, STD, collect, config, image_set, train_loader

from mdistiller.dataset import load_data
from mdistiller.dataset.memory import two_views as _two_views
from mdistiller.dataset.memory.two_views import TwoViewLoader


def two_views(**options):
    return train_loader(kind=TwoViewLoader, **options)


def collect_pairs(loader):
    """All batches of an iteration joined: (weak, strong, targets, index)."""
    parts = [(*pair, target, index) for pair, target, index in loader]
    return [torch.cat(column) for column in zip(*parts, strict=True)]


@pytest.fixture
def small_blocks(monkeypatch):
    """Strong views are made for 16 images at a time."""
    monkeypatch.setattr(_two_views, "_BLOCK_BYTES", 16 * 3 * 32 * 32)


def test_an_item_is_a_pair_with_target_and_index():
    (weak, strong), target, index = next(iter(two_views()))
    for view in (weak, strong):
        assert (view.shape, view.dtype) == ((8, 3, 32, 32), torch.float32)
    assert not torch.equal(weak, strong)
    assert torch.equal(target, image_set(50).targets[index])


@pytest.mark.parametrize("augment", ["crop_flip", "crop", "none"])
def test_the_weak_views_are_those_of_the_loader_of_one_view(augment):
    pairs, single = two_views(seed=4, augment=augment), train_loader(seed=4, augment=augment)
    for _ in range(2):
        weak, _, target, index = collect_pairs(pairs)
        for ours, want in zip((weak, target, index), collect(single), strict=True):
            assert torch.equal(ours, want)
        assert torch.equal(pairs.views, single.views)


def test_a_strong_view_belongs_to_its_image():
    loader = two_views()
    _, strong, _, index = collect_pairs(loader)
    view, parameters = loader.strong, loader._drawn.strong
    images = view.base.store(image_set(50).images)
    want = view.apply(images, parameters, torch.arange(50), view.group(parameters))
    assert torch.equal(strong, loader.normalize(want)[index])


def test_the_strong_crop_is_drawn_anew():
    loader = two_views(num=2000, batch_size=100, size=(8, 8))
    iter(loader)
    weak, strong = loader._drawn.parameters, loader._drawn.strong[:, 18:]
    assert weak.shape == strong.shape
    equal = (weak == strong).all(dim=1).float().mean()
    assert equal < 0.12  # 1 in 18 views agrees by chance


def test_same_seed_and_epoch_give_the_same_bits():
    first, second = two_views(seed=5), two_views(seed=5)
    second.set_epoch(7)
    collect_pairs(second)
    for epoch in (1, 2):
        second.set_epoch(epoch)
        ours, again = collect_pairs(first), collect_pairs(second)
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    other = collect_pairs(two_views(seed=6))
    assert not torch.equal(ours[1], other[1])


@pytest.mark.parametrize("batch_size", [7, 50])
def test_neither_batches_nor_blocks_change_a_view(small_blocks, batch_size):
    in_blocks = two_views(batch_size=batch_size)
    assert len(in_blocks._blocks) > 1 or batch_size == 50
    for ours, want in zip(collect_pairs(in_blocks), collect_pairs(two_views()), strict=True):
        assert torch.equal(ours, want)


@pytest.mark.parametrize(("num", "batch", "world"), [(49, 8, 2), (50, 8, 3)])
def test_processes_share_what_one_process_sees(small_blocks, num, batch, world):
    single = collect_pairs(two_views(num=num, batch_size=batch * world))
    ranks = [two_views(num=num, batch_size=batch, rank=r, world_size=world) for r in range(world)]
    steps = zip(*ranks, strict=True)
    parts = [(*pair, target, index) for step in steps for pair, target, index in step]
    for ours, want in zip(zip(*parts, strict=True), single, strict=True):
        assert torch.equal(torch.cat(ours), want)


def test_changing_a_batch_in_place_does_not_change_the_data():
    loader = two_views(augment="none", batch_size=50)
    for (weak, strong), _, _ in loader:
        weak.zero_()
        strong.zero_()
    assert torch.equal(loader.dataset.images, image_set(50).images)


def test_load_data_gives_pairs_if_asked():
    cfg = config("digits", batch_size=32)
    pair, _, _ = next(iter(load_data(cfg, two_views=True).train))
    image, _, _ = next(iter(load_data(cfg).train))
    assert torch.equal(pair[0], image)
    assert not torch.equal(pair[1], image)


@pytest.mark.gpu
def test_cuda_gives_the_batches_of_the_cpu_without_waiting():
    from mdistiller.dataset.memory.augment import AUGMENTS

    augment = AUGMENTS["crop_flip"]((32, 32))
    cuda = TwoViewLoader(image_set(50), 8, augment, MEAN, STD, torch.device("cuda"))
    steps = iter(cuda)  # copies what is drawn, once per epoch
    torch.cuda.set_sync_debug_mode("error")
    try:
        batches = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (pair, *rest), (want, *others) in zip(batches, two_views(), strict=True):
        for a, b in zip([*pair, *rest], [*want, *others], strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2.5e-7, atol=1e-6)


def test_a_lone_image_joins_the_batch_before(small_blocks):
    loader = two_views(batch_size=7)  # 50 images
    assert len(loader) == 8
    loader.merge_last_batch()
    sizes = [(len(weak), len(strong)) for (weak, strong), _, _ in loader]
    assert sizes == [(7, 7)] * 6 + [(8, 8)]
    assert sorted(collect_pairs(loader)[3].tolist()) == list(range(50))
