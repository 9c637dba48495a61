#!/usr/bin/env bash
# torchdistill 1.1.5, torch 2.14.1, torchvision 0.29.1, Python 3.11.
#
# `DISTPlusLoss` adds the correlation of the channels of both feature maps where one minus the correlation would be a
# loss: the term is largest when the student's map equals the teacher's, and training on it makes the two opposite.
# The terms on logits and on space have the right sign, so that a run with all of them still learns. Output seen (the
# other terms off):
#   student's map              loss
#   the teacher's             1.000
#   random                   -0.000
#   minus the teacher's      -1.000
#   random, after 200 steps  -1.000
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torchdistill==1.1.5 torch==2.14.1 torchvision==0.29.1
cd "$work"
cat > dist_plus.py <<'PY'
import torch
from torchdistill.losses.mid_level import DISTPlusLoss

torch.manual_seed(0)
channels = DISTPlusLoss(*["net", "output"] * 2, *["map", "output"] * 2, beta=0, gamma=0, kappa=0)
logits, teacher = {"output": torch.randn(8, 10)}, torch.randn(8, 64, 4, 4)


def loss(student):
    return channels({"net": logits, "map": {"output": student}}, {"net": logits, "map": {"output": teacher}})


student = torch.randn_like(teacher).requires_grad_()
seen = {"the teacher's": loss(teacher), "random": loss(student), "minus the teacher's": loss(-teacher)}
optimizer = torch.optim.Adam([student], lr=0.1)
for _ in range(200):
    optimizer.zero_grad()
    loss(student).backward()
    optimizer.step()
seen["random, after 200 steps"] = loss(student)
print("student's map              loss")
for name, value in seen.items():
    print(f"{name:24s} {value.item():6.3f}")
assert seen["the teacher's"] > 0.999, "equal maps no longer have the largest loss"
assert seen["minus the teacher's"] < -0.999 and seen["random, after 200 steps"] < -0.99
PY
"$work/venv/bin/python" dist_plus.py
