"""k-NN and linear probes: their classifiers, `eval --probe`, and LOG.PROBE in training."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from support import image_folder, saved_teacher

from mdistiller.cli import eval as evaluate
from mdistiller.cli import train
from mdistiller.engine import probe
from mdistiller.engine.callbacks.probe import Probe
from mdistiller.engine.cfg import load_config
from mdistiller.engine.probe import knn_accuracy, linear_accuracy
from mdistiller.evaluation.probe import training_size
from mdistiller.evaluation.subjects import Source


def clusters(count, spread, seed):
    """Features [3 * count, 5] about three centres, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.arange(3).repeat(count)
    centres = torch.eye(3, 5, dtype=torch.float64)
    noise = torch.randn(len(classes), 5, generator=generator, dtype=torch.float64)
    return centres[classes] + spread * noise, classes


def test_the_knn_classifier_is_a_weighted_vote():
    train, train_classes = clusters(20, 0.7, 0)
    test, test_classes = clusters(30, 0.7, 1)
    hits = 0
    for x, wanted in zip(test.numpy(), test_classes.tolist(), strict=True):
        cosines = [x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in train.numpy()]
        votes = [0.0] * 3
        for k in np.argsort(cosines)[::-1][:20]:
            votes[train_classes[k]] += math.exp(cosines[k] / 0.07)
        hits += votes.index(max(votes)) == wanted
    assert 30 < hits < 90
    accuracy = knn_accuracy(train, train_classes, test, test_classes)
    assert accuracy == pytest.approx(100 * hits / 90)
    few = knn_accuracy(train[:3], train_classes[:3], test, test_classes)  # fewer than 20
    assert 0 < few <= 100


def test_the_linear_classifier_is_the_regularised_optimum(monkeypatch):
    x, classes = clusters(40, 0.5, 0)
    weight, bias = probe._fit(x, classes, 3, (1e-1, 1e-2))[1]
    model = LogisticRegression(C=1 / (1e-2 * len(x)), tol=1e-10, max_iter=1000)
    model.fit(x.numpy(), classes.numpy())
    np.testing.assert_allclose(weight, model.coef_, atol=1e-4)
    np.testing.assert_allclose(bias - bias.mean(), model.intercept_, atol=1e-4)


def test_held_out_images_choose_the_weight_decay(monkeypatch):
    used = []

    def fit(x, targets, classes, decays, original=probe._fit):
        used.append((len(x), decays))
        return original(x, targets, classes, decays)

    monkeypatch.setattr(probe, "_fit", fit)
    generator = torch.Generator().manual_seed(0)
    x, classes = torch.randn(60, 50, generator=generator), torch.arange(60) % 2  # noise: overfits
    x[:, 0] += 1.5 * classes
    test = torch.randn(400, 50, generator=generator), torch.arange(400) % 2
    test[0][:, 0] += 1.5 * test[1]
    chosen = linear_accuracy(x, classes, *test)
    assert used == [(48, probe.WEIGHT_DECAYS), (60, probe.WEIGHT_DECAYS[: len(used[1][1])])]
    assert chosen > 60
    x[:, 1] = 7.0  # a constant feature, and more classes than images
    assert linear_accuracy(x[:3], torch.arange(3), x[:3], torch.arange(3)) == 100


def test_eval_and_training_find_the_same_accuracy(tmp_path, capsys):
    """Of a student trained without labels; its two teachers, of other classes, beside it."""
    labelled, out = image_folder(tmp_path / "labelled"), tmp_path / "found.json"
    teacher = saved_teacher(tmp_path)
    words = ["DEVICE", "cpu", "EXPERIMENT.NAME", "run", "LOG.PREFIX", tmp_path]
    words += ["DATASET.TYPE", "images", "DATASET.ROOT", labelled / "train"]
    words += ["DISTILLER.TYPE", "SEED", "DISTILLER.STUDENT", "resnet8", "SOLVER.EPOCHS", 2]
    entry = {"NAME": "resnet8", "CKPT": str(teacher)}
    words += ["DISTILLER.TEACHERS", [entry, entry | {"NORM": "data"}]]
    words += [
        "DISTILLER.TEACHER_SIZE",
        48,
        "LOG.PROBE",
        labelled,
        "LOG.PROBE_FREQ",
        2,
        "SOLVER.BATCH_SIZE",
        12,
    ]
    assert train.main(list(map(str, words))) == 0
    folder = tmp_path / "distill" / "run"
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "test_knn" not in rows[0]
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["best_epoch"] == 2
    assert "best_acc" not in summary
    assert summary["best_knn"] == summary["last_knn"] == rows[1]["test_knn"]
    command = [str(folder), "--probe", "knn,linear", "--labelled", str(labelled)]
    assert evaluate.main([*command, "--json", str(out)]) == 0
    networks = json.loads(out.read_text())["networks"]
    latest, untrained, best, its_teacher, other = networks
    assert latest["knn"] == best["knn"] == rows[1]["test_knn"]
    assert (untrained["label"], untrained["weights"]) == ("random weights", "")
    assert its_teacher["linear"] > 60
    assert its_teacher["weights"] == other["weights"] == str(teacher)
    assert (latest["image_size"], its_teacher["image_size"]) == ([32, 32], [48, 48])
    assert "k-NN top-1 %" in capsys.readouterr().out


def test_labelled_images_are_cropped_as_the_students_file_records(tmp_path):
    """Square ones, for a student of photographs that were cropped."""
    how = {"image_size": [32, 32], "resize": "crop", "crop_pct": 0.8, "interpolation": "bilinear"}
    facts = {"image_size": [32, 32], "mean": [0.5] * 3, "std": [0.2] * 3, "preprocessing": how}
    student = SimpleNamespace(file_entries={"data": facts})
    cfg = load_config("", ["DATASET.TYPE", "images", "LOG.PROBE", str(image_folder(tmp_path))])
    hook = Probe()
    hook.before_train(
        SimpleNamespace(cfg=cfg, device=torch.device("cpu"), model=SimpleNamespace(student=student))
    )
    for data in hook.sets:
        assert (data.preprocessing.crop_pct, data.mean) == (0.8, (0.5,) * 3)
    assert [len(data.loader.dataset) for data in hook.sets] == [24, 12]  # train/ and val/


def test_a_teacher_is_judged_at_the_size_it_had_in_training():
    words = ["DISTILLER.TYPE", "SEED", "DATASET.TYPE", "images", "DATASET.IMAGE_SIZE", "64"]
    sizes = [
        training_size(Source("", load_config("", [*words, *more]), "", role=role))
        for role, more in (
            ("TEACHER", []),
            ("TEACHER", ["DISTILLER.TEACHER_SIZE", "[48, 32]"]),
            ("STUDENT", []),
        )
    ]
    assert sizes == [(64, 64), (48, 32), None]


def test_a_probe_without_labelled_images_is_refused(tmp_path, capsys):
    assert evaluate.main(["-m", "resnet8", "--probe", "knn"]) == 2
    assert "--probe and --labelled belong together" in capsys.readouterr().err
    (tmp_path / "train").mkdir()
    assert evaluate.main(["-m", "resnet8", "--probe", "knn", "--labelled", str(tmp_path)]) == 2
    assert "has no test images: a folder of labelled images holds" in capsys.readouterr().err
