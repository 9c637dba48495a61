"""DATASET.SAMPLER balanced: classes of any size equally often, for every loader and process."""

import pytest
import torch
from data_support import CPU, MEAN, STD, config, one_line, random_images, write_folders

from mdistiller.dataset import ImageSet, load_data
from mdistiller.dataset.files.loader import WorkerTrainLoader
from mdistiller.dataset.files.transforms import EvalTransform, TrainTransform
from mdistiller.dataset.memory.augment import AUGMENTS
from mdistiller.dataset.memory.loader import TrainLoader
from mdistiller.dataset.memory.two_views import TwoViewLoader
from mdistiller.dataset.sampler import balanced_order
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError

SIZE = (16, 16)


def uneven(classes=(30, 8, 2)):
    targets = torch.cat([torch.full((num,), k) for k, num in enumerate(classes)])
    return ImageSet(random_images(len(targets), SIZE), targets, list("abc"))


def balanced(kind=TrainLoader, **options):
    augment = AUGMENTS["crop_flip"](SIZE)
    if kind is WorkerTrainLoader:
        keep = EvalTransform(SIZE, Preprocessing(resize="keep"))
        augment, options = TrainTransform(augment, keep), {"num_workers": 0, **options}
    return kind(uneven(), 8, augment, MEAN, STD, CPU, balanced=True, **options)


def test_an_epoch_has_every_class_equally_often_and_its_images_in_turn():
    targets = uneven().targets[torch.randperm(40)]
    sizes = set()
    for seed in range(20):
        order = balanced_order(targets, torch.Generator().manual_seed(seed))
        counts = targets[order].bincount()
        assert sorted(counts.tolist()) == [13, 13, 14]
        sizes.add(tuple(counts.tolist()))
        for label in range(3):
            images = order.bincount(minlength=40)[targets == label]
            assert images.max() - images.min() <= 1
    assert len(sizes) == 3  # no class is favoured
    first, last = targets[order[:20]].bincount(), targets[order[20:]].bincount()
    assert first.min() >= 2
    assert last.min() >= 2


@pytest.mark.parametrize("kind", [TrainLoader, WorkerTrainLoader])
def test_processes_share_one_order_and_an_epoch_goes_on_where_it_stopped(kind):
    whole, parts = balanced(kind), [balanced(kind, rank=r, world_size=2) for r in range(2)]
    batches = list(whole)
    assert torch.cat([target for _, target, _ in batches]).bincount().min() == 13
    steps = [
        [torch.cat(both) for both in zip(*step, strict=True)] for step in zip(*parts, strict=True)
    ]
    joined = [torch.cat(column) for column in zip(*steps, strict=True)]
    for ours, alone in zip(joined, map(torch.cat, zip(*batches, strict=True)), strict=True):
        assert torch.equal(ours, alone)
    again = balanced(kind)
    again.set_epoch(1, start=3)
    for ours, before in zip(list(again), batches[3:], strict=True):
        assert all(map(torch.equal, ours, before))


def test_an_image_that_is_shown_again_in_an_epoch_gets_another_view():
    images, _, index = map(torch.cat, zip(*balanced(), strict=True))
    rare = images[index == 39]
    assert len(rare) >= 6
    assert len(torch.unique(rare, dim=0)) > len(rare) // 2


def test_loaders_over_memory_and_files_show_the_same_images():
    """Workers draw a seed an image as well, so only the order is compared."""
    orders = [
        torch.cat([index for _, _, index in balanced(kind)])
        for kind in (TrainLoader, WorkerTrainLoader, TwoViewLoader)
    ]
    assert torch.equal(orders[0], orders[1])
    assert torch.equal(orders[0], orders[2])


def test_two_views_are_those_of_their_image():
    """A strong view without strong operations is a crop of the same image: compare mean colours."""
    loader = balanced(TwoViewLoader)
    (weak, strong), _, index = next(iter(loader))
    plain = next(iter(balanced()))
    assert torch.equal(weak, plain[0])
    assert torch.equal(index, plain[2])
    groups, rows = loader._drawn.groups, loader._drawn.strong
    whole = loader.strong.apply(
        loader._store[torch.cat(loader.batches())], rows, torch.arange(40), groups[0]
    )
    assert torch.equal(strong, loader.normalize(whole[:8]))


def test_values_and_data_that_cannot_be_balanced_are_refused(tmp_path):
    folder = write_folders(tmp_path, per_class=4)
    for kind, value, message in (
        ("imagefolder", "even", "must be default or balanced, got 'even'"),
        ("webdataset", "balanced", "reads its shards from front to back"),
    ):
        with pytest.raises(UserError) as error:
            load_data(config(kind, ROOT=folder, SAMPLER=value))
        assert message in one_line(error)
    data = load_data(config("imagefolder", ROOT=folder, SAMPLER="balanced", LOADER="workers"))
    assert data.train.balanced
