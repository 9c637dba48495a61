"""Training on images without labels: which methods run, and how the best epoch is chosen."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import TOY, saved_teacher

from mdistiller.cli import train
from mdistiller.dataset import load_data
from mdistiller.dataset.sources.images import Images
from mdistiller.distillers import distiller_dict, get_distiller
from mdistiller.engine.cfg import default_config
from mdistiller.engine.checkpoints.write import load_checkpoint
from mdistiller.engine.unlabelled import UnlabelledTrainer
from mdistiller.models import get_model_entry
from mdistiller.networks.make import make_network
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller

LABEL_FREE = ["AT", "CC", "FITNET", "NST", "PKT", "RADIO", "REVIEWKD", "RKD", "SEED", "SP", "VID"]
FAMILIES = {
    "timm/test_vit": {},
    "timm/vit_small_patch16_dinov3": {"embed_dim": 24, "depth": 2, "num_heads": 2},  # registers
    "timm/test_convnext": {},
    "timm/test_efficientnet": {},
    "timm/mobilenetv4_conv_small_035": {},
    "timm/test_maxvit": {},
}
LABELLED = ("IMPORTS", f"['{TOY}']", "DATASET.TYPE", "tiny16", "SOLVER.EPOCHS", 1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """40 pictures of 16 pixels at several depths; 4 more in a hidden folder, and a text file."""
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for k in range(44):
        folder = root / (".trash" if k >= 40 else "abc"[k % 3]) / "deep"[: k % 5]
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    (root / "a" / "notes.txt").write_text("no picture")
    return root


def run(folder, *words, name="run"):
    """Train in this process; returns the exit code."""
    teacher = folder / "resnet8_10.pth"
    if not teacher.exists():
        saved_teacher(folder)
    pairs = {
        "DEVICE": "cpu",
        "EXPERIMENT.NAME": name,
        "DISTILLER.STUDENT": "resnet8",
        "DISTILLER.TEACHER": "resnet8",
        "DISTILLER.TEACHER_CKPT": str(teacher),
        "SOLVER.EPOCHS": "2",
        "SOLVER.LR": "0.01",
        "SOLVER.BATCH_SIZE": "16",
        "LOG.PREFIX": str(folder),
    }
    return train.main([*(word for pair in pairs.items() for word in pair), *map(str, words)])


def result(folder, name="run"):
    run_folder = folder / "distill" / name
    rows = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    return json.loads((run_folder / "summary.json").read_text()), rows


@pytest.mark.parametrize("loader", ["memory", "workers"])
def test_a_tree_of_pictures_trains_without_accuracies(pictures, tmp_path, loader):
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures, "DATASET.LOADER", loader)
    assert run(tmp_path, *data, "DISTILLER.TYPE", "RKD+SP", "SOLVER.EMA", 0.5) == 0
    summary, rows = result(tmp_path)
    assert not [
        key for key in (*summary, *rows[0]) if key.endswith("_acc") and key != "teacher_acc"
    ]
    assert "train_loss_ce" not in rows[0]
    assert summary["best_loss"] == min(row["train_loss"] for row in rows)
    assert summary["selected_on"] == "training images"
    images = rows[0]["images_per_second"] * rows[0]["seconds"]
    assert images == pytest.approx(40)  # without the hidden ones
    record = json.loads((tmp_path / "distill" / "run" / "run.json").read_text())
    assert (record["data"]["num_classes"], record["data"]["classes"]) == (0, [])
    folder = tmp_path / "distill" / "run"
    state = load_checkpoint(folder / "student_best")["model"]
    assert state["fc.weight"].shape == (0, 64)
    names = sorted(path.name for path in folder.glob("student_ema_*"))
    assert names == ["student_ema_latest"]  # no accuracy selects one
    averaged, last = (
        load_checkpoint(folder / f"student_{name}latest")["model"]["conv1.weight"]
        for name in ("ema_", "")
    )
    assert not torch.equal(averaged, last)


def test_linked_folders_are_read_once_and_a_split_folder_is_reported(tmp_path, capsys):
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    for folder in (root / "train", root / "val", elsewhere / "deep"):
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(folder / "0.png")
    (root / "link").symlink_to(elsewhere)
    (elsewhere / "loop").symlink_to(root)
    (elsewhere / "twin").symlink_to(elsewhere / "deep")
    names = [str(name, "utf-8") for name in Images().files(root, "train").names]
    assert names == ["link/deep/0.png", "train/0.png", "val/0.png"]
    assert f"name {root / 'train'} to leave them out" in capsys.readouterr().err
    Images().files(root / "train", "train")
    assert not capsys.readouterr().err


def test_held_out_images_select_the_epoch_of_the_lowest_loss(pictures, tmp_path):
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures, "DATASET.VAL_SPLIT", 8)
    # the learning rate ruins the student in the second epoch
    steps = ("SOLVER.LR_DECAY_STAGES", "[1]", "SOLVER.LR_DECAY_RATE", 1e4)
    assert run(tmp_path, *data, *steps, "DISTILLER.TYPE", "FITNET", "SOLVER.LR", 1e-4) == 0
    summary, rows = result(tmp_path)
    assert summary["selected_on"] == "8 held-out training images"
    assert summary["best_epoch"] == 1
    assert summary["best_loss"] == rows[0]["test_loss"] < rows[1]["test_loss"]
    state = load_checkpoint(tmp_path / "distill" / "run" / "student_latest")["model"]
    assert state["bn1.num_batches_tracked"] == 4  # batches of training alone


def test_labelled_data_train_without_their_labels(tmp_path):
    assert run(tmp_path, *LABELLED, "DATASET.LABELS", False, "DISTILLER.TYPE", "AT") == 0
    summary, rows = result(tmp_path)
    assert set(rows[0]) >= {"train_loss", "test_loss"}
    assert not any("acc" in key or "top" in key for key in rows[0])
    assert summary["selected_on"] == "test set"


def test_which_methods_need_no_labels(pictures, tmp_path, capsys):
    assert sorted(name for name in LABEL_FREE) == sorted(
        name for name, cls in distiller_dict.items() if not cls.needs_labels
    )
    assert not get_distiller("AT+SP").needs_labels
    assert get_distiller("AT+KD").needs_labels
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures)
    assert run(tmp_path, *data, "DISTILLER.TYPE", "KD+AT") == 2
    error = capsys.readouterr().err
    assert "KD needs class labels or logits" in error
    assert "DATASET.LABELS" not in error  # it is no reason here
    assert run(tmp_path, *data, "DISTILLER.TYPE", "AT", "SOLVER.TRAINER", "dot") == 2
    assert "SOLVER.TRAINER dot reads labels" in capsys.readouterr().err
    cfg = default_config()
    for key, value in (("SOLVER.CUDA_GRAPHS", True), ("SOLVER.QAT_EPOCHS", 1)):
        asked = cfg.clone()
        asked.merge_from_list([key, value])
        with pytest.raises(UserError, match=f"{key} does not work on data without labels"):
            UnlabelledTrainer.check(asked)


def test_a_headless_teacher_on_labelled_data(tmp_path, capsys):
    """TEACHER_ARGS {num_classes: 0}: for methods that read features, refused for the others."""
    backbone = ("DISTILLER.TEACHER_ARGS.num_classes", 0)
    assert run(tmp_path, *LABELLED, *backbone, "DISTILLER.TYPE", "AT") == 0
    assert result(tmp_path)[1][0]["train_acc"] > 0
    assert run(tmp_path, *LABELLED, *backbone, "DISTILLER.TYPE", "KD", name="kd") == 2
    assert "DISTILLER.TEACHER_ARGS {num_classes: 0} leaves out" in capsys.readouterr().err


def test_the_teachers_summary_vectors_are_cached(pictures, tmp_path, capsys):
    """Losses as without a cache, over a resume; another method finds all that was left."""
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures, "DATASET.AUGMENT", "crop_flip")
    data = (*data, "SOLVER.BATCH_SIZE", 20)
    cache = ("DISTILLER.TEACHER_CACHE", "disk")
    seed = ("DISTILLER.TYPE", "SEED")
    assert run(tmp_path, *data, *seed, name="plain") == 0
    assert run(tmp_path, *data, *seed, *cache, "SOLVER.EPOCHS", 1, name="cached") == 0
    assert run(tmp_path, *data, *seed, *cache, "--resume", name="cached") == 0
    assert run(tmp_path, *data, *cache, "DISTILLER.TYPE", "RKD+PKT", name="again") == 0
    plain, cached, again = (result(tmp_path, name)[1] for name in ("plain", "cached", "again"))
    assert cached[0]["train_loss"] == plain[0]["train_loss"]
    assert cached[1]["train_loss"] == pytest.approx(plain[1]["train_loss"], rel=1e-5)
    assert [row["teacher_hits"] for row in again] == [100, 100]
    assert run(tmp_path, *data, *cache, "DISTILLER.TYPE", "RADIO", name="radio") == 2
    assert "RADIO reads more of the teacher than logits and summary" in capsys.readouterr().err


def test_a_run_continues_to_the_bit(pictures, tmp_path):
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures, "DISTILLER.TYPE", "SEED")
    assert run(tmp_path, *data, name="whole") == 0
    assert run(tmp_path, *data, "SOLVER.EPOCHS", 1, name="cut") == 0
    assert run(tmp_path, *data, "--resume", name="cut") == 0
    whole, cut = (
        load_checkpoint(tmp_path / "distill" / name / "latest") for name in ("whole", "cut")
    )
    assert whole["best_acc"] == cut["best_acc"]
    for key, value in whole["model"].items():
        assert torch.equal(value, cut["model"][key]), key


def test_the_teacher_sees_images_of_its_own_size(pictures, tmp_path):
    cfg = default_config()
    words = ["DEVICE", "cpu", "DATASET.TYPE", "images", "DATASET.ROOT", str(pictures)]
    words += ["DISTILLER.TYPE", "SEED", "DISTILLER.STUDENT", "resnet8", "SOLVER.BATCH_SIZE", 8]
    words += ["DISTILLER.TEACHER", "resnet8", "DISTILLER.TEACHER_SIZE", 24]
    words += ["DISTILLER.TEACHER_CKPT", str(saved_teacher(tmp_path))]
    cfg.merge_from_list(words)
    distiller = build_distiller(cfg, load_data(cfg), torch.device("cpu")).train()
    torch.manual_seed(1)
    teacher = get_model_entry("resnet8", "cifar")(num_classes=10).eval()  # as saved
    images = torch.randn(2, 3, 16, 16)
    larger = torch.nn.functional.interpolate(images, (24, 24), mode="bicubic", antialias=True)
    with torch.no_grad():
        wanted = teacher(larger)[1]["final_map"]
    assert wanted.shape[2] == 6
    torch.testing.assert_close(distiller.run_teacher(images)["final_map"], wanted)
    assert distiller.run_student(images)["final_map"].shape[2] == 4


def test_weights_that_the_loss_does_not_reach_are_reported(pictures, tmp_path, capsys):
    data = ("DATASET.TYPE", "images", "DATASET.ROOT", pictures, "SOLVER.EPOCHS", 1)
    assert run(tmp_path, *data, "DISTILLER.TYPE", "FITNET") == 0
    assert "FITNET does not train" in capsys.readouterr().out
    assert run(tmp_path, *data, "DISTILLER.TYPE", "FITNET+SEED", name="all") == 0
    assert "does not train" not in capsys.readouterr().out


def test_families_of_timm_teach_and_learn_without_labels():
    """Each is the teacher of one and the student of another, for a step of both methods."""
    cfg, size = default_config(), (64, 64)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    networks = [
        make_network(get_model_entry(name, "cifar"), 0, size, settings, "")
        for name, settings in FAMILIES.items()
    ]
    for number, student in enumerate(networks):
        teacher = networks[number - 1].eval()
        tokens = teacher.net.forward_features(images)
        summary = teacher.net.forward_head(tokens, pre_logits=True)
        features = teacher(images)[1]
        torch.testing.assert_close(features["pooled_feat"], summary)
        if tokens.ndim == 3:  # class and register tokens are not part of the map
            tokens = tokens[:, teacher.net.num_prefix_tokens :].mT.unflatten(2, (4, 4))
        torch.testing.assert_close(features["final_map"], tokens)
        distiller = get_distiller("SEED+RADIO").build(student, teacher, cfg, 8, image_size=size)
        _, losses = distiller.train()(image=images, target=torch.zeros(2).long(), epoch=1)
        sum(losses.values()).backward()
        head = {id(param) for param in student.classifier().parameters()}
        for name, param in student.named_parameters():
            assert id(param) in head or param.grad.isfinite().all(), (student.name, name)
