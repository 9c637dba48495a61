"""Convolutions that do the ReLUs and sums after them: the same outputs, and nothing else merged."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from mdistiller.frozen_teacher import frozen as frozen_module
from mdistiller.frozen_teacher import fusing
from mdistiller.frozen_teacher.frozen import FrozenTeacher
from mdistiller.frozen_teacher.fusing import can_fuse, fuse
from mdistiller.models import cifar_model_dict, get_model_entry

FUSES = True
IMAGE = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
FUSED = {  # ReLUs whose input is neither returned nor behind a norm that stays
    "resnet8": 4,
    "vgg13": 6,
    "wrn_16_2": 6,
    "MobileNetV2": 36,
    "ShuffleV2": 34,
    "BabyTeacher": 0,
}

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this torch is built without oneDNN"
)


def frozen_net(name, dtype=None):
    torch.manual_seed(0)
    net = get_model_entry(name, "cifar")(num_classes=7).requires_grad_(False)
    with torch.no_grad():
        net.train()(torch.randn(16, 3, 32, 32))  # norms that change what they get
    frozen = FrozenTeacher.of(net.eval(), (32, 32), dtype)
    assert frozen is not None
    return frozen


def worst(first, second):
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return torch.stack([(a - b).abs().max() / b.abs().max() for a, b in pairs]).max().item()


def fused_operations(run):
    """How many of oneDNN's fused operations a function runs."""
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        run()
    return sum("_convolution_pointwise" in event.name for event in seen.events())


@torch.no_grad()
@pytest.mark.parametrize("name", FUSED)
def test_a_teacher_runs_fused(name):
    frozen = frozen_net(name)
    output = frozen(IMAGE)
    assert fused_operations(lambda: frozen(IMAGE)) == FUSED[name]
    frozen.fuses = False
    assert fused_operations(lambda: frozen(IMAGE)) == 0
    assert worst(output, frozen(IMAGE)) <= 1e-5
    assert list(output[1]) == list(frozen(IMAGE)[1])


@torch.no_grad()
def test_in_bf16_it_is_no_further_from_fp32():
    frozen = frozen_net("resnet8", torch.bfloat16)
    output, exact = frozen(IMAGE), frozen.teacher(IMAGE)
    assert fused_operations(lambda: frozen(IMAGE)) == 4
    frozen.fuses = False
    assert worst(output, exact) <= 1.2 * worst(frozen(IMAGE), exact) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("how", ["load", "in place", "hidden"])
def test_it_follows_the_teachers_weights(how):
    frozen = frozen_net("resnet8")
    frozen(IMAGE)
    if how == "load":
        torch.manual_seed(5)
        frozen.teacher.load_state_dict(cifar_model_dict["resnet8"](num_classes=7).state_dict())
    elif how == "in place":
        frozen.teacher.layer2[0].bn1.running_var.mul_(3)
    else:
        frozen.teacher.conv1.weight.data.mul_(2)
        frozen.refresh()
    assert worst(frozen(IMAGE), frozen.teacher(IMAGE)) <= 1e-5
    assert fused_operations(lambda: frozen(IMAGE)) == 4


@torch.no_grad()
def test_operations_are_recorded_once_for_the_same_weights(monkeypatch):
    frozen = frozen_net("resnet8")
    frozen(IMAGE)
    monkeypatch.setattr(frozen_module, "fuse", None)
    frozen.refresh()
    frozen(IMAGE)


@torch.no_grad()
@pytest.mark.parametrize("how", [copy.deepcopy, lambda frozen: pickle.loads(pickle.dumps(frozen))])
def test_it_can_be_copied_after_it_ran(how):
    frozen = frozen_net("resnet8")
    frozen(IMAGE)
    other = how(frozen)
    frozen.teacher.conv1.weight.zero_()
    frozen.fuses = False
    assert worst(other(IMAGE), other.teacher(IMAGE)) <= 1e-5
    assert worst(other(IMAGE), frozen(IMAGE)) > 0.1


@torch.no_grad()
def test_the_verdict_does_not_depend_on_the_images_at_hand():
    frozen = frozen_net("resnet8")
    state = torch.get_rng_state()
    frozen(torch.full_like(IMAGE, float("nan")))
    assert torch.equal(torch.get_rng_state(), state)
    assert fused_operations(lambda: frozen(IMAGE)) == 4


@torch.no_grad()
def test_operations_are_recorded_for_the_first_few_shapes(monkeypatch):
    monkeypatch.setattr(frozen_module, "SHAPES", 2)
    frozen = frozen_net("resnet8")
    for count in (3, 1, 3, 2, 0):
        output = frozen(IMAGE[:count])
        assert len(output[0]) == count
        if count:
            assert worst(output, frozen.teacher(IMAGE[:count])) <= 1e-5
    assert [shape[0] for shape in frozen._fused] == [3, 1]
    assert fused_operations(lambda: frozen(IMAGE[:2])) == 0


