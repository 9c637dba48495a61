"""Networks for grey images and for four channels."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from mdistiller.dataset.pipelines import luminance
from mdistiller.models import get_model_entry, with_channels
from mdistiller.networks.make import make_network
from mdistiller.registry import UserError
from mdistiller.weights import load_network


def make(name, channels, **settings):
    torch.manual_seed(0)
    entry = get_model_entry(name, "cifar")
    return make_network(entry, 4, (32, 32), settings, "DISTILLER.STUDENT_ARGS", channels).eval()


@pytest.mark.parametrize("name", ["resnet8", "torchvision/shufflenet_v2_x0_5"])
def test_a_grey_image_gives_what_its_three_copies_gave(name):
    colour, grey = make(name, 3), make(name, 1)
    image = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(grey(image)[0], colour(image.expand(-1, 3, -1, -1))[0])
    four = make(name, 4)
    more = torch.cat([image.expand(-1, 3, -1, -1), image], dim=1)
    torch.testing.assert_close(four(more)[0], grey(image)[0])  # as the outputs keep their size


def test_in_chans_of_timm_is_taken_and_has_to_fit():
    name = "timm/test_resnet"
    assert make(name, 1, in_chans=1)(torch.randn(1, 1, 32, 32))[0].shape == (1, 4)
    for channels, given, message in ((3, 1, "takes images of 1 channels, and the data have 3"),):
        with pytest.raises(UserError, match=message):
            make(name, channels, in_chans=given)


def test_a_file_for_images_of_other_channels_is_refused(tmp_path):
    torch.save({"model": make("resnet8", 3).state_dict()}, tmp_path / "colour")
    with pytest.raises(UserError, match=r"of a resnet8 for images of 3 .* DATASET\.CHANNELS is 1"):
        load_network(make("resnet8", 1), tmp_path / "colour", "resnet8", 4)


def test_a_network_that_does_not_begin_with_a_convolution_is_refused():
    with pytest.raises(UserError, match="does not begin with a convolution of 3 channels"):
        with_channels(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), 1)


def test_colour_becomes_grey_as_by_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    want = np.asarray(Image.fromarray(pixels).convert("L"))
    got = luminance(torch.from_numpy(pixels).permute(2, 0, 1)[None])
    assert np.array_equal(got[0, 0].numpy(), want)
