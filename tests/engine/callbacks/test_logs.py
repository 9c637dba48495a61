import io
import json
import struct
import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from support import write_config
from tensorboardX.proto import event_pb2
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from mdistiller.cli import train as train_command
from mdistiller.dataset import ImageSet
from mdistiller.dataset.memory.loader import EvalLoader
from mdistiller.engine.callbacks.mistakes import SIDE, TEXT, mistakes_picture, worst_mistakes
from mdistiller.engine.cfg import load_config
from mdistiller.engine.hooks import Hook
from mdistiller.run.train import train


def scalars(folder):
    """(tag, step) -> value of all event files directly in a folder."""
    found = summaries(folder)
    return {(value.tag, step): value.simple_value for step, value in found}


def summaries(folder):
    """(step, value) of all event files directly in a folder."""
    found = []
    for path in sorted(folder.glob("events*")):
        raw = path.read_bytes()
        while raw:
            (length,) = struct.unpack("<Q", raw[:8])
            event = event_pb2.Event.FromString(raw[12 : 12 + length])
            raw = raw[16 + length :]
            found += [(event.step, value) for value in event.summary.value]
    return found


def test_tensorboard_has_the_originals_tags_by_epoch_and_curves_by_step(tmp_path):
    config = write_config(tmp_path, text="LOG: {TENSORBOARD_FREQ: 4, MISTAKES: 7}\n")
    assert train_command.main(["--cfg", str(config)]) == 0
    events = tmp_path / "out" / "toy" / "run" / "train.events"
    found = scalars(events)
    for tag in ("train_acc", "train_loss", "test_acc", "test_acc_top5", "test_loss"):
        assert {step for name, step in found if name == tag} == {1, 2}
    steps = scalars(events / "steps")
    assert {step for name, step in steps if name == "step/losses"} == {4, 8}  # 5 steps an epoch

    summary = json.loads((events.parent / "summary.json").read_text())
    assert found["final/best_acc", 2] == pytest.approx(summary["best_acc"])
    values = {value.tag: value for _, value in summaries(events)}
    picture = Image.open(io.BytesIO(values["mistakes"].image.encoded_image_string))
    assert picture.size == (6 * SIDE, 2 * (SIDE + TEXT))
    settings = HParamsPluginData.FromString(
        values["_hparams_/session_start_info"].metadata.plugin_data.content
    ).session_start_info.hparams
    assert settings["SOLVER.LR"].number_value == 0.05
    assert settings["DISTILLER.STUDENT"].string_value == "resnet8"
    assert not any(key.startswith("KD.") for key in settings)


def test_the_worst_mistakes_come_first():
    """A network that says class 0 of everything, surer the brighter the image is."""

    class Bright(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, image):
            light = image.mean((1, 2, 3))
            return torch.stack([3 + light, 0 * light, 0 * light], 1)

    images = torch.arange(6, dtype=torch.uint8).mul(40).view(6, 1, 1, 1).expand(6, 3, 4, 4)
    targets = torch.tensor([1, 0, 2, 1, 0, 2])
    data = ImageSet(images.contiguous(), targets, ["a", "b", "c"])
    loader = EvalLoader(data, 4, (0.5,) * 3, (0.25,) * 3, torch.device("cpu"))
    found = worst_mistakes(Bright(), loader, 3)
    assert [(pixels.max().item(), target, said) for _, pixels, target, said in found] == [
        (200, 2, 0),
        (120, 1, 0),
        (80, 2, 0),
    ]
    assert len(worst_mistakes(Bright(), loader, 9)) == 4
    assert mistakes_picture(Bright(), loader, 9).shape == (SIDE + TEXT, 6 * SIDE, 3)
    data.targets[:] = 0
    assert (
        mistakes_picture(Bright(), EvalLoader(data, 4, (0,), (1,), torch.device("cpu")), 9) is None
    )


@pytest.mark.parametrize("moment", ["init", "log"])
def test_wandb_trouble_never_stops_a_run(tmp_path, capsys, monkeypatch, moment):
    def fails(*args, **kwargs):
        raise ConnectionError("no network")

    run = types.SimpleNamespace(log=fails, summary={}, finish=lambda: None)
    fake = types.SimpleNamespace(init=fails if moment == "init" else lambda **kwargs: run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = write_config(tmp_path, text="LOG:\n  WANDB: True\n")
    assert train_command.main(["--cfg", str(config)]) == 0
    assert capsys.readouterr().out.count("wandb is off: ConnectionError: no network") == 1


def test_wandb_gets_the_originals_names(tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(
        log=lambda values, step: logged.append((step, values)), summary={}, finish=lambda: None
    )
    started = {}
    fake = types.SimpleNamespace(init=lambda **kwargs: started.update(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    text = "LOG:\n  WANDB: True\nEXPERIMENT:\n  TAG: a,b\n"
    assert train_command.main(["--cfg", str(write_config(tmp_path, text=text))]) == 0
    assert (started["project"], started["tags"]) == ("toy", ["a", "b"])
    assert [step for step, _ in logged] == [1, 2]
    assert {"current lr", "train_acc", "test_acc", "test_loss"} <= set(logged[0][1])
    assert run.summary["best_acc"] == max(values["test_acc"] for _, values in logged)
    assert started["config"]["SOLVER.EPOCHS"] == 2
    assert not any(key.startswith("DKD.") for key in started["config"])
    first = dict(started)
    path = str(write_config(tmp_path, text=text, epochs=3))
    assert train_command.main(["--cfg", path, "--resume"]) == 0
    assert (first["id"], "allow") == (started["id"], started["resume"])
    assert started["config"]["SOLVER.EPOCHS"] == 3
    assert logged[-1][0] == 3


def test_text_and_tensors_that_a_hook_records_end_no_run(tmp_path):
    class Notes(Hook):
        def after_epoch(self, trainer, epoch, record):
            record |= {"note": "fine", "test_loss": torch.tensor(0.5)}
            record |= {"hits": torch.tensor([1, 2]), "parts": [1, "a"], "half": np.float32(0.5)}

    train(load_config(write_config(tmp_path)), hooks=[Notes()])
    folder = tmp_path / "out" / "toy" / "run"
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    right = {"note": "fine", "hits": [1, 2], "parts": [1, "a"], "half": 0.5}
    assert {key: last[key] for key in right} == right
    tags = {name for name, _ in scalars(folder / "train.events")}
    assert "half" in tags
    assert not tags & {"note", "hits", "parts"}


def test_numbers_that_a_hook_replaces_by_text_stay(tmp_path, capsys):
    class Labels(Hook):
        def after_epoch(self, trainer, epoch, record):
            record |= {"lr": "warm", "train_loss": None, "test_acc": "good"}
            record.pop("seconds", None)

    class Last(Labels):
        def before_train(self, trainer):  # behind the one that evaluates
            trainer.hooks.insert(4, Labels())

    summary = train(load_config(write_config(tmp_path)), hooks=[Last()])
    rows = (tmp_path / "out" / "toy" / "run" / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(row) for row in rows]
    for record in records:
        numbers = [record[key] for key in ("lr", "train_loss", "test_acc", "seconds")]
        assert all(isinstance(number, float) for number in numbers)
    assert summary["last_acc"] == records[-1]["test_acc"]
    text = capsys.readouterr().out
    assert "the hook Last replaced the number 'lr': it stays 0.05" in text
    assert "the hook Labels replaced the number 'test_acc'" in text
