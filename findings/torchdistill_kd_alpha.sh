#!/usr/bin/env bash
# torchdistill 1.1.5, torch 2.14.1, torchvision 0.29.1, Python 3.11.
#
# `KDLoss` computes alpha * CE + beta * T^2 * KL, but only for alpha above 0. With alpha 0 (distillation alone), and
# without labels, it returns the bare KL: neither `beta` nor T^2 is applied. At T = 4 and beta = 1 the loss and its
# gradients are 16 times smaller than with an alpha of one millionth. `LogitStdKDLoss` does the same. The default of
# alpha, None, needs a `beta`: alone it raises a TypeError. Output seen (T = 4, beta = 9):
#   loss             alpha 0.000001    alpha 0    ratio
#   KDLoss                    73.55      0.511      144
#   LogitStdKDLoss             7.84      0.054      144
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1
cd "$work"
cat > alpha.py <<'PY'
import torch
from torchdistill.losses.mid_level import KDLoss, LogitStdKDLoss

torch.manual_seed(0)
student, teacher = ({"net": {"output": 3 * torch.randn(64, 10)}} for _ in range(2))
labels = torch.randint(10, (64,))

print(f"{'loss':15s}  alpha 0.000001    alpha 0    ratio")
for loss in (KDLoss, LogitStdKDLoss):
    nearly, zero = (
        loss("net", "output", "net", "output", temperature=4, alpha=alpha, beta=9)(student, teacher, labels).item()
        for alpha in (1e-6, 0)
    )
    print(f"{loss.__name__:15s}  {nearly:14.2f} {zero:10.3f} {nearly / zero:8.0f}")
    assert abs(nearly / zero - 9 * 4**2) < 0.1, "the loss with alpha 0 is no longer the bare divergence"
try:
    KDLoss("net", "output", "net", "output", temperature=4)
    raise SystemExit("the default alpha works without beta now")
except TypeError as error:
    print("alpha and beta left out:", error)
PY
"$work/venv/bin/python" alpha.py
