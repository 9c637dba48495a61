"""Checks that need a CUDA device: `pytest -m gpu`. Elsewhere they are left out."""

import json

import pytest
import torch
from support import saved_teacher, write_config

from benchmarks.gpu.sync import waits
from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.engine.cfg import load_config
from mdistiller.run.build import build_distiller

pytestmark = pytest.mark.gpu


def settings(folder):
    return {
        "method": "DKD",
        "TEACHER": "resnet8",
        "TEACHER_CKPT": str(saved_teacher(folder)),
        "epochs": 2,
    }


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_run_on_the_gpu_follows_the_cpu(tmp_path, amp):
    losses = {}
    for device in ("cpu", "cuda"):
        (tmp_path / device).mkdir()
        text = f"DEVICE: {device}\nSOLVER:\n  AMP: {amp if device == 'cuda' else 'none'}\n"
        config = write_config(tmp_path / device, text=text, **settings(tmp_path))
        assert train_command.main(["--cfg", str(config)]) == 0
        log = tmp_path / device / "out" / "toy" / "run" / "metrics.jsonl"
        losses[device] = [json.loads(line)["train_loss"] for line in log.read_text().splitlines()]
    assert losses["cuda"] == pytest.approx(losses["cpu"], rel=0.02 if amp == "none" else 0.1)


CACHED = "AMP: none\nDISTILLER:\n  TEACHER_CACHE: memory"


@pytest.mark.parametrize("solver", ["AMP: none", "AMP: bf16", "ACCUMULATE: 2\n  EMA: 0.9", CACHED])
def test_no_step_waits_for_the_gpu(tmp_path, solver):
    config = write_config(
        tmp_path, text=f"DEVICE: cuda\nSOLVER:\n  {solver}\n", **settings(tmp_path)
    )
    cfg = load_config(config)
    device = torch.device("cuda")
    data = load_data(cfg, device)
    distiller = build_distiller(cfg, data, device)
    assert waits(cfg, distiller, data) == {"error": "", "calls": {}, "unread": 6}


@pytest.mark.parametrize("solver", ["TYPE: SGD", "TYPE: AdamW\n  LR: 0.001", "AMP: bf16"])
def test_recorded_steps_are_the_usual_ones(tmp_path, solver):
    """Five steps an epoch: three before the recording, one compared, one replayed."""
    losses = {}
    for graphs in (False, True):
        place = tmp_path / str(graphs)
        place.mkdir()
        text = f"DEVICE: cuda\nSOLVER:\n  {solver}\n  CUDA_GRAPHS: {graphs}\n"
        config = write_config(place, text=text, **settings(tmp_path))
        assert train_command.main(["--cfg", str(config)]) == 0
        log = place / "out" / "toy" / "run" / "metrics.jsonl"
        losses[graphs] = [json.loads(line)["train_loss"] for line in log.read_text().splitlines()]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)
