"""A frozen teacher with its batch norms folded says what the plain one says, and follows it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from support import same_state, saved_teacher, write_config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from mdistiller.distillers import DISTILLERS, KD, get_distiller
from mdistiller.frozen_teacher.folding import foldable
from mdistiller.frozen_teacher.frozen import FrozenTeacher
from mdistiller.models import cifar_model_dict, get_model_entry
from mdistiller.registry import UserError

FUSES = True
# One of each kind of block and of wiring; the rest of the zoo repeats them.
KINDS = (
    *("BabyTeacher", "BabyTeacherReLU", "MobileNetV2", "resnet8", "resnet8x4", "ResNet18"),
    *("ResNet50", "resnext50_32x4d", "ShuffleV1", "ShuffleV2", "vgg8", "wrn_16_1", "wrn_16_2"),
)
MORE = [
    pytest.param(name, marks=pytest.mark.slow) for name in cifar_model_dict if name not in KINDS
]
OTHERS = {"imagenet/ResNet18": 33, "imagenet/MobileNetV1": 36, "timm/resnet18": 36}  # image sizes


def unusual(net):
    """`net` in eval mode with batch norms that change what they get."""
    generator = torch.Generator().manual_seed(3)
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            values = torch.rand(4, norm.num_features, generator=generator)
            with torch.no_grad():
                norm.running_mean.copy_(2 * values[0] - 1)
                norm.running_var.copy_(values[1] + 0.2)
                norm.weight.copy_(values[2] + 0.5)
                norm.bias.copy_(values[3] - 0.5)
    return net.requires_grad_(False).eval()


def zoo_net(name, classes=7):
    size = OTHERS.get(name, 32)
    zoo = "imagenet" if name.startswith("imagenet/") else "cifar"
    torch.manual_seed(0)
    net = get_model_entry(name.removeprefix("imagenet/"), zoo)(num_classes=classes)
    return unusual(net), size


@torch.no_grad()
def worst(frozen, net, size=32):
    """Largest difference of any output, as part of its largest value."""
    image = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))
    pairs = zip(tree_leaves(frozen(image)), tree_leaves(net(image)), strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


@pytest.mark.parametrize("name", [*KINDS, *OTHERS, *MORE])
def test_it_gives_the_same_outputs(name):
    net, size = zoo_net(name)
    before = copy.deepcopy(net.state_dict())
    frozen = FrozenTeacher.of(net, (size, size))
    assert worst(frozen, net, size) <= 1e-5
    norms = sum(isinstance(module, _BatchNorm) for module in net.modules())
    left = sum(isinstance(module, _BatchNorm) for module in frozen.net.modules())
    assert frozen.folded == norms - left
    # those before a sum's readers (wide nets), and behind pooling or ReLU (baby), stay
    depth = {"wrn_16": 7, "wrn_28": 13, "wrn_40": 19}
    stays = {**depth, "Baby": norms}
    assert left == next((count for key, count in stays.items() if key in name), 0)
    assert same_state(net.state_dict(), before)


def test_preparing_disturbs_neither_modes_nor_randomness():
    net = zoo_net("resnet8")[0].train()
    net.layer1.eval()
    modes, state = [m.training for m in net.modules()], torch.get_rng_state()
    FrozenTeacher.of(net, (32, 32))
    assert [m.training for m in net.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(module._forward_hooks for module in net.modules())


class Branches(nn.Module):
    """Convolutions of which only `plain`'s output belongs to its norm alone."""

    def __init__(self):
        super().__init__()
        for name in ("plain", "returned", "shared", "twice", "changed"):
            setattr(self, name, nn.Conv2d(3, 3, 1))
            setattr(self, f"{name}_norm", nn.BatchNorm2d(3))
        self.tied = nn.Conv2d(3, 3, 1)
        self.tied.weight = self.plain.weight

    def forward(self, x):
        returned, shared = self.returned(x), self.shared(x)
        changed = self.changed(x).mul_(2)
        out = self.plain_norm(self.plain(x)) + self.returned_norm(returned)
        out = out + self.shared_norm(shared) * shared.mean() + self.changed_norm(changed)
        out = self.twice_norm(self.twice(out)) + self.twice(x) + self.tied(x)
        return out, {"feats": [returned]}


