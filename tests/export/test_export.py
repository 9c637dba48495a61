"""Exported files against the network they are of, what refuses to be exported, and the card."""

import json
import re
import sys

import onnxruntime
import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from support import REPO, TOY, same_state, saved_teacher, unpadded, write_config
from torch import nn

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import models as models_command
from mdistiller.cli import train as train_command
from mdistiller.dataset import DATASETS, Options
from mdistiller.export import FORMATS, source
from mdistiller.export.student import Deployed
from mdistiller.models import get_model_entry
from mdistiller.weights import load_checkpoint, load_network

MEAN, STD = 0.3, 0.4  # of the toy data
OWN_MEAN, OWN_STD = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 4, "num_heads": 2}
NETS = {"timm/vit_tiny_patch16_224": VIT, "resnet8x4": {}, "MobileNetV2": {}}
OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("resnet8x4", "MobileNetV2")]
TINY = ["--formats", "safetensors", "--no-latency"]


def export(*words):
    return export_command.main([str(word) for word in words])


def refused(capsys, *words):
    """Exit code 2 and one line of error, which is returned."""
    capsys.readouterr()
    assert export(*words) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@torch.no_grad()
def checkpoint(path, name, settings):
    """A file of a network whose batch norms have seen data, so that its logits are of order 1."""
    torch.manual_seed(0)
    size = {"image_size": (32, 32)} if "/" in name else {}
    net = get_model_entry(name, "cifar")(num_classes=10, **size, **settings)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 1.0
    net.train()(torch.randn(32, 3, 32, 32))
    torch.save({"model": net.state_dict()}, path)
    return net.eval()


def train(folder, *words, **options):
    config = write_config(folder, **options)
    assert train_command.main(["--cfg", str(config), *words]) == 0
    return folder / "out" / "toy" / "run"


