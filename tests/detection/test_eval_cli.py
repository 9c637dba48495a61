"""tools/eval_detection.py: numbers by class, files, run folders, the teacher, processes."""

import contextlib
import json

import pytest
import torch
from nets import SMALL, detector
from support import unpadded
from synth import make_coco

from mdistiller.cli import eval_detection
from mdistiller.detection.coco.evaluate import evaluate_detector
from mdistiller.detection.coco.packages import STATISTICS
from mdistiller.detection.config import load_config
from mdistiller.detection.data import val_loader
from mdistiller.engine.cfg import dump_cfg


def student_file(path, **keys):
    """A file as a run leaves it, of a random network that sees something everywhere."""
    net = detector(**keys)
    torch.save({"model": net.state_dict(), "detector": net.facts}, path)
    return net


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A set, a config that names it, and files of three networks."""
    folder = tmp_path_factory.mktemp("eval_detection")
    val = make_coco(folder, 3, split="val", size=(64, 96))
    networks = "".join(
        f"  {role}:\n" + "".join(f"    {key}: {value}\n" for key, value in SMALL.items())
        for role in ("STUDENT", "TEACHER")
    )
    (folder / "small.yaml").write_text(
        f"DEVICE: cpu\nDATASET:\n  NUM_WORKERS: 0\nDETECTION:\n{networks}"
        f"  DATA:\n    VAL_IMAGES: {val.images}\n    VAL_ANNOTATIONS: {val.annotations}\n"
        "    TEST_MIN_SIZE: 64\n"
    )
    student_file(folder / "one")
    student_file(folder / "two", seed=1)
    student_file(folder / "masks", MASK=True)
    return folder


def run(place, *words, cfg=True):
    return eval_detection.main([*(["--cfg", str(place / "small.yaml")] if cfg else []), *words])


def refused(capsys, place, *words, **options):
    """The one line of an error."""
    assert run(place, *words, **options) == 2
    error = capsys.readouterr().err.strip().split("\n")[-1]
    assert error.startswith("error: ")
    return error


def test_numbers_are_those_of_the_evaluator(place, tmp_path, capsys):
    words = ["-c", str(place / "one"), "--json", str(tmp_path / "found.json")]
    assert run(place, *words, "--results", str(tmp_path / "results.json")) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    cpu, cfg = torch.device("cpu"), load_config(place / "small.yaml")
    numbers = evaluate_detector(detector().eval(), val_loader(cfg, cpu), cpu)
    (one,) = found["networks"]
    assert one["numbers"] == pytest.approx(numbers)
    assert one["parameters"] == sum(p.numel() for p in detector().parameters())
    assert one["curves"]["bbox"]["classes"].keys() == {"disc", "box", "triangle"}
    assert (found["images"], found["classes"]) == (3, ["disc", "box", "triangle"])
    out = unpadded(capsys.readouterr().out)
    assert f"| {place / 'one'} | mobilenet_v2 | {numbers['bbox/AP']:.2f} |" in out
    assert f"| triangle | {numbers['bbox/AP/triangle']:.2f} |" in out
    assert f"AP {numbers['bbox/AP']:.2f}" in out
    results = json.loads((tmp_path / "results.json").read_text())
    assert {record["category_id"] for record in results} <= {3, 7, 42}
    assert len(results) > 10


def test_a_run_folder_says_itself_what_it_holds(place, tmp_path, capsys):
    folder = tmp_path / "detection" / "run"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_cfg(load_config(place / "small.yaml")))
    (folder / "student_best").write_bytes((place / "one").read_bytes())
    (folder / "student_latest").write_bytes((place / "two").read_bytes())
    words = ["-c", str(folder), "-c", str(folder / "student_latest"), "--teacher"]
    teacher = ["DETECTION.TEACHER.WEIGHTS", str(place / "two")]
    assert run(place, *words, *teacher, cfg=False) == 0
    lines = unpadded(capsys.readouterr().out).splitlines()
    rows = {line.split(" | ")[0]: line.split(" | ")[2:] for line in lines if "mobilenet" in line}
    assert list(rows) == ["| detection/run best", "| detection/run latest", "| teacher"]
    assert rows["| detection/run latest"] == rows["| teacher"]
    assert rows["| detection/run best"] != rows["| teacher"]
    head = next(line for line in lines if line.startswith("| boxes"))
    assert head == f"| boxes | network | {' | '.join(STATISTICS)} |"
    assert "has no checkpoint epoch_3" in refused(
        capsys, place, "-c", str(folder), "--checkpoint", "epoch_3", cfg=False
    )


def test_looking_at_a_run_runs_no_code_of_it(place, tmp_path, capsys):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    text = dump_cfg(load_config(place / "small.yaml")).replace("IMPORTS: []", "IMPORTS: [evil.py]")
    (tmp_path / "config.yaml").write_text(text)
    (tmp_path / "student_best").write_bytes((place / "one").read_bytes())
    error = refused(capsys, place, "-c", str(tmp_path), cfg=False)
    assert "give --import evil.py" in error
    assert not (tmp_path / "ran").exists()


def test_weights_for_classes_in_another_order_are_refused(place, tmp_path, capsys):
    net = detector()
    facts = {**net.facts, "classes": ["background", "box", "disc", "triangle"]}
    torch.save({"model": net.state_dict(), "detector": facts}, tmp_path / "other")
    error = refused(capsys, place, "-c", str(tmp_path / "other"))
    assert "its class 1 is 'box', the data's is 'disc'" in error


def test_masks_are_measured_beside_boxes(place, tmp_path, capsys):
    val = make_coco(tmp_path, 1, split="val", size=(64, 96), empty=0)
    words = ["-c", str(place / "masks"), "DETECTION.STUDENT.MASK", "True", *val.keys("val")]
    assert run(place, *words) == 0
    out = unpadded(capsys.readouterr().out)
    assert "| masks | network | AP |" in out
    assert "mask AP" in out
    assert run(place, *words, "--boxes") == 0
    assert "| masks |" not in capsys.readouterr().out


def test_pictures_are_drawn(place, tmp_path):
    words = ["-c", str(place / "one"), "--pictures", str(tmp_path / "pictures")]
    assert run(place, *words) == 0
    picture = (tmp_path / "pictures" / "detections.png").read_bytes()
    assert picture.startswith(b"\x89PNG")


def test_processes_measure_together_and_the_first_writes(place, tmp_path, capsys, monkeypatch):
    """What several measure together is tested in test_evaluate.py and test_trainer.py."""
    measure, open_groups = eval_detection._measure, []

    @contextlib.contextmanager
    def group(device, minutes):
        open_groups.append(device)
        yield
        open_groups.clear()

    def measured(*args):
        assert open_groups
        return measure(*args)

    monkeypatch.setattr("mdistiller.distributed.process_group", group)
    monkeypatch.setattr(eval_detection, "_measure", measured)
    for module in ("console", "distributed"):
        monkeypatch.setattr(f"mdistiller.{module}.is_main_process", lambda: False)
    assert run(place, "-c", str(place / "one"), "--json", str(tmp_path / "found.json")) == 0
    assert not (tmp_path / "found.json").exists()
    assert "[EVAL]" not in capsys.readouterr().out


def test_what_cannot_be_measured_is_one_line(place, tmp_path, capsys):
    one = str(place / "one")
    assert "by --cfg" in refused(capsys, place, "-c", one, cfg=False)
    assert "name weights by -c" in refused(capsys, place)
    assert "name run folders by -c" in refused(capsys, place, cfg=False)
    assert "is not a run folder" in refused(capsys, place, "-c", str(tmp_path), cfg=False)
    assert "TEACHER.WEIGHTS names no file" in refused(capsys, place, "--teacher")
    assert "none does not exist" in refused(capsys, place, "-c", str(tmp_path / "none"))
    (tmp_path / "cut").write_bytes((place / "one").read_bytes()[:5000])
    assert "truncated, damaged" in refused(capsys, place, "-c", str(tmp_path / "cut"))
    assert "there is no folder" in refused(capsys, place, "-c", one, "--json", "/none/found.json")
    assert "--results is a file of one" in refused(
        capsys, place, "-c", one, "-c", one, "--results", str(tmp_path / "results")
    )
    for key, value, text in (
        ("LABEL_SPACE", "coco91", "have 91: set DETECTION.DATA.LABEL_SPACE contiguous"),
        ("VAL_ANNOTATIONS", "/none.json", "VAL_ANNOTATIONS: there is no annotation file"),
        ("VAL_IMAGES", "/none", "set DETECTION.DATA.VAL_IMAGES"),
    ):
        assert text in refused(capsys, place, "-c", one, f"DETECTION.DATA.{key}", value)
    fast = ("DETECTION.STUDENT.FLAVOUR", "d2")
    assert "of a detector with FLAVOUR tv" in refused(capsys, place, "-c", one, *fast)