def test_what_something_else_reads_is_not_folded():
    torch.manual_seed(0)
    net = unusual(Branches())
    with torch.no_grad():
        assert foldable(copy.deepcopy(net), torch.randn(2, 3, 8, 8)) == [("plain", "plain_norm")]
    assert worst(FrozenTeacher.of(net, (8, 8)), net, 8) <= 1e-5


def test_a_linear_layer_is_folded():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(192, 5), nn.BatchNorm1d(5))

        def forward(self, x):
            return self.body(x), {}

    net = unusual(Net())
    frozen = FrozenTeacher.of(net, (8, 8))
    assert frozen.folded == 1
    assert worst(frozen, net, 8) <= 1e-5


def test_a_network_that_cannot_be_copied_or_run_is_left_alone():
    class Odd(nn.Linear):
        def __deepcopy__(self, memo):
            raise RuntimeError("no copies")

    assert FrozenTeacher.of(Odd(3, 3), (8, 8)) is None


@pytest.mark.parametrize("how", ["load", "assign", "in place", "moved"])
def test_changed_weights_are_followed_at_once(how):
    net, other = zoo_net("resnet8")[0], unusual(cifar_model_dict["resnet8"](num_classes=7))
    frozen = FrozenTeacher.of(net, (32, 32))
    if how in ("load", "assign"):
        net.load_state_dict(other.state_dict(), assign=how == "assign")
    elif how == "in place":
        net.layer2[0].bn1.running_var.mul_(3)
    else:
        net.conv1.weight.data = 2 * net.conv1.weight.data
    assert worst(frozen, net) <= 1e-5


def built(tmp_path, method="KD", **settings):
    """The distiller of a config, as a run builds it, and a batch."""
    from mdistiller.dataset import load_data
    from mdistiller.engine.cfg import load_config
    from mdistiller.run.build import build_distiller

    teacher = saved_teacher(tmp_path, "resnet14")
    path = write_config(tmp_path, method=method, TEACHER="resnet14", TEACHER_CKPT=str(teacher))
    cfg = load_config(path, [str(word) for pair in settings.items() for word in pair])
    data = load_data(cfg, torch.device("cpu"), get_distiller(method).two_views)
    distiller = build_distiller(cfg, data, torch.device("cpu"))
    unusual(distiller.teacher)
    image, target, index = next(iter(data.train))
    return distiller.train(), {"image": image, "target": target, "index": index, "epoch": 5}


def losses_and_gradient(distiller, batch):
    torch.manual_seed(0)
    losses = distiller(**batch)[1]
    sum(losses.values()).backward()
    return losses, distiller.student.conv1.weight.grad


# Of each kind: logits, two views, maps, maps before ReLUs, pooled, the classifier; the outputs
# themselves are compared above.
METHODS = ("KD", "MLKD", "REVIEWKD", "AB", "CRD", "CATKD", "SIMKD", "KD+AT")


@pytest.mark.parametrize("method", METHODS)
def test_training_is_the_same_with_and_without(tmp_path, method):
    (folded, batch), (plain, _) = (
        built(tmp_path, method, **{"DISTILLER.TEACHER_FOLD": fold}) for fold in (True, False)
    )
    assert folded.frozen is not None
    assert plain.frozen is None
    assert folded.state_dict().keys() == plain.state_dict().keys()
    assert not any(isinstance(module, FrozenTeacher) for module in folded.modules())
    assert same_state(folded.student.state_dict(), plain.student.state_dict())
    (ours, grad), (theirs, reference) = (losses_and_gradient(d, batch) for d in (folded, plain))
    for name, loss in ours.items():
        torch.testing.assert_close(loss, theirs[name], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, reference, rtol=1e-4, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("method", ["OFD", "KD+OFD"])
def test_a_teacher_in_train_mode_is_run_as_it_is(tmp_path, method):
    distiller, batch = built(tmp_path, method)
    assert distiller.frozen is None
    mean = distiller.teacher.bn1.running_mean.clone()
    distiller(**batch)
    assert not torch.equal(distiller.teacher.bn1.running_mean, mean)


def test_a_dtype_for_a_teacher_that_is_not_frozen_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"TEACHER_DTYPE bf16: OFD"):
        built(tmp_path, "OFD", **{"DISTILLER.TEACHER_DTYPE": "bf16"})


