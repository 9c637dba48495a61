"""Large JPEGs decoded at a reduced scale: the same parts of the image, nearly the same pixels."""

import io

import numpy as np
import pytest
import torch
from data_support import CPU, config, flat, one_line, write_image
from PIL import Image
from worker_support import photo

from mdistiller.dataset import load_data
from mdistiller.dataset.files import scaled_jpeg as _scaled
from mdistiller.dataset.files.resized_crop import ResizedCropFlip
from mdistiller.dataset.files.scaled_jpeg import EncodedImage
from mdistiller.dataset.files.transforms import seeded
from mdistiller.preprocessing import Preprocessing
from mdistiller.registry import UserError

SIZE = (403, 309)  # no multiple of 8: the last blocks are padded


@pytest.fixture(autouse=True)
def _any_size(monkeypatch):
    """Images need not have a megapixel."""
    monkeypatch.setattr(_scaled, "MIN_PIXELS", 0)


def encoded(orientation=1, size=SIZE, scaling="all", kind="JPEG", mode="RGB"):
    exif = Image.Exif()
    exif[0x0112] = orientation
    smooth = Image.fromarray(photo(orientation, (24, 30))).resize(size[::-1], 3).convert(mode)
    file = io.BytesIO()
    smooth.save(file, kind, exif=exif, quality=95)
    data = torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)
    return EncodedImage(data, "x", upright=True, scaling=scaling)


def in_full(image):
    return EncodedImage(image.data, "x", upright=True, scaling="none")


@pytest.fixture
def scales(monkeypatch):
    """The reduced scales that are decoded."""
    used, reduced = [], EncodedImage._reduced
    monkeypatch.setattr(
        EncodedImage, "_reduced", lambda self, scale: used.append(scale) or reduced(self, scale)
    )
    return used


@pytest.mark.parametrize("how", ["crop", "stretch", "pad"])
def test_whole_images_are_the_same_in_all_orientations(how, scales):
    """A part that is off by one pixel of the decoded image differs by several levels."""
    for orientation in range(1, 9):
        image = encoded(orientation)
        want = in_full(image).resized((32, 32), Preprocessing(resize=how)).int()
        difference = (image.resized((32, 32), Preprocessing(resize=how)).int() - want).abs().float()
        assert difference.mean() < 0.7, orientation
        assert difference.max() <= 5, orientation
    assert set(scales) == {4}  # 309 / 8 pixels would be less than twice 32 (37 before the crop)


def test_crops_are_those_of_the_whole_image(scales):
    augment = ResizedCropFlip((32, 32))
    for seed in range(24):
        image = encoded(1 + seed % 8, scaling="train")
        with seeded(seed):
            want = augment.view(in_full(image).pixels()).int()
        with seeded(seed):
            difference = (augment.view(image).int() - want).abs().float()
        assert difference.mean() < 1.2, seed
    assert set(scales) == {2, 4, 8}  # by the size of the crop


def test_the_decoded_part_is_large_enough(scales):
    for side, scale in ((38, 8), (39, 4), (77, 4), (78, 2), (154, 2)):
        scales.clear()
        assert encoded().region((0, 0, *SIZE), side, side, "", 1).shape == (3, side, side)
        assert scales == [scale]
    assert encoded().region((0, 0, *SIZE), 155, 155, "", 1) is None


@pytest.mark.parametrize(
    "image",
    [
        encoded(scaling="none"),
        encoded(scaling="train"),
        encoded(size=(120, 127)),
        encoded(kind="PNG"),
        encoded(kind="WEBP"),
    ],
    ids=["none", "train", "small", "png", "webp"],
)
def test_other_images_are_decoded_in_full(image, scales):
    how = Preprocessing(resize="stretch")
    assert torch.equal(image.resized((32, 32), how), in_full(image).resized((32, 32), how))
    assert not scales


def test_images_below_a_megapixel_are_decoded_in_full(monkeypatch, scales):
    monkeypatch.undo()
    assert encoded().large_size(32, 32, 1) is None
    assert encoded(size=(1000, 1001)).large_size(32, 32, 1) == (1000, 1001)


def test_a_broken_file_is_named_and_damaged_exif_is_none(scales):
    image = encoded()
    cut = EncodedImage(image.data[: len(image.data) // 2], "cut.jpg", True, scaling="all")
    with pytest.raises(UserError, match=r"cut\.jpg cannot be read as an image") as error:
        cut.resized((32, 32), Preprocessing(resize="crop"))
    one_line(error)
    grey = encoded(mode="L").resized((32, 32), Preprocessing(resize="crop"))
    assert torch.equal(grey[0], grey[2])


def test_the_key_reaches_memory_workers_and_training(tmp_path, scales):
    for split in ("train", "val"):
        for label in ("a", "b"):
            write_image(tmp_path / split / label / "0.jpg", np.tile(flat(90), (40, 50, 1)))
    keys = {"ROOT": tmp_path, "IMAGE_SIZE": 32, "NUM_WORKERS": 0, "AUGMENT": "none"}
    keys |= {"MEAN": [0.0] * 3, "STD": [1.0] * 3, "RESIZE": "stretch"}

    def used(**more):
        scales.clear()
        data = load_data(config("imagefolder", 2, **keys, **more), CPU)
        for batch in (*data.train, *data.val):
            assert (batch[0] * 255 - 90).abs().max() < 2
        return len(scales)

    assert used(LOADER="memory") == used(LOADER="workers") == 0  # whole images, by default
    assert used(LOADER="memory", JPEG_SCALING="all") == 4
    assert used(LOADER="workers", JPEG_SCALING="all") == 4
    keys["AUGMENT"] = "resized_crop_flip"
    assert used() == 2
    assert used(JPEG_SCALING="none") == 0
    with pytest.raises(UserError, match=r"JPEG_SCALING must be none, train or all, got 'on'"):
        used(JPEG_SCALING="on")
