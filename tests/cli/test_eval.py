"""eval beyond one accuracy: run folders, several networks, teachers, features, files."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from support import TOY, command, image_folder, saved_teacher, unpadded, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import export as export_command
from mdistiller.cli import report as report_command
from mdistiller.cli import train as train_command
from mdistiller.dataset import load_test_loader
from mdistiller.distillers import Vanilla
from mdistiller.engine.cfg import load_config
from mdistiller.engine.utils import validate
from mdistiller.evaluation.evaluate import evaluate
from mdistiller.evaluation.subjects import file_source, load
from mdistiller.weights import load_checkpoint

TOY_DATA = ["-d", "toy", "--import", TOY]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder of two epochs on the toy data."""
    folder = tmp_path_factory.mktemp("run")
    assert train_command.main(["--cfg", str(write_config(folder))]) == 0
    return folder / "out" / "toy" / "run"


def evaluated(folder, *words):
    """What eval writes to its JSON file."""
    path = folder / "found.json"
    assert eval_command.main([*map(str, words), "--json", str(path), "DEVICE", "cpu"]) == 0
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def refused(capsys, *words, lines=1):
    capsys.readouterr()
    assert eval_command.main([str(word) for word in words]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == lines, said
    return said[-1]


def test_a_run_folder_says_itself_what_to_evaluate(run, tmp_path, capsys):
    """What else a shell's pattern gives is skipped, with a line each."""
    (tmp_path / "notes").mkdir()
    (tmp_path / "run.log").touch()
    (tmp_path / "begun").mkdir()
    shutil.copy(run / "config.yaml", tmp_path / "begun")
    others = sorted(tmp_path.iterdir())
    latest, best = evaluated(tmp_path, run, *others)["networks"]
    why = ["the run has no checkpoint yet", *["it is not a run folder (no config.yaml)"] * 2]
    skipped = [f"skipped {path}: {text}" for path, text in zip(others, why, strict=True)]
    printed = capsys.readouterr()
    assert printed.err.splitlines() == skipped
    assert "none of the 2 paths is a run folder" in refused(capsys, *others[1:], lines=3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert latest["top1"] == pytest.approx(rows[-1]["test_acc"], abs=1e-4)
    assert latest["nll"] == pytest.approx(rows[-1]["test_loss"], abs=1e-5)
    summary = json.loads((run / "summary.json").read_text())
    assert best["top1"] == pytest.approx(summary["best_acc"], abs=1e-4)
    assert best["note"] == f"epoch {summary['best_epoch']}, selected on the test set"
    assert (latest["note"], latest["model"], latest["images"]) == ("", "resnet8", 60)
    assert latest["label"] == "toy/run latest"
    shown = unpadded(printed.out).splitlines()
    scores = f"top-1 {latest['top1']:.2f}  top-5 {latest['top5']:.2f}"
    line = f"resnet8, toy/run latest, on toy (60 images): {scores}"
    assert shown[0] == f"[EVAL] {line}  loss {latest['nll']:.4f}"
    assert any(text.startswith("| resnet8 | toy/run best |") for text in shown)


def test_runs_of_one_name_in_two_folders_are_told_apart(run, tmp_path, capsys):
    other = shutil.copytree(run, tmp_path / run.parent.name / run.name)
    networks = evaluated(tmp_path, run, other, "--checkpoint", "latest")["networks"]
    assert [one["label"] for one in networks] == [f"{run} latest", f"{other} latest"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[EVAL]")]
    for line, folder in zip(lines, (run, other), strict=True):
        assert line.startswith(f"[EVAL] resnet8, {folder} latest, on toy")


def test_checkpoints_of_a_run_are_chosen_by_name_or_file(run, tmp_path):
    (named,) = evaluated(tmp_path, run, "--checkpoint", "latest")["networks"]
    (file,) = evaluated(tmp_path, "-c", run / "student_latest")["networks"]
    (bare,) = evaluated(tmp_path, "-m", "resnet8", "-c", run / "latest", *TOY_DATA)["networks"]
    assert named["confusion"] == file["confusion"] == bare["confusion"]


def test_a_run_on_an_image_folder_is_evaluated_from_its_folder_alone(tmp_path):
    root = image_folder(tmp_path / "data", classes=("cat", "dog"))
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", str(root), "LOG.PREFIX", str(tmp_path)]
    more = ["EXPERIMENT.NAME", "run", "SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "8"]
    config = ["--cfg", "configs/cifar10/vanilla.yaml", "DEVICE", "cpu"]
    assert train_command.main([*config, *words, *more]) == 0
    done = command(
        tmp_path / "cifar10" / "run",
        *("--checkpoint", "latest", "--confusion", "c.csv", "DATASET.LOADER", "workers"),
        *("DATASET.NUM_WORKERS", "0"),
        module="eval",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "resnet8 on imagefolder (8 images): top-1 " in done.stdout.splitlines()[0]
    rows = list(csv.DictReader((tmp_path / "c.csv").open()))
    assert [(row["class"], row["images"]) for row in rows] == [("cat", "4"), ("dog", "4")]
    assert all(int(row["cat"]) + int(row["dog"]) == 4 for row in rows)
    right = int(rows[0]["cat"])
    assert float(rows[0]["accuracy"]) == 100 * right / 4


def test_several_networks_in_one_pass_are_as_each_alone(run, tmp_path):
    files = [saved_teacher(tmp_path, "resnet8"), saved_teacher(tmp_path, "vgg8")]
    each = [["-m", name, "-c", file] for name, file in zip(("resnet8", "vgg8"), files, strict=True)]
    (first,), (second,) = (evaluated(tmp_path, *words, *TOY_DATA)["networks"] for words in each)
    both = evaluated(tmp_path, *each[0], *each[1], *TOY_DATA)["networks"]
    assert both == [first, second]
    mixed = evaluated(tmp_path, *each[1], "--checkpoint", "latest", run)["networks"]
    assert [one["label"] for one in mixed] == [str(files[1]), "toy/run latest"]
    assert mixed[0]["confusion"] == second["confusion"]  # on the run's data


def test_the_data_are_read_once_and_as_validate_reads_them(tmp_path):
    cfg = load_config("", ["DATASET.TYPE", "toy"], [TOY])
    test, device = load_test_loader(cfg, torch.device("cpu")), torch.device("cpu")
    subjects = []
    for seed in (1, 2):
        path = str(saved_teacher(tmp_path, seed=seed))
        subjects.append(load(file_source(path, "resnet8", cfg), test, device))
    passes = []

    class Counting:
        def __iter__(self):
            passes.append(1)
            return iter(test.loader)

    found = evaluate(subjects, Counting(), 10, device, teacher=subjects[1])
    assert len(passes) == 1
    assert len(found) == 3
    for one in found:
        quality = one.quality
        want = validate(test.loader, Vanilla(one.subject.net))
        assert (quality.top1, quality.top5, quality.nll) == pytest.approx(want, rel=1e-5)


def test_a_student_beside_its_teacher(run, tmp_path, capsys):
    path = saved_teacher(tmp_path, "vgg8")
    words = ["--checkpoint", "latest", "--teacher", "vgg8", "--teacher-ckpt", path, "--features"]
    found = evaluated(tmp_path, run, *words)
    student, teacher = found["networks"]
    assert found["teacher"] == teacher["label"] == str(path)
    beside = student["teacher"]
    assert beside["gap"] == pytest.approx(teacher["top1"] - student["top1"])
    shares = ("both_right", "only_teacher", "only_student", "both_wrong_same", "both_wrong_other")
    assert sum(beside[key] for key in shares) == pytest.approx(100)
    # heights 32, 16, 8 and 16, 8, 4, 4 (vgg8)
    assert list(student["cka"]) == ["1-1", "2-2", "3-3", "pooled"]
    assert "cka" not in teacher
    assert "teacher" not in teacher
    assert teacher["collapse"]["nc1"] > 0
    table = unpadded(capsys.readouterr().out)
    assert f"| toy/run latest | {beside['gap']:.2f} | {beside['agreement']:.2f} |" in table
    assert f"| {student['cka']['pooled']:.3f} |" in table


def test_the_report_takes_what_was_found_of_a_run(run, tmp_path):
    path = tmp_path / "found.json"
    words = ["--teacher", "vgg8", "--teacher-ckpt", saved_teacher(tmp_path, "vgg8")]
    _, best, _ = evaluated(tmp_path, run, *words)["networks"]
    table = tmp_path / "r.csv"
    words = ["--evaluation", str(path), "--metric", "best", "--csv", str(table)]
    assert report_command.main([str(run), *words]) == 0
    (row,) = csv.DictReader(table.open())
    for name in ("agreement", "kl", "only_student"):
        assert float(row[f"teacher.{name}"]) == pytest.approx(best["teacher"][name])
    assert float(row["ece"]) == pytest.approx(best["ece"])


def test_a_run_compared_with_itself_agrees_whatever_the_batches(run, tmp_path):
    words = [run, "--checkpoint", "latest", "--teacher", run, "--features", "-bs"]
    one, other = (evaluated(tmp_path, *words, size)["networks"] for size in (60, 7))
    assert one[0]["teacher"]["kl"] == pytest.approx(0, abs=1e-12)
    assert one[0]["teacher"]["agreement"] == 100
    assert one[0]["cka"] == pytest.approx({"1-1": 1, "2-2": 1, "3-3": 1, "pooled": 1})
    for first, second in zip(one, other, strict=True):
        assert first["collapse"] == pytest.approx(second["collapse"], rel=1e-4)
        assert first["confusion"] == second["confusion"]


def test_the_files_hold_the_same_numbers(run, tmp_path):
    table, cells = tmp_path / "t.csv", tmp_path / "c.csv"
    outputs = ["--csv", str(table), "--confusion", str(cells), "--features", "--teacher", str(run)]
    found = evaluated(tmp_path, run, *outputs)
    rows = list(csv.DictReader(table.open()))
    assert [row["label"] for row in rows] == [one["label"] for one in found["networks"]]
    assert float(rows[0]["ece"]) == found["networks"][0]["ece"]
    assert float(rows[1]["teacher.kl"]) == found["networks"][1]["teacher"]["kl"]
    assert rows[2]["teacher.kl"] == ""  # the teacher's own row
    by_class = list(csv.reader(cells.open()))
    assert by_class[0][4:] == found["classes"]
    matrix = np.array([row[4:] for row in by_class[1:11]], dtype=int)
    assert matrix.tolist() == found["networks"][0]["confusion"]
    accuracies = [float(row[3]) for row in by_class[1:11]]
    assert accuracies == found["networks"][0]["class_accuracy"]


def test_a_diverged_network_is_named_and_null_in_json(tmp_path, capsys):
    path = saved_teacher(tmp_path)
    contents = load_checkpoint(path)
    contents["model"]["fc.weight"] *= math.nan
    torch.save(contents, path)
    (found,) = evaluated(tmp_path, "-m", "resnet8", "-c", path, *TOY_DATA)["networks"]
    assert found["nll"] is None
    assert found["images"] == 60
    assert "has NaN in 1 of 56 tensors (first: fc.weight)" in capsys.readouterr().out
    teacher = ["--teacher", "resnet8", "--teacher-ckpt", path]
    assert "has NaN in 1" in refused(capsys, "-m", "resnet8", "-c", path, *teacher, *TOY_DATA)


def test_bad_input_is_one_line(run, tmp_path, capsys):
    path = saved_teacher(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(run, other)
    text = (other / "config.yaml").read_text()
    (other / "config.yaml").write_text(text.replace("TYPE: toy\n", "TYPE: tiny16\n"))
    cases = [
        ([], "name run folders or files by -c, or networks by -m"),
        (["-c", path], f"-m must name the network of {path}"),
        (["-c", tmp_path], f"{tmp_path} is not a run folder"),
        ([run, "-m", "resnet8"], "-m goes with a file"),
        (["-m", "resnet8", "-m", "vgg8", "-c", path], "-m names 2 networks for 1 files"),
        ([run, "--checkpoint", "epoch_9"], "has no checkpoint epoch_9 (it has: best, latest)"),
        (["-m", "resnet8", "-c", path, "--checkpoint", "best"], "--checkpoint goes with a run"),
        ([run, "--teacher-ckpt", path], "--teacher-ckpt needs --teacher"),
        ([run, "--teacher", run, "--teacher-ckpt", path], "is a run, so --teacher-ckpt"),
        ([run, "--teacher", "resnet9"], "unknown CIFAR model 'resnet9'"),
        ([run, "--teacher", "resnet8"], "resnet8 has no released weights"),
        ([run, other], "different data (DATASET.TYPE 'toy' and 'tiny16'); name the data"),
        ([run, "--json", tmp_path / "no" / "x.json"], "there is no folder"),
        ([run, "--csv", tmp_path], "is a folder"),
        (["nothere"], "run folder or file nothere does not exist"),
        ([run, tmp_path / "typo"], f"run folder or file {tmp_path / 'typo'} does not exist"),
    ]
    for words, says in cases:
        assert says in refused(capsys, *words), words


def test_code_that_a_folder_names_runs_only_if_the_user_names_it_too(run, tmp_path, capsys):
    folder, ran = tmp_path / "run", tmp_path / "ran"
    shutil.copytree(run, folder)
    helper = folder / "helper.py"
    helper.write_text(f"open({str(ran)!r}, 'w').close()\n")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["IMPORTS"].append(str(helper))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert f"look at it, and give --import {helper}" in refused(capsys, folder)
    assert export_command.main([str(folder)]) == 2
    assert not ran.exists()
    own = tmp_path / "helper.py"  # as on another machine
    own.write_text(helper.read_text())
    helper.unlink()
    assert evaluated(tmp_path, folder, "--import", own)["networks"]
    assert ran.exists()
    config["IMPORTS"].pop()
    config["DATASET"]["SHARDS"]["VAL"] = "pipe:false"
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert "a command: look at it, and give DATASET.SHARDS.VAL" in refused(capsys, folder)
