"""Decoding and resizing: Pillow's pixels and torchvision's transforms."""

import io

import numpy as np
import pytest
import torch
import torchvision.transforms as reference
from data_support import collect
from PIL import Image
from torchvision.transforms import v2
from worker_support import imagenet, photo

from mdistiller.dataset.files import images as _images
from mdistiller.dataset.files.images import decode, resize_to_size
from mdistiller.dataset.files.transforms import seeded
from mdistiller.preprocessing import Preprocessing


def test_training_views_are_those_of_torchvision(folder):
    """RandomResizedCrop and mirror on the decoded image, in that order, from the drawn seed."""
    train = imagenet(folder).train
    images, _, index = collect(train)
    crop = v2.Compose([v2.RandomResizedCrop(32, antialias=True), v2.RandomHorizontalFlip()])
    for image, i in zip(images, index.tolist(), strict=True):
        whole = v2.functional.pil_to_tensor(Image.open(train.dataset.path(i)))
        with seeded(int(train._drawn.parameters[i, -1])):
            expected = train.normalize(crop(whole))
        # channels-last images, as the decoder gives them, may be rounded to the next level
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
    cut = resize_to_size(image, (224, 224), Preprocessing(resize="crop"))
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


def test_without_torchvisions_decoder_pillow_reads_all(monkeypatch):
    data = torch.frombuffer(bytearray(encoded("RGB")), dtype=torch.uint8)
    expected = decode(data, "x")
    monkeypatch.setattr(_images, "decode_jpeg", None)
    assert (decode(data, "x").int() - expected.int()).abs().max() <= 2
