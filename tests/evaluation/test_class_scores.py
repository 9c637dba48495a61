"""Balanced accuracy, precision, recall and F1: their values, and what selects the best epoch."""

import json

import pytest
import torch
from support import write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command
from mdistiller.engine.metrics import class_scores, macro_scores


def test_scores_are_those_of_torchmetrics():
    functional = pytest.importorskip("torchmetrics.functional.classification")
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(5, (200,), generator=generator) % 4 + (torch.arange(200) % 7 == 0)
    said = torch.where(torch.rand(200, generator=generator) < 0.6, target, (target * 3) % 5)
    cells = torch.zeros(5, 5)
    for row, column in zip(target.tolist(), said.tolist(), strict=True):
        cells[row, column] += 1
    for k, name in enumerate(("precision", "recall", "f1_score")):
        measure = getattr(functional, f"multiclass_{name}")
        each = 100 * measure(said, target, 5, average="none")
        torch.testing.assert_close(class_scores(cells)[k], each)
        assert macro_scores(cells)[k].item() == pytest.approx(each.mean().item(), rel=1e-5)


def test_a_class_without_images_is_left_out_and_one_that_is_never_named_scores_zero():
    cells = torch.tensor([[3.0, 0, 1], [4, 0, 0], [0, 0, 0]])  # the third class has no images
    precision, recall, f1 = class_scores(cells)
    assert [x[:2].tolist() for x in (precision, recall)] == [[pytest.approx(300 / 7), 0], [75, 0]]
    assert torch.stack([precision, recall, f1])[:, 2].isnan().all()
    assert macro_scores(cells)[1] == 37.5


NUMBERS = ((50.0, 1.0, 30.0, 35.0), (40.0, 0.5, 60.0, 20.0), (45.0, float("nan"), 50.0, 55.0))


@pytest.mark.parametrize(("by", "best"), [("loss", 2), ("macro_f1", 3)])
def test_select_by_chooses_the_best_epoch_also_after_resuming(
    tmp_path, monkeypatch, capsys, by, best
):
    def scripted(loader, distiller):
        epoch = min(len(epochs) // 2, 2)  # student and average are evaluated in each
        epochs.append(epoch)
        names = ("acc", "loss", "balanced_acc", "macro_f1")
        return {**dict(zip(names, NUMBERS[epoch], strict=True)), "acc_top5": 90.0}

    epochs = []
    for module in ("classification", "callbacks.ema"):
        monkeypatch.setattr(f"mdistiller.engine.{module}.evaluate", scripted)
    text = f"DATASET:\n  TYPE: tiny16\nLOG:\n  SELECT_BY: {by}\nSOLVER:\n  EMA: 0.9\n"
    words = ["--cfg", str(write_config(tmp_path, text, epochs=3)), "SOLVER.BATCH_SIZE", "80"]
    words += ["EXPERIMENT.NAME", "run", "SOLVER.SCHEDULE", "constant"]

    run = tmp_path / "out" / "toy" / "run"
    assert train_command.main([*words, "SOLVER.EPOCHS", "2"]) == 0
    (run / "summary.json").unlink()
    assert train_command.main([*words, "--resume"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best_epoch"], summary["selected_by"]) == (best, by)
    assert summary["ema_best_epoch"] == best
    assert summary["best_acc"] == NUMBERS[best - 1][0]
    assert summary["best_balanced_acc"] == NUMBERS[best - 1][2]
    assert torch.load(run / "best", weights_only=True)["epoch"] == best
    words += ["--resume", "--allow-changes", "LOG.SELECT_BY", "top1"]
    assert train_command.main(words) != 0  # the file `best` is of another epoch
    assert "LOG.SELECT_BY was" in capsys.readouterr().err


def test_eval_has_a_table_of_classes_a_picture_and_the_scores(tmp_path, capsys):
    config = write_config(tmp_path, "DATASET:\n  TYPE: tiny16\n", epochs=1)
    assert train_command.main(["--cfg", str(config)]) == 0
    run = tmp_path / "out" / "toy" / "run"
    picture, found = tmp_path / "cells.png", tmp_path / "found.json"
    words = [str(run), "--per-class", "--confusion", str(picture), "--json", str(found)]
    assert eval_command.main([*words, "--checkpoint", "latest"]) == 0
    table = capsys.readouterr().out
    (one,) = json.loads(found.read_text())["networks"]
    cells = torch.tensor(one["confusion"], dtype=torch.float64)
    scores = macro_scores(cells).tolist()
    assert [one[f"macro_{name}"] for name in ("precision", "recall", "f1")] == scores
    assert one["balanced_accuracy"] == one["macro_recall"]
    worst = min(range(10), key=lambda k: one["class_f1"][k])
    rows = table.split("most often mistaken for")[1].splitlines()
    assert rows[2].split("|")[1:3] == [
        f" {worst} ".ljust(9),
        f" {int(cells[worst].sum())} ".ljust(10),
    ]
    assert picture.read_bytes()[:4] == b"\x89PNG"
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["test_balanced_acc"] == pytest.approx(one["balanced_accuracy"], rel=1e-5)
    assert row["test_macro_f1"] == pytest.approx(one["macro_f1"], rel=1e-5)
    assert eval_command.main([str(run), "--confusion", str(tmp_path / "no" / "a.png")]) == 2
    capsys.readouterr()
    assert eval_command.main([str(run), "--per-class"]) == 0
    table = capsys.readouterr().out  # of an only epoch, the last and the best
    assert table.count("most often mistaken for") == 1
    assert "toy/run latest = toy/run best\n" in table
