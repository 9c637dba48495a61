"""The cache of teacher logits: the same training with fewer teacher passes, never wrong logits."""

import json

import pytest
import torch
from teacher_cache_runs import CPU, cache_of, config, drawn_hits, hits, rows_of, train

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers import DISTILLERS, KD
from mdistiller.engine.cfg import load_config
from mdistiller.frozen_teacher.frozen import FrozenTeacher
from mdistiller.frozen_teacher.logit_store import HEADER
from mdistiller.networks import compiling
from mdistiller.run_folder.changes import differences
from mdistiller.run_folder.naming import experiment_name

FUSES = True


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
