"""Loaders with worker processes: the same batches for any number of them, and those of memory."""

import io

import numpy as np
import pytest
import torch
import torchvision.transforms as reference
from data_support import collect, config, image_set, one_line, write_folders, write_image
from PIL import Image
from torchvision.transforms import v2

from mdistiller.dataset import DATASETS, DataSource, load_data, load_test_loader
from mdistiller.dataset._images import centre, decode
from mdistiller.dataset._view import TrainView, seeded
from mdistiller.dataset._workers import WorkerTrainLoader
from mdistiller.dataset.loader import TrainLoader
from mdistiller.registry import UserError

STATISTICS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
WNIDS = ("n01440764", "n01443537", "n01484850")


def photo(seed, size=(70, 90)):
    """uint8 [H, W, 3]: smooth colours with some noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 226, (5, 6, 3), dtype=np.uint8))
    smooth = np.asarray(small.resize(size[::-1], Image.Resampling.BICUBIC), dtype=np.int16)
    return (smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """ImageNet's layout: 3 x 8 training and 3 x 3 validation JPEGs of many sizes."""
    root = tmp_path_factory.mktemp("imagenet")
    for split, number in (("train", 8), ("val", 3)):
        for label, wnid in enumerate(WNIDS):
            for k in range(number):
                size = (60 + 7 * k, 100 - 9 * k)
                path = root / split / wnid / f"{wnid}_{k}.JPEG"
                write_image(path, photo(100 * label + k, size))
    return root


def imagenet(folder, workers=0, rank=None, world_size=None, **keys):
    """Data of the fixture at 32 pixels; as one of several processes if a rank is given."""
    keys = {"NUM_WORKERS": workers, "IMAGE_SIZE": 32, **keys}
    with pytest.MonkeyPatch.context() as patch:
        if rank is not None:
            patch.setattr("mdistiller.runtime.rank", lambda: rank)
            patch.setattr("mdistiller.runtime.world_size", lambda: world_size)
        return load_data(config("imagenet", ROOT=folder, **keys))


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


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_nothing(folder, workers):
    alone, shared = imagenet(folder), imagenet(folder, workers, RANDAUGMENT=[])
    for _ in range(2):  # the workers stay for the second epoch
        for ours, theirs in zip(collect(alone.train), collect(shared.train), strict=True):
            assert torch.equal(ours, theirs)
    for ours, theirs in zip(collect(alone.val), collect(shared.val), strict=True):
        assert torch.equal(ours, theirs)


def test_workers_give_what_memory_gives(tmp_path):
    write_folders(tmp_path, per_class=5, size=(9, 12))
    keys = {"ROOT": tmp_path, "IMAGE_SIZE": 16, "AUGMENT": "crop_flip", "VAL_SPLIT": 2}
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


@pytest.mark.parametrize("augment", ["none", "crop", "rotate_flip"])
def test_a_set_in_memory_goes_through_workers_as_well(monkeypatch, augment):
    class Shapes(DataSource):
        mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

        def load(self, root, split, options):
            return image_set(12)

    monkeypatch.setitem(DATASETS, "shapes", Shapes)
    pair = [
        load_data(config("shapes", AUGMENT=augment, LOADER=kind)).train
        for kind in ("memory", "workers")
    ]
    for ours, theirs in zip(*map(collect, pair), strict=True):
        assert torch.equal(ours, theirs)
    enlarged = load_data(config("shapes", AUGMENT=augment, LOADER="workers", IMAGE_SIZE=48))
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
    data = imagenet(folder, workers=1)
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


@pytest.mark.parametrize("world", [2, 4, 11])
def test_evaluation_takes_every_image_once(folder, world):
    whole = collect(imagenet(folder).val)
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


@pytest.mark.parametrize("fault", [break_image, replace_by_text, remove])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_image_is_named_in_one_line(tmp_path, fault, workers):
    for split in ("train", "val"):
        for wnid in WNIDS[:2]:
            for k in range(2):
                write_image(tmp_path / split / wnid / f"{k}.JPEG", photo(k))
    data = imagenet(tmp_path, workers)
    for split, loader in (("train", data.train), ("val", data.val)):
        path = tmp_path / split / WNIDS[1] / "0.JPEG"
        fault(path)
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

    class Twice(TrainView):
        def __call__(self, image, name, parameters):
            return super().__call__(image, name, parameters).expand(2, -1, -1, -1)

    train = imagenet(folder).train
    view = Twice(train.augment.augment, train.augment.fit)
    twice = WorkerTrainLoader(
        train.dataset, 4, view, *STATISTICS, torch.device("cpu"), num_workers=1
    )
    for (one, *rest), (two, *same) in zip(train, twice, strict=True):
        assert two.shape == (4, 2, 3, 32, 32)
        for k in range(2):
            assert torch.equal(two[:, k], one)
        assert all(torch.equal(a, b) for a, b in zip(rest, same, strict=True))


