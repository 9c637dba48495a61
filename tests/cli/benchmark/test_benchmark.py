"""The benchmark command: its figures, its files, its refusals."""

import json
import sys

import pytest
import torch

from benchmarks import loaders, memory, photographs
from benchmarks import main as benchmark
from mdistiller.cli.support import timing


def test_losses_are_timed_against_the_textbook(tmp_path, capsys):
    path = tmp_path / "losses.json"
    words = ["losses", "--device", "cpu", "--batch", "4", "--rounds", "1", "--only", "KD", "NST"]
    assert benchmark.main([*words, "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip("- ") for line in printed[1:]] == ["loss", "", "KD", "NST"]
    report = json.loads(path.read_text())
    assert report["device"] == "cpu"
    assert report["batch"] == 4
    assert {"hardware", "torch", "threads"} <= set(report)
    for row in report["losses"]:
        assert row["ratio"] == pytest.approx(row["textbook"]["ms"] / row["ours"]["ms"])
        assert 0 < row["ours"]["low"] <= row["ours"]["ms"] <= row["ours"]["high"]
    assert report["losses"][1]["ratio"] > 5  # 60 and more at batch 64: the two are not mixed up


def test_loaders_are_timed_against_torchvisions(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loaders, "IMAGES", 26)
    path = tmp_path / "loader.json"
    words = ["loader", "--device", "cpu", "--batch", "8", "--rounds", "1", "--workers", "1"]
    assert benchmark.main([*words, "--json", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    names = [line.split("|")[1].strip("- ") for line in printed[1:]]
    assert names == ["loader", "", "ours", "torchvision"]
    report = json.loads(path.read_text())
    assert report["workers"] == 1
    ours, reference = report["loader"]
    assert ours["images_per_second"] == pytest.approx(16 / (ours["ms"] / 1e3))
    assert ours["ratio"] == pytest.approx(
        ours["images_per_second"] / reference["images_per_second"]
    )


def test_both_pipelines_read_every_training_image(tmp_path, monkeypatch):
    monkeypatch.setattr(loaders, "IMAGES", 26)
    loaders.write_images(tmp_path)
    for make in (loaders.ours, loaders.reference):
        batches = list(make(tmp_path, 8, 0, "cpu"))
        targets = torch.cat([batch[1] for batch in batches])
        assert sorted(targets.tolist()) == sorted(i % 10 for i in range(10, 26))
        assert batches[0][0].shape == (8, 3, 224, 224)


def test_large_jpegs_are_timed_with_and_without_scaling(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(photographs, "SIZES", {(1200, 900): 8})
    monkeypatch.setattr(photographs, "DISTINCT", 4)
    path = tmp_path / "photographs.json"
    words = ["photographs", "--device", "cpu", "--batch", "4", "--rounds", "1"]
    assert benchmark.main([*words, "--json", str(path)]) == 0
    assert [line.split("|")[2].strip() for line in capsys.readouterr().out.splitlines()[3:]] == [
        "train",
        "eval",
    ]
    train, evaluation = json.loads(path.read_text())["photographs"]
    assert set(train["images_per_second"]) == {"none", "train"}
    assert set(evaluation["images_per_second"]) == {"none", "all"}


def test_forms_take_turns_and_are_warmed_up():
    calls = []
    steps = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert set(timing.race(steps, "cpu", 3)) == {"a", "b"}
    assert calls == ["a", "b"] * 4


def allocate(megabytes):
    return lambda: bytearray(megabytes << 20)


@pytest.mark.skipif(sys.platform != "linux", reason="the CPU's peak is read from Linux's /proc")
def test_peak_memory_is_that_of_the_step():
    assert memory.peak_growth(allocate, 200, device="cpu") == pytest.approx(200, abs=15)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "NTS"], "unknown loss case 'NTS'"),
        (["--rounds", "0"], "--rounds, --batch and --threads must be at least 1"),
        (["--json", "nowhere/at/all.json"], "--json: there is no folder"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert benchmark.main(["losses", "--batch", "4", *words]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
