"""eval, visualize and report on run folders: beside the teacher that taught, checked."""

import json
import shutil

import pytest
import torch
from support import TOY, saved_teacher, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import report as report_command
from mdistiller.cli import train as train_command
from mdistiller.cli import visualize as visualize_command

NORM = [[0.9, 0.1, 0.5], [0.2, 0.9, 0.4]]
LATEST = ["--checkpoint", "latest", "DEVICE", "cpu"]


def train(folder, name, text="", method="KD", **distiller):
    """A run of an epoch; returns its folder."""
    config = write_config(folder, text, method=method, epochs=1, **distiller)
    words = ["EXPERIMENT.NAME", name]
    assert train_command.main(["--cfg", str(config), *words]) == 0
    return folder / "out" / "toy" / name


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher's file, and runs: KD beside it with a norm of its own, and plain."""
    folder = tmp_path_factory.mktemp("runs")
    plain = train(folder, "plain", "SOLVER: {LR: 0.1}\n", method="NONE")
    teacher = folder / "teacher.pth"
    shutil.copy(plain / "student_latest", teacher)
    settings = {"TEACHER": "resnet8", "TEACHER_CKPT": str(teacher), "TEACHER_NORM": NORM}
    train(folder, "kd", **settings)
    return folder


@pytest.fixture
def runs(trained, tmp_path):
    """A copy of it to be changed; the config still names the file of the original."""
    return shutil.copytree(trained, tmp_path / "copy")


def evaluated(folder, *words):
    path = folder / "found.json"
    assert eval_command.main([*map(str, words), *LATEST, "--json", str(path)]) == 0
    return json.loads(path.read_text())


def test_a_run_is_evaluated_beside_the_teacher_it_had(trained, tmp_path):
    """The teacher's normalisation was left out before: another accuracy than recorded."""
    kd, teacher = trained / "out/toy/kd", trained / "teacher.pth"
    recorded = json.loads((kd / "summary.json").read_text())["teacher_acc"]
    found = evaluated(tmp_path, kd)
    student, own = found["networks"]
    assert own["top1"] == pytest.approx(recorded, abs=1e-4)
    assert student["teacher"]["gap"] == pytest.approx(own["top1"] - student["top1"])
    by_name = evaluated(tmp_path, kd, "--teacher", "resnet8")
    by_file = evaluated(tmp_path, kd, "--teacher", "resnet8", "--teacher-ckpt", teacher)
    for other in (by_name, by_file):
        assert other["networks"][1]["confusion"] == own["confusion"]
    keys = ["DISTILLER.TEACHER_NORM", "data"]
    changed = evaluated(tmp_path, kd, "--teacher", "resnet8", "--teacher-ckpt", teacher, *keys)
    assert changed["networks"][1]["confusion"] != own["confusion"]
    assert len(evaluated(tmp_path, kd, "--teacher", "none")["networks"]) == 1
    assert len(evaluated(tmp_path, trained / "out/toy/plain")["networks"]) == 1
    assert len(evaluated(tmp_path, kd, trained / "out/toy/plain")["networks"]) == 3


def test_a_teacher_trained_by_its_config_is_found_again_where_the_folders_were_moved(tmp_path):
    (tmp_path / "t").mkdir()
    teacher = write_config(tmp_path / "t", "EXPERIMENT: {NAME: teacher}\n", epochs=1)
    kd = train(tmp_path, "kd", TEACHER="resnet8", TEACHER_CFG=str(teacher))
    recorded = json.loads((kd / "summary.json").read_text())["teacher_acc"]
    teacher.unlink()
    (tmp_path / "out").rename(tmp_path / "moved")
    found = evaluated(tmp_path, tmp_path / "moved/toy/kd", "--import", TOY)
    assert found["networks"][1]["top1"] == pytest.approx(recorded, abs=1e-4)
    assert found["teacher"] == "toy/teacher latest"


def test_one_of_several_networks_in_a_file_is_found_again_where_all_was_moved(tmp_path):
    kept = {
        k: torch.load(saved_teacher(tmp_path, seed=s))["model"] for k, s in (("a", 1), ("b", 2))
    }
    torch.save(kept, tmp_path / "two.pth")
    kd = train(tmp_path, "kd", TEACHER="resnet8", TEACHER_CKPT=f"{tmp_path}/two.pth:b")
    recorded = json.loads((kd / "summary.json").read_text())["teacher_acc"]
    (tmp_path / "moved").mkdir()
    for name in ("out", "two.pth"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    found = evaluated(tmp_path, tmp_path / "moved/out/toy/kd", "--import", TOY)
    assert found["networks"][1]["top1"] == pytest.approx(recorded, abs=1e-4)


def test_a_teacher_that_changed_since_is_refused(runs, tmp_path, capsys):
    kd = runs / "out/toy/kd"
    torch.save(torch.load(saved_teacher(tmp_path, seed=3)), runs / "teacher.pth")
    picture = ["attention", str(kd), "--out", str(tmp_path / "a.png"), "DEVICE", "cpu"]
    for command, words in ((eval_command, [str(kd), *LATEST]), (visualize_command, picture)):
        capsys.readouterr()
        assert command.main(words) == 2
        said = capsys.readouterr().err
        assert "% when it taught" in said
        assert "--teacher none" in said
    assert visualize_command.main([*picture, "--teacher", "none"]) == 0


def test_a_teacher_that_is_gone_leaves_the_student_and_a_line(runs, tmp_path, capsys):
    kd = runs / "out/toy/kd"
    (runs / "teacher.pth").unlink()
    config = (kd / "config.yaml").read_text().splitlines()
    kept = [line for line in config if "TEACHER_CKPT" not in line]
    (kd / "config.yaml").write_text("\n".join([*kept, ""]))
    assert len(evaluated(tmp_path, kd)["networks"]) == 1
    shown = capsys.readouterr().out
    assert "no teacher beside toy/kd latest: the weights of" in shown
    assert eval_command.main([str(kd), "--teacher", "resnet8", *LATEST]) == 2
    assert "teacher resnet8 are not there" in capsys.readouterr().err


def test_runs_of_several_teachers_are_each_beside_their_own(trained, runs, tmp_path, capsys):
    two = [folder / "out/toy/kd" for folder in (trained, runs)]
    plain = trained / "out/toy/plain"
    found = evaluated(tmp_path, *two, plain)
    assert (len(found["networks"]), found["teacher"]) == (5, None)
    labels = [one["teacher"]["label"] if "teacher" in one else "" for one in found["networks"]]
    files = [str((folder / "teacher.pth").resolve()) for folder in (trained, runs)]
    assert labels == [*files, "", "", ""]
    picture = ["tsne", *map(str, two), "--out", str(tmp_path / "a.png"), "--samples", "40"]
    assert visualize_command.main([*picture, "DEVICE", "cpu"]) == 0
    assert "several teachers" in capsys.readouterr().out


def test_a_report_refuses_an_evaluation_with_another_teacher(trained, tmp_path, capsys):
    kd, file = trained / "out/toy/kd", tmp_path / "found.json"
    found = evaluated(tmp_path, kd)
    words = [str(kd), "--evaluation", str(file), "--md", str(tmp_path / "report.md")]
    assert report_command.main(words) == 0
    found["networks"][0]["teacher"]["gap"] += 5
    file.write_text(json.dumps(found))
    capsys.readouterr()
    assert report_command.main(words) == 2
    assert "% for the teacher of" in capsys.readouterr().err
