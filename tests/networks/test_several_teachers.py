"""DISTILLER.TEACHERS in a run: built, measured, cached and resumed; not in the student's files."""

import json

import pytest
import torch
from support import image_folder, same_state, saved_teacher, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command
from mdistiller.cli.support.teachers import taught_by
from mdistiller.dataset import load_data
from mdistiller.distillers import KD, TeacherTeam
from mdistiller.distillers._teachers import several
from mdistiller.engine.cfg import load_config
from mdistiller.evaluation.subjects import run_sources
from mdistiller.frozen_teacher.fingerprint import teacher_digest
from mdistiller.models.normalize import resize_input
from mdistiller.run import measuring
from mdistiller.run.build import build_distiller


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    """Two different resnet8 as entries of DISTILLER.TEACHERS."""
    folders = [tmp_path_factory.mktemp(name) for name in ("first", "second")]
    return [
        {"NAME": "resnet8", "CKPT": str(saved_teacher(folder, seed=number))}
        for number, folder in enumerate(folders)
    ]


def run_of(folder, *words, method="KD", epochs=1, code=0, text="", **settings):
    folder.mkdir(exist_ok=True)
    path = write_config(folder, text, method, "resnet8", epochs, **settings)
    assert train_command.main(["--cfg", str(path), *words]) == code
    return folder / "out" / "toy" / "run"


def load(path):
    return torch.load(path, weights_only=True)


def test_one_teacher_in_the_list_is_that_teacher_to_the_bit(tmp_path, entries):
    (first, _), cached = entries, {"TEACHER_CACHE": "disk"}
    one = run_of(tmp_path / "one", TEACHERS=[first], COMBINE="ensemble", **cached)
    usual = {"TEACHER": first["NAME"], "TEACHER_CKPT": first["CKPT"]}
    other = run_of(tmp_path / "other", **usual, **cached)
    states = [load(run / "latest") for run in (one, other)]
    assert states[0]["model"].keys() == states[1]["model"].keys()
    assert same_state(states[0]["model"], states[1]["model"])
    records = [json.loads((run / "run.json").read_text()) for run in (one, other)]
    assert records[0]["teacher_acc"] == records[1]["teacher_acc"]
    names = [[p.name for p in run.parents[1].glob("teacher_cache/*")] for run in (one, other)]
    assert names[0] == names[1] != []


def test_two_teachers_are_measured_and_resumed_to_the_bit(tmp_path, entries, capsys):
    settings = {"method": "FITNET", "text": "SOLVER: {SCHEDULE: constant}\n"}
    weighted = [{**entries[0], "WEIGHT": 2}, entries[1]]
    whole = run_of(tmp_path / "whole", TEACHERS=weighted, epochs=2, **settings)
    printed = capsys.readouterr().out
    record = json.loads((whole / "run.json").read_text())
    for number, teacher in enumerate(record["teachers"], start=1):
        line = next(x for x in printed.splitlines() if x.startswith(f"teacher {number}"))
        assert f" {teacher['name']}, " in line
        assert f"accuracy {teacher['acc']:.2f} %" in line
    assert f"ensemble  accuracy {record['teacher_acc']:.2f} %" in printed
    run_of(tmp_path / "parts", TEACHERS=weighted, **settings)
    moved = [{**entry, "CKPT": entry["CKPT"].replace(".pth", "_moved.pth")} for entry in weighted]
    for old, new in zip(weighted, moved, strict=True):
        torch.save(load(old["CKPT"]), new["CKPT"])
    parts = run_of(tmp_path / "parts", "--resume", TEACHERS=moved, epochs=2, **settings)
    first, second = (load(run / "latest") for run in (whole, parts))
    assert same_state(first["model"], second["model"])
    assert json.loads((parts / "run.json").read_text())["teachers"][0]["acc"] is not None
    hints = [first["model"][f"parts.teacher{k}.conv_reg.conv.weight"] for k in (1, 2)]
    assert not torch.equal(*hints)
    student = load(whole / "student_latest")["model"]
    assert not [key for key in student if "teacher" in key or "nets" in key]
    assert eval_command.main([str(whole), "--checkpoint", "latest"]) == 0  # beside no teacher
    assert taught_by("", run_sources(whole, ["latest"])) == []
    changed = [entries[0], entries[1]]
    run_of(tmp_path / "parts", "--resume", TEACHERS=changed, epochs=2, code=2, **settings)
    assert "DISTILLER.TEACHERS was" in capsys.readouterr().err


