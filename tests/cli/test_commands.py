"""The commands as users call them: their output, and one line for everything that cannot work."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import REPO, TOY, command, image_folder, saved_teacher, unpadded, write_config

from mdistiller.cli import COMMANDS
from mdistiller.cli import eval as eval_command
from mdistiller.cli import main as mdistiller
from mdistiller.cli import train as train_command
from mdistiller.cli.support.command import PIPE_CLOSED, guarded
from mdistiller.config.values import lookup
from mdistiller.distillers import DISTILLERS, Vanilla
from mdistiller.engine.utils import validate
from mdistiller.models import get_model_entry


def refused(capsys, words, main=train_command.main):
    """Exit code not 0 and one line of error; returns the line."""
    assert main([str(word) for word in words]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


BAD = {
    "SOLVER.LRR 0.1": "unknown config key SOLVER.LRR; did you mean 'SOLVER.LR'?",
    "--same-t DISTILLER.TYPE KD": "--same-t: DISTILLER.TYPE KD lacks the keys ALPHA_T in KD;",
    "SOLVER.EPOCHS many": "SOLVER.EPOCHS must be a whole number",
    "DISTILLER.STUDENT resnet9": "DISTILLER.STUDENT: unknown CIFAR model 'resnet9'; did you mean",
    "DISTILLER.TYPE KDD": "unknown distiller (DISTILLER.TYPE) 'KDD'; did you mean 'KD'?",
    "DATASET.TYPE cifar1000": "unknown data set 'cifar1000'; did you mean 'cifar100'?",
    "SOLVER.TRAINER bass": "unknown trainer (SOLVER.TRAINER) 'bass'; did you mean 'base'?",
    "SOLVER.TYPE RMS": "unknown optimizer (SOLVER.TYPE) 'RMS'",
    "SOLVER.BATCH_SIZE 999": "999",
    "DATASET.TYPE imagefolder": "DATASET.ROOT",
    "DATASET.TYPE imagefolder DATASET.ROOT nowhere": "nowhere",
    "--resume": "--resume: there is no checkpoint",
    "--resume output/nowhere": "leave --cfg out",
    "--resume nowhere": "leave --cfg out",
    "DISTILLER.TYPE KD DISTILLER.TEACHER resnet56": "no weights for the teacher resnet56",
    "DISTILLER.TYPE KD DISTILLER.TEACHER ResNet18 DISTILLER.STUDENT MobileNetV1 "
    "DATASET.TYPE toy_imagenet": "for 1000 classes, but 10 are wanted",
    "DISTILLER.TYPE KD DISTILLER.TEACHER_CKPT none.pth": "TEACHER_CKPT: none.pth does not exist",
    "DISTILLER.TYPE KD DISTILLER.TEACHER_CFG none.yaml": "config file 'none.yaml' not found",
    "DEVICE tpu": "DEVICE 'tpu' is not a device",
    "SOLVER.NESTEROV True SOLVER.MOMENTUM 0": "SOLVER.NESTEROV needs a SOLVER.MOMENTUM above 0",
    "DISTILLER.STUDENT BabyStudent DATASET.TYPE tiny16": "take 32x32 images, not 16x16",
    "EXPERIMENT.PROJECT a/../../b": "make no folder name",
    f"LOG.PREFIX {__file__}": "is a file",
}


@pytest.mark.parametrize("words", BAD)
def test_bad_input_gets_one_line_and_writes_nothing(tmp_path, capsys, words):
    line = refused(capsys, ["--cfg", write_config(tmp_path), *words.split()])
    assert BAD[words] in line
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_asked_for_and_absent(tmp_path, capsys):
    line = refused(capsys, ["--cfg", write_config(tmp_path), "DEVICE", "cuda"])
    assert "this machine has 0 usable CUDA devices" in line


def test_bad_files_get_one_line(tmp_path, capsys):
    assert "'no.yaml' not found" in refused(capsys, ["--cfg", "no.yaml"])
    (tmp_path / "x.py").write_text("")
    assert "not a .yaml file" in refused(capsys, ["--cfg", tmp_path / "x.py"])
    assert "no file nothing.py" in refused(capsys, ["--import", "nothing.py"])


@pytest.mark.parametrize(
    ("model", "classes", "cut", "says"),
    [
        ("resnet8", 100, 0, "is of a resnet8 for 100 classes, but 10 are wanted"),
        ("vgg8", 10, 0, "do not fit together"),
        ("resnet8", 10, 1000, "truncated"),
    ],
)
def test_a_wrong_teacher_is_refused(tmp_path, capsys, model, classes, cut, says):
    path = saved_teacher(tmp_path, model, classes)
    if cut:
        path.write_bytes(path.read_bytes()[:-cut])
    config = write_config(tmp_path, method="KD", TEACHER="resnet8", TEACHER_CKPT=str(path))
    assert says in refused(capsys, ["--cfg", config])
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_started_over_and_a_damaged_one_not_resumed(tmp_path, capsys):
    config = write_config(tmp_path, epochs=1)
    run = tmp_path / "out" / "toy" / "run"
    assert train_command.main(["--cfg", str(config)]) == 0
    capsys.readouterr()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert "holds a run already" in refused(capsys, ["--cfg", config])
    other = ["--cfg", config, "--resume", "DISTILLER.STUDENT", "vgg8", "EXPERIMENT.NAME", "run"]
    assert "DISTILLER.STUDENT was resnet8, is now vgg8" in refused(capsys, other)
    (run / "config.yaml").rename(tmp_path / "config.yaml")  # as in a run of the original
    assert "do not fit together" in refused(capsys, other)
    (tmp_path / "config.yaml").rename(run / "config.yaml")
    after = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    assert before == after
    for name in ("latest", "best"):
        (run / name).write_bytes(before[name][:-100])
    error = refused(capsys, ["--cfg", config, "--resume"])
    assert "latest is not what its run wrote (damaged" in error
    assert "the other checkpoints there are damaged as well" in error


README = (REPO / "README.md").read_text()


def test_the_recipe_for_ones_own_images(tmp_path, monkeypatch):
    """The two commands of docs/train.md as they stand, on a folder of small images, an epoch."""
    monkeypatch.chdir(tmp_path)
    image_folder(tmp_path / "data" / "flowers", size=40)
    page = (REPO / "docs" / "train.md").read_text()
    block = next(b for b in page.split("```sh") if "data/flowers" in b and "train.py" in b)
    lines = block.split("```")[0].replace("\\\n", " ").strip().splitlines()
    assert len(lines) == 2
    for line in lines:
        words = [*line.split()[2:], "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "8"]
        assert train_command.main(words) == 0
    assert (tmp_path / "output" / "cifar10" / "dkd" / "student_latest").is_file()


def test_the_readmes_own_method_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, config = (
        README.split(f"```{kind}\n# my_method")[1].split("```")[0] for kind in ("python", "yaml")
    )
    (tmp_path / "my_method.py").write_text(code.partition("\n")[2])
    (tmp_path / "my_method.yaml").write_text(config.partition("\n")[2])
    words = "DATASET.TYPE toy DISTILLER.STUDENT resnet8 DISTILLER.TEACHER resnet8 SOLVER.EPOCHS 1"
    teacher = ["DISTILLER.TEACHER_CKPT", str(saved_teacher(tmp_path))]
    toy = ["--import", str(REPO / "tests" / "toy.py")]
    assert train_command.main(["--cfg", "my_method.yaml", *toy, *words.split(), *teacher]) == 0


def test_the_recorded_config_can_be_used_again_elsewhere(tmp_path, monkeypatch):
    """It names what was imported, whether by --import or beside the config, by whole paths."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "mine.py").write_text(
        "from mdistiller.distillers import DISTILLERS, KD\n"
        "DISTILLERS.add('MINE', type('MINE', (KD,), {}), config={'X': 1})\n"
    )
    config = write_config(
        tmp_path / "sub",
        text="IMPORTS: [mine.py]\n",
        method="MINE",
        epochs=1,
        TEACHER="resnet8",
        TEACHER_CKPT=str(saved_teacher(tmp_path)),
    )
    monkeypatch.chdir(tmp_path)
    assert train_command.main(["--cfg", str(config)]) == 0
    recorded = tmp_path / "sub" / "out" / "toy" / "run" / "config.yaml"
    (tmp_path / "elsewhere").mkdir()
    student = str(recorded.parent / "student_latest")
    words = ["-m", "resnet8", "-c", student, "--cfg", str(recorded)]
    done = command(*words, module="eval", cwd=tmp_path / "elsewhere")
    assert done.returncode == 0, done.stderr


