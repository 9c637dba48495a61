"""Order, views and shares of the loaders, for one process and several."""

import pytest
import torch
from data_support import MEAN, STD, collect, eval_loader, image_set, train_loader

from mdistiller.dataset.sampler import DistributedBatchSampler, rank_slice
from mdistiller.registry import UserError

WORLDS = [(50, 8, 1), (48, 8, 2), (49, 8, 3)]


def test_a_batch_has_the_promised_types():
    image, target, index = next(iter(train_loader()))
    assert (image.shape, image.dtype) == ((8, 3, 32, 32), torch.float32)
    assert (target.shape, target.dtype) == ((8,), torch.int64)
    assert (index.shape, index.dtype) == ((8,), torch.int64)


def test_targets_and_index_belong_to_the_image():
    data = image_set(50)
    images, targets, index = collect(train_loader(augment="none"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (MEAN, STD))
    torch.testing.assert_close(images, (data.images[index] / 255 - mean) / std)
    assert torch.equal(targets, data.targets[index])


def test_same_seed_and_epoch_give_the_same_bits():
    first, second = train_loader(seed=5), train_loader(seed=5)
    second.set_epoch(7)
    collect(second)
    for epoch in (1, 2):
        second.set_epoch(epoch)
        for ours, again in zip(collect(first), collect(second), strict=True):
            assert torch.equal(ours, again)


def test_other_epochs_and_seeds_give_other_orders_and_views():
    loader, other = train_loader(seed=5), train_loader(seed=6)
    runs = [(collect(loader)[2], loader.views) for _ in range(2)] + [
        (collect(other)[2], other.views)
    ]
    for i, j in [(0, 1), (0, 2), (1, 2)]:
        assert not torch.equal(runs[i][0], runs[j][0])
        assert not torch.equal(runs[i][1], runs[j][1])


def test_the_order_is_shuffled_over_the_whole_set():
    index = collect(train_loader(num=1000, batch_size=100, size=(8, 8)))[2]
    moved = (index - torch.arange(1000)).abs().float().mean()
    assert 280 < moved < 390  # a third of the set for a uniform permutation


def test_epochs_follow_one_another_from_one_unless_set():
    loader = train_loader()
    seen = []
    for _ in range(2):
        iter(loader)
        seen.append(loader.epoch)
    loader.set_epoch(9)
    for _ in range(2):
        iter(loader)
        seen.append(loader.epoch)
    assert seen == [1, 2, 9, 10]


def test_reading_views_first_does_not_skip_an_epoch():
    loader, plain = train_loader(), train_loader()
    views = loader.views
    assert torch.equal(collect(loader)[2], collect(plain)[2])
    assert torch.equal(views, plain.views)


def test_batch_size_changes_neither_order_nor_views():
    for small, large in zip(
        collect(train_loader(batch_size=7)), collect(train_loader(batch_size=50)), strict=True
    ):
        assert torch.equal(small, large)


def test_views_are_a_key_of_the_pixels():
    loader = train_loader(num=3, batch_size=3)
    seen = {}
    for _ in range(120):
        for image, _, index in loader:
            keys = zip(index.tolist(), loader.views[index].tolist(), strict=True)
            for key, pixels in zip(keys, image, strict=True):
                assert torch.equal(seen.setdefault(key, pixels), pixels)
    assert 200 < len(seen) < 300  # of 3 x 162 in 360 draws


@pytest.mark.parametrize(("num", "batch", "world"), WORLDS)
def test_processes_share_what_one_process_sees(num, batch, world):
    single = train_loader(num=num, batch_size=batch * world)
    ranks = [
        train_loader(num=num, batch_size=batch, rank=r, world_size=world) for r in range(world)
    ]
    assert len({len(loader) for loader in ranks}) == 1
    images, targets, index = collect(single)
    assert index.sort().values.tolist() == list(range(num))  # each once
    joined = [
        torch.cat(parts)
        for step in zip(*ranks, strict=True)
        for parts in [[batch[k] for batch in step] for k in range(3)]
    ]
    for k, whole in enumerate((images, targets, index)):
        assert torch.equal(torch.cat(joined[k::3]), whole)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_process_has_something_in_every_step_and_weights_are_exact(world):
    for num in range(24, 60):
        samplers = [DistributedBatchSampler(num, 8, rank, world) for rank in range(world)]
        for step in range(len(samplers[0])):
            start, stop = samplers[0].batch(step)
            parts = [sampler.local_batch(step) for sampler in samplers]
            sizes = [last - first for first, last in parts]
            assert min(sizes) >= 1
            assert sum(sizes) == stop - start
            weights = [sampler.loss_weight(step) for sampler in samplers]
            assert abs(sum(weights) - world) < 1e-9
            for size, weight in zip(sizes, weights, strict=True):  # averaged means = global mean
                assert abs(weight / (size * world) - 1 / (stop - start)) < 1e-9
        assert samplers[0].batch(len(samplers[0]) - 1)[1] == num


def test_the_loss_weight_of_a_loader_is_that_of_its_plan():
    loader = train_loader(num=49, batch_size=8, rank=0, world_size=2)
    assert loader.loss_weight(0) == 1.0
    assert len(loader) == 3  # 16 + 16 + 17: one left over joins the last batch
    assert loader.loss_weight(2) == pytest.approx(9 * 2 / 17)


def test_the_last_partial_batch_is_kept_unless_dropped():
    assert [len(t) for _, t, _ in train_loader(num=50, batch_size=8)] == [8] * 6 + [2]
    dropped = train_loader(num=50, batch_size=8, drop_last=True)
    assert [len(t) for _, t, _ in dropped] == [8] * 6 == [8] * len(dropped)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"BATCH_SIZE 20 x 3 process.*more than the 50 training"):
        train_loader(num=50, batch_size=20, rank=0, world_size=3)
    with pytest.raises(UserError, match="BATCH_SIZE 0 must be at least 1"):
        train_loader(num=50, batch_size=0)


