"""The operations of the strong view, image by image, against torchvision and Pillow."""

import math

import pytest
import torch
from data_support import random_images
from PIL import Image
from torchvision.transforms.v2 import functional as reference

from mdistiller.dataset.memory.augment import AUGMENTS
from mdistiller.dataset.memory.operations import OPERATIONS
from mdistiller.dataset.memory.randaugment import StrongAugmentation, cut_out

NAMES = list(OPERATIONS)


def pillow_affine(image, matrix):
    return image.transform(image.size, Image.Transform.AFFINE, matrix)


def shear(image, x, y):
    """As torchvision's RandAugment calls it."""
    degrees = [math.degrees(math.atan(x)), math.degrees(math.atan(y))]
    return reference.affine(
        image, angle=0.0, translate=[0, 0], scale=1.0, shear=degrees, center=[0, 0]
    )


# each by torchvision on a Pillow image; shifts by parts of a pixel only Pillow does
REFERENCES = {
    "AutoContrast": lambda image, m: reference.autocontrast(image),
    "Brightness": reference.adjust_brightness,
    "Color": reference.adjust_saturation,
    "Contrast": reference.adjust_contrast,
    "Equalize": lambda image, m: reference.equalize(image),
    "Identity": lambda image, m: image,
    "Posterize": lambda image, m: reference.posterize(image, int(m)),
    "Rotate": lambda image, m: reference.rotate(image, m),
    "Sharpness": reference.adjust_sharpness,
    "ShearX": lambda image, m: shear(image, m, 0),
    "ShearY": lambda image, m: shear(image, 0, m),
    "Solarize": lambda image, m: reference.solarize(image, int(m)),
    "TranslateX": lambda image, m: pillow_affine(image, (1, 0, m * image.size[0], 0, 1, 0)),
    "TranslateY": lambda image, m: pillow_affine(image, (1, 0, 0, 0, 1, m * image.size[1])),
}
RANGES = {
    **dict.fromkeys(("Brightness", "Color", "Contrast", "Sharpness"), (0.05, 0.95)),
    **dict.fromkeys(("ShearX", "ShearY", "TranslateX", "TranslateY"), (-0.3, 0.3)),
    **dict.fromkeys(("AutoContrast", "Equalize", "Identity"), (0, 0)),
    "Posterize": (4, 8),
    "Rotate": (-30, 30),
    "Solarize": (1, 257),
}


def rich_images(size):
    """Smooth, noisy, flat, two-level and dark images."""
    images = random_images(40, size)
    images[0] = 77
    images[1] = (images[1] > 120) * 255
    images[2] = images[2] // 16
    images[3, 0], images[3, 1] = 0, 255
    images[4] = torch.arange(256, dtype=torch.uint8).repeat(9)[: size[1]]
    return images


def strong(size=(32, 32), base="crop_flip"):
    return StrongAugmentation(AUGMENTS[base](size))


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_equals_the_reference(name):
    size = (33, 47)
    images = rich_images(size)
    position = torch.linspace(0, 1, 41, dtype=torch.float64)[:40]
    number = torch.full((40,), NAMES.index(name))
    terms = strong(size).encode(number, position)
    result = OPERATIONS[name].kernel(images, terms)
    assert result.dtype == torch.uint8
    low, high = RANGES[name]
    tolerance = 1 if name == "AutoContrast" else 0
    for image, place, ours in zip(images, position.tolist(), result, strict=True):
        magnitude = math.trunc((low + (high - low) * place) * 4096) / 4096
        want = reference.pil_to_tensor(REFERENCES[name](reference.to_pil_image(image), magnitude))
        assert (ours.int() - want.int()).abs().max() <= tolerance, (name, magnitude)


def test_the_references_are_not_all_the_identity():
    image = reference.to_pil_image(random_images(1)[0])
    changed = {name for name in NAMES if REFERENCES[name](image, RANGES[name][0]) != image}
    assert changed == set(NAMES) - {"Identity"}


