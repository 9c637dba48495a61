"""DML and KDCL, whose networks teach one another, against float64 references."""

import math

import pytest
import torch
import torch.nn.functional as F
from support import golden_values

from mdistiller.distillers import distiller_dict, get_distiller
from mdistiller.distillers.DML import dml_losses
from mdistiller.distillers.helpers.losses.decoupled import target_column
from mdistiller.distillers.KDCL import ensemble, error_products, general_weights, kdcl_losses
from mdistiller.engine.cfg import default_config
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

LOGITS = [3 * golden_values((4, 5), seed) for seed in (1, 2, 3)]
TARGET = torch.tensor([0, 3, -100, 4])


def softmax(values, temperature):
    shares = [math.exp(v / temperature) for v in values]
    return [share / sum(shares) for share in shares]


def kd(taught, learning, temperature):
    q, p = softmax(taught, temperature), softmax(learning, temperature)
    return temperature**2 * sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def test_dml_is_the_mean_divergence_from_the_others_without_gradient_to_them():
    rows = [z.tolist() for z in LOGITS]
    leaves = [z.clone().requires_grad_() for z in LOGITS]
    losses = dml_losses(leaves, 1.5)
    for k in range(3):
        others = [rows[i] for i in range(3) if i != k]
        values = [kd(other[n], rows[k][n], 1.5) for other in others for n in range(4)]
        assert losses[k].item() == pytest.approx(sum(values) / 8, rel=1e-9)
        grads = torch.autograd.grad(losses[k], leaves, allow_unused=True)
        assert [grad is not None for grad in grads] == [i == k for i in range(3)]


def taught(kind, rows, label):
    """KDCL's target for a sample, from the networks' logits."""
    if kind == "mean":
        return [sum(column) / 3 for column in zip(*rows, strict=True)]
    if kind == "naive":
        return max(rows, key=lambda row: softmax(row, 1.0)[label])
    return [min(row[c] - row[label] for row in rows) for c in range(5)]


@pytest.mark.parametrize("kind", ["naive", "minlogit", "mean"])
def test_kdcl_is_kd_from_what_the_networks_agree_on(kind):
    counted = [n for n in range(4) if kind == "mean" or TARGET[n] >= 0]
    leaves = [z.clone().requires_grad_() for z in LOGITS]
    losses = kdcl_losses(leaves, TARGET, 2.0, kind)
    for k in range(3):
        total = 0.0
        for n in counted:
            rows = [z[n].tolist() for z in LOGITS]
            total += kd(taught(kind, rows, int(TARGET[n])), rows[k], 2.0)
        assert losses[k].item() == pytest.approx(total / len(counted), rel=1e-9)
    grads = torch.autograd.grad(losses[0], leaves, allow_unused=True)
    assert [grad is not None for grad in grads] == [True, False, False]


def test_the_linear_target_has_the_least_cross_entropy_of_all_mixes():
    """Against a grid over the simplex, in each size of logits; unlabelled samples do not count."""
    column, labelled = target_column(TARGET)
    grid = [(i / 100, j / 100) for i in range(101) for j in range(101 - i)]
    mixes = torch.tensor([(a, b, 1 - a - b) for a, b in grid], dtype=torch.float64)
    for scale in (0.1, 1.0, 10.0):
        stacked = scale * torch.stack(LOGITS)
        mixed = torch.einsum("mk,knc->mnc", mixes, stacked)[:, labelled].flatten(0, 1)
        rows = F.cross_entropy(mixed, TARGET[labelled].repeat(len(mixes)), reduction="none")
        losses = rows.unflatten(0, (len(mixes), -1)).mean(dim=1)
        best = losses.min()
        e = ensemble([*stacked], column, "linear", labelled)
        got = F.cross_entropy(e[labelled], TARGET[labelled])
        assert got < best + 0.02 * (losses.max() - best)
        pairs = zip(e[labelled].tolist(), stacked[0][labelled].tolist(), strict=True)
        want = [kd(row, z, 2.0) for row, z in pairs]
        loss = kdcl_losses([*stacked], TARGET, 2.0, "linear")[0]
        assert loss.item() == pytest.approx(sum(want) / 3, rel=1e-9)


