"""Whole runs of small detectors on drawn images: rounds, schedule, files, resume, processes."""

import json
import os
import shutil
import signal

import pytest
import torch
from support import command, same_state, unpadded
from synth import make_coco

from mdistiller.cli import report, train_detection
from mdistiller.detection.coco.evaluate import evaluate_detector
from mdistiller.detection.config import load_config
from mdistiller.detection.trainer import DetectionTrainer, IterationEpochs, build_schedule
from mdistiller.registry import UserError

SMALL = {"ARCH": "mobilenet_v2", "CHANNELS": 16, "NORM": "batch", "FREEZE_AT": 0, "ROI_SAMPLES": 16}
RUN = {
    **{f"DETECTION.{role}.{key}": v for role in ("STUDENT", "TEACHER") for key, v in SMALL.items()},
    "DETECTION.DATA.MIN_SIZES": [64, 80],
    "DETECTION.DATA.TEST_MIN_SIZE": 64,
    "DETECTION.REVIEWKD.MID_CHANNELS": 8,
    "DETECTION.EVALUATE_TEACHER": False,
    "DATASET.NUM_WORKERS": 0,
    "SOLVER.MAX_ITER": 4,
    "SOLVER.EVAL_PERIOD": 2,
    "SOLVER.WARMUP_ITERS": 2,
    "SOLVER.STEPS": [3],
    "DEVICE": "cpu",
}


def spell(settings):
    """Settings as command words."""
    return [str(word) for pair in settings.items() for word in pair]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """Command words for runs that take seconds; the teacher is such a run."""
    folder = tmp_path_factory.mktemp("detection")
    train = make_coco(folder, 6, size=(64, 96))
    val = make_coco(folder, 2, split="val", size=(64, 96), crowds=0)
    common = [*train.keys(), *val.keys("val"), *spell(RUN), "LOG.PREFIX", str(folder)]
    short = {"SOLVER.MAX_ITER": 1, "SOLVER.EVAL_PERIOD": 1, "EXPERIMENT.NAME": "teacher"}
    assert train_detection.main([*common, *spell(short)]) == 0
    teacher = folder / "detection" / "teacher" / "student_best"
    return [*common, "DETECTION.TEACHER.WEIGHTS", str(teacher), "DISTILLER.TYPE", "DKD+REVIEWKD"]


def test_a_report_says_what_is_compared(run, capsys):
    assert report.main([str(run)]) == 0
    text = unpadded(capsys.readouterr().out)
    assert "| last epoch, test box AP % |" in text
    assert "top-1" not in text


def load(path):
    return torch.load(path, weights_only=True)


def metrics(run):
    times = {"time", "seconds", "images_per_second"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: v for key, v in row.items() if key not in times} for row in rows]


@pytest.fixture(scope="module")
def run(words, tmp_path_factory):
    """The folder of an undisturbed run."""
    folder = tmp_path_factory.mktemp("whole")
    assert train_detection.main([*words, "LOG.PREFIX", str(folder), "EXPERIMENT.NAME", "run"]) == 0
    return folder / "detection" / "run"


def test_a_run_leaves_what_every_run_leaves(run):
    names = {path.name for path in run.iterdir()}
    assert {"latest", "best", "student_latest", "student_best", "metrics.jsonl"} <= names
    assert {"worklog.txt", "train.events", "config.yaml", "run.json", "summary.json"} <= names
    rows = metrics(run)
    assert [row["epoch"] for row in rows] == [1, 2]
    assert [row["lr"] for row in rows] == pytest.approx([0.005005, 0.001])  # of the last iteration
    assert {"train_loss_dkd", "train_loss_review", "train_loss_classifier"} <= set(rows[0])
    assert rows[0]["train_loss"] == pytest.approx(
        sum(value for key, value in rows[0].items() if key.startswith("train_loss_"))
    )
    summary = json.loads((run / "summary.json").read_text())
    assert summary["best_acc"] == max(row["test_bbox/AP"] for row in rows)
    assert "test_bbox/AP50: " in (run / "worklog.txt").read_text()
    assert json.loads((run / "run.json").read_text())["data"]["classes"][1:] == [
        "disc",
        "box",
        "triangle",
    ]
    assert "resnet32" not in (run / "config.yaml").read_text()  # nothing of classification's


