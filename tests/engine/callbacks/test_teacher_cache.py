"""The cache of teacher logits: the same training with fewer teacher passes, never wrong logits."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch
from support import run_script, saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.dataset import DATASETS, ImageSet, load_data
from mdistiller.dataset.memory.augment import Crop
from mdistiller.distillers import DISTILLERS, KD
from mdistiller.engine.callbacks.teacher_cache import TeacherCache
from mdistiller.engine.cfg import load_config
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.frozen_teacher.frozen import FrozenTeacher
from mdistiller.frozen_teacher.logit_store import HEADER, FileStore
from mdistiller.models import get_model_entry
from mdistiller.networks import compiling
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller
from mdistiller.run_folder.changes import differences
from mdistiller.run_folder.naming import experiment_name

FUSES = True
CPU = torch.device("cpu")


def config(folder, method="KD", epochs=2, text=""):
    """The toy config, of 9 views an image, with a teacher; returns its path."""
    folder.mkdir(exist_ok=True)
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    return write_config(folder, text, method, "resnet8", epochs, **teacher)


def train(folder, cache="none", *words, name="run", **settings):
    """Train; returns the rows of metrics.jsonl and the student's weights."""
    path = config(folder, **settings)
    words = ["EXPERIMENT.NAME", name, "DISTILLER.TEACHER_CACHE", cache, *map(str, words)]
    assert train_command.main(["--cfg", str(path), *words]) == 0
    run = folder / "out" / "toy" / name
    return rows_of(run), torch.load(run / "student_latest", weights_only=True)["model"]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def hits(rows):
    return [row["teacher_hits"] for row in rows]


def drawn_hits(path, epochs, kept=160, ranks=1, shared=True):
    """Percentages that a plain count over the drawn views gives."""
    loaders = []
    for rank in range(ranks):
        as_rank = {"rank": lambda rank=rank: rank, "world_size": lambda: ranks}
        with mock.patch.multiple("mdistiller.runtime", **as_rank):
            loaders.append(load_data(load_config(path), CPU).train)
    seen, found = [set() for _ in loaders], []
    for epoch in range(1, epochs + 1):
        drawn = []
        for loader in loaders:
            loader.set_epoch(epoch)
            drawn.append({(int(i), int(loader.views[i])) for _, _, index in loader for i in index})
        known = [
            len(pairs & (set().union(*seen) if shared else own))
            for pairs, own in zip(drawn, seen, strict=True)
        ]
        found.append(100 * sum(known) / 160)
        for own, pairs in zip(seen, drawn, strict=True):
            own |= {pair for pair in pairs if pair[0] < kept}
    return found


def assert_same(first, second, exact_epochs=0):
    """Two runs: losses to 1e-5, those of the first epochs to the bit, and the students."""
    (rows, state), (others, other_state) = first, second
    assert len(rows) == len(others)
    for number, (row, other) in enumerate(zip(rows, others, strict=True)):
        for key in ("train_loss", "train_loss_ce", "train_loss_kd", "test_loss"):
            rel = 0 if number < exact_epochs else 1e-5
            assert row[key] == pytest.approx(other[key], rel=rel, abs=0), (number, key)
    for key, value in state.items():
        torch.testing.assert_close(value, other_state[key], rtol=1e-4, atol=1e-5)


RUNS = {
    "KD": {"method": "KD"},
    "EMA, accumulation": {
        "method": "DIST",
        "text": "SOLVER:\n  LR: 0.005\n  BATCH_SIZE: 12\n  ACCUMULATE: 3\n  EMA: 0.9\n"
        "LSKD:\n  ENABLE: True\n",
    },
    "dot": {"method": "KD+NKD", "text": "SOLVER:\n  TRAINER: dot\n"},
}


@pytest.mark.parametrize("case", RUNS)
def test_training_is_the_same(tmp_path, case):
    """The first epoch, in which all is new, to the bit."""
    plain = train(tmp_path / "a", **RUNS[case])
    cached = train(tmp_path / "b", "memory", **RUNS[case])
    assert_same(cached, plain, exact_epochs=1)
    path = tmp_path / "b" / "toy.yaml"
    assert hits(cached[0]) == pytest.approx(drawn_hits(path, 2))
    assert hits(cached[0])[-1] > 5


