"""DISTILLER.PEERS: every peer is trained, evaluated, saved, resumed and reported by itself."""

import json

import pytest
import torch
from support import same_state, write_config

from mdistiller.cli import eval as eval_command
from mdistiller.cli import report as report_command
from mdistiller.cli import train as train_command
from mdistiller.export.card import accuracies
from mdistiller.export.source import from_run


def load(path):
    return torch.load(path, weights_only=True)


def run_of(folder, *words, method="DML", epochs=2, code=0, text="", **settings):
    folder.mkdir(exist_ok=True)
    path = write_config(folder, text, method, "resnet8", epochs, **settings)
    assert train_command.main(["--cfg", str(path), *words]) == code
    return folder / "out" / "toy" / "run"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A resnet8 beside another one and a resnet14, by DML, with held-out images."""
    text = "DATASET: {VAL_SPLIT: 20}\nSOLVER: {SCHEDULE: constant}\n"
    peers = ["resnet8", {"NAME": "resnet14"}]
    return run_of(tmp_path_factory.mktemp("peers") / "whole", text=text, PEERS=peers)


def test_each_peer_has_files_numbers_and_a_summary(run):
    states = [load(run / f"student_{name}latest") for name in ("", "peer1_", "peer2_")]
    assert all(state["data"]["num_classes"] == 10 for state in states)
    assert not same_state(states[0]["model"], states[1]["model"])
    assert len(states[2]["model"]) > len(states[1]["model"])
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for peer in ("peer1", "peer2"):
        accuracies = [row[f"{peer}_test_acc"] for row in rows]
        assert summary[f"{peer}_best_acc"] == max(accuracies)
        assert summary[f"{peer}_last_acc"] == accuracies[-1]
        assert 0 <= summary[f"{peer}_test_acc_best"] <= 100
        assert rows[-1][f"train_{peer}_loss"] > 0


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(run, tmp_path):
    text = "DATASET: {VAL_SPLIT: 20}\nSOLVER: {SCHEDULE: constant}\n"
    settings = {"text": text, "PEERS": ["resnet8", {"NAME": "resnet14"}]}
    run_of(tmp_path / "parts", epochs=1, **settings)
    parts = run_of(tmp_path / "parts", "--resume", **settings)
    first, second = (load(folder / "latest") for folder in (run, parts))
    assert same_state(first["model"], second["model"])
    assert first["peers_best"] == second["peers_best"]
    for name in ("student_peer1_best", "student_peer2_latest"):
        assert same_state(load(run / name)["model"], load(parts / name)["model"])


def test_eval_export_and_report_take_a_peer_by_its_name(run, tmp_path, capsys):
    out = tmp_path / "found.json"
    assert eval_command.main([str(run), "--checkpoint", "peer2_latest", "--json", str(out)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    (found,) = json.loads(out.read_text())["networks"]
    assert found["top1"] == pytest.approx(summary["peer2_test_acc_last"])
    student = from_run(run, "peer2_latest")
    assert student.name == "resnet14"
    assert summary["peer2_test_acc_last"] in [item.value for item in accuracies(student)]
    capsys.readouterr()
    assert report_command.main([str(run)]) == 0
    assert "resnet14" in capsys.readouterr().out.split("## Peers")[1].split("##")[0]
    assert eval_command.main([str(run), "--checkpoint", "peer3_latest"]) == 2


def test_kdcl_general_weights_the_networks_by_held_out_images(tmp_path, capsys):
    """After each epoch, also of a resumed run; refused without such images."""
    text = "DATASET: {VAL_SPLIT: 20}\nSOLVER: {SCHEDULE: constant}\nKDCL: {TARGET: general}\n"
    settings = {"method": "KDCL", "text": text}
    whole = run_of(tmp_path / "whole", **settings)
    run_of(tmp_path / "parts", epochs=1, **settings)
    parts = run_of(tmp_path / "parts", "--resume", **settings)
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    weights = [[row["kdcl_weight0"], row["kdcl_weight1"]] for row in rows]
    assert all(sum(pair) == pytest.approx(1, abs=1e-5) for pair in weights)
    assert weights[0] != weights[1] != [0.5, 0.5]
    first, second = (load(run / "latest")["model"] for run in (whole, parts))
    assert first["weights"].tolist() == weights[1]
    assert same_state(first, second)
    bare = {"method": "KDCL", "text": "KDCL: {TARGET: general}\n"}
    run_of(tmp_path / "bare", code=2, **bare)
    assert "KDCL.TARGET general weights the networks by" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "peers", "message"),
    [
        ("KD", ["resnet8"], "DISTILLER.PEERS: KD trains no networks beside the student"),
        ("DML", ["resnet8", "resnett"], "DISTILLER.PEERS: unknown CIFAR model 'resnett'"),
        ("DML", [{"CKPT": "file"}], "DISTILLER.PEERS[0] must be a network's name or a section"),
        ("DML", [{"NAME": "resnet8", "CKPT": "file"}], "unknown config key DISTILLER.PEERS[0]"),
    ],
)
def test_bad_peers(tmp_path, capsys, method, peers, message):
    run_of(tmp_path, method=method, code=2, PEERS=peers, TEACHER="resnet8")
    assert message in capsys.readouterr().err