def test_no_file_holds_the_teacher(run):
    keys = {key.split(".")[0] for key in load(run / "latest")["model"]}
    assert keys == {"student", "methods"}
    student = load(run / "student_latest")
    assert student["detector"]["arch"] == "mobilenet_v2"
    assert student["detector"]["num_classes"] == 4
    own = {f"student.{key}": value for key, value in student["model"].items()}
    latest = load(run / "latest")["model"]
    assert same_state(own, {key: v for key, v in latest.items() if key.startswith("student.")})


def stop_once(monkeypatch, step):
    """SIGTERM comes in the first run's step of that number."""
    original = DetectionTrainer.optimize

    def optimize(self, losses):
        if self.global_step == step:
            monkeypatch.setattr(DetectionTrainer, "optimize", original)
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, losses)

    monkeypatch.setattr(DetectionTrainer, "optimize", optimize)


def test_a_signal_ends_a_run_that_goes_on_to_the_same_bits(
    words, run, tmp_path, monkeypatch, capsys
):
    """Batches are of one orientation, so images are waiting for others when the run is stopped."""
    stop_once(monkeypatch, 3)
    again = [*words, "--resume", "auto", "LOG.PREFIX", str(tmp_path), "EXPERIMENT.NAME", "run"]
    assert train_detection.main(again) == 75
    assert train_detection.main(again) == 0
    assert ", within epoch" in capsys.readouterr().out
    resumed = tmp_path / "detection" / "run"
    first, second = (load(folder / "latest") for folder in (run, resumed))
    assert same_state(first["model"], second["model"])
    assert first["batches"] == second["batches"]
    assert first["batches"]["stream"]["waiting"] != [[], []]
    assert metrics(run) == metrics(resumed)


def test_a_mask_rcnn_of_detectron2s_kind_trains_goes_on_and_is_measured(
    words, tmp_path, monkeypatch
):
    """Beside a teacher of torchvision's kind, without masks, that is measured once a run."""
    measured = []

    def measure(*args):
        measured.append(evaluate_detector(*args))
        return measured[-1]

    monkeypatch.setattr("mdistiller.detection.run.evaluate_detector", measure)
    more = {"DETECTION.STUDENT.FLAVOUR": "d2", "DETECTION.STUDENT.MASK": True}
    more |= {"DETECTION.EVALUATE_TEACHER": True, "LOG.PREFIX": tmp_path}
    more |= {"SOLVER.MAX_ITER": 2, "SOLVER.STEPS": [], "DISTILLER.TYPE": "DKD"}
    val = make_coco(tmp_path, 1, split="val", size=(64, 96), empty=0, crowds=0)
    common = [*words, "--resume", "auto", *val.keys("val"), *spell(more), "EXPERIMENT.NAME"]
    stop_once(monkeypatch, 1)
    assert train_detection.main([*common, "stopped"]) == 75
    assert train_detection.main([*common, "stopped"]) == 0
    stopped = tmp_path / "detection" / "stopped"
    assert len(measured) == 1
    summary = json.loads((stopped / "summary.json").read_text())
    assert summary["teacher_acc"] == measured[0]["bbox/AP"]
    facts = load(stopped / "student_latest")["detector"]
    assert (facts["flavour"], facts["mask"]) == ("d2", True)
    (row,) = metrics(stopped)
    assert 0 < row["train_loss_mask"] < 2
    assert {"test_bbox/AP", "test_segm/AP", "test_segm/AR100"} <= row.keys()


def rates(words, accumulate=1):
    """Learning rates of the iterations of a run, as the schedule gives them."""
    cfg = load_config("", [*words.split(), "SOLVER.LR", "0.1", "SOLVER.ACCUMULATE", accumulate])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.SOLVER.LR)
    schedule, found = build_schedule(optimizer, cfg.SOLVER), []
    for _ in range(cfg.SOLVER.MAX_ITER):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_the_rate_warms_up_and_falls_by_iterations():
    warm = "SOLVER.MAX_ITER 8 SOLVER.STEPS [5,7] SOLVER.WARMUP_ITERS 4 SOLVER.WARMUP_FACTOR 0.2"
    expected = [0.02, 0.04, 0.06, 0.08, 0.1, 0.01, 0.01, 0.001]
    assert rates(warm) == pytest.approx(expected)
    flat = rates("SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 0 SOLVER.SCHEDULE constant")
    assert flat == pytest.approx([0.1] * 3)
    half = rates("SOLVER.MAX_ITER 3 SOLVER.WARMUP_ITERS 0 SOLVER.SCHEDULE cosine")
    assert half == pytest.approx([0.1, 0.075, 0.025])


