"""Recorded values and gradients of the modern methods' losses (golden/modern.*), in float64.

`modern.json` says of each case: the inputs, hyperparameters, the loss and its parts. Variant "code"
is what the authors' implementation gives, "paper" the published formula where that differs,
"proposed" a mended form. `modern.npz` holds inputs and the gradient for every student input.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

_HERE = Path(__file__).parent / "golden"
_ARRAYS = np.load(_HERE / "modern.npz")
CASES = json.loads((_HERE / "modern.json").read_text())


def golden_inputs(case):
    """The tensors of a case by name; the student's want a gradient."""
    facts = CASES[case]
    tensors = {}
    for name in [*facts["student_inputs"], *facts.get("other_inputs", [])]:
        # "param": CTKD's learned number, which starts as a hyperparameter
        start = [facts["hyper"]["param_init"]] if name == "param" else _ARRAYS[f"in/{name}"]
        tensors[name] = torch.tensor(np.array(start), requires_grad=name in facts["student_inputs"])
    return tensors


def check_golden(case, loss, rtol=1e-8):
    """Hold `loss(tensors, hyper)`, a scalar, and its gradients to the recorded ones.

    The gradients are allowed 1e-6 relative, 1e-10 absolute.
    """
    tensors = golden_inputs(case)
    value = loss(tensors, dict(CASES[case]["hyper"]))
    assert value.item() == pytest.approx(CASES[case]["loss"], rel=rtol, abs=1e-10)
    names = CASES[case]["student_inputs"]
    found = torch.autograd.grad(value, [tensors[name] for name in names])
    for name, gradient in zip(names, found, strict=True):
        want = torch.from_numpy(_ARRAYS[f"grad/{case}/{name}"])
        torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-10, msg=f"{case}: {name}")