def test_errors_reach_the_shell_as_one_line(tmp_path):
    done = command("--cfg", write_config(tmp_path), "SOLVER.LRR", "1")
    assert done.returncode == 2
    assert done.stderr == "error: unknown config key SOLVER.LRR; did you mean 'SOLVER.LR'?\n"


def test_resume_may_stand_behind_the_overrides():
    args = train_command.parser().parse_intermixed_args(
        ["--cfg", "a.yaml", "SOLVER.LR", "0.1", "--resume", "SOLVER.MIN_LR", "-1"]
    )
    assert args.resume
    assert args.opts == ["SOLVER.LR", "0.1", "SOLVER.MIN_LR", "-1"]
    args = train_command.parser().parse_intermixed_args(["--resume", "out/run", "SOLVER.LR", "1"])
    assert (args.cfg, args.resume, args.opts) == (None, "out/run", ["SOLVER.LR", "1"])


def test_a_config_may_be_named_as_other_programs_do(tmp_path, capsys):
    for words in (["--config", "a.yaml"], ["a.yaml"], ["--resume", "./a.yaml"]):
        args = train_command.parser().parse_intermixed_args([*words, "SOLVER.LR", "0.1"])
        assert (Path(args.cfg[0]).name, args.opts) == ("a.yaml", ["SOLVER.LR", "0.1"])
        assert args.resume in (None, "yes")
    (tmp_path / "config.yaml").write_text("")
    said = {"kd": "neither a config (FILE", tmp_path: "a run folder; --resume"}
    for word, message in said.items():
        assert train_command.main([str(word), "SOLVER.LR", "0.1"]) == 2
        assert f"{word} is {message}" in capsys.readouterr().err


