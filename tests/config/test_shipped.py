"""Every YAML file of ImageNet and Tiny-ImageNet trains on a folder with the data set's layout."""

import functools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from support import REPO, saved_teacher

from mdistiller.cli import train as train_command
from mdistiller.engine.callbacks.default import Checkpoint
from mdistiller.engine.cfg import load_config
from mdistiller.engine.trainer import seed_everything
from mdistiller.models import get_model_entry

WNIDS = ["n01443537", "n01629819", "n01641577"]
# What has settings of its own for these networks or this size. The other methods read logits and
# attention alone, as in the configs of CIFAR; that their configs load, test_cfg.py says.
ALWAYS = {
    "r34_r18": ("catkd", "reviewkd", "wkd_lf"),
    "r50_mv1": ("crd", "ofd", "reviewkd"),
}
CONFIGS = [
    pytest.param(
        zoo,
        path,
        id=path.relative_to(REPO / "configs").as_posix(),
        marks=[pytest.mark.slow] * (path.stem not in ALWAYS.get(path.parent.name, (path.stem,))),
    )
    for zoo in ("tiny_imagenet", "imagenet")
    for path in sorted((REPO / "configs" / zoo).rglob("*.yaml"))
]


def picture(path, width=64, height=64):
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The data sets' folders, three classes with one image in each split.

    Tiny-ImageNet as it is unpacked, with a table of the validation images; ImageNet as class
    folders, images of all sizes.
    """
    tiny, large = (tmp_path_factory.mktemp(name) for name in ("tiny-imagenet-200", "imagenet"))
    rows = []
    for i, wnid in enumerate(WNIDS):
        picture(tiny / "train" / wnid / "images" / f"{wnid}_0.JPEG")
        picture(large / "train" / wnid / f"{wnid}_1.JPEG", 240 + 50 * i, 400 - 60 * i)
        picture(tiny / "val" / "images" / f"val_{i}.JPEG")
        rows.append(f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n")
        picture(large / "val" / wnid / f"ILSVRC2012_val_{i:08d}.JPEG", 200, 160 + 50 * i)
    (tiny / "val" / "val_annotations.txt").write_text("".join(rows))
    return {"tiny_imagenet": tiny, "imagenet": large}


def overrides(zoo, path, root, folder, teacher):
    """What makes a run of one small step of a shipped config."""
    words = "SOLVER.BATCH_SIZE 3 SOLVER.EPOCHS 1 SOLVER.LR 0.02 "
    words += f"DATASET.NUM_WORKERS 1 DATASET.ROOT {root}"
    words += f" DEVICE cpu LOG.PREFIX {folder} EXPERIMENT.NAME run DISTILLER.TEACHER_CKPT {teacher}"
    if zoo == "imagenet" and path.stem != "reviewkd":  # its SHAPES are those of 224 pixels
        words += " DATASET.IMAGE_SIZE 64"
    if path.stem.startswith("wkd"):  # else the only epoch is the last of a decay to 0
        words += " WKD.LOSS.COSINE_DECAY_EPOCH 1"
    return words.split()


@pytest.fixture
def scratch(tmp_path):
    """A folder for hundreds of megabytes, which are not kept."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Files with a teacher each, made when they are asked for."""
    folder = tmp_path_factory.mktemp("teachers")

    @functools.cache
    def teacher(zoo, name):
        (folder / zoo).mkdir(exist_ok=True)
        return saved_teacher(folder / zoo, name, len(WNIDS), zoo=zoo)

    yield teacher
    shutil.rmtree(folder)


@pytest.mark.parametrize(("zoo", "path"), CONFIGS)
def test_a_shipped_config_trains(scratch, folders, teachers, monkeypatch, zoo, path):
    """Its weights are looked at in memory: no checkpoint of hundreds of megabytes is written."""
    trained = []
    keep = lambda self, trainer, epoch, record: trained.append(trainer.model)  # noqa: E731
    monkeypatch.setattr(Checkpoint, "after_epoch", keep)
    cfg = load_config(path)
    teacher = teachers(zoo, cfg.DISTILLER.TEACHER)
    words = overrides(zoo, path, folders[zoo], scratch, teacher)
    assert train_command.main(["--cfg", str(path), *words]) == 0
    run = scratch / cfg.EXPERIMENT.PROJECT / "run"
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    assert all(math.isfinite(row[key]) for key in ("train_loss", "test_loss"))
    assert row["train_loss_kd"] > 0
    (model,) = trained
    state = model.state_dict()
    for key, value in torch.load(teacher)["model"].items():  # OFD's teacher counts batches
        if key.endswith(("weight", "bias")):
            assert torch.equal(state[f"teacher.{key}"], value)
    seed_everything(cfg.EXPERIMENT.SEED)
    student = get_model_entry(cfg.DISTILLER.STUDENT, zoo)(num_classes=len(WNIDS))
    start = dict(student.named_parameters())
    assert not any(
        torch.equal(value, start[key]) for key, value in model.student.named_parameters()
    )