@pytest.fixture(scope="module")
def simkd(tmp_path_factory):
    """A finished run of SIMKD, whose student keeps the teacher's head."""
    folder = tmp_path_factory.mktemp("simkd")
    teacher = str(saved_teacher(folder, "resnet14"))
    return train(folder, epochs=2, method="SIMKD", TEACHER="resnet14", TEACHER_CKPT=teacher)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run of three epochs with held-out images, a moving average and all its checkpoints."""
    text = "SOLVER:\n  EMA: 0.5\nDATASET:\n  VAL_SPLIT: 40\nLOG:\n  SAVE_CHECKPOINT_FREQ: 1\n"
    return train(tmp_path_factory.mktemp("saved"), epochs=3, text=text)


@pytest.fixture(scope="module")
def normalised(tmp_path_factory):
    """A run whose student has a normalisation of its own."""
    return train(tmp_path_factory.mktemp("normalised"), epochs=1, STUDENT_NORM=[OWN_MEAN, OWN_STD])


@pytest.fixture(scope="module", params=["timm/vit_tiny_patch16_224", "SIMKD", *OTHERS])
def exported(request, tmp_path_factory):
    """(network, folder of its files, all formats)."""
    name, folder = request.param, tmp_path_factory.mktemp("exported")
    torch.set_num_threads(1)
    if name == "SIMKD":
        run = request.getfixturevalue("simkd")
        net = get_model_entry("resnet8", "cifar")(num_classes=10)
        load_network(net, run / "student_best", "resnet8", 10)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(export_command, "SECONDS", 0.1)
            assert export(run, "--out", folder / "files") == 0
        return net.eval(), folder / "files"
    net = checkpoint(folder / "net.pth", name, NETS[name])
    words = ["-m", name, "-c", folder / "net.pth", "-d", "toy", "--num-classes", 10]
    words += ["--import", TOY, "--out", folder / "files", "--no-latency"]
    words += ["DISTILLER.STUDENT_NORM", "data"]  # else timm's, for a file that does not say
    for key, value in NETS[name].items():
        words += [f"DISTILLER.STUDENT_ARGS.{key}", value]
    assert export(*words) == 0
    return net, folder / "files"


@torch.no_grad()
def test_onnx_and_torch_export_give_the_networks_logits_at_any_batch_size(exported):
    net, folder = exported
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    program = torch.export.load(folder / "student.pt2").module()
    assert session.get_inputs()[0].shape == ["batch", 3, 32, 32]
    assert session.get_outputs()[0].shape == ["batch", 10]
    for batch in (1, 2, 5):
        raw = torch.rand(batch, 3, 32, 32)
        wanted = net((raw - MEAN) / STD)[0]
        assert wanted.std() > 0.01
        (found,) = session.run(["logits"], {"image": raw.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=0, atol=1e-4)
        torch.testing.assert_close(program(raw), wanted, rtol=0, atol=1e-4)


def test_files_say_what_they_are(exported):

    _, folder = exported
    session = onnxruntime.InferenceSession(folder / "student.onnx")
    extra = {"num_classes": "", "mean": "", "classes": ""}
    torch.export.load(folder / "student.pt2", extra_files=extra)
    with safe_open(folder / "student.safetensors", "pt") as file:
        facts = file.metadata()
    for found in (facts, session.get_modelmeta().custom_metadata_map, extra):
        assert found["num_classes"] == "10"
        assert json.loads(found["mean"]) == [MEAN] * 3
    assert facts["dataset"] == "toy"
    if facts["model"] == "resnet8":  # of a run, which knows the names
        assert json.loads(extra["classes"]) == [str(digit) for digit in range(10)]


def test_the_cards_code_runs(exported, monkeypatch):
    net, folder = exported
    monkeypatch.chdir(folder)
    Image.new("RGB", (50, 40), (200, 100, 0)).save("image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        names = {}
        exec(block, names)
        assert tuple(names["logits"].shape) == (1, 10)
        if "features" in names:  # weights alone: the image is normalised by the caller
            with torch.no_grad():
                torch.testing.assert_close(names["logits"], net(names["image"])[0])


def test_the_card_of_a_run_tells_how_it_was_made(exported, simkd):
    net, folder = exported
    text = unpadded((folder / "README.md").read_text())
    if "SIMKD" not in text:
        assert "Unknown: the weights came without the record of a run." in text
        return
    summary = json.loads((simkd / "summary.json").read_text())
    header = yaml.safe_load(text.split("---\n")[1])
    (metric,) = header["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(summary["best_acc"], abs=1e-4)
    best = (
        f"| best (these files) | {summary['best_epoch']} | {summary['best_acc']:.2f} | test set |"
    )
    assert best in text
    assert f"| latest | 2 | {summary['last_acc']:.2f} | test set |" in text
    assert f"by SIMKD under the teacher `resnet14` (top-1 {summary['teacher_acc']:.2f} %)" in text
    assert f"{sum(p.numel() for p in net.parameters()):,} parameters" in text
    assert len(re.findall(r"\| PyTorch, CPU \| (?:1|64) \| \d", text)) == 2
    assert len(re.findall(r"\| `student.onnx`, CPU \| (?:1|64) \| \d", text)) == 2
    config = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    assert config["SIMKD"]["FACTOR"] == 2
    assert str(simkd.parents[2]) not in text  # a card is shared; places on this machine are not


def test_the_pages_code_measures_the_accuracy_of_the_run(exported, simkd, monkeypatch, capsys):
    """On all 360 digits, of which the run's own test set is the first 60."""
    net, folder = exported
    if "SIMKD" not in (folder / "README.md").read_text():
        return
    page = (REPO / "docs" / "export.md").read_text()
    code = page.split("<!-- tested -->\n```python\n")[1].split("```")[0]
    (folder.parent / "deploy").symlink_to(folder)
    monkeypatch.chdir(folder.parent)
    capsys.readouterr()
    exec(code, {})
    printed = float(capsys.readouterr().out.removesuffix(" %\n"))
    digits = DATASETS["digits"]().load(None, "test", Options())
    with torch.no_grad():
        logits = net((digits.images.float() / 255 - MEAN) / STD)[0]
    right = (logits.argmax(1) == digits.targets).float().mean()
    assert printed == pytest.approx(100 * float(right), abs=0.3)