def test_bf16_trains_the_same(tmp_path):
    text = "SOLVER:\n  AMP: bf16\nDATASET:\n  AUGMENT: none\n"
    plain, cached = train(tmp_path / "a", text=text), train(tmp_path / "b", "disk", text=text)
    assert hits(cached[0]) == [0, 100]
    for row, other in zip(cached[0], plain[0], strict=True):
        assert row["train_loss"] == pytest.approx(other["train_loss"], rel=2e-2)
    assert cached[0][0]["train_loss"] == plain[0][0]["train_loss"]


@pytest.fixture
def passes(monkeypatch):
    """Sizes of the batches that go through the teacher."""
    sizes, call = [], FrozenTeacher.__call__
    monkeypatch.setattr(
        FrozenTeacher, "__call__", lambda self, image: sizes.append(len(image)) or call(self, image)
    )
    return sizes


def test_a_second_run_finds_all_that_the_first_left(tmp_path, passes, capsys):
    """Another method, the same seed: no image goes through the teacher in any epoch."""
    first, _ = train(tmp_path, "disk")
    wanted = drawn_hits(tmp_path / "toy.yaml", 2)
    assert hits(first) == pytest.approx(wanted)
    assert f"saved {sum(wanted) / 2:.1f} % of the teacher's passes" in capsys.readouterr().out
    passes.clear()
    again, _ = train(tmp_path, "disk", name="again", method="DKD")
    assert hits(again) == [100, 100]
    assert passes == [2, 32, 32]  # when it is folded; then to compare it with the file
    out = capsys.readouterr().out
    assert "cached %" in out
    assert "saved 100.0 % of the teacher's passes" in out
    summary = json.loads((tmp_path / "out" / "toy" / "again" / "summary.json").read_text())
    assert summary["teacher_hits"] == 100


def test_another_seed_finds_its_share(tmp_path):
    train(tmp_path, "disk")
    path = tmp_path / "toy.yaml"
    rows, _ = train(tmp_path, "disk", "EXPERIMENT.SEED", 1, name="other")
    loaders = [load_data(load_config(path, ["EXPERIMENT.SEED", str(s)]), CPU).train for s in (0, 1)]
    seen, wanted = set(), []
    for loader in loaders:
        for epoch in (1, 2):
            loader.set_epoch(epoch)
            pairs = set(enumerate(loader.views.tolist()))
            wanted.append(100 * len(pairs & seen) / 160)
            seen |= pairs
    assert hits(rows) == pytest.approx(wanted[2:])