def test_a_teacher_that_was_put_in_train_mode_is_run_as_it_is(tmp_path):
    distiller, batch = built(tmp_path)
    distiller.teacher.train()
    mean = distiller.teacher.bn1.running_mean.clone()
    distiller.run_teacher(batch["image"])
    assert not torch.equal(distiller.teacher.bn1.running_mean, mean)


def test_changes_hidden_from_autograd_are_followed_from_the_next_epoch_on(tmp_path):
    distiller, batch = built(tmp_path)
    before = distiller.run_teacher(batch["image"]).logits
    distiller.teacher.fc.bias.data += 1
    distiller.train()
    after = distiller.run_teacher(batch["image"]).logits
    torch.testing.assert_close(after, before + 1)


@pytest.mark.parametrize("amp", ["none", "bf16"])
def test_in_bf16_it_is_as_close_as_autocast(tmp_path, amp):
    settings = {"SOLVER.AMP": amp, "DISTILLER.TEACHER_DTYPE": "bf16" if amp == "none" else "auto"}
    distiller, batch = built(tmp_path, **settings)
    image = batch["image"]
    exact = distiller.teacher(image)[0]
    with torch.autocast("cpu", torch.bfloat16):
        usual = distiller.teacher(image)[0].float()
    ours = distiller.run_teacher(image).logits
    assert ours.dtype == torch.float32
    assert 0 < (ours - exact).abs().max() <= 2 * (usual - exact).abs().max()
    assert distiller.frozen.net.conv1.weight.dtype == torch.bfloat16
    assert distiller.teacher.conv1.weight.dtype == torch.float32


def test_norms_that_overflow_fp16_are_not_folded():
    net, _ = zoo_net("resnet8")
    net.layer1[0].bn1.running_var.zero_()
    net.layer1[0].bn1.weight.mul_(1e4)
    assert FrozenTeacher.of(net, (32, 32)).folded == 9
    half = FrozenTeacher.of(net, (32, 32), torch.float16)
    assert half.folded == 0
    assert all(param.isfinite().all() for param in half.net.parameters())


def test_fp32_under_autocast_is_exact(tmp_path):
    settings = {"SOLVER.AMP": "bf16", "DISTILLER.TEACHER_DTYPE": "fp32"}
    distiller, batch = built(tmp_path, **settings)
    with torch.autocast("cpu", torch.bfloat16):
        ours = distiller.run_teacher(batch["image"]).logits
    exact = distiller.teacher(batch["image"])[0]
    assert (ours - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_a_resumed_run_follows_the_teacher_of_its_checkpoint(tmp_path):
    distiller, batch = built(tmp_path)
    distiller.run_teacher(batch["image"])
    saved = copy.deepcopy(distiller.state_dict())
    saved["teacher.fc.bias"] += 2
    before = distiller.run_teacher(batch["image"]).logits
    distiller.load_state_dict(saved)
    after = distiller.run_teacher(batch["image"]).logits
    torch.testing.assert_close(F.relu(after), F.relu(before + 2), rtol=1e-4, atol=1e-4)


class Watcher(KD):
    """Reads what a layer of the teacher puts out, by a hook."""

    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        self.seen = []
        teacher.layer1.register_forward_hook(lambda *call: self.seen.append(call))


def test_a_teacher_that_its_method_watches_is_run_itself(tmp_path, monkeypatch):
    monkeypatch.setitem(DISTILLERS, "WATCHER", Watcher)
    distiller, batch = built(tmp_path, "WATCHER")
    before = len(distiller.seen)
    distiller(**batch)
    assert len(distiller.seen) == before + 1


def test_a_teacher_that_gets_a_hook_is_run_itself_from_the_next_epoch_on(tmp_path):
    distiller, batch = built(tmp_path)
    seen = []
    hook = distiller.teacher.layer1.register_forward_hook(lambda *call: seen.append(call))
    distiller.train()(**batch)
    assert len(seen) == 1
    hook.remove()
    distiller.train()(**batch)
    assert len(seen) == 1