def test_flops_of_the_card_are_those_of_the_list_of_networks(tmp_path):
    assert export(*bare(tmp_path, "--formats", "safetensors")) == 0
    flops = models_command.facts("resnet8", "cifar", 32, 10)["flops"]
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"; {flops / 1e6:,.1f} MFLOPs for one 32x32 image" in text


def test_eval_takes_safetensors(simkd, tmp_path, capsys):
    assert export(simkd, "--out", tmp_path, *TINY) == 0
    lines = []
    for path in (simkd / "student_best", tmp_path / "student.safetensors"):
        capsys.readouterr()
        words = ["-m", "resnet8", "-c", str(path), "-d", "toy", "--import", TOY]
        assert eval_command.main(words) == 0
        lines.append(capsys.readouterr().out.splitlines()[0])
    assert lines[0] == lines[1]
    assert "top-1" in lines[0]
    path = tmp_path / "student.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert eval_command.main(words) == 2
    assert "is damaged or not a safetensors file" in capsys.readouterr().err


@pytest.mark.parametrize("choice", ["latest", "epoch_1"])
def test_another_checkpoint_of_a_run(saved, tmp_path, choice):
    run = saved
    assert export(run, "--checkpoint", choice, "--out", tmp_path, *TINY) == 0
    file = {"latest": "student_latest", "epoch_1": "student_1"}[choice]
    nets = [get_model_entry("resnet8", "cifar")(num_classes=10) for _ in range(2)]
    for net, path in zip(nets, (run / file, tmp_path / "student.safetensors"), strict=True):
        load_network(net, path, "resnet8")
    assert torch.equal(nets[0].fc.weight, nets[1].fc.weight)
    text = unpadded((tmp_path / "README.md").read_text())
    assert f"| {choice} (these files) |" in text
    assert "The best epoch was selected on the 40 held-out training images." in text
    summary = json.loads((run / "summary.json").read_text())
    assert f"| {summary['test_acc_last']:.2f} | test set |" in text
    assert f"Exported from {file}" in text


@pytest.mark.parametrize("choice", ["ema_best", "ema_latest"])
def test_the_moving_average_of_a_run(saved, tmp_path, choice):
    run = saved
    assert export(run, "--checkpoint", choice, "--out", tmp_path, *TINY) == 0
    exported = load_file(tmp_path / "student.safetensors")
    states = {
        name: load_checkpoint(run / f"student_{name}")["model"] for name in (choice, "latest")
    }
    assert same_state(exported, states[choice])
    assert not same_state(exported, states["latest"])
    text = unpadded((tmp_path / "README.md").read_text())
    summary = json.loads((run / "summary.json").read_text())
    which = {"ema_best": "best", "ema_latest": "last"}[choice]
    epoch = summary["ema_best_epoch"] if which == "best" else 3
    on = "40 held-out training images"
    assert (
        f"| {choice} (these files) | {epoch} | {summary[f'ema_{which}_acc']:.2f} | {on} |" in text
    )
    tested = summary[f"ema_test_acc_{which}"]
    assert f"| {choice} (these files) | {epoch} | {tested:.2f} | test set |" in text
    assert "moving average of the weights (decay 0.5)" in text
    header = yaml.safe_load(text.split("---\n")[1])
    (metric,) = header["model-index"][0]["results"][0]["metrics"]
    assert metric["value"] == pytest.approx(tested, abs=1e-4)


