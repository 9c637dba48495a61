"""SOLVER.FREEZE, LR_BY_NAME and LAYER_DECAY: which weights move, and how fast."""

import pytest
import timm.optim
import torch
from support import saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.distillers import KD, Vanilla
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import load_config
from mdistiller.engine.optim.param_groups import freeze, parameter_names, student_groups
from mdistiller.engine.optim.schedules import build_scheduler
from mdistiller.engine.trainer import BaseTrainer
from mdistiller.models import cifar_model_dict, get_model_entry
from mdistiller.registry import UserError


def solver(*words):
    return load_config("", ["SOLVER.LR", 0.1, *words]).SOLVER


def resnet8():
    torch.manual_seed(0)
    return cifar_model_dict["resnet8"][0](num_classes=10)


def rates(net, *words):
    """The first rate of each parameter by name."""
    groups = student_groups(Vanilla(net).param_groups(), solver(*words), Vanilla(net))
    rate_of = {id(p): group.get("lr", 0.1) for group in groups for p in group["params"]}
    return {name: rate_of.get(id(p)) for name, p in parameter_names(net).items()}


def train(folder, *words, **config):
    path = write_config(folder, **config)
    code = train_command.main(["--cfg", str(path), *words])
    return code, folder / "out" / "toy" / "run"


def unwrapped(text):
    """The lines that a run begins with, whose continuations are indented."""
    return text.replace("\n          ", " ")


def state(path):
    return torch.load(path, weights_only=True)["model"]


def moved(run, before):
    after = state(run / "student_latest")
    return {key for key in after if not torch.equal(after[key], before[key])}


def test_patterns_are_those_of_file_names_and_modules():
    net = resnet8()
    norms = freeze(net, ["conv1", "layer1.*", "bn1.bias", "*.downsample.1", "layer3.0.bn2.*"])
    frozen = {name for name, p in net.named_parameters() if not p.requires_grad}
    fixed = {name for name, module in net.named_modules() if module in norms}
    assert frozen == {
        *("conv1.weight", "bn1.bias"),
        *(name for name, _ in net.named_parameters() if name.startswith("layer1.")),
        *(f"layer{k}.0.downsample.1.{kind}" for k in (2, 3) for kind in ("weight", "bias")),
        *("layer3.0.bn2.weight", "layer3.0.bn2.bias"),
    }
    downsample = {"layer2.0.downsample.1", "layer3.0.downsample.1"}
    assert fixed == {"layer1.0.bn1", "layer1.0.bn2", "layer3.0.bn2", *downsample}  # bn1 is trained
    net = resnet8()
    norms = freeze(net, ["*", "!fc", "!layer3.*.bn1.bias"])
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        *("layer3.0.bn1.bias", "fc.weight", "fc.bias"),
    ]
    assert {m for n, m in net.named_modules() if "bn" in n or n.endswith("downsample.1")} == {
        *norms,
        net.layer3[0].bn1,
    }
    for patterns, message in (
        (["layr1.*"], "SOLVER.FREEZE: 'layr1.*' matches no parameter.*did you mean 'layer1'"),
        (["stem"], r"its modules: conv1, bn1, layer1, layer2, layer3, fc\)"),
        (["*"], "leaves no parameter of the student"),
    ):
        with pytest.raises(UserError, match=message):
            freeze(resnet8(), patterns)


def test_what_is_frozen_stays_to_the_bit_through_a_stage_and_in_the_average(tmp_path, capsys):
    """FSP's stage trains the student as well; conv1, bn1 and layer1 keep all their values."""
    teacher = str(saved_teacher(tmp_path, "resnet8", seed=2))
    start = saved_teacher(tmp_path, "resnet8", seed=3)
    text = "SOLVER: {FREEZE: [conv1, bn1, layer1], EMA: 0.5, LR_BY_NAME: ['fc=2']}\n"
    text += "FSP: {INIT: {EPOCHS: 1}}\n"
    nets = {"STUDENT_CKPT": str(start), "TEACHER": "resnet8", "TEACHER_CKPT": teacher}
    code, run = train(tmp_path, method="FSP", text=text, epochs=1, **nets)
    assert code == 0
    said = capsys.readouterr().out
    assert f"student   resnet8, 0.08 M parameters (0.01 M frozen), from {start}" in unwrapped(said)
    frozen = {k for k in state(start) if k.startswith(("conv1", "bn1", "layer1"))}
    assert moved(run, state(start)) == state(start).keys() - frozen
    average = state(run / "student_ema_latest")
    assert all(torch.equal(average[key], state(start)[key]) for key in frozen)
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("kind", ["SGD", "AdamW", "lion", "dot", "deepkd"])
def test_every_optimizer_follows_factors_and_leaves_out_what_is_frozen(kind):
    """With equal gradients and without decay, a step of each is proportional to the rate."""
    words = ["SOLVER.FREEZE", ["layer2"], "SOLVER.LR_BY_NAME", ["*=0.5", "fc=2"]]
    words += ["SOLVER.TRAINER" if kind in trainer_dict else "SOLVER.TYPE", kind]
    cfg = load_config("", ["SOLVER.WEIGHT_DECAY", 0, "SOLVER.LR", 0.1, *words])
    trainer_class = trainer_dict[cfg.SOLVER.TRAINER]
    trainer = trainer_class.__new__(trainer_class)
    trainer.model = KD(resnet8(), resnet8(), cfg)
    freeze(trainer.model.student, cfg.SOLVER.FREEZE)
    optimizer = trainer.init_optimizer(cfg)
    before = {n: p.detach().clone() for n, p in trainer.model.student.named_parameters()}
    for param in trainer.model.student.parameters():
        param.grad = torch.ones_like(param)
    optimizer.step()
    for name, param in trainer.model.student.named_parameters():
        step = 0.0 if name.startswith("layer2.") else 0.2 if name.startswith("fc.") else 0.05
        torch.testing.assert_close(before[name] - param, torch.full_like(param, step))