def test_image_folder_from_training_to_evaluation(tmp_path, capsys):
    root = image_folder(tmp_path / "data")
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root)]
    solver = ["SOLVER.EPOCHS", "6", "SOLVER.BATCH_SIZE", "8", "EXPERIMENT.NAME", "run"]
    places = ["LOG.PREFIX", str(tmp_path / "out"), "DEVICE", "cpu"]
    assert (
        train_command.main(["--cfg", "configs/cifar10/vanilla.yaml", *words, *solver, *places]) == 0
    )
    (run,) = (tmp_path / "out" / "cifar10").iterdir()
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["test_acc"] > 60  # colours are easy; chance is 33
    capsys.readouterr()
    ckpt = str(run / "student_latest")
    evaluate = ["-m", "resnet8", "-c", ckpt, "-d", "imagefolder", "-bs", "5", "DEVICE", "cpu"]
    assert eval_command.main([*evaluate, "DATASET.ROOT", str(root)]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    assert f"resnet8 on imagefolder (12 images): top-1 {last['test_acc']:.2f}" in line
    assert f"loss {last['test_loss']:.4f}" in line
    places = ["DATASET.ROOT", str(root), "DATASET.LOADER", "workers", "DATASET.NUM_WORKERS", "0"]
    assert eval_command.main([*evaluate, *places]) == 0
    assert capsys.readouterr().out.splitlines()[0] == line


def test_eval_equals_a_measurement_by_hand(tmp_path, capsys):
    path = saved_teacher(tmp_path)
    assert eval_command.main(["-m", "resnet8", "-c", str(path), "-d", "digits"]) == 0
    line = capsys.readouterr().out.splitlines()[0]
    from mdistiller.dataset import load_test_loader
    from mdistiller.engine.cfg import load_config

    net = get_model_entry("resnet8", "cifar")(num_classes=10)
    net.load_state_dict(torch.load(path)["model"])
    loader = load_test_loader(load_config("", ["DATASET.TYPE", "digits"])).loader
    top1, top5, loss = validate(loader, Vanilla(net))
    assert f"top-1 {top1:.2f}  top-5 {top5:.2f}  loss {loss:.4f}" in line


def test_eval_of_imagenet_networks(tmp_path, capsys):
    words = ["-d", "toy_imagenet", "--import", TOY, "-m"]
    path = str(saved_teacher(tmp_path, "ResNet18", zoo="imagenet"))
    assert eval_command.main([*words, "ResNet18", "-c", path]) == 0
    assert "ResNet18 on toy_imagenet (60 images): top-1" in capsys.readouterr().out
    line = refused(capsys, [*words, "ResNet18"], main=eval_command.main)
    assert "for 1000 classes, but 10 are wanted" in line
    line = refused(capsys, [*words, "MobileNetV1"], main=eval_command.main)
    assert "MobileNetV1 has no released weights" in line


def test_eval_refuses_with_one_line(tmp_path, capsys):
    def check(*words):
        return refused(capsys, ["-d", "digits", *words], main=eval_command.main)

    assert "unknown CIFAR model 'resnet9'" in check("-m", "resnet9")
    assert "resnet8 has no released weights" in check("-m", "resnet8")
    assert "does not exist" in check("-m", "resnet8", "-c", tmp_path / "no")
    path = saved_teacher(tmp_path, num_classes=7)
    assert "for 7 classes, but 10 are wanted" in check("-m", "resnet8", "-c", path)
    assert "TEST.BATCH_SIZE must be at least 1" in check("-m", "resnet8", "-bs", "0")


def test_the_mdistiller_command_knows_its_subcommands(capsys):
    assert mdistiller(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    assert all((REPO / "tools" / f"{name}.py").is_file() for name in COMMANDS)
    assert mdistiller(["trian"]) == 2
    assert "unknown command 'trian'" in capsys.readouterr().err
    assert mdistiller(["train", "--cfg", "no.yaml"]) == 2


def test_demo_tables_and_plots(tmp_path, capsys):
    from mdistiller.cli import demo

    runs = [{"last_acc": acc, "parameters": 1234, "seconds": 2.0} for acc in (90.0, 92.0)]
    assert "| KD | 91.00 ± 1.41 | 2 | 1,234 | 2.0 |" in unpadded(demo.table({"KD": runs}))
    demo.plot({"KD": [[10.0, 20.0], [12.0, 22.0]]}, tmp_path / "a.png")
    assert Image.open(tmp_path / "a.png").size > (500, 300)


FORK_FLAGS = {
    "KD --logit-stand": {"KD.TEMPERATURE": 2.0, "KD.LOSS.KD_WEIGHT": 9.0},
    "KD --logit-stand --base-temp 3 --kd-weight 6 KD.LOSS.KD_WEIGHT 7": {
        "KD.TEMPERATURE": 3.0,
        "KD.LOSS.KD_WEIGHT": 7.0,
    },
    "DKD --logit-stand --kd-weight 2 DKD.BETA 3": {"DKD.ALPHA": 2.0, "DKD.BETA": 3.0, "DKD.T": 2.0},
    "MLKD --base-temp 2": {"MLKD.TEMPS": [2.0, 3.0, 5.0, 2.0, 6.0]},
    "RLDLIKE --same-t": {"RLDLIKE.ALPHA_T": 4.0},
    "RLDLIKE --same-t --base-temp 2": {"RLDLIKE.ALPHA_T": 2.0, "RLDLIKE.T": 2.0},
}
RLD_LIKE = """
from mdistiller.distillers import DISTILLERS, KD
DISTILLERS.add("RLDLIKE", type("RLDLIKE", (KD,), {}), config={"ALPHA_T": 1.0, "T": 4.0})
"""


@pytest.mark.parametrize("words", FORK_FLAGS)
def test_options_of_forks_are_their_overrides(words, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("mdistiller.run.train.train", lambda cfg, *args, **kwargs: seen.append(cfg))
    method, *words_ = words.split()
    (tmp_path / "like.py").write_text(RLD_LIKE)
    loaded = ["--import", str(tmp_path / "like.py")] if method == "RLDLIKE" else []
    try:
        assert train_command.main([*words_, *loaded, "DISTILLER.TYPE", method]) == 0
    finally:
        DISTILLERS.pop("RLDLIKE", None)
    assert {key: lookup(seen[0], key) for key in FORK_FLAGS[words]} == FORK_FLAGS[words]
    assert ("--logit-stand" in words) == seen[0].EXPERIMENT.LOGIT_STAND


def test_a_reader_that_has_enough_ends_a_command_quietly(monkeypatch, capsys):
    for text in ("a line", "more than a buffer" * 10_000):
        reader, writer = os.pipe()
        os.close(reader)
        with os.fdopen(writer, "w") as out:
            monkeypatch.setattr(sys, "stdout", out)
            assert guarded(lambda text=text: print(text)) == PIPE_CLOSED

    def lost():
        raise BrokenPipeError("of something else than standard output")

    monkeypatch.undo()
    with pytest.raises(BrokenPipeError):
        guarded(lost)
    assert capsys.readouterr().err == ""