def test_it_is_not_used_where_somebody_looks_or_gradients_flow():
    with torch.no_grad():
        frozen = frozen_net("resnet8")
        counts = []
        for fuses in (True, False):
            frozen.fuses = fuses
            with FlopCounterMode(display=False) as counter:
                assert not can_fuse(IMAGE)
                frozen(IMAGE)
            counts.append(counter.get_total_flops())
        assert counts[0] == counts[1] > 0
        assert can_fuse(IMAGE)
        assert not can_fuse(IMAGE.double())
        assert not can_fuse(IMAGE.to("meta"))
    assert not can_fuse(IMAGE)


class Net(nn.Module):
    """Convolutions a, b, c, and a forward given as a function of them and x."""

    def __init__(self, run):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.up = nn.ConvTranspose2d(3, 3, 1)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def shortcut_written_to(net, x):
    y = net.a(x)
    seen = y.view(-1)  # sees what is added to y
    y += net.b(x)
    return F.relu(y), seen


def input_written_to(net, x):
    x = x + 1
    y = net.a(x)
    x.mul_(2)
    return F.relu(y + net.b(x))


CASES = {  # name -> (forward, how many are fused)
    "convolution and ReLU": (lambda n, x: F.relu(n.a(x)), 1),
    "in place": (lambda n, x: F.relu_(n.a(x)), 1),
    "sum and ReLU": (lambda n, x: F.relu(n.a(x) + x), 1),
    "sum the other way round": (lambda n, x: F.relu(x + n.a(x)), 1),
    "sum in place": (lambda n, x: F.relu_(n.a(x).add_(x)), 1),
    "sum of two convolutions": (lambda n, x: F.relu(n.a(x) + n.b(x)), 1),
    "chain": (lambda n, x: F.relu(n.c(F.relu(n.b(F.relu(n.a(x))))) + x), 3),
    "weights used twice": (lambda n, x: F.relu(n.a(F.relu(n.a(x)))), 2),
    "sum with itself": (lambda n, x: (lambda y: F.relu(y + y))(n.a(x)), 0),
    "sum with a factor": (lambda n, x: F.relu(torch.add(n.a(x), x, alpha=2)), 0),
    "sum with a number": (lambda n, x: F.relu(n.a(x) + 1), 0),
    "sum over a broadcast": (lambda n, x: F.relu(n.a(x) + x.mean((2, 3), keepdim=True)), 0),
    "before the ReLU it is returned": (lambda n, x: (lambda y: (F.relu(y), y))(n.a(x)), 0),
    "the sum is returned": (lambda n, x: (lambda y: (F.relu(y), y))(n.a(x) + x), 0),
    "read by something else": (lambda n, x: (lambda y: F.relu(y) + y.mean())(n.a(x)), 0),
    "transposed": (lambda n, x: F.relu(n.up(x)), 0),
    "weights that are computed": (
        lambda n, x: F.relu(F.conv2d(x, n.a.weight / n.a.weight.norm(), padding=1)),
        0,
    ),
    "the other is written to": (shortcut_written_to, 0),
    "its input is written to": (input_written_to, 0),
}


def packed_weights(fused):
    return sum(name.startswith("packed_") for name, _ in fused.named_buffers())


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_only_what_nothing_else_reads_is_merged(case, monkeypatch):
    monkeypatch.setattr(fusing, "agree", lambda *pair: True)  # the rules alone must see to it
    run, count = CASES[case]
    net = Net(run).eval()
    fused = fuse(net, IMAGE)
    assert (packed_weights(fused) if fused else 0) == count
    if fused:
        other = torch.randn(3, 3, 32, 32)
        kept = other.clone()
        assert worst(fused(other), net(other)) <= 1e-6
        assert torch.equal(other, kept)


NUMBERS = {  # what is read as a number while operations are recorded, and would stay
    "a branch": lambda n, x: F.relu(n.a(x) if x.mean() > 0 else n.b(x)),
    "an image's largest value": lambda n, x: F.relu(n.a(x)) / float(x.numpy().max()),
    "a list of signs": lambda n, x: F.relu(n.a(x)) * sum((x[:, 0, 0, 0] > 0).tolist()),
    "a weight": lambda n, x: F.relu(n.a(x)) * n.b.bias[0].item(),
}


@torch.no_grad()
@pytest.mark.parametrize("case", NUMBERS)
def test_what_reads_values_as_numbers_is_not_recorded(case):
    assert fuse(Net(NUMBERS[case]).eval(), IMAGE) is None


@torch.no_grad()
def test_what_is_random_is_not_kept():
    net = Net(lambda n, x: F.relu(F.dropout(n.a(F.relu(n.b(x))))))
    assert fuse(net, IMAGE) is None


@torch.no_grad()
def test_one_sum_that_cannot_be_fused_does_not_keep_others_from_it():
    def run(n, x):
        y = F.relu(n.a(x))
        return F.relu(n.b(y) + x.double())

    assert packed_weights(fuse(Net(run).eval(), IMAGE)) == 1