def test_of_equal_accuracies_the_card_names_the_epoch_whose_weights_the_files_have(
    tmp_path, monkeypatch
):
    for module, values in (
        ("classification", [20.0, 30.0, 30.0]),
        ("callbacks.ema", [40.0, 40.0, 10.0]),
    ):
        rest = {"acc_top5": 50.0, "loss": 1.0}
        scripted = iter([{"acc": value, **rest} for value in values])
        target = f"mdistiller.engine.{module}.evaluate"
        monkeypatch.setattr(target, lambda *_, scripted=scripted: next(scripted))
    run = train(tmp_path, epochs=3, text="SOLVER:\n  EMA: 0.5\n")
    best = load_checkpoint(run / "student_best")["model"]
    assert same_state(best, load_checkpoint(run / "student_latest")["model"])
    assert export(run, *TINY) == 0
    text = unpadded((run / "export" / "README.md").read_text())
    assert "| best (these files) | 3 | 30.00 |" in text
    assert "| ema_best | 2 | 40.00 |" in text


def test_an_unfinished_run_and_one_that_recorded_no_data_facts(tmp_path):
    run = train(tmp_path, epochs=1)
    recorded = json.loads((run / "run.json").read_text())
    assert recorded["data"]["mean"] == [MEAN] * 3
    (run / "run.json").write_text(json.dumps({"starts": recorded["starts"]}))
    (run / "summary.json").unlink()
    assert export(run, *TINY, "SOLVER.EPOCHS", "3") == 0
    text = unpadded((run / "export" / "README.md").read_text())
    assert "The run was not finished: 1 of 3 epochs." in text
    assert f"mean {[MEAN] * 3}" in text


def bare(tmp_path, *more):
    """Words for an untrained resnet8, which is quick to export."""
    words = ["-m", "resnet8", "-c", saved_teacher(tmp_path), "-d", "toy", "--num-classes", 10]
    return [*words, "--import", TOY, "--out", tmp_path / "out", "--no-latency", *more]


@torch.no_grad()
def test_without_normalization_images_come_normalised(tmp_path):
    words = bare(tmp_path, "--without-normalization", "--formats", "torch")
    assert export(*words) == 0
    net = get_model_entry("resnet8", "cifar")(num_classes=10)
    load_network(net, tmp_path / "resnet8_10.pth", "resnet8")
    image = torch.randn(3, 3, 32, 32)
    found = torch.export.load(tmp_path / "out" / "student.pt2").module()(image)
    torch.testing.assert_close(found, net.eval()(image)[0], rtol=0, atol=1e-4)
    assert (
        "`student.pt2`: values **normalised before**"
        in (tmp_path / "out" / "README.md").read_text()
    )