@pytest.fixture
def stepped(monkeypatch):
    """Learning rate of each micro-batch, as the optimizer has it."""
    found, original = [], DetectionTrainer.optimize

    def optimize(self, losses):
        original(self, losses)
        found.append(self.optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(DetectionTrainer, "optimize", optimize)
    monkeypatch.setattr(DetectionTrainer, "own_steps", False)
    return found


def test_micro_batches_share_a_step_and_its_rate(words, stepped, tmp_path):
    more = {"SOLVER.ACCUMULATE": 2, "SOLVER.AMP": "bf16", "SOLVER.LR": 0.1, "SOLVER.MAX_ITER": 3}
    more |= {"SOLVER.STEPS": [2], "SOLVER.WARMUP_FACTOR": 0.5, "LOG.PREFIX": tmp_path}
    more |= {"EXPERIMENT.NAME": "run", "SOLVER.BATCH_SIZE": 1}
    assert train_detection.main([*words, *spell(more)]) == 0
    assert stepped == pytest.approx([0.05, 0.05, 0.075, 0.075, 0.01, 0.01])
    summary = json.loads((tmp_path / "detection" / "run" / "summary.json").read_text())
    seen = summary["images_per_second"] * summary["seconds"]
    assert seen == pytest.approx(6)  # though a full round, of which there are two, has 4


def test_a_changed_schedule_holds_from_where_the_run_is(words, run, stepped, tmp_path, capsys):
    shutil.copytree(run, tmp_path / "detection" / "run")
    where = ["LOG.PREFIX", str(tmp_path), "EXPERIMENT.NAME", "run", "--resume"]
    more = {"SOLVER.MAX_ITER": 6, "SOLVER.LR": 0.02, "SOLVER.STEPS": [5]}
    assert train_detection.main([*words, *where, *spell(more)]) == 2
    folder = str(tmp_path / "detection" / "run")  # which is enough
    assert train_detection.main(["--resume", folder, "--allow-changes", *spell(more)]) == 0
    assert stepped == pytest.approx([0.02, 0.002])
    longer = {**more, "SOLVER.MAX_ITER": 12, "SOLVER.EVAL_PERIOD": 3}
    capsys.readouterr()
    assert train_detection.main([*words, *where, "--allow-changes", *spell(longer)]) == 2
    assert "keep SOLVER.EVAL_PERIOD, ACCUMULATE as they were" in capsys.readouterr().err


class Numbers:
    """A stream of whole numbers in place of batches."""

    batch_size, position = 2, 0

    def __iter__(self):
        while True:
            self.position += 1
            yield self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_rounds_cut_the_stream_without_a_loss():
    rounds = IterationEpochs(Numbers(), period=3, total=7)
    seen = []
    for epoch in (1, 2, 3):
        rounds.set_epoch(epoch)
        assert len(rounds.dataset) == 2 * len(rounds)
        seen.append(list(rounds))
    assert seen == [[1, 2, 3], [4, 5, 6], [7]]


def test_rounds_go_on_where_they_were():
    rounds = IterationEpochs(Numbers(), period=3, total=7)
    rounds.set_epoch(1)
    assert list(rounds) == [1, 2, 3]
    rounds.set_epoch(2)
    assert next(iter(rounds)) == 4
    other = IterationEpochs(Numbers(), period=3, total=7)
    other.load_state_dict(rounds.state_dict())
    other.set_epoch(2)
    assert list(other) == [5, 6]
    other.set_epoch(3)
    assert list(other) == [7]


PATCH = """
import torch
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

def first(self, matched):
    found = []
    for one in matched:
        positive, negative = (one >= 1).nonzero()[:, 0], (one == 0).nonzero()[:, 0]
        chosen = positive[: int(self.batch_size_per_image * self.positive_fraction)]
        rest = negative[: self.batch_size_per_image - len(chosen)]
        masks = [torch.zeros_like(one, dtype=torch.uint8) for _ in range(2)]
        masks[0][chosen], masks[1][rest] = 1, 1
        found.append(masks)
    return tuple(list(part) for part in zip(*found))

BalancedPositiveNegativeSampler.__call__ = first  # by chance, each process has its own
"""


def test_two_processes_follow_one_with_the_doubled_batch(words, tmp_path):
    """Two steps of two micro-batches; batch norms by the statistics of both processes, regions
    sampled without chance.
    """
    (tmp_path / "patch.py").write_text(PATCH)
    changes = {
        "DETECTION.STUDENT.ARCH": "resnet18",  # fewer norms, so less rounding
        "EXPERIMENT.SEED": 2,
        "SOLVER.SYNC_BN": True,
        "SOLVER.MAX_ITER": 2,
        "SOLVER.ACCUMULATE": 2,
        "SOLVER.WARMUP_ITERS": 0,
        "DETECTION.DATA.MIN_SIZES": [64],
        "LOG.PREFIX": tmp_path,
    }
    common = [*words, "--import", str(tmp_path / "patch.py"), *spell(changes)]
    one, two = (
        [*common, *spell({"SOLVER.BATCH_SIZE": size, "EXPERIMENT.NAME": name})]
        for size, name in ((2, "one"), (1, "two"))
    )
    assert train_detection.main(one) == 0
    done = command(*two, module="train_detection", processes=2)
    assert done.returncode == 0, done.stderr
    rows = [metrics(tmp_path / "detection" / name)[0] for name in ("one", "two")]
    for key, value in rows[0].items():
        assert rows[1][key] == pytest.approx(value, rel=2e-4, abs=1e-6), key
    states = [load(tmp_path / "detection" / name / "latest") for name in ("one", "two")]
    assert states[0]["batches"] == states[1]["batches"]
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(states[1]["model"][key], value, rtol=1e-3, atol=1e-4)


BAD_SETTINGS = [
    ("SOLVER.EPOCHS 12", "SOLVER.EPOCHS 12: detection counts iterations; set SOLVER.MAX_ITER"),
    ("SOLVER.STEPS [9,3]", "SOLVER.STEPS must be rising iterations from 1 on"),
    ("SOLVER.SCHEDULE plateau", "SOLVER.SCHEDULE must be one of multistep, cosine, constant"),
    ("SOLVER.EMA 0.9", "SOLVER.EMA must be one of 0.0 in detection"),
    ("SOLVER.WARMUP_FACTOR 0", "SOLVER.WARMUP_FACTOR must be in (0, 1]"),
    ("SOLVER.EVAL_PERIOD 0", "SOLVER.EVAL_PERIOD must be at least 1"),
    ("SOLVER.LR_DECAY_STAGES [3]", "unknown config key SOLVER.LR_DECAY_STAGES"),
    ("DKD.BETA 8", "unknown config key DKD"),
    ("DETECTION.DKD.BTA 8", "did you mean 'DETECTION.DKD.BETA'"),
    ("DETECTION.EVALUATOR torchmetrics", "DETECTION.EVALUATOR must be one of pycocotools"),
    ("DISTILLER.TYPE CRD", "DISTILLER.TYPE CRD cannot train a detector"),
    ("SOLVER.TRAINER base", "SOLVER.TRAINER base is for classification"),
]


def test_a_bad_setting_is_a_line(words, capsys):
    wrong = []
    for changes, message in BAD_SETTINGS:
        code = train_detection.main([*words, *changes.split()])
        line = capsys.readouterr().err.strip().splitlines()[-1]
        if code != 2 or not line.startswith("error: ") or message not in line:
            wrong.append(f"{changes}: {line}")
    assert wrong == []


def test_a_config_with_epochs_that_fit_is_taken():
    """As a run's own config.yaml is."""
    assert load_config("", ["SOLVER.EPOCHS", "18"]).SOLVER.EPOCHS == 18
    with pytest.raises(UserError, match="counts iterations"):
        load_config("", ["SOLVER.EPOCHS", "17"])


def test_one_small_picture_a_batch_ends_before_the_first_step(words, tmp_path, capsys):
    train = make_coco(tmp_path, 2, size=(64, 64))
    more = {"DETECTION.DATA.MIN_SIZES": [64], "SOLVER.BATCH_SIZE": 1, "LOG.PREFIX": tmp_path}
    assert train_detection.main([*words, *train.keys(), *spell(more)]) == 2
    assert "SOLVER.BATCH_SIZE 1: Expected more than 1 value" in capsys.readouterr().err
