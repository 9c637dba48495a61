"""Pairing of stages, and the rule for map sizes."""

import warnings

import pytest
import torch

from mdistiller.distillers._base import Output
from mdistiller.distillers.helpers.features.stages import match_size, pair_by_height, paired_stages
from mdistiller.registry import UserError


@pytest.mark.parametrize(
    ("student", "teacher", "pairs"),
    [
        ((32, 16, 8), (16, 8, 4), [(0, 0), (1, 1), (2, 2)]),  # equally many: in order
        ((28, 14, 7), (56, 28, 14, 7), [(0, 1), (1, 2), (2, 3)]),  # ResNet50 > MobileNetV1
        ((32, 16, 8), (32, 16, 8, 4), [(0, 0), (1, 1), (2, 2)]),  # ResNet50 > resnet8x4
        ((56, 28, 14, 7), (28, 14, 7), [(1, 0), (2, 1), (3, 2)]),
        ((16, 8, 4, 4), (32, 16, 8), [(0, 0), (1, 1), (2, 2)]),  # equally good: the shallowest
        ((32, 16, 8, 4), (28, 14, 7), [(0, 0), (1, 1), (2, 2)]),
        ((8,), (32, 16, 8), [(0, 2)]),
    ],
)
def test_stages_are_paired_in_order_or_by_height(student, teacher, pairs):
    assert pair_by_height(student, teacher) == pairs


def test_networks_without_stages_are_refused():
    with pytest.raises(UserError, match="at least one stage"):
        pair_by_height((), (8,))


def output(*heights):
    feats = [torch.full((1, 2, h, h), float(i), dtype=torch.half) for i, h in enumerate(heights)]
    return Output(torch.zeros(1, 10), {"feats": feats})


def test_stages_left_over_are_named():
    with pytest.warns(UserWarning, match="3 and 4 stages; left over.*: teacher stage 1$"):
        own, other = paired_stages(output(64, 28, 14, 7), output(64, 56, 28, 14, 7))
    assert [f[0, 0, 0, 0].item() for f in own] == [1, 2, 3]
    assert [f[0, 0, 0, 0].item() for f in other] == [2, 3, 4]
    assert own[0].dtype == torch.float32


def test_equally_many_stages_need_no_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        paired_stages(output(64, 28, 14), output(64, 56, 28))


def test_the_higher_map_is_averaged_to_the_size_of_the_lower():
    large, small = torch.arange(16.0).view(1, 1, 4, 4), torch.zeros(1, 3, 2, 2)
    averaged = [[2.5, 4.5], [10.5, 12.5]]
    first, second = match_size(large, small)
    assert first[0, 0].tolist() == averaged
    assert second is small
    first, second = match_size(small, large)
    assert first is small
    assert second[0, 0].tolist() == averaged
