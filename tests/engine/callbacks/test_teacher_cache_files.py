"""Files of teacher logits: what has one of its own, damage, sharing by processes."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from support import run_script, saved_teacher
from teacher_cache_runs import cache_of, config, drawn_hits, fill, hits, names, rows_of

from mdistiller.dataset import DATASETS, ImageSet
from mdistiller.dataset.memory.augment import Crop
from mdistiller.frozen_teacher.logit_store import HEADER, FileStore
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

FUSES = True

CHANGES = {
    "data": {"DATASET.TYPE": "toy"},
    "order of the data": {"DATASET.VAL_SPLIT": 10},
    "augmentation": {"DATASET.AUGMENT": "crop_flip"},
    "normalisation": {"DATASET.MEAN": "[.3, .3, .3]", "DATASET.STD": "[.4, .4, .41]"},
    "normalisation for the teacher": {"DISTILLER.TEACHER_NORM": "[[.3,.3,.2],[.4,.4,.4]]"},
    "dtype": {"DISTILLER.TEACHER_DTYPE": "bf16"},
    "AMP": {"SOLVER.AMP": "bf16"},
    "form": {"DISTILLER.TEACHER_FOLD": False},
    "limit": {"DISTILLER.TEACHER_CACHE_GB": 1e-5},
}
SAME = {
    "nothing": {},
    "seed": {"EXPERIMENT.SEED": 3},
    "method": {"DISTILLER.TYPE": "DIST", "DIST.TAU": 2},
    "student": {"DISTILLER.STUDENT": "resnet14"},
    "batch": {"SOLVER.BATCH_SIZE": 20},
    "tiny batch": {"SOLVER.BATCH_SIZE": 5},
    "larger limit": {"DISTILLER.TEACHER_CACHE_GB": 1},
}


@pytest.fixture(scope="module")
def left(tmp_path_factory):
    """The folder of a run that has filled its file."""
    folder = tmp_path_factory.mktemp("left")
    assert fill(cache_of(folder)) == 0
    return folder


@pytest.fixture
def filled(left, tmp_path):
    """A copy of it."""
    return shutil.copytree(left, tmp_path, dirs_exist_ok=True)


@pytest.mark.parametrize("change", [*CHANGES, *SAME])
def test_what_the_logits_depend_on_has_a_file_of_its_own(filled, tmp_path, change):
    before = names(tmp_path)
    assert len(before) == 1
    cache = cache_of(tmp_path, **{**CHANGES, **SAME}[change])
    assert (names(tmp_path) == before) == (change in SAME)
    if change != "seed":
        assert fill(cache) == (100 if change in SAME else 0)


def test_other_weights_have_a_file_of_their_own(filled, tmp_path):
    path = saved_teacher(tmp_path)
    saved = torch.load(path)
    saved["model"]["fc.bias"][0] += 1e-6
    torch.save(saved, tmp_path / "other.pth")
    cache_of(tmp_path, **{"DISTILLER.TEACHER_CKPT": tmp_path / "other.pth"})
    assert len(names(tmp_path)) == 2


def test_an_image_that_shows_no_view_counts_as_well(tmp_path, monkeypatch):
    """Of 300 images the last has a pixel changed; 256 are looked at for what the views do."""

    class Many(DATASETS["digits"]):
        pixel = 0

        def load(self, root, split, options):
            whole = super().load(root, split, options).select(torch.arange(300))
            images = whole.images[:, :, ::2, ::2].contiguous()
            images[299, 0, 0, 0] += self.pixel
            return ImageSet(images, whole.targets, whole.classes)

    monkeypatch.setitem(DATASETS, "many", Many)
    for Many.pixel in (0, 1):
        cache = cache_of(tmp_path, **{"DATASET.TYPE": "many"})
        assert fill(cache) == 0
    assert len(names(tmp_path)) == 2


def test_views_that_are_made_otherwise_have_a_file_of_their_own(filled, tmp_path, monkeypatch):
    """The same augmentation by name and size, with other pixels under its numbers."""
    apply = Crop.apply
    monkeypatch.setattr(Crop, "apply", lambda *args: apply(*args).flip(3))
    cache_of(tmp_path)
    assert len(names(tmp_path)) == 2


def test_a_teacher_whose_code_has_changed_starts_anew(filled, tmp_path, monkeypatch, capsys):
    """The same weights and names, and gives other logits."""
    network = type(get_model_entry("resnet8", "cifar")(num_classes=10))
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda self, x: forward(self, x.flip(3)))
    capsys.readouterr()
    assert fill(cache_of(tmp_path)) == 0
    assert "gives other outputs now" in capsys.readouterr().out
    assert len(names(tmp_path)) == 1


def test_a_damaged_file_is_said_and_made_anew(filled, tmp_path, capsys):
    (file,) = (tmp_path / "out" / "teacher_cache").glob("*.logits")
    file.write_bytes(file.read_bytes()[:-100])
    assert fill(cache_of(tmp_path)) == 0
    assert "was not this cache (it has" in capsys.readouterr().out
    cache = cache_of(tmp_path)
    os.truncate(file, HEADER)
    cache.begin()
    assert f"it has {HEADER} bytes" in capsys.readouterr().out
    assert fill(cache) == 0
    raw = bytearray(file.read_bytes())
    cache = cache_of(tmp_path)
    slot = int(cache._slots[5])
    raw[HEADER + slot * 48 + 3] ^= 4
    file.write_bytes(raw)
    assert fill(cache_of(tmp_path)) == pytest.approx(100 * 159 / 160)


def test_a_full_disk_ends_the_keeping_and_not_the_run(tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError("no space left")

    cache = cache_of(tmp_path)
    monkeypatch.setattr(FileStore, "write", full)
    assert fill(cache) == 0
    assert "no more outputs are stored: no space left" in capsys.readouterr().out
    cache.begin()
    assert fill(cache) == 0


@pytest.mark.parametrize("how", ["in place", "hidden", "hook"])
def test_a_teacher_that_changes_ends_the_run_and_nothing_is_kept(tmp_path, how):
    cache = cache_of(tmp_path)
    if how == "in place":
        cache.teacher.layer1[0].bn1.running_mean.add_(1)
    elif how == "hidden":
        cache.teacher.fc.bias.data += 1
    else:
        cache.teacher.register_forward_hook(lambda *call: None)
    with pytest.raises(UserError, match=r"TEACHER_CACHE disk: the teacher has changed"):
        fill(cache)
    assert fill(cache_of(tmp_path)) == 0


def test_what_a_method_writes_into_its_logits_is_not_kept(tmp_path):
    cache = cache_of(tmp_path)
    for step in range(len(cache.loader)):
        cache.rows(step).zero_()
    cache.finish()
    cache.begin()
    assert cache.rows(0).abs().min() > 0


# Several processes


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What `cache_processes.py` leaves."""
    folder = tmp_path_factory.mktemp("shared")
    config(folder, text="SOLVER:\n  BATCH_SIZE: 16\n")
    done = run_script(Path(__file__).with_name("cache_processes.py"), folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_runs_of_a_sweep_share_one_file(shared):
    """Two at once, and then a third, which finds all that they left. Every image has one view."""
    assert len(list((shared / "sweep" / "teacher_cache").glob("*.logits"))) == 1
    seen = {run.name: hits(rows_of(run)) for run in (shared / "sweep" / "toy").glob("*-seed=0")}
    assert seen.pop("TEMPERATURE=2-seed=0") == [100, 100]
    assert [rates[1:] for rates in seen.values()] == [[100]] * 2


@pytest.mark.parametrize(("cache", "memories"), [("disk", 1), ("memory", 2)])
def test_processes_of_a_run_share_a_file_but_not_their_memory(shared, cache, memories):
    found = hits(rows_of(shared / "out" / "toy" / cache))
    path = shared / "toy.yaml"
    assert found == pytest.approx(drawn_hits(path, 2, ranks=2, shared=memories == 1))
    assert found[1] > 0
