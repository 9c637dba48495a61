"""RADIO: the losses, PHI-S, and the standardisation that a run computes."""

import math

import pytest
import torch
from support import golden_values, image_folder, saved_teacher

from mdistiller.dataset import load_data
from mdistiller.distillers.helpers.losses.phi_s import (
    equalizing_rotation,
    hadamard,
    phi_s,
    standardized,
)
from mdistiller.distillers.RADIO import POSITIONS, cosine_loss, map_loss
from mdistiller.engine.cfg import default_config
from mdistiller.run.build import build_distiller


def cosine(x, y):
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.hypot(*x) / math.hypot(*y)


def test_the_losses_are_the_papers_sums():
    student, teacher = golden_values((2, 3, 3, 4), 1), golden_values((2, 3, 3, 4), 2)
    pairs = list(zip(student.reshape(-1, 4).tolist(), teacher.reshape(-1, 4).tolist(), strict=True))
    angle = sum(1 - cosine(x, y) for x, y in pairs) / len(pairs)
    gaps = [abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True)]
    smooth = sum(d * d / 2 if d < 1 else d - 0.5 for d in gaps) / len(gaps)
    assert max(gaps) > 1
    assert cosine_loss(student, teacher).item() == pytest.approx(angle, rel=1e-12)
    both = map_loss(student, teacher, 0.9, 0.1)
    assert both.item() == pytest.approx(0.9 * angle + 0.1 * smooth, rel=1e-12)


def test_the_students_map_takes_the_size_of_the_teachers():
    ramp = torch.linspace(0, 3, 4).expand(1, 4, 4)[..., None]
    coarse = torch.tensor([0.5, 2.5]).expand(1, 2, 2)[..., None]  # its averages over 2 x 2
    assert map_loss(ramp, coarse, 0, 1).item() == 0
    assert map_loss(coarse, ramp, 0, 1).item() > 0


@pytest.mark.parametrize("size", [1, 2, 12, 20, 24, 28, 36, 192, 384, 1152])
def test_hadamard_matrices(size):
    matrix = hadamard(size)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(size, dtype=torch.float64))
    assert torch.allclose(matrix.abs(), torch.tensor(size**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("width", [12, 10])
def test_phi_s_gives_every_dimension_the_same_variance_and_keeps_the_shape(width):
    """With a Hadamard matrix, and where there is none."""
    assert (hadamard(width) is None) == (width == 10)
    rows = golden_values((50, width), 3) @ golden_values((width, width), 4) + 5
    rows[:, -1] = 7.0  # of less than full rank
    made = standardized(rows, phi_s(rows))
    assert made.mean(0).abs().max() < 1e-9
    torch.testing.assert_close(made.var(0, correction=0), torch.ones_like(made[0]))
    ratio = torch.pdist(made) / torch.pdist(rows)
    assert ratio.max() / ratio.min() < 1 + 1e-9
    assert not standardized(rows[:1], phi_s(rows[:1].expand(4, -1))).any()  # constant


def test_the_other_rotation_equalises_any_variances():
    for variances in ([3.0], [1.0, 0.0, 0.0], [5.0, 5.0, 5.0], [9.0, 1.0, 4.0, 0.0, 2.0]):
        rotation = equalizing_rotation(torch.tensor(variances))
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(len(variances)).double())
        turned = rotation @ torch.tensor(variances).double().diag() @ rotation.T
        assert turned.diagonal() == pytest.approx([sum(variances) / len(variances)] * len(turned))


def test_a_run_standardises_each_teacher_by_its_training_images(tmp_path):
    root = image_folder(tmp_path / "pictures", size=16)
    (tmp_path / "second").mkdir()
    files = [saved_teacher(tmp_path), saved_teacher(tmp_path / "second", seed=2)]
    cfg = default_config()
    settings = {
        "DEVICE": "cpu",
        "DATASET.TYPE": "images",
        "DATASET.ROOT": str(root),
        "DISTILLER.TYPE": "RADIO",
        "DISTILLER.STUDENT": "resnet8",
        "DISTILLER.TEACHERS": [{"NAME": "resnet8", "CKPT": str(file)} for file in files],
        "SOLVER.BATCH_SIZE": 8,
        "LOG.PREFIX": str(tmp_path),
        "RADIO.COSINE": 0.7,
        "RADIO.SMOOTH_L1": 0.2,
        "RADIO.LOSS.SUMMARY_WEIGHT": 2,
        "RADIO.LOSS.MAP_WEIGHT": 3,
    }
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    data = load_data(cfg)
    distiller = build_distiller(cfg, data, torch.device("cpu")).train()
    images = torch.cat([images for images, _ in data.plain()])
    outputs = ("pooled_feat", "final_map")
    for radio in distiller.parts.values():
        student, teacher = radio.run_student(images), radio.run_teacher(images)
        assert teacher["final_map"][0, 0].numel() == POSITIONS  # all positions count
        vectors, maps = (radio.matched(name, student[name], teacher[name]) for name in outputs)
        for made in (vectors[1], maps[1].reshape(-1, 64)):
            assert made.mean(0).abs().max() < 1e-3
            torch.testing.assert_close(made.var(0, correction=0), torch.ones(64), rtol=0, atol=2e-2)
        wanted = 2 * cosine_loss(*vectors) + 3 * map_loss(*maps, 0.7, 0.2)
        torch.testing.assert_close(
            radio.distill(student, teacher, torch.zeros(len(images))), wanted
        )
