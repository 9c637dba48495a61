"""Facts of a frozen teacher and the training images: made once, kept under hashes."""

import re

import numpy as np
import pytest
import torch
from support import command, image_folder, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers.helpers.training.teacher_facts import class_similarity
from mdistiller.distillers.WKD import class_costs
from mdistiller.engine.cfg import load_config
from mdistiller.frozen_teacher.facts import choose_images, class_outputs
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller

CPU = torch.device("cpu")
WKD = "WKD: {COST: cka, LOSS: {WKD_LOGIT_WEIGHT: 20.0, COSINE_DECAY_EPOCH: 9}}\n"
TEACHER = "resnet8_10.pth"


def config(folder, text=WKD, method="WKD", epochs=2, student="resnet8"):
    folder.mkdir(exist_ok=True)
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    return write_config(folder, text, method, student, epochs, **teacher)


def built(path, *words):
    cfg = load_config(path, list(map(str, words)))
    data = load_data(cfg, CPU)
    return build_distiller(cfg, data, CPU), cfg, data


def kept(folder):
    return sorted((folder / "out" / "teacher_cache").glob("*.fact.npz"))


def train(path, name, *words):
    words = ["--cfg", path, *words, "EXPERIMENT.NAME", name]
    assert train_command.main(list(map(str, words))) == 0


def student(folder, name):
    path = folder / "out" / "toy" / name / "student_latest"
    return torch.load(path, weights_only=True)["model"]


def by_hand(data, teacher, per_class=500):
    """The costs from plain passes over the images, one class at a time."""
    images, targets = data.train.dataset.images, data.train.dataset.targets
    count = min(int(targets.bincount().min()), per_class)
    with torch.no_grad():
        rows = [
            teacher.eval()(data.train.normalize(images[targets == c][:count]))[0]
            for c in range(data.num_classes)
        ]
    return class_costs(class_similarity(torch.stack(rows)), 1.0)


def test_the_cost_is_that_of_the_teachers_outputs_by_class(tmp_path, capsys):
    distiller, _, data = built(config(tmp_path))
    assert not distiller.missing
    assert "the teacher runs once on" in capsys.readouterr().out
    want = by_hand(data, distiller.teacher)
    torch.testing.assert_close(distiller.class_cost, want, rtol=0, atol=1e-5)
    few, _, _ = built(config(tmp_path), "WKD.COST_IMAGES", 4)
    want = by_hand(data, distiller.teacher, 4)
    torch.testing.assert_close(few.class_cost, want, rtol=0, atol=1e-5)
    pooled, _, _ = built(config(tmp_path), "WKD.COST", "cka_feats")
    assert not torch.allclose(pooled.class_cost, distiller.class_cost, atol=1e-3)


def test_a_fact_without_classes_is_of_the_same_images_with_and_without_labels(tmp_path):
    path, standards = config(tmp_path, "RADIO: {IMAGES: 10}\n", "RADIO"), []
    for labels in (True, False):
        distiller, _, data = built(path, "DATASET.LABELS", labels)
        assert bool(data.num_classes) == labels
        standards.append(distiller.standard_pooled_feat)
        for file in kept(tmp_path):
            file.unlink()
    torch.testing.assert_close(*standards)


def test_it_is_made_once_and_kept_by_what_it_depends_on(tmp_path, capsys):
    path = config(tmp_path)
    first = built(path)[0].class_cost
    assert len(kept(tmp_path)) == 1
    capsys.readouterr()
    again = built(path, "DISTILLER.TEACHER_FOLD", False, "SOLVER.AMP", "bf16")[0].class_cost
    assert "read from" in capsys.readouterr().out
    assert torch.equal(first, again)
    for count, words in enumerate((["WKD.SHARPEN", 2.0], ["DATASET.VAL_SPLIT", 20]), start=2):
        built(path, *words)
        assert len(kept(tmp_path)) == count
    built(path, "WKD.TEMPERATURE", 3.0)
    assert len(kept(tmp_path)) == 3
    weights = torch.load(tmp_path / TEACHER, weights_only=True)
    weights["model"]["fc.weight"] += 1
    torch.save(weights, tmp_path / TEACHER)
    other = built(path)[0].class_cost
    assert not torch.equal(first, other)
    assert len(kept(tmp_path)) == 4


def test_images_that_are_resized_or_decoded_otherwise_give_other_costs(tmp_path):
    """Files are not hashed pixel by pixel, so the key names what is done to them."""
    image_folder(tmp_path / "images", classes=[str(k) for k in range(10)], size=48)
    text = "DATASET: {TYPE: imagefolder, ROOT: %s, IMAGE_SIZE: 32, LOADER: workers, " % (
        tmp_path / "images"
    )
    text += "NUM_WORKERS: 0, MEAN: [0.5, 0.5, 0.5], STD: [0.2, 0.2, 0.2]}\n"
    path = config(tmp_path, WKD + text)
    changes = ((), ("RESIZE", "stretch"), ("RESIZE", "crop", "CROP_PCT", 0.5))
    changes += (("INTERPOLATION", "nearest"), ("EXIF", False), ("SCALE_16_BIT", True))
    changes += (("JPEG_SCALING", "all"),)
    for count, change in enumerate(changes, start=1):
        words = [f"DATASET.{x}" if k % 2 == 0 else x for k, x in enumerate(change)]
        built(path, "SOLVER.BATCH_SIZE", 4, *words)
        assert len(kept(tmp_path)) == count, change


