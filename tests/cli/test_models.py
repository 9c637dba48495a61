"""The list of networks."""

import itertools

import timm
from support import unpadded

from mdistiller.cli import models
from mdistiller.models import zoo_names


def test_facts_of_a_network_against_a_count_by_hand():
    # resnet8: widths 16, 16, 32, 64; a block of two 3x3 convolutions per stage, 1x1 shortcuts
    maps = [(16, 32), (16, 32), (32, 16), (64, 8)]
    stem = 3 * 16 * 9 * 32**2
    blocks = sum((a * b + b * b) * 9 * side**2 for (a, _), (b, side) in itertools.pairwise(maps))
    shortcuts = 16 * 32 * 16**2 + 32 * 64 * 8**2
    found = models.facts("resnet8", "cifar", 32, 10)
    assert found["flops"] == 2 * (stem + blocks + shortcuts + 64 * 10)
    assert found["parameters"] == 78_042
    assert [found["stem"], *found["stages"]] == [(c, side, side) for c, side in maps]
    assert found["embedding"] == 64


def test_patterns_choose_and_the_table_is_printed(capsys):
    assert models.chosen(["wrn_16_?", "vgg8"], "cifar") == [
        "wrn_16_1",
        "wrn_16_2",
        "wrn_16_4",
        "vgg8",
    ]
    assert models.chosen([], "cifar") == zoo_names("cifar")
    assert models.main(["resnet8", "--classes", "10"]) == 0
    assert "| resnet8 | 78,042 | 25.0 | 16x32x32 | 16x32x32 32x16x16" in unpadded(
        capsys.readouterr().out
    )


def test_a_network_without_stem_among_its_features_is_shown_so(capsys):
    assert models.main(["MobileNetV1", "--zoo", "imagenet", "--size", "64"]) == 0
    line = unpadded(capsys.readouterr().out).splitlines()[-1]
    assert line.endswith("| none | 128x16x16 256x8x8 512x4x4 1024x2x2 | 1024 |")


def test_networks_of_other_libraries_are_listed_for_the_size_of_the_images(capsys):
    words = ["timm/mixer_s32_22?", "torchvision/squeezenet1*", "--size", "64", "--classes", "10"]
    assert models.main(words) == 0
    lines = unpadded(capsys.readouterr().out).splitlines()
    own = timm.create_model("mixer_s32_224", img_size=64, num_classes=10)
    count = sum(p.numel() for p in own.parameters())
    assert lines[4].startswith(f"| timm/mixer_s32_224 | {count:,} | ")
    assert " | 512x2x2 | 512x2x2 512x2x2 512x2x2 512x2x2 | 512 |" in lines[4]
    refusals = [line for line in lines if "squeezenet1" in line]
    assert len(refusals) == 2
    assert all("| refused: torchvision/squeezenet1" in line for line in refusals)
    assert models.main(["torchvision/squeezenet1_1"]) == 2
    assert models.main(["timm/nothing_*"]) == 2
    assert "no network of timm matches 'timm/nothing_*'" in capsys.readouterr().err


def test_bad_names_and_sizes_are_one_line(capsys):
    for words, message in [
        (["resnet9"], "unknown CIFAR model 'resnet9'"),
        (["nothing*"], "no network of the cifar zoo matches 'nothing*'"),
        (["resnet8", "--size", "0"], "--size and --classes must be at least 1"),
        (["vgg13", "--size", "4"], "vgg13 cannot take 4x4 images"),
    ]:
        assert models.main(words) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
