"""Runs with an initialisation stage, on 160 real digits: files, weights, resume, processes."""

import json

import pytest
import torch
from support import command, same_state, saved_teacher, write_config
from test_original_code import OLD_TRAINER

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.distillers.AB import ab_loss
from mdistiller.distillers.FSP import fsp_loss
from mdistiller.engine.cfg import load_config
from mdistiller.engine.stages import STRIDE, Stage, stage_solver
from mdistiller.engine.trainer import BaseTrainer, InitTrainer, seed_everything
from mdistiller.registry import UserError
from mdistiller.run.build import build_distiller

CPU = torch.device("cpu")


def config(folder, method, text="", teacher="resnet8", init=2, **more):
    """A config in a new folder with short stages at a rate of 0.02; `text` goes above it all."""
    folder.mkdir(exist_ok=True)
    more = {"epochs": 2, "TEACHER_CKPT": str(saved_teacher(folder, teacher)), **more}
    path = write_config(folder, method=method, TEACHER=teacher, **more)
    stages = [f"{name}: {{INIT: {{EPOCHS: {init}, LR: 0.02}}}}" for name in method.split("+")]
    (folder / "stages.yaml").write_text("\n".join(stages))
    path.write_text(f"_BASE_: [toy_base.yaml, stages.yaml]\n{text}")
    return path


def train(path, *words):
    assert train_command.main(["--cfg", str(path), *map(str, words)]) == 0
    return path.parent / "out" / "toy" / "run"


def load(path):
    return torch.load(path, weights_only=True)


def rows(run):
    """Records of the stages before the main one, and of the main one."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        for key in ("time", "seconds", "images_per_second"):
            record.pop(key, None)
    return [r for r in records if "stage" in r], [r for r in records if "epoch" in r]


class StoppedError(Exception):
    """What a test stops a run by."""


def stop_at(monkeypatch, stage, epoch, step):
    """Have the next run stop before a step."""
    original = BaseTrainer.train_iter

    def train_iter(self, data, now, meters):
        if (self.stage, now, self.step) == (stage, epoch, step):
            monkeypatch.setattr(BaseTrainer, "train_iter", original)
            raise StoppedError
        return original(self, data, now, meters)

    monkeypatch.setattr(BaseTrainer, "train_iter", train_iter)


def after_init(path, monkeypatch):
    """The distiller's weights right after the initialisation, from `latest`; and its init part."""
    stop_at(monkeypatch, "", 1, 1)
    with pytest.raises(StoppedError):
        train_command.main(["--cfg", str(path)])
    state = load(path.parent / "out" / "toy" / "run" / "latest")
    return state["model"], state["init"]


def before(path):
    cfg = load_config(path)
    data = load_data(cfg, CPU)
    return build_distiller(cfg, data, CPU), data


def test_the_stage_is_logged_under_its_name_and_its_loss_falls(tmp_path):
    text = "FSP: {INIT: {LR_DECAY_STAGES: [2], LR_DECAY_RATE: 0.5}}\n"
    run = train(config(tmp_path, "FSP", text, init=3))
    init, main = rows(run)
    assert [(r["stage"], r["stage_epoch"]) for r in init] == [("init", 1), ("init", 2), ("init", 3)]
    assert [r["lr"] for r in init] == pytest.approx([0.02, 0.02, 0.01])
    assert init[2]["train_loss"] < init[1]["train_loss"] < init[0]["train_loss"]
    assert [r["epoch"] for r in main] == [1, 2]
    assert [r["lr"] for r in main] == pytest.approx([0.05, 0.005])
    assert all("test_acc" in r and "stage" not in r for r in main)
    lines = (run / "worklog.txt").read_text().splitlines()
    titles = [line for line in lines if "epoch:" in line]
    assert titles == ["init epoch: 1", "init epoch: 2", "init epoch: 3", "epoch: 1", "epoch: 2"]
    assert {"lr: 0.02", f"train_loss: {init[0]['train_loss']:.2f}"} <= set(lines)
    assert list((run / "train.events" / "init").glob("events*"))


@pytest.mark.parametrize("method", ["AB", "FT"])
def test_the_other_methods_learn_in_their_stage(tmp_path, method):
    teacher = "wrn_16_2" if method == "AB" else "resnet8"
    init, main = rows(train(config(tmp_path, method, teacher=teacher, init=4, epochs=1)))
    assert init[-1]["train_loss"] < init[0]["train_loss"]
    assert len(main) == 1


TRAINED = {
    "FSP": ("student.conv1.", "student.block"),
    "AB": ("student.conv1.", "student.block", "connectors."),
    "FT": ("paraphraser.",),
}


