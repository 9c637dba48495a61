#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1, torchvision 0.29.1, numpy 2.2.6, Python 3.11.
#
# `create_optimizer_v2(model, ..., layer_decay=0.5)` sorts a ViT's parameters into groups of layers, but every group
# gets the full rate: the decay stands beside it, as `lr_scale`, which timm's own schedulers multiply in and nothing
# else does. With a scheduler of torch, or none, all layers train at one rate and layer decay has no effect, without
# a word. With timm's schedulers it acts from their constructor on. Output seen (rates of the groups):
#   as built                1
#   torch's cosine, 1 step  1
#   timm's cosine, built    14
#   timm's cosine, 1 step   14
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$work"
cat > decay.py <<'PY'
import timm
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch.optim.lr_scheduler import CosineAnnealingLR


def made():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8)
    return create_optimizer_v2(model, opt="adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.5)


def show(title, optimizer, rates):
    seen = len({group["lr"] for group in optimizer.param_groups})
    print(f"{title:23} {seen}")
    assert (seen == 1) == (rates == 1), f"{title}: {seen} rates"


optimizer = made()
assert len({group["lr_scale"] for group in optimizer.param_groups}) == 14
show("as built", optimizer, 1)
scheduler = CosineAnnealingLR(optimizer, T_max=10)
optimizer.step()
scheduler.step()
show("torch's cosine, 1 step", optimizer, 1)
optimizer = made()
scheduler = CosineLRScheduler(optimizer, t_initial=10)
show("timm's cosine, built", optimizer, 14)
optimizer.step()
scheduler.step(1)
show("timm's cosine, 1 step", optimizer, 14)
PY
"$work/venv/bin/python" decay.py