def test_what_is_missing_goes_through_the_teacher_in_full_batches(tmp_path, passes):
    rows, _ = train(tmp_path, "memory")
    missing = [round(160 * (1 - share / 100)) for share in hits(rows)]
    probing, of_epochs = passes[:3], passes[3:]
    assert probing == [2, 32, 32]
    assert of_epochs == [32] * sum(-(-count // 32) for count in missing)


@pytest.mark.parametrize("known", [7, 127, 159])
def test_logits_do_not_depend_on_what_else_is_known(tmp_path, known):
    """To the bit: so a run that goes on without what it knew ends in the same weights."""
    whole, part = cache_of(tmp_path / "a", "memory"), cache_of(tmp_path / "b", "memory")
    rows = [whole.rows(step) for step in range(5)]
    whole.finish()
    slots = part._slots[::-1][:known].copy()
    part._store.write(slots, whole._store.read(slots)[1])
    part.begin()
    assert all(torch.equal(part.rows(step), row) for step, row in enumerate(rows))


def test_the_limit_keeps_the_first_images(tmp_path, capsys):
    """9 views of 10 classes are 360 bytes an image in memory, 432 on disk."""
    for cache, gigabytes in (("memory", 36.1e-6), ("disk", 43.21e-6)):
        folder = tmp_path / cache
        rows, _ = train(folder, cache, "DISTILLER.TEACHER_CACHE_GB", gigabytes)
        assert hits(rows) == pytest.approx(drawn_hits(folder / "toy.yaml", 2, kept=100))
        assert "for the first 100 of 160 images" in capsys.readouterr().out
    (file,) = (tmp_path / "disk" / "out" / "teacher_cache").glob("*.logits")
    assert file.stat().st_size == HEADER + 43200 + 8 * 48  # those to compare


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = train(tmp_path / "a", "disk")
    train(tmp_path / "b", "disk", epochs=1)
    path = config(tmp_path / "b")
    words = ["EXPERIMENT.NAME", "run", "DISTILLER.TEACHER_CACHE", "disk"]
    assert train_command.main(["--cfg", str(path), *words, "--resume"]) == 0
    run = tmp_path / "b" / "out" / "toy" / "run"
    rows = rows_of(run)
    state = torch.load(run / "student_latest", weights_only=True)["model"]
    assert hits(rows) == hits(whole[0])
    assert_same((rows, state), whole)


def test_it_may_be_switched_on_by_a_resume_but_its_folder_names_no_run(tmp_path):
    cfg = load_config(config(tmp_path))
    other = load_config(config(tmp_path), ["DISTILLER.TEACHER_CACHE", "memory"])
    assert differences(cfg, other) == []
    assert experiment_name(cfg, ["DISTILLER.TEACHER_CACHE_DIR", "x"]) == experiment_name(cfg)


def test_a_compiled_teacher_gets_batches_of_one_size(tmp_path, monkeypatch, passes):
    torch.compiler.reset()
    monkeypatch.setattr(compiling, "BACKEND", "eager")
    text = "SOLVER:\n  COMPILE: True\n"
    cached = train(tmp_path / "a", "memory", text=text)
    assert hits(cached[0])[1] > 0
    assert set(passes[1:]) == {32}
    assert_same(cached, train(tmp_path / "b", text=text))


class Staged(KD):
    """KD behind a stage that trains the student by what the teacher's maps say."""

    def init_stages(self):
        from mdistiller.distillers.helpers.training.init_stage import InitPlan

        self.init = InitPlan(2, 0.01, [], 0.1)
        return {"init": self}

    def init_modules(self):
        return [self.student]

    def init_loss(self, student, teacher, target, **batch):
        assert "teacher_logits" not in batch
        return student.logits.square().mean() + teacher["feats"][0].mean()


def test_a_stage_before_the_main_one_runs_the_teacher(tmp_path, monkeypatch, passes):
    monkeypatch.setitem(DISTILLERS, "STAGED", Staged)
    text = "DATASET:\n  AUGMENT: none\n"
    rows, _ = train(tmp_path, "memory", method="STAGED", text=text)
    assert ["teacher_hits" in row for row in rows] == [False, False, True, True]
    assert hits(rows[2:]) == [0, 100]
    assert len(passes) == 1 + 2 * 5 + 2 + 5  # folding; the stage; probing; the first epoch


# Which file


def cache_of(folder, cache="disk", method="KD", text="", **changes):
    """The cache of a run, as the trainer has it, after the start of its first epoch."""
    words = [str(word) for pair in changes.items() for word in pair]
    path = config(folder, method, text=text)
    cfg = load_config(path, ["DISTILLER.TEACHER_CACHE", cache, *words])
    data = load_data(cfg, CPU)
    data.train.set_epoch(1)
    cache = TeacherCache(cfg, build_distiller(cfg, data, CPU).train(), data.train)
    cache.begin()
    return cache


def fill(cache):
    """An epoch of its own; the percentage of hits."""
    for step in range(len(cache.loader)):
        cache.rows(step)
    return cache.finish()["teacher_hits"]


def names(folder):
    return {path.name for path in (folder / "out" / "teacher_cache").glob("*.logits")}


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


# Refusals

REFUSED = {
    r"DISTILLER.TEACHER_CACHE disk: DISTILLER.TYPE FITNET reads more": {"method": "FITNET"},
    r"disk: DISTILLER.TYPE AT reads more of the teacher than logits": {"method": "KD+AT"},
    r"disk: DISTILLER.TYPE OFD has its teacher in train mode": {"method": "OFD"},
    r"disk: DISTILLER.TYPE MLKD reads more": {"method": "MLKD"},
    r"disk: DATASET.AUGMENT rotate_flip": {"text": "DATASET:\n  AUGMENT: rotate_flip\n"},
    r"disk: DATASET.ERASING, MIXUP and CUTMIX": {"text": "DATASET:\n  MIXUP: 0.2\n"},
    r"DATASET.LOADER memory; set it to none": {"text": "DATASET:\n  LOADER: workers\n"},
    r"TEACHER_CACHE must be one of none, memory, disk": {"text": "DISTILLER: {TEACHER_CACHE: y}\n"},
    r"TEACHER_CACHE_GB must be positive, got -1": {"text": "DISTILLER: {TEACHER_CACHE_GB: -1}\n"},
    r"TEACHER_CACHE_GB 1e-09 does not hold": {"text": "DISTILLER: {TEACHER_CACHE_GB: 1.0e-9}\n"},
    r"TRAINER own_step makes its steps itself": {"text": "SOLVER:\n  TRAINER: own_step\n"},
    r"TRAINER own_batch makes its inputs itself": {"text": "SOLVER:\n  TRAINER: own_batch\n"},
    r"TEACHER_CACHE disk: WATCHER watches its teacher": {"method": "WATCHER"},
    r"TEACHER_CACHE disk: the teacher is trained": {"method": "TUNER"},
    r"DISTILLER.TYPE CHANGED reads more": {"method": "CHANGED"},
    r"TEACHER_CACHE_DIR: .* cannot be used": {"text": "DISTILLER: {TEACHER_CACHE_DIR: FILE}\n"},
}


class OwnStep(BaseTrainer):
    def train_iter(self, data, epoch, train_meters):
        return super().train_iter(data, epoch, train_meters)


class OwnBatch(BaseTrainer):
    def batch_inputs(self, data, epoch):
        inputs = super().batch_inputs(data, epoch)
        return {**inputs, "image": inputs["image"].flip(3)}


class Watcher(KD):
    def __init__(self, student, teacher, cfg):
        super().__init__(student, teacher, cfg)
        teacher.layer1.register_forward_hook(lambda *call: None)


class Tuner(KD):
    """Trains the teacher's classifier along."""

    def get_learnable_parameters(self):
        return [*super().get_learnable_parameters(), *self.teacher.fc.parameters()]


class Changed(KD):
    """Reads what KD does not, and does not say whether it does."""

    def distill(self, student, teacher, target, **batch):
        return teacher["pooled_feat"].mean() + student.logits.mean()


@pytest.mark.parametrize("message", REFUSED)
def test_where_it_cannot_work_it_is_refused(tmp_path, message, monkeypatch, capsys):
    monkeypatch.setitem(trainer_dict, "own_step", OwnStep)
    monkeypatch.setitem(trainer_dict, "own_batch", OwnBatch)
    for cls in (Watcher, Tuner, Changed):
        monkeypatch.setitem(DISTILLERS, cls.__name__.upper(), cls)
    settings = dict(REFUSED[message])
    (tmp_path / "file").touch()
    settings["text"] = settings.get("text", "").replace("FILE", str(tmp_path / "file"))
    words = [] if "must be one of" in message else ["DISTILLER.TEACHER_CACHE", "disk"]
    path = config(tmp_path, **settings)
    assert train_command.main(["--cfg", str(path), *words]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert re.search(message, errors[0]), errors


def test_a_method_without_a_teacher_is_not_bothered(tmp_path):
    rows, _ = train(tmp_path, "disk", method="NONE", epochs=1)
    assert "teacher_hits" not in rows[0]
    assert not names(tmp_path)


def test_a_teacher_that_looks_at_its_batch_is_refused(tmp_path, monkeypatch):
    from mdistiller.frozen_teacher import frozen

    def by_batch(self, image):
        return self.net(image - image.mean(dim=0, keepdim=True))

    monkeypatch.setattr(frozen.FrozenTeacher, "__call__", by_batch)
    monkeypatch.setattr(frozen, "agree", lambda *outputs: True)
    with pytest.raises(UserError, match="depend on more than the image"):
        cache_of(tmp_path)


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