@pytest.mark.parametrize("method", TRAINED)
def test_what_the_stage_does_not_train_stays_to_the_bit(tmp_path, monkeypatch, method):
    """Buffers too: of a WRN's last batch norm, of the translator's, of the teacher's."""
    pair = {"student": "wrn_16_1", "teacher": "wrn_16_2" if method == "AB" else "wrn_16_1"}
    path = config(tmp_path, method, init=1, **pair)
    start = {k: v.clone() for k, v in before(path)[0].state_dict().items()}
    end, _ = after_init(path, monkeypatch)
    changed = {key for key in start if not torch.equal(start[key], end[key])}
    ours = {key for key in start if key.startswith(TRAINED[method])}
    assert changed == ours
    assert load(path.parent / f"{pair['teacher']}_10.pth")["model"].keys() == {
        key.removeprefix("teacher.") for key in start if key.startswith("teacher.")
    }


@pytest.mark.parametrize("method", ["FSP", "AB"])
def test_the_stage_is_that_of_a_plain_loop(tmp_path, monkeypatch, method):
    """Same order and views, SGD with the run's momentum and decay, the rate of the stage."""
    path = config(tmp_path, method)
    distiller, data = before(path)
    student = distiller.student
    params = [p for name, p in student.named_parameters() if not name.startswith("fc.")]
    optimizer = torch.optim.SGD(params, lr=0.02, momentum=0.9, weight_decay=0.0005)
    distiller.train()
    for epoch in (1, 2):
        data.train.set_epoch(STRIDE + epoch)
        for image, _, _ in data.train:
            outputs = student(image)[1], distiller.run_teacher(image).features
            loss = (
                fsp_loss(*(out["feats"] for out in outputs))
                if method == "FSP"
                else ab_loss(*(out["preact_feats"][1:] for out in outputs))
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    got, _ = after_init(path, monkeypatch)
    assert same_state(
        {f"student.{k}": v for k, v in student.state_dict().items()},
        {key: value for key, value in got.items() if key.startswith("student.")},
    )


def test_the_main_stage_starts_fresh_from_the_weights_of_the_first(tmp_path, monkeypatch):
    """No momentum carries over, and epoch 1 is that of any run: a plain loop repeats it."""
    path = config(tmp_path, "FSP", epochs=1)
    weights, _ = after_init(path, monkeypatch)
    distiller, data = before(path)
    distiller.load_state_dict(weights)
    student = distiller.student.train()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9, weight_decay=0.0005)
    data.train.set_epoch(1)
    for image, target, _ in data.train:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(student(image)[0], target).backward()
        optimizer.step()
    run = train(path, "--resume")
    got = load(run / "student_latest")["model"]
    for key, value in student.state_dict().items():
        torch.testing.assert_close(got[key], value, rtol=1e-5, atol=1e-7)


def test_one_stage_has_no_stage_and_the_same_files_as_ever(tmp_path):
    run = train(config(tmp_path, "FSP", "FSP: {LOSS: {FEAT_WEIGHT: 1.0}}\n", init=0))
    init, main = rows(run)
    assert init == []
    assert main[0]["train_loss_kd"] > 0
    assert not (run / "train.events" / "init").exists()
    keys = {"epoch", "model", "optimizer", "settings", "scheduler", "scaler"}
    keys |= {"best_acc", "best_epoch", "history", "log_sizes", "norm", "position", "skipped"}
    keys |= {"data", "best_score"}
    assert set(load(run / "latest")) == keys