def test_operations_and_magnitudes_are_uniform():
    drawn = strong().draw(28_000, torch.Generator().manual_seed(1))
    for turn in (0, 1):
        operation, first = drawn[:, 7 * turn], drawn[:, 7 * turn + 1]
        assert (operation.bincount(minlength=14) - 2000).abs().max() < 220  # 5 sigma
        for name, (low, high), bins in (
            ("Brightness", (0.05 * 4096, 0.95 * 4096), 9),
            ("Posterize", (4, 8), 4),
            ("Solarize", (1, 257), 16),
        ):
            values = first[operation == NAMES.index(name)].double()
            counts = values.histc(bins, low, high)
            assert counts.sum() == len(values), name  # none outside
            expected = len(values) / bins
            assert (counts - expected).abs().max() < 5 * expected**0.5, name
        turned = drawn[operation == NAMES.index("Rotate"), 7 * turn + 1 : 7 * turn + 7]
        angle = torch.rad2deg(torch.atan2(turned[:, 3].double(), turned[:, 0].double()))
        assert angle.abs().max() <= 30.001
        assert (angle.histc(6, -30, 30) - len(angle) / 6).abs().max() < 5 * (len(angle) / 6) ** 0.5
        # a shift of .3 x 32 pixels at most, in 1/65536; half a pixel to the centre
        shift = drawn[operation == NAMES.index("TranslateY"), 7 * turn + 6] / 65536 - 0.5
        assert 9.5 < shift.max() <= 9.6
        assert -9.6 <= shift.min() < -9.5
        assert shift.mean().abs() < 0.6
    pairs = drawn[:, 0] * 14 + drawn[:, 7]
    assert len(pairs.unique()) == 196  # with replacement


def test_the_cut_is_a_square_of_uniform_side_around_a_uniform_centre():
    size = (64, 64)
    left, top, right, bottom = (
        strong(size).draw(20_000, torch.Generator().manual_seed(2))[:, 14:18].T
    )
    assert ((right - left) - (bottom - top)).abs().max() <= 1
    side = (right - left).double()
    assert side.max() == 32
    assert side.min() == 0
    assert side.mean().item() == pytest.approx(16, abs=0.3)
    for low, high in ((left, right), (top, bottom)):
        centre = (low + high) / 2
        assert (centre.histc(8, 0, 64) - 2500).abs().max() < 250


def test_the_cut_is_filled_and_the_rest_stays():
    images = torch.full((2, 3, 6, 8), 7, dtype=torch.uint8)
    result = cut_out(images, torch.tensor([[2, -1, 5, 3], [4, 4, 4, 9]]))
    assert torch.equal(result[1], images[1])  # of no width
    assert result[0, :, 0, 2].tolist() == [125, 123, 114]
    inside = result[0, 0] == 125
    assert inside.sum() == 9
    assert inside[:3, 2:5].all()
    assert (result[0, :, ~inside] == 7).all()


def one_by_one(view, images, parameters):
    """Crop, then each operation, then the cut, with every image a batch of its own."""
    store = view.base.store(images)
    results = []
    for k, row in enumerate(parameters):
        image = view.base.apply(store, parameters[:, 18:], torch.tensor([k]))
        for turn in (0, 1):
            kernel = OPERATIONS[NAMES[row[7 * turn]]].kernel
            image = kernel(image, row[None, 7 * turn + 1 : 7 * turn + 7])
        results.append(cut_out(image, row[None, 14:18]))
    return torch.cat(results)


@pytest.mark.parametrize("base", ["crop_flip", "rotate_flip"])
def test_a_batch_equals_its_images_one_by_one_in_any_order(base):
    images = random_images(60)
    view = strong(base=base)
    parameters = view.draw(60, torch.Generator().manual_seed(3))
    want = one_by_one(view, images, parameters)
    store = view.base.store(images)
    for index in (torch.arange(60), torch.tensor([17, 3, 3, 59]), torch.tensor([8])):
        groups = view.group(parameters[index])
        assert torch.equal(view.apply(store, parameters, index, groups), want[index])
    assert torch.equal(images, random_images(60))