def test_teachers_and_their_ensemble_are_measured_on_images_of_one_size(tmp_path, monkeypatch):
    file = str(saved_teacher(tmp_path, num_classes=3))
    entries = [{"NAME": "resnet8", "CKPT": file}] * 2
    words = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", image_folder(tmp_path / "data")]
    words += ["DATASET.IMAGE_SIZE", 16, "DISTILLER.TEACHER_SIZE", 24, "SOLVER.BATCH_SIZE", 8]
    path = write_config(tmp_path, "", "KD", "resnet8", TEACHERS=entries)
    cfg, cpu, seen = load_config(path, list(map(str, words))), torch.device("cpu"), []
    data, validate = load_data(cfg, cpu, train_size=(24, 24)), measuring.validate

    def record(loader, *rest):
        seen.append(torch.cat([images for images, _ in loader]))
        return validate(loader, *rest)

    monkeypatch.setattr(measuring, "validate", record)
    distiller = build_distiller(cfg, data, cpu, [file, file])
    accuracies = measuring.measure_teachers(distiller, cfg, data, cpu, [file, file])
    assert [images.shape[2:] for images in seen] == [(24, 24)] * 3
    assert torch.equal(seen[0], seen[2])
    assert len(accuracies) == 3


@pytest.mark.parametrize(
    "settings", [{"COMBINE": "confidence"}, {"method": "KD+SEED", "text": "SEED: {QUEUE: 40}\n"}]
)
def test_cached_outputs_of_all_teachers_take_their_place(tmp_path, entries, settings):
    """All are new in the first epoch: the same numbers to the bit."""
    plain = run_of(tmp_path / "plain", TEACHERS=entries, **settings)
    cached = run_of(tmp_path / "cached", TEACHERS=entries, TEACHER_CACHE="memory", **settings)
    rows = [json.loads((run / "metrics.jsonl").read_text()) for run in (plain, cached)]
    for key in ("train_loss_kd", "train_loss_teacher1", "train_loss_teacher2"):
        assert rows[1][key] == rows[0][key]
    assert "teacher_hits" in rows[1]


def test_the_size_of_each_teachers_images_counts_as_its_own_does():
    """In the digest that names the cache's file: of a team as of one network."""
    for in_team in (False, True):
        digests = set()
        for size in ((8, 8), (16, 16)):
            nets = [torch.nn.Identity(), torch.nn.Identity()]
            resize_input(nets[1], size)
            digests.add(teacher_digest(TeacherTeam(nets, [1, 1]) if in_team else nets[1]))
        assert len(digests) == 2


class SummaryRows(KD):
    """Reads summary vectors, with a loss for each sample."""

    teacher_logits_only = False
    teacher_summary_only = True

    def distill_rows(self, student, teacher, target, **batch):
        return student["pooled_feat"].sum(dim=1) * teacher["pooled_feat"].sum(dim=1)

    def distill(self, student, teacher, target, **batch):
        return self.distill_rows(student, teacher, target).mean()


def test_confidence_reads_the_logits_that_the_method_does_not():
    assert SummaryRows.cacheable_outputs() == ("pooled_feat",)
    assert several(SummaryRows, "losses").cacheable_outputs() == ("pooled_feat",)
    assert several(SummaryRows, "confidence").cacheable_outputs() == ("logits", "pooled_feat")
    assert several(KD, "confidence").cacheable_outputs() == ("logits",)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"TEACHERS": [{"NAME": "resnet8"}, "resnett"]}, "DISTILLER.TEACHERS: unknown CIFAR model"),
        ({"TEACHERS": "[{NAME: resnet8}]"}, "DISTILLER.TEACHERS cannot be read: on the"),
        ({"TEACHERS": [0]}, "DISTILLER.TEACHERS[0] must be a network's name or a section with"),
        ({"TEACHERS": ["resnet8", "resnet8"]}, "set CKPT to a checkpoint, or CFG to the config"),
        ({"TEACHERS": [{"NAME": "resnet8", "WEIGHT": -1}]}, "DISTILLER.TEACHERS[0].WEIGHT must be"),
        ({"COMBINE": "mean"}, "DISTILLER.COMBINE must be one of losses, ensemble, confidence"),
        ({"TEACHERS": ["resnet8"] * 2, "method": "SIMKD"}, "SIMKD cannot learn from several"),
    ],
)
def test_bad_teachers(tmp_path, capsys, settings, message):
    run_of(tmp_path, code=2, **settings)
    assert message in capsys.readouterr().err