@pytest.mark.parametrize(("num", "world"), [(50, 1), (50, 3), (2, 3)])
def test_evaluation_counts_every_image_once_and_in_order(num, world):
    ranks = [eval_loader(num=num, rank=r, world_size=world) for r in range(world)]
    assert [len(list(loader)) for loader in ranks] == [len(loader) for loader in ranks]
    targets = torch.cat([target for loader in ranks for _, target in loader])
    assert torch.equal(targets, image_set(num).targets)
    assert {len(loader.dataset) for loader in ranks} == {num}


def test_a_share_is_contiguous_and_even():
    assert [rank_slice(10, rank, 4) for rank in range(4)] == [(0, 3), (3, 6), (6, 8), (8, 10)]


def test_changing_a_batch_in_place_does_not_change_the_data():
    for loader in (train_loader(augment="none", batch_size=50), eval_loader(batch_size=50)):
        for batch in loader:
            for part in batch:
                part.zero_()
        assert torch.equal(loader.dataset.images, image_set(50).images)
        assert torch.equal(loader.dataset.targets, image_set(50).targets)


@pytest.mark.gpu
@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "rotate_flip"])
def test_cuda_gives_the_batches_of_the_cpu(augment):
    from mdistiller.dataset.memory.augment import AUGMENTS
    from mdistiller.dataset.memory.loader import TrainLoader

    cuda = TrainLoader(
        image_set(50), 8, AUGMENTS[augment]((32, 32)), MEAN, STD, torch.device("cuda")
    )
    steps = iter(cuda)  # copies what is drawn, once per epoch
    torch.cuda.set_sync_debug_mode("error")  # no host sync in the loop
    try:
        batches = list(steps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, expected in zip(batches, train_loader(augment=augment), strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a.cpu(), b, rtol=2.5e-7, atol=1e-6)


@pytest.mark.parametrize(("num", "batch", "world"), WORLDS)
def test_what_batches_will_hold_is_known_beforehand(num, batch, world):
    for rank in range(world):
        loader = train_loader(num, batch, rank=rank, world_size=world)
        loader.set_epoch(3)
        foretold = loader.batches()
        assert [part.tolist() for part in foretold] == [index.tolist() for _, _, index in loader]
        assert loader.epoch == 3


@pytest.mark.parametrize("augment", ["none", "crop", "crop_flip", "rotate_flip"])
def test_any_image_of_an_epoch_can_be_made_again(augment):
    loader = train_loader(augment=augment)
    loader.set_epoch(2)
    early = loader.images(torch.arange(50))
    images, _, index = collect(loader)
    assert torch.equal(images, early[index])
    assert torch.equal(loader.images(index.flip(0)), images.flip(0))


def test_images_of_other_views_leave_the_epoch_as_it_is():
    loader = train_loader()
    loader.set_epoch(1)
    before = loader.images(torch.arange(50))
    other = loader.augment.draw(50, torch.Generator().manual_seed(9))
    views = loader.augment.views(other)
    same = views == loader.views
    made = loader.images(torch.arange(50), other)
    assert torch.equal(made[same], before[same])
    assert not any(torch.equal(a, b) for a, b in zip(made[~same], before[~same], strict=True))
    assert torch.equal(loader.images(torch.arange(50)), before)