def test_a_damaged_file_is_named_and_made_anew(tmp_path, capsys):
    path = config(tmp_path)
    first = built(path)[0].class_cost
    (file,) = kept(tmp_path)
    whole = file.read_bytes()
    with np.load(file) as found:
        arrays = dict(found)
    for damage in ("cut off", "changed", "of another key", "empty"):
        if damage == "changed":
            np.savez(file, **{**arrays, "value": arrays["value"] + 1})
        elif damage == "of another key":
            np.savez(file, **{**arrays, "key": np.array("{}")})
        else:
            file.write_bytes(whole[: len(whole) // 2] if damage == "cut off" else b"")
        capsys.readouterr()
        assert torch.equal(built(path)[0].class_cost, first), damage
        said = capsys.readouterr().out
        assert re.search(r"\.fact\.npz is damaged \(.+\) and made anew", said), damage
    built(path)
    assert "read from" in capsys.readouterr().out


def test_a_run_is_continued_with_the_costs_it_began_with(tmp_path):
    path = config(tmp_path)
    train(path, "whole")
    train(path, "parts", "SOLVER.EPOCHS", 1)
    (file,) = kept(tmp_path)
    cost = np.load(file)["value"]
    file.unlink()
    train(path, "parts", "--resume")
    for key, value in student(tmp_path, "whole").items():
        assert torch.equal(value, student(tmp_path, "parts")[key]), key
    state = torch.load(tmp_path / "out" / "toy" / "parts" / "latest", weights_only=True)
    assert torch.equal(state["model"]["class_cost"], torch.from_numpy(cost))


def test_two_processes_follow_one(tmp_path):
    values = []
    for processes, size in ((0, 32), (2, 16)):
        folder = tmp_path / f"of {processes}"
        text = WKD + f"SOLVER: {{BATCH_SIZE: {size}}}\n"
        path = config(folder, text, epochs=1, student="BabyStudent")  # without batch norm
        done = command("--cfg", path, processes=processes)
        assert done.returncode == 0, done.stderr
        (file,) = kept(folder)
        state = torch.load(folder / "out" / "toy" / "run" / "latest", weights_only=True)
        rows = [row["train_loss_kd"] for row in state["history"]]
        values.append((np.load(file)["value"], rows, state["model"]["class_cost"]))
    np.testing.assert_allclose(values[0][0], values[1][0], rtol=0, atol=1e-5)
    assert values[0][1] == pytest.approx(values[1][1], rel=5e-5)
    assert torch.equal(values[1][2], torch.from_numpy(values[1][0]))


def test_parts_of_a_sum_get_theirs_and_a_moving_teacher_is_refused(tmp_path):
    distiller, _, data = built(config(tmp_path, method="WKD+AT"))
    want = by_hand(data, distiller.teacher)
    torch.testing.assert_close(distiller.parts["WKD"].class_cost, want, rtol=0, atol=1e-5)
    with (
        pytest.warns(UserWarning, match="teacher in train mode"),
        pytest.raises(UserError, match="class_cost depends on a teacher that does not change"),
    ):
        built(config(tmp_path, method="WKD+OFD"))


def test_images_are_the_first_of_each_class_and_each_class_needs_some():
    targets = torch.tensor([2, 0, 1, 0, 2, 1, 0, 2])
    assert choose_images(targets, 3, 5).tolist() == [[1, 3], [2, 5], [0, 4]]
    assert choose_images(targets, 3, 1).tolist() == [[1], [2], [0]]
    with pytest.raises(UserError, match="class 3 has no training images"):
        choose_images(targets, 4, 5)


def test_images_read_by_workers_and_features_that_are_not_there(tmp_path):
    path = config(tmp_path)
    first, cfg, data = built(path)
    by_workers, _, _ = built(path, "DATASET.LOADER", "workers", "DATASET.NUM_WORKERS", 0)
    torch.testing.assert_close(by_workers.class_cost, first.class_cost, rtol=0, atol=1e-5)
    chosen = choose_images(data.train.dataset.targets, 10, 2)
    with pytest.raises(UserError, match="needs 'nonsense', which the network does not return"):
        class_outputs(first.teacher, data, CPU, "nonsense", chosen)
    assert cfg.WKD.COST == "cka"


def test_a_teacher_that_gives_no_numbers_is_refused(tmp_path):
    path = config(tmp_path)
    weights = torch.load(tmp_path / TEACHER, weights_only=True)
    weights["model"]["fc.weight"].fill_(3e38)  # finite, but its logits are not
    torch.save(weights, tmp_path / TEACHER)
    with pytest.raises(UserError, match="class_cost is not finite; the teacher resnet8 gives"):
        built(path)


def test_the_teacher_cache_serves_it_too(tmp_path):
    path = config(tmp_path)
    train(path, "plain", "DATASET.AUGMENT", "none")
    train(path, "cached", "DISTILLER.TEACHER_CACHE", "memory", "DATASET.AUGMENT", "none")
    for key, value in student(tmp_path, "plain").items():
        other = student(tmp_path, "cached")[key]
        torch.testing.assert_close(value, other, rtol=1e-3, atol=1e-4)
