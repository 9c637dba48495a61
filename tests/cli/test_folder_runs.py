"""Train, evaluate, export and predict on folders of images of unusual kinds."""

import json
import shutil

from support import image_folder

from mdistiller.cli import eval as eval_command
from mdistiller.cli import train as train_command


def train(folder, root, *words):
    """One epoch of resnet8 on an image folder; returns the run folder."""
    common = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", root, "DISTILLER.STUDENT", "resnet8"]
    common += ["SOLVER.EPOCHS", "1", "SOLVER.BATCH_SIZE", "6", "LOG.PREFIX", folder]
    common += ["EXPERIMENT.NAME", "run", "DEVICE", "cpu"]
    assert train_command.main([*map(str, common), *words]) == 0
    return folder / "distill" / "run"


def test_without_test_images_the_held_out_ones_serve_for_both(tmp_path, capsys):
    root = image_folder(tmp_path / "images", size=16)
    shutil.rmtree(root / "val")
    run = train(tmp_path, root, "DATASET.VAL_SPLIT", "6")
    out = capsys.readouterr().out
    assert "has no test images (val/ or test/): the 6 held-out training images" in out
    summary = json.loads((run / "summary.json").read_text())
    assert summary["selected_on"] == "6 held-out training images"
    assert "test_acc_best" not in summary
    assert eval_command.main([str(run), "--checkpoint", "latest", "--json", str(run / "e")]) == 0
    top1 = f"{summary['last_acc']:.2f}"
    assert f"(6 held-out training images): top-1 {top1}" in capsys.readouterr().out
    assert json.loads((run / "e").read_text())["split"] == "6 held-out training images"
    assert eval_command.main([str(run), "DATASET.VAL_SPLIT", "0"]) == 2
    assert "or set DATASET.VAL_SPLIT" in capsys.readouterr().err
