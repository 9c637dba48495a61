"""The benchmarks of whole commands, run in this process where they would start others."""

import json
from pathlib import Path

import pytest
from support import REPO

from benchmarks import commands
from benchmarks import main as benchmark
from mdistiller.cli import train


def test_commands_are_run_in_both_checkouts(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    (other / "tools").mkdir(parents=True)
    (other / "tools" / "train.py").write_text("import time; time.sleep(0.01); sum(range(10**7))")
    monkeypatch.setattr(commands, "COMMANDS", {"help": (["tools/train.py", "--help"], 0)})
    words = ["commands", "--device", "cpu", "--rounds", "1", "--against", "other"]
    assert benchmark.main([*words, "--json", "figures.json"]) == 0
    (row,) = json.loads(Path("figures.json").read_text())["commands"]
    assert row["before"]["seconds"] > row["now"]["seconds"] > 0
    assert row["ratio"] == row["now"]["seconds"] / row["before"]["seconds"]
    assert f"| {row['ratio']:.2f} " in capsys.readouterr().out


def test_a_command_that_ends_otherwise_is_no_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(commands, "COMMANDS", {"fail": (["-c", "raise SystemExit('broken')"], 2)})
    assert benchmark.main(["commands", "--device", "cpu", "--rounds", "1"]) == 2
    assert "ended with 1: broken" in capsys.readouterr().err


def test_runs_one_by_one_and_in_lock_step_are_the_same_runs(tmp_path, monkeypatch):
    taken, losses = [], []

    def usage(words, checkout, expected=0):
        paths = [Path(word) for word in words if word.endswith(".yaml")]
        assert train.main(words[1:]) == 0
        for path in paths:
            config = json.loads(path.read_text())
            (log,) = path.parent.glob(f"out/runs/{config['EXPERIMENT']['NAME']}*/metrics.jsonl")
            losses.append(json.loads(log.read_text().splitlines()[-1])["train_loss"])
        taken.append(len(paths))
        return commands.Usage([2.0, 3.0][len(paths) > 1], 100.0 + len(taken))

    monkeypatch.setattr(commands, "usage", usage)
    path = tmp_path / "figures.json"
    words = ["together", "--device", "cpu", "--rounds", "1", "--images", "32", "--json", str(path)]
    nets = ["DISTILLER.TEACHER", "resnet8", "DISTILLER.STUDENT", "resnet8"]
    assert benchmark.main([*words, "--batch", "16", "--only", "KD", "LSKD", "--", *nets]) == 0
    assert taken == [1, 1, 2]
    assert losses[:2] == losses[2:]
    (row,) = json.loads(path.read_text())["together"]
    assert (row["before"]["seconds"], row["now"]["seconds"], row["ratio"]) == (4, 3, 0.75)
    assert (row["before"]["peak_mib"], row["now"]["peak_mib"]) == (102, 103)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["commands", "--against", str(REPO / "docs")], "is not a checkout"),
        (["losses", "--against", str(REPO)], "--against belongs to the suites commands and"),
        (["commands", "--only", "nothing"], "--only: no command 'nothing'; there are mdistiller"),
    ],
)
def test_bad_input_is_one_line(words, message, capsys):
    assert benchmark.main([*words, "--device", "cpu"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