def test_the_general_target_has_the_least_squared_error_on_held_out_images():
    """Against the sums written out and no other weights of sum 1; networks that agree share."""
    generator = torch.Generator().manual_seed(0)
    nets = [*torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)]
    labels = [0, 3, 2, 4]
    products = error_products(nets, torch.tensor(labels))
    errors = [
        [
            p - (c == label)
            for z, label in zip(net, labels, strict=True)
            for c, p in enumerate(softmax(z.tolist(), 1.0))
        ]
        for net in nets
    ]
    for k, mine in enumerate(errors):
        for j, other in enumerate(errors):
            want = sum(a * b for a, b in zip(mine, other, strict=True))
            assert products[k, j].item() == pytest.approx(want, rel=1e-9)
    weights = general_weights(products)
    assert weights.sum().item() == pytest.approx(1)
    inverse = products.inverse()
    assert torch.allclose(weights, inverse.sum(dim=1) / inverse.sum(), rtol=1e-4)
    for step in ([1, -1, 0], [0, 1, -1], [1, 0, -1]):
        for size in (-0.1, 0.1):
            other = weights + size * torch.tensor(step, dtype=torch.float64)
            assert other @ products @ other > weights @ products @ weights
    same = general_weights(error_products([nets[0]] * 2, torch.tensor(labels)))
    assert same.tolist() == pytest.approx([0.5, 0.5])
    assert general_weights(torch.zeros(2, 2)).tolist() == [0.5, 0.5]
    mixed = sum(w * z for w, z in zip(weights, nets, strict=True)).tolist()
    loss = kdcl_losses(nets, TARGET, 2.0, "general", weights)[1]
    rows = [kd(a, b, 2.0) for a, b in zip(mixed, nets[1].tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(rows) / 4, rel=1e-9)


@pytest.mark.parametrize("method", ["DML", "KDCL"])
def test_each_network_gets_the_gradient_of_its_own_losses(method):
    """The student's is that of its cross-entropy and its term, whatever the peers' loss."""
    torch.manual_seed(0)
    nets = [get_model_entry("resnet8", "cifar")(num_classes=5) for _ in range(3)]
    distiller = distiller_dict[method].build(nets[0], None, default_config(), 4, peers=nets[1:])
    image, target = golden_values((4, 3, 8, 8), 1).float(), torch.tensor([0, 3, 1, 4])
    logits, losses = distiller.train()(image=image, target=target, epoch=1)
    assert len(distiller.get_learnable_parameters()) == 3 * len(list(nets[0].parameters()))
    torch.manual_seed(0)
    all_logits = [net(image)[0] for net in nets]
    torch.testing.assert_close(all_logits[0], logits)
    form = {
        "DML": lambda z: dml_losses(z, 1.0),
        "KDCL": lambda z: kdcl_losses(z, target, 2.0, "minlogit"),
    }[method]
    own = [
        torch.nn.functional.cross_entropy(z, target) + loss
        for z, loss in zip(all_logits, form(all_logits), strict=True)
    ]
    assert distiller.metrics["peer2_loss"].item() == pytest.approx(own[2].item(), rel=1e-5)
    sum(losses.values()).backward()
    for net, loss in zip(nets, own, strict=True):
        (want,) = torch.autograd.grad(loss, [net.conv1.weight], retain_graph=True)
        torch.testing.assert_close(net.conv1.weight.grad, want, rtol=1e-3, atol=1e-5)


def test_without_peers_there_is_one_like_the_student_with_other_weights():
    net = get_model_entry("resnet8", "cifar")(num_classes=5)
    peers = distiller_dict["DML"].build(net, None, default_config(), 4).peers
    assert [type(peer) for peer in peers] == [type(net)]
    assert not torch.equal(peers[0].conv1.weight, net.conv1.weight)
    with pytest.raises(UserError, match="DML cannot be combined, since it has no teacher"):
        get_distiller("KD+DML")
