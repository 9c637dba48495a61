#!/usr/bin/env bash
# torchdistill 1.1.5, torch 2.14.1, torchvision 0.29.1, Python 3.11.
#
# `SPKDLoss` divides the rows of both similarity matrices by their sums of absolute values; the paper (Tung and Mori,
# ICCV 2019) divides by the Euclidean norm. The 1 it passes to `torch.nn.functional.normalize` is the order of the
# norm; the dimension comes after it. For maps after a ReLU the entries of a row then are about 1 / batch instead of
# 1 / sqrt(batch), so the loss falls with the batch size once more, and the paper's weight of 3000 gives much less.
# Output seen (random maps after ReLU, the same loss in either norm computed beside it):
#   batch    SPKDLoss    sums    Euclidean    Euclidean / SPKDLoss
#      16   1.063e-04   same    1.363e-03                    12.8
#      64   6.481e-06   same    3.846e-04                    59.3
#     256   3.800e-07   same    9.441e-05                   248.4
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1
cd "$work"
cat > sp.py <<'PY'
import torch
from torchdistill.losses.mid_level import SPKDLoss

torch.manual_seed(0)
similarity = SPKDLoss("map", "map", reduction="batchmean")


def by_hand(student, teacher, order):
    rows = [torch.nn.functional.normalize(m.flatten(1) @ m.flatten(1).T, p=order, dim=1) for m in (student, teacher)]
    return (rows[0] - rows[1]).square().sum() / len(student) ** 2


print("batch    SPKDLoss    sums    Euclidean    Euclidean / SPKDLoss")
for batch in (16, 64, 256):
    student, teacher = (torch.randn(batch, 32, 4, 4).relu() for _ in range(2))
    loss = similarity(*({"map": {"output": m}} for m in (student, teacher)))
    sums, euclidean = (by_hand(student, teacher, order) for order in (1, 2))
    same = torch.allclose(loss, sums, rtol=1e-4)
    print(f"{batch:5d}   {loss:.3e}   {'same' if same else 'other'}    {euclidean:.3e}   {euclidean / loss:21.1f}")
    assert same, "SPKDLoss no longer divides by sums of absolute values"
    assert euclidean > 5 * loss
PY
"$work/venv/bin/python" sp.py
