#!/usr/bin/env bash
# timm 1.0.31, torch 2.14.1, torchvision 0.29.1, numpy 2.2.6, Python 3.11.
#
# In timm the logits are `get_classifier()` of `forward_head(features, pre_logits=True)`: what linear probes
# and exported features build on. For efficientvit_m0 and shvit_s1 they are not: the head is a batch norm and a
# linear layer, `pre_logits` are taken before the norm, and `get_classifier` returns the linear layer alone. RepViT,
# whose head has such a norm as well, returns both. Training `get_classifier().parameters()` alone leaves the
# norm's weights as they are, while its statistics go on moving. Take `model.head` instead. Output seen (untrained
# weights, batch norms with statistics of random images; largest difference relative to the largest logit):
#   resnet18              Linear            0.00
#   vit_tiny_patch16_224  Linear            0.00
#   repvit_m0_9           RepVitClassifier  0.00
#   efficientvit_m0       Linear            0.64
#   shvit_s1              Linear            0.50
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q numpy==2.2.6 torch==2.14.1 torchvision==0.29.1 timm==1.0.31
cd "$work"
cat > head.py <<'PY'
import timm
import torch

torch.manual_seed(0)
for name in ("resnet18", "vit_tiny_patch16_224", "repvit_m0_9", "efficientvit_m0", "shvit_s1"):
    model = timm.create_model(name)
    images = torch.randn(8, 3, 224, 224)
    with torch.no_grad():
        for _ in range(20):
            model.train()(images)
        model.eval()
        logits = model(images)
        features = model.forward_head(model.forward_features(images), pre_logits=True)
        rebuilt = model.get_classifier()(features)
    apart = float((rebuilt - logits).abs().max() / logits.abs().max())
    print(f"{name:21} {type(model.get_classifier()).__name__:17} {apart:.2f}")
    if name in ("efficientvit_m0", "shvit_s1"):
        assert apart > 0.1, f"{name}: get_classifier now has the norm"
        torch.testing.assert_close(model.head(features), logits)
    else:
        assert apart < 1e-5, f"{name}: get_classifier is not the whole classifier"
PY
"$work/venv/bin/python" head.py
