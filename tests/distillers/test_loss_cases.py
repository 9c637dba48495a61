"""The library's losses against the textbook forms that its benchmark compares them with."""

import pytest
import torch
from loss_cases import loss_cases

# CRD draws all 297 images of other classes there are: any order of them gives the same sums.
CASES = loss_cases(
    6, dtype=torch.float64, student="resnet8", teacher="resnet20", bank=300, negatives=297
)


@pytest.mark.parametrize("name", CASES)
def test_both_forms_are_the_same_function(name):
    case = CASES[name]
    values = [form(*case.inputs) for form in (case.ours, case.textbook)]
    torch.testing.assert_close(values[0].double(), values[1], rtol=1e-6, atol=1e-12)
    gradients = [torch.autograd.grad(value, case.inputs) for value in values]
    for ours, textbook in zip(*gradients, strict=True):
        largest = textbook.abs().max().item()
        torch.testing.assert_close(ours, textbook, rtol=1e-5, atol=1e-5 * largest)
