#!/usr/bin/env bash
# torch 2.14.1, numpy 2.2.6, Python 3.11.
#
# `cross_entropy` with both `weight` and `label_smoothing` does not weight samples by their class. Of the smoothed
# label each class keeps its own weight, while the mean divides by the labels' weights alone. Images of a frequent
# class then carry the large weights of all rare classes in their evenly spread part, and the loss has its minimum
# far from the label. 90 and 10 samples of two classes that one feature separates, weights inverse to the numbers:
# probability of the label at the minimum of the loss. `weight` alone or smoothing alone gives what one expects;
# weighting each sample's unreduced, smoothed loss gives what one expects from both. Output seen:
#   smoothing                   frequent    rare
#   0.1, no weights                 0.95    0.95
#   0.0, weights                    1.00    1.00
#   0.1, weights                    0.68    0.99
#   0.2, weights                    0.50    0.99
#   0.1, samples weighted           0.95    0.95
#
# Runs outside CI; needs a package index. Fails if the behaviour changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.2.6
cd "$work"
cat > smoothing.py <<'PY'
import torch
import torch.nn.functional as F

labels = torch.tensor([0] * 90 + [1] * 10)
features = F.one_hot(labels, 2).double()
inverse = (100 / (2 * labels.bincount())).double()


def by_torch(logits, smoothing, weights=None):
    return F.cross_entropy(logits, labels, weights, label_smoothing=smoothing)


def by_sample(logits, smoothing, weights):
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    return (losses * weights[labels]).sum() / weights[labels].sum()


def fit(title, loss, *facts):
    layer = torch.zeros(2, 2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([layer], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        value = loss(features @ layer, *facts)
        value.backward()
        return value

    optimizer.step(closure)
    frequent, rare = layer.detach().softmax(1).diagonal().tolist()
    print(f"{title:25} {frequent:10.2f} {rare:7.2f}")
    return frequent, rare


def near(got, want):
    assert all(abs(a - b) < 0.01 for a, b in zip(got, want)), "the behaviour changed"


print(f"{'smoothing':25} {'frequent':>10} {'rare':>7}")
near(fit("0.1, no weights", by_torch, 0.1), (0.95, 0.95))
near(fit("0.0, weights", by_torch, 0.0, inverse), (1.0, 1.0))
near(fit("0.1, weights", by_torch, 0.1, inverse), (0.68, 0.99))
near(fit("0.2, weights", by_torch, 0.2, inverse), (0.50, 0.99))
near(fit("0.1, samples weighted", by_sample, 0.1, inverse), (0.95, 0.95))
PY
"$work/venv/bin/python" smoothing.py