def test_training_views_are_those_of_torchvision(folder):
    """RandomResizedCrop and mirror on the decoded image, in that order, from the drawn seed."""
    train = imagenet(folder).train
    images, _, index = collect(train)
    crop = v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()])
    for image, i in zip(images, index.tolist(), strict=True):
        whole = v2.functional.pil_to_tensor(Image.open(train.dataset.path(i)))
        with seeded(int(train._drawn.parameters[i, -1])):
            expected = train.normalize(crop(whole))
        # torchvision's resize rounds channels-last images, as decoded ones are, by itself
        assert (image - expected).abs().max() <= 1.01 / 255 / min(0.224, 0.225, 0.229)
        assert (image - expected).abs().mean() < 0.002


def test_validation_images_are_those_of_the_reference(folder):
    """Resize to 8/7 and centre crop, against Pillow and version 1 of torchvision's transforms."""
    data = imagenet(folder, IMAGE_SIZE=56)
    images, _ = collect(data.val)
    pipeline = reference.Compose(
        [
            reference.Resize(64),
            reference.CenterCrop(56),
            reference.ToTensor(),
            reference.Normalize(data.mean, data.std),
        ]
    )
    for i, image in enumerate(images):
        expected = pipeline(Image.open(data.val.dataset.path(i)).convert("RGB"))
        assert (image - expected).abs().max() <= 1.01 / 255 / min(data.std)  # one level
        assert (image - expected).abs().mean() < 0.002


@pytest.mark.parametrize(("size", "short"), [((400, 500), 256), ((500, 333), 256), ((90, 90), 256)])
def test_the_usual_sizes_of_evaluation(size, short):
    image = torch.zeros(3, *size, dtype=torch.uint8)
    image[:, size[0] // 2 - 3 : size[0] // 2 + 3] = 200  # a line across the middle
    cut = centre(image, 224)
    assert cut.shape == (3, 224, 224)
    rows = (cut[0, :, 0] > 100).nonzero().squeeze(1).float()
    assert rows.mean() == pytest.approx(111.5, abs=1)
    assert len(rows) == pytest.approx(6 * short / min(size), abs=1.01)


def encoded(mode, kind="JPEG", **options):
    file = io.BytesIO()
    Image.fromarray(photo(3)).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        encoded("RGB"),
        encoded("RGB", quality=98, subsampling=0),
        encoded("RGB", progressive=True),
        encoded("L"),
        encoded("CMYK"),
        encoded("P", "PNG"),
        encoded("RGBA", "WEBP", lossless=True),
    ],
    ids=["rgb", "444", "progressive", "grey", "cmyk", "palette", "webp"],
)
def test_decoding_gives_the_pixels_of_pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    ours = decode(torch.frombuffer(bytearray(data), dtype=torch.uint8), "x")
    assert (ours.int() - expected.int()).abs().max() <= 2  # libjpegs differ by so much


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
    data = load_data(config("imagefolder", ROOT=tmp_path, AUGMENT="resized_crop_flip"))
    assert data.image_size == (224, 224)
    assert next(iter(data.val))[0].shape == (6, 3, 224, 224)


def test_images_of_other_sizes_are_refused_by_name(tmp_path):
    write_folders(tmp_path)
    path = write_image(tmp_path / "train" / "dog" / "1.png", photo(0, (8, 9)))
    data = load_data(
        config("imagefolder", ROOT=tmp_path, LOADER="workers", MEAN=[0.5] * 3, STD=[1.0] * 3)
    )
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
    loader, classes, zoo = load_test_loader(
        config("imagenet", ROOT=folder, IMAGE_SIZE=32, NUM_WORKERS=0)
    )
    assert (classes, zoo) == (3, "imagenet")
    for ours, theirs in zip(collect(loader), collect(imagenet(folder).val), strict=True):
        assert torch.equal(ours, theirs)


def test_the_zoo_can_be_chosen(folder):
    assert imagenet(folder, ZOO="cifar").zoo == "cifar"