STOPS = [("init-FT", 2, 2), ("init-FSP", 1, 1), ("", 1, 2)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return train(interrupted_config(tmp_path_factory.mktemp("whole")))


def interrupted_config(folder):
    """Two stages before the main one; batch norm and dropout."""
    text = "FT: {BATCH_NORM: both}\nSOLVER: {CLIP_GRAD_NORM: 5.0}\n"
    return config(folder, "FT+FSP", text, student="BabyTeacher", teacher="BabyTeacher")


@pytest.mark.parametrize("stop", STOPS, ids=str)
def test_a_stopped_run_resumes_to_the_bit(tmp_path, monkeypatch, whole, stop):
    path = interrupted_config(tmp_path)
    stop_at(monkeypatch, *stop)
    with pytest.raises(StoppedError):
        train_command.main(["--cfg", str(path)])
    run = train(path, "--resume")
    first, second = (load(folder / "latest") for folder in (whole, run))
    assert first["epoch"] == second["epoch"] == 2
    assert "init" not in second
    assert same_state(first["model"], second["model"])
    buffers = [
        [entry["momentum_buffer"] for entry in state["optimizer"]["state"].values()]
        for state in (first, second)
    ]
    assert all(map(torch.equal, *buffers))
    assert rows(whole) == rows(run)
    assert (whole / "worklog.txt").read_text() == (run / "worklog.txt").read_text()


def test_a_changed_stage_is_not_resumed(tmp_path, monkeypatch, capsys):
    path = config(tmp_path, "FSP")
    after_init(path, monkeypatch)
    words = ["--cfg", str(path), "--resume", "FSP.INIT.EPOCHS", "3", "EXPERIMENT.NAME", "run"]
    assert train_command.main(words) == 2
    assert "FSP.INIT.EPOCHS was 2, is now 3" in capsys.readouterr().err


def test_a_checkpoint_of_a_stage_that_is_not_there_is_refused(tmp_path):
    path = config(tmp_path, "FSP")
    distiller, data = before(path)
    main = BaseTrainer("x", distiller, data.train, data.val, load_config(path))
    main.init_state = {"stage": "init-AB", "epoch": 1}
    with pytest.raises(UserError, match="of the stage 'init-AB', which this config does not have"):
        main.initialize()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Records of FSP's stage under the plain trainer in full precision."""
    path = config(tmp_path_factory.mktemp("plain"), "FSP", init=1, epochs=1)
    return rows(train(path))[0]


@pytest.mark.parametrize("trainer", ["dot", "crd", "older"])
def test_every_trainer_has_the_stage(tmp_path, plain, trainer):
    """Its steps are plain ones, whatever the main stage's are."""
    (tmp_path / "old.py").write_text(OLD_TRAINER)
    path = config(tmp_path, "FSP", f"SOLVER: {{TRAINER: {trainer}}}\n", init=1, epochs=1)
    init, main = rows(train(path, "--import", tmp_path / "old.py"))
    assert init == plain
    assert len(main) == 1


@pytest.mark.parametrize("amp", ["bf16", pytest.param("fp16", marks=pytest.mark.slow)])
def test_mixed_precision_follows_full_precision(tmp_path, plain, amp):
    text = f"SOLVER: {{AMP: {amp}, CLIP_GRAD_NORM: 1.0e+4}}\n"
    half, _ = rows(train(config(tmp_path, "FSP", text, init=1, epochs=1)))
    assert half[0]["train_loss"] != plain[0]["train_loss"]
    assert half[0]["train_loss"] == pytest.approx(plain[0]["train_loss"], rel=0.05)


def test_clipping_bounds_the_step(tmp_path, monkeypatch):
    text = (
        "SOLVER: {BATCH_SIZE: 160, MOMENTUM: 0.0, WEIGHT_DECAY: 0.0, CLIP_GRAD_NORM: 0.01}\n"
        "AB: {INIT: {LR: 0.5}}\n"
    )
    path = config(tmp_path, "AB", text, init=1)
    start = {name: p.detach().clone() for name, p in before(path)[0].named_parameters()}
    end, _ = after_init(path, monkeypatch)
    moved = sum(((end[name] - value) ** 2).sum() for name, value in start.items()) ** 0.5
    assert moved.item() == pytest.approx(0.5 * 0.01, rel=1e-3)


def test_seeds_of_stages_epochs_and_processes_are_apart(tmp_path):
    path = config(tmp_path, "FSP")
    cfg = load_config(path)
    distiller, data = before(path)
    main = BaseTrainer("x", distiller, data.train, data.val, cfg)
    drawn = []
    for number in (0, 1, 2):
        groups = distiller.init_param_groups()
        stage = Stage("init", number, groups, stage_solver(distiller, "init", cfg.SOLVER))
        trainer = InitTrainer(main, stage) if number else main
        for epoch in (1, 2):
            trainer.seed_epoch(epoch)
            order = next(iter(data.train))[2].tolist()
            drawn.append((torch.rand(1).item(), tuple(order)))
    for process in (1, 2):  # of the main stage
        seed_everything(cfg.EXPERIMENT.SEED, 1, process)
        drawn.append((torch.rand(1).item(), process))
    assert len({number for number, _ in drawn}) == len({order for _, order in drawn}) == 8


def test_a_non_finite_loss_names_the_stage(tmp_path, capsys):
    path = config(tmp_path, "FSP")
    assert train_command.main(["--cfg", str(path), "FSP.INIT.LR", "1e18"]) == 2
    error = capsys.readouterr().err
    assert "non-finite loss in init epoch 1, step 2: loss_init=" in error
    assert error.count("\n") == 1


def test_two_processes_follow_one_with_the_doubled_batch(tmp_path):
    """153 images: the last batch splits unevenly. No batch norm, as its statistics would differ."""
    for name, batch, processes in (("one", 48, 0), ("two", 24, 2)):
        text = (
            f"SOLVER: {{BATCH_SIZE: {batch}, CLIP_GRAD_NORM: 5.0}}\n"
            "DATASET: {VAL_SPLIT: 7}\n"
            "FT: {BATCH_NORM: none, P: 2}\n"  # |d| has no gradient at 0 that rounding would keep
        )
        nets = {"student": "BabyStudent", "teacher": "BabyStudent"}
        path = config(tmp_path / name, "FT+FSP", text, epochs=1, **nets)
        done = command("--cfg", path, processes=processes)
        assert done.returncode == 0, done.stderr
    runs = [tmp_path / name / "out" / "toy" / "run" for name in ("one", "two")]
    records = ([*init, *main] for init, main in map(rows, runs))
    for one, two in zip(*records, strict=True):
        for key in ("train_loss", "train_loss_kd", "test_loss"):
            if key in one:
                assert two[key] == pytest.approx(one[key], rel=5e-5), key
    states = [load(run / "latest")["model"] for run in runs]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-4, atol=1e-4)
