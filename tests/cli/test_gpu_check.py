"""The GPU check, as far as it runs without a GPU."""

import json
import time
import zipfile

import pytest

from benchmarks.gpu import main as gpu_check
from benchmarks.gpu import packages, parts, sync
from mdistiller.engine import captured
from mdistiller.networks import compiling


def rows_of(part, folder):
    path = folder / f"{part}.jsonl"
    parts.main([part, "--device", "cpu", "--quick", "--out", str(path), "--seconds", "60"])
    facts, *rows = map(json.loads, path.read_text().splitlines())
    assert {"hardware", "torch", "torchvision", "python"} <= facts.keys()
    return rows


def test_every_part_measures_its_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(compiling, "BACKEND", compiling.BACKEND)  # quick ones set it
    monkeypatch.setattr(captured, "CudaGraph", captured.CudaGraph)
    names = ("sync", "together", "recorded", "steps", "compiled")
    rows = {part: rows_of(part, tmp_path) for part in names}
    assert [row.get("error") for part in rows.values() for row in part if row.get("error")] == []
    assert [(row["method"], row["setting"], row["unread"]) for row in rows["sync"]] == [
        ("KD", "fp32", 6),
        ("DKD", "bf16", 6),
        ("CRD", "EMA", 6),
    ]
    assert len(rows["together"]) == 2
    for group in rows["together"]:
        assert group["difference"] == 0
        assert group["ratio"] == group["seconds"]["together"] / group["seconds"]["alone"]
    assert [(row["method"], row["difference"]) for row in rows["recorded"]] == [("KD", 0)]
    assert [row["precision"] for row in rows["steps"]] == ["fp32", "TF32", "bf16"]
    assert rows["steps"][0]["classic_ms"] > 0
    for row in rows["steps"] + rows["compiled"]:
        assert row["images_per_second"] == pytest.approx(1e3 * row["batch"] / row["wall_ms"])
    report = {"device": "cpu", "quick": True, "parts": {}}
    for name, part in rows.items():
        report["parts"][name] = {"rows": part, "state": "done", "seconds": 1.0}
    from benchmarks.gpu.page import page

    text = page(report)
    assert text.count("\n## ") == 5
    assert text.count("resnet8 -> resnet8") == 3 + 2 + 1 + 2 + 1


def test_a_network_that_was_not_compiled_gives_no_figures(tmp_path, monkeypatch):
    def failing(graph, inputs):
        raise RuntimeError("no compiler")

    check = parts.Check.__new__(parts.Check)
    check.device, check.quick = "cpu", True
    from benchmarks.gpu.timing import cases, time_step

    monkeypatch.setattr(compiling, "BACKEND", failing)
    (case,) = cases(check, compiled=True)
    with pytest.raises(RuntimeError, match="the student ran uncompiled"):
        time_step(case, check)


def test_the_whole_matrix_is_what_is_documented():
    check = parts.Check.__new__(parts.Check)
    check.quick = False
    from benchmarks.gpu.timing import cases

    for compiled in (False, True):
        found = cases(check, compiled)
        keys = ("pair", "method", "batch", "precision")
        assert len({tuple(case[key] for key in keys) for case in found}) == 3 * 3 * 2 * 3


PART = """
import json, pathlib, sys, time
name, out = sys.argv[1], pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
row = {"pair": "a -> b", "method": "KD", "setting": "fp32", "calls": {}}
facts = json.dumps({"hardware": "some"}) + "\\n"
if name == "tests":
    out.write_text(facts)
    print("what went wrong")
    sys.exit(3)
if name == "sync":
    out.write_text(facts + json.dumps(row) + '\\n{"half')
    time.sleep(60)
out.write_text(facts)
"""


def test_parts_that_fail_or_take_too_long_do_not_stop_the_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "part.py").write_text(PART)
    monkeypatch.setattr(gpu_check, "PART", [str(tmp_path / "part.py")])
    monkeypatch.setattr(gpu_check, "SHARES", {"tests": 3, "sync": 1, "steps": 3})
    monkeypatch.setattr(gpu_check, "SPARE", 0)
    began = time.monotonic()
    words = ["--device", "cpu", "--minutes", "0.05", "--out", str(tmp_path / "out")]
    assert gpu_check.main(words) == 1
    assert time.monotonic() - began < 6
    assert "failed: tests sync;" in capsys.readouterr().out
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert report["hardware"] == "some"
    states = {name: part["state"] for name, part in report["parts"].items()}
    assert states == {"tests": "failed", "sync": "out of time", "steps": "done"}
    assert report["parts"]["tests"]["log"] == ["what went wrong"]
    assert len(report["parts"]["sync"]["rows"]) == 1  # the half line is left out
    page = (tmp_path / "out" / "gpu.md").read_text()
    assert "hardware some" in page
    assert "| a -> b" in page


def wheel(folder, name):
    with zipfile.ZipFile(folder / f"{name}-1.0-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}/__init__.py", "")
        info = f"{name}-1.0.dist-info"
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")


def test_missing_packages_are_named_or_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(packages, "NEEDED", {"sys": "sys", "made_up_one.part": "made-up-one"})
    monkeypatch.setattr(packages, "FOR_TESTS", {"made_up_two": "made-up-two"})
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    expected = "gpu_check: missing packages: made-up-one (give their wheels with --wheels DIR)\n"
    assert capsys.readouterr().err == expected
    assert "no wheels of them in" in gpu_check.make_ready(tmp_path, tmp_path / "target")
    assert "there is no folder" in gpu_check.make_ready(tmp_path / "none", tmp_path / "target")
    wheel(tmp_path, "made_up_one")
    assert gpu_check.make_ready(tmp_path, tmp_path / "target") == ""
    assert (tmp_path / "target" / "made_up_one" / "__init__.py").is_file()
    (tmp_path / "made_up_two-1.0-py3-none-any.whl").write_text("no wheel")
    assert gpu_check.make_ready(tmp_path, tmp_path / "target").startswith("--wheels: ")


def test_a_waiting_call_is_found(monkeypatch):
    monkeypatch.setattr(sync, "WAITS", ("aten::item",))  # which a CPU has too
    import torch

    calls = sync._profiled(lambda: [torch.ones(1).item() for _ in range(3)], torch.device("cpu"))
    assert calls == {"aten::item": 3}


@pytest.mark.slow
def test_the_command_runs_every_part(tmp_path):
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert gpu_check.main(words) == 0
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == list(gpu_check.SHARES)
    assert "skipped" in report["parts"]["tests"]["rows"][0]["summary"]