def test_a_student_with_its_own_normalisation_is_exported_with_it(normalised, tmp_path):
    mean, std, run = OWN_MEAN, OWN_STD, normalised
    words = ["--formats", "torch", "safetensors", "--no-latency", "--checkpoint", "latest"]
    assert export(run, "--out", tmp_path / "out", *words) == 0
    net = get_model_entry("resnet8", "cifar")(num_classes=10)
    load_network(net, run / "student_latest", "resnet8")
    image = torch.rand(3, 3, 32, 32)
    shape = (1, 3, 1, 1)
    own = (image - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    found = torch.export.load(tmp_path / "out" / "student.pt2").module()(image)
    torch.testing.assert_close(found, net.eval()(own)[0], rtol=0, atol=1e-4)
    with safe_open(tmp_path / "out" / "student.safetensors", "pt") as file:
        assert json.loads(file.metadata()["mean"]) == mean


def test_a_run_exported_with_another_normalisation_than_its_evaluation_is_refused(
    normalised, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(source, "statistics_of", lambda *_: ([MEAN] * 3, [STD] * 3))
    words = ["--out", tmp_path, "--formats", "safetensors", "--no-latency"]
    line = refused(capsys, normalised, *words)
    assert "does not agree with the network: of 1 images, logits differ" in line
    assert not list(tmp_path.iterdir())


def of_other_weights(kind):
    def write(student, deployed):
        net = student.build()
        net.load_state_dict(student.net.state_dict())
        with torch.no_grad():
            net.fc.bias[3] += 0.001
        student.net = net
        return kind.write(student, Deployed(net, student.image_size, student.mean, student.std))

    return write


def of_one_batch_size(kind):
    def write(student, deployed):
        deployed.program = torch.export.export(deployed, deployed.example, strict=False)
        return kind.write(student, deployed)

    return write


@pytest.mark.parametrize(
    ("name", "spoil", "message"),
    [
        ("onnx", of_other_weights, "does not agree with the network"),
        ("safetensors", of_other_weights, "does not agree with the network"),
        ("torch", of_one_batch_size, "student.pt2 cannot be run, and is not written"),
    ],
)
def test_a_wrong_file_is_not_written(tmp_path, capsys, monkeypatch, name, spoil, message):
    out = tmp_path / "out"
    out.mkdir()
    old = out / FORMATS[name].file
    old.write_bytes(b"what was there before")
    right = FORMATS[name]

    def write(student, deployed):
        kept = student.net
        contents = spoil(right)(student, deployed)
        student.net = kept
        return contents

    monkeypatch.setitem(FORMATS, name, right._replace(write=write))
    assert message in refused(capsys, *bare(tmp_path, "--force", "--formats", name))
    assert [path.name for path in out.iterdir()] == [old.name]
    assert old.read_bytes() == b"what was there before"


@pytest.mark.parametrize("package", [*FORMATS["onnx"].packages, "safetensors"])
def test_a_missing_package_is_named_before_anything_is_written(
    tmp_path, capsys, monkeypatch, package
):
    monkeypatch.setitem(sys.modules, package, None)
    line = refused(capsys, *bare(tmp_path))
    assert f"needs the package {package}, which cannot be imported" in line
    assert line.endswith("pip install mdistiller[export]")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_one_line(tmp_path, capsys):
    run = train(tmp_path, epochs=1)
    file = saved_teacher(tmp_path)
    unknown_data = ["-m", "resnet8", "-c", file, "--num-classes", 10, "--out", tmp_path / "new"]
    for words, message in [
        ([], "name a run folder, or a network and a checkpoint by -m and -c"),
        ([tmp_path / "nowhere"], "is not a run folder: it has no config.yaml"),
        (
            [run, "--checkpoint", "worst"],
            "--checkpoint is best, latest, epoch_N, ema_best or ema_latest, got",
        ),
        ([run, "--checkpoint", "epoch_9"], "has no checkpoint epoch_9 (it has: best, latest)"),
        (
            [run, "--checkpoint", "ema_best"],
            "no checkpoint ema_best (it has: best, latest); it kept no moving average (SOLVER.EMA)",
        ),
        ([run, "--formats", "tflite"], "unknown export format (--formats) 'tflite'"),
        ([run, "-d", "digits"], "--dataset goes with -m"),
        ([*bare(tmp_path)[:-3]], "-m needs --out"),
        (bare(tmp_path, "--num-classes", 7), "for 10 classes, but 7 are wanted"),
        (["-m", "resnet8", "--out", tmp_path], "-m needs -d, the data set it was trained on"),
        (unknown_data, "give DATASET.MEAN and DATASET.STD, or leave it out of the files by --with"),
    ]:
        assert message in refused(capsys, *words)
    (run / "student_best").write_bytes((run / "student_best").read_bytes()[:-100])
    assert "student_best is not what its run wrote" in refused(capsys, run)
    (run / "config.yaml").write_text("STUDENT: [")
    assert "config.yaml" in refused(capsys, run)
    assert not (run / "export").exists()


def test_files_are_replaced_only_by_force(tmp_path, capsys):
    words = bare(tmp_path, "--formats", "safetensors")
    assert export(*words) == 0
    path = tmp_path / "out" / "student.safetensors"
    path.write_bytes(b"mine")
    line = refused(capsys, *words)
    assert "holds student.safetensors, README.md already; replace them by --force" in line
    assert path.read_bytes() == b"mine"
    assert export(*words, "--force") == 0
    assert len(path.read_bytes()) > 300_000