def test_layer_decay_counts_the_stages_of_the_zoo_and_the_blocks_of_timm():
    found = rates(resnet8(), "SOLVER.LAYER_DECAY", 0.5, "SOLVER.LR_BY_NAME", ["layer3.0.bn1=4"])
    shown = {name: rate for name, rate in found.items() if name.endswith(("conv1.weight", "bias"))}
    assert shown["fc.bias"] == 0.1
    assert shown["layer3.0.conv1.weight"] == pytest.approx(0.05)
    assert shown["layer3.0.bn1.bias"] == pytest.approx(0.2)  # both factors
    assert shown["layer1.0.conv1.weight"] == pytest.approx(0.0125)
    assert shown["conv1.weight"] == shown["bn1.bias"] == pytest.approx(0.00625)
    small = {"patch_size": 8, "embed_dim": 12, "depth": 2, "num_heads": 2}
    entry = get_model_entry("timm/vit_tiny_patch16_224", "cifar")
    found = rates(entry(num_classes=10, image_size=(32, 32), **small), "SOLVER.LAYER_DECAY", 0.5)
    net = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, **small)
    theirs = timm.optim.param_groups_layer_decay(net, layer_decay=0.5)
    scale_of = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
    assert found == pytest.approx({n: 0.1 * scale_of[id(p)] for n, p in net.named_parameters()})
    plain = get_model_entry("torchvision/mnasnet0_5", "cifar")(image_size=(32, 32))
    with pytest.raises(UserError, match=r"SOLVER.LAYER_DECAY: .* use SOLVER.LR_BY_NAME"):
        rates(plain, "SOLVER.LAYER_DECAY", 0.5)


def test_a_cosine_ends_in_proportion():
    node = solver("SOLVER.SCHEDULE", "cosine", "SOLVER.MIN_LR", 0.02, "SOLVER.EPOCHS", 4)
    ours, theirs = [
        torch.optim.SGD([{"params": [torch.nn.Parameter(torch.ones(1))], **more}], lr=0.1)
        for more in ({"lr": 0.05, "lr_scale": 0.5}, {})
    ]
    schedules = [build_scheduler(optimizer, node) for optimizer in (ours, theirs)]
    for _ in range(4):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"] / 2)
        for optimizer, schedule in zip((ours, theirs), schedules, strict=True):
            optimizer.step()
            schedule.step()
    assert theirs.param_groups[0]["lr"] == pytest.approx(0.02)


class Ungrouped(BaseTrainer):
    """As trainers of forks make their optimizer."""

    def init_optimizer(self, cfg):
        return torch.optim.SGD(self.distiller.module.get_learnable_parameters(), lr=0.1)


def test_settings_that_cannot_work_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(trainer_dict, "mine", Ungrouped)
    for words, says in (
        (["SOLVER.LR_BY_NAME", "['fc']"], 'LR_BY_NAME must be a list of "PATTERN=FACTOR"'),
        (["SOLVER.LR_BY_NAME", "['fc=0']"], "SOLVER.FREEZE keeps weights fixed"),
        (["SOLVER.LR_BY_NAME", "['head=2']"], "SOLVER.LR_BY_NAME: 'head' matches no parameter"),
        (["SOLVER.LAYER_DECAY", "1.5"], "SOLVER.LAYER_DECAY must be above 0 and at most 1"),
        (["SOLVER.FREEZE", "['nothing']"], "SOLVER.FREEZE: 'nothing' matches no parameter"),
        (["SOLVER.LAYER_DECAY", "0.5", "SOLVER.TRAINER", "mine"], "overrides init_optimizer"),
    ):
        assert train(tmp_path, *words, epochs=1)[0] == 2, words
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
        assert says in line
    assert not (tmp_path / "out" / "toy" / "run" / "metrics.jsonl").exists()
