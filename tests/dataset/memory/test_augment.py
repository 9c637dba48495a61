"""Batched augmentation against torchvision and Pillow, image by image."""

import numpy as np
import pytest
import torch
from data_support import CPU, MEAN, STD, random_images
from PIL import Image
from torchvision.transforms import functional as reference

from mdistiller.dataset.memory.augment import AUGMENTS
from mdistiller.dataset.memory.loader import Normalize
from mdistiller.registry import UserError


def drawn(name, num, size=(32, 32), seed=3):
    augment = AUGMENTS[name](size)
    return augment, augment.draw(num, torch.Generator().manual_seed(seed))


def applied(augment, images, parameters, index=None):
    index = torch.arange(len(images)) if index is None else index
    return augment.apply(augment.store(images), parameters, index)


def test_crop_flip_and_normalise_equal_torchvision():
    images = random_images(80)
    augment, parameters = drawn("crop_flip", 80)
    ours = Normalize(MEAN, STD, CPU)(applied(augment, images, parameters))
    for image, (row, column, flip), result in zip(images, parameters.tolist(), ours, strict=True):
        padded = reference.pad(reference.to_pil_image(image), [4])
        view = reference.crop(padded, row, column, 32, 32)
        view = reference.hflip(view) if flip else view
        expected = reference.normalize(reference.to_tensor(view), MEAN, STD)
        torch.testing.assert_close(result, expected, rtol=2.5e-7, atol=1e-6)


def test_every_crop_offset_and_both_mirrors_are_drawn_evenly():
    augment, parameters = drawn("crop_flip", 162 * 200)
    counts = torch.bincount(augment.views(parameters), minlength=162)
    assert len(counts) == 162 == augment.num_views
    assert counts.min() > 130  # 200 +- 5 standard deviations
    assert counts.max() < 280


def test_padding_is_raw_black_before_normalisation():
    augment, _ = drawn("crop_flip", 1)
    corner = torch.tensor([[0, 0, 0]])
    view = applied(augment, random_images(1), corner)
    assert (view[:, :, :4] == 0).all()
    assert (view[:, :, :, :4] == 0).all()
    assert (view[:, :, 4:, 4:] > 0).all()


@pytest.mark.parametrize("size", [(32, 32), (33, 47)])
def test_rotation_equals_pillow_to_the_pixel(size):
    images = random_images(60, size)
    augment = AUGMENTS["rotate_flip"](size)
    angles = torch.linspace(-20, 20, 60)
    angles[0] = 0
    flips = (torch.arange(60) % 2)[:, None]
    ours = applied(augment, images, torch.cat([augment.inverse_map(angles), flips], dim=1))
    for image, angle, flip, result in zip(images, angles, flips, ours, strict=True):
        turned = reference.rotate(Image.fromarray(image.permute(1, 2, 0).numpy()), float(angle))
        turned = reference.hflip(turned) if flip else turned
        assert np.array_equal(np.asarray(turned), result.permute(1, 2, 0).numpy()), float(angle)


def test_rotation_angles_are_uniform_within_20_degrees():
    _, parameters = drawn("rotate_flip", 20000)
    angles = torch.rad2deg(torch.atan2(parameters[:, 3].double(), parameters[:, 0].double()))
    assert angles.abs().max() < 20.001
    assert angles.histc(10, -20, 20).min() > 1800
    assert parameters[:, 6].float().mean() == pytest.approx(0.5, abs=0.02)


def test_crop_never_mirrors():
    gradient = torch.arange(32, dtype=torch.uint8).expand(400, 3, 32, 32).contiguous() + 1
    augment, parameters = drawn("crop", 400)
    views = applied(augment, gradient, parameters)[:, 0, 16, 4:28].int()
    assert (views.diff(dim=1) > 0).all()
    assert augment.num_views == 25
    assert len(augment.views(parameters).unique()) == 25


@pytest.mark.parametrize("name", ["none", "crop", "crop_flip"])
def test_equal_view_codes_mean_equal_pixels_and_others_differ(name):
    augment, parameters = drawn(name, 600)
    image = random_images(1).expand(600, -1, -1, -1)
    seen = {}
    for code, view in zip(
        augment.views(parameters).tolist(), applied(augment, image, parameters), strict=True
    ):
        assert torch.equal(seen.setdefault(code, view), view)
    assert len({view.numpy().tobytes() for view in seen.values()}) == len(seen)
    assert max(seen) < augment.num_views


def test_views_that_cannot_be_enumerated_are_minus_one():
    augment, parameters = drawn("rotate_flip", 5)
    assert augment.num_views is None
    assert augment.views(parameters).tolist() == [-1] * 5


@pytest.mark.parametrize("name", sorted(AUGMENTS))
def test_the_view_of_an_image_does_not_depend_on_its_batch(name):
    images = random_images(20)
    augment, parameters = drawn(name, 20)
    whole = applied(augment, images, parameters)
    some = torch.tensor([17, 3, 3, 11])
    assert whole.dtype == torch.uint8
    assert torch.equal(applied(augment, images, parameters, some), whole[some])


def test_padding_grows_with_the_images():
    assert [AUGMENTS["crop_flip"]((s, s)).pad for s in (8, 32, 64)] == [1, 4, 8]
    assert [AUGMENTS["crop"]((s, s)).pad for s in (8, 32, 64)] == [1, 2, 4]


def test_an_unknown_augmentation_is_answered_with_the_nearest():
    with pytest.raises(UserError, match=r"AUGMENT.*'crop_flp'.*did you mean 'crop_flip'"):
        AUGMENTS["crop_flp"]
