"""The list of networks."""

import itertools

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
    assert found["stages"] == [(c, side, side) for c, side in maps]
    assert found["embedding"] == 64


def test_patterns_choose_and_the_table_is_printed(capsys):
    assert models.chosen(["wrn_16_?", "vgg8"], "cifar") == ["wrn_16_1", "wrn_16_2", "vgg8"]
    assert models.chosen([], "cifar") == zoo_names("cifar")
    assert models.main(["resnet8", "--classes", "10"]) == 0
    assert "| resnet8 | 78,042 | 25.0 | 16x32x32 16x32x32" in capsys.readouterr().out


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
