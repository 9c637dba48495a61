"""Published numbers: well formed, found for a run, and beside it in the report."""

import csv
import functools
import itertools
from collections import Counter
from dataclasses import fields

from report_runs import config, flat, make_run, rows
from support import REPO, cache_yaml

from mdistiller.distillers import distiller_dict
from mdistiller.engine.cfg import load_config
from mdistiller.report.build import build_report
from mdistiller.report.published import Published, _configs, departures, published, published_for


def test_every_published_line_is_well_formed_and_there_once():
    with (REPO / "docs" / "results" / "published.csv").open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    assert reader.fieldnames == [field.name for field in fields(Published)]
    for line in lines:
        assert len(line) == len(reader.fieldnames), line
        assert None not in line.values(), line
        assert line["dataset"] in ("cifar10", "cifar100", "imagenet")
        assert line["type"] in distiller_dict, line
        assert line["verified"] in ("yes", "no"), line
        assert all((line["student"], line["method"], line["source"])), line
        assert bool(line["teacher"]) == (line["type"] not in ("NONE", "USKD")), line
        assert 40 < float(line["top1"]) < 100, line
        assert len(line["top1"]) == 5, line
    names = ("dataset", "method", "type", "teacher", "student", "source")
    counts = Counter(tuple(line[name] for name in names) for line in lines)
    assert [key for key, count in counts.items() if count > 1] == []
    assert len(published()) == len(lines)


def pair(method, *pairs, teacher="resnet32x4", student="resnet8x4"):
    networks = ("DISTILLER.TEACHER", teacher, "DISTILLER.STUDENT", student)
    return flat(config("DISTILLER.TYPE", method, *networks, "SOLVER.EPOCHS", 240, *pairs))


def test_a_run_finds_what_is_published_for_it():
    def found(*words, **names):
        return [(line.method, line.top1) for line in published_for(pair(*words, **names))]

    assert found("DKD") == [("DKD", 76.32)]
    assert found("DKD", "LSKD.ENABLE", True) == [("LSKD-DKD", 77.01)]
    assert found("SDD", "SDD.BASE", "KD") == [("SD-KD", 76.63)]
    assert found("NONE", student="vgg8", teacher="vgg13") == [("student", 70.36)]
    assert found("DKD", "DATASET.TYPE", "cifar10") == []
    assert found("DKD", "SOLVER.TRAINER", "dot") == []
    assert found("DKD", "DKD.DIVERGENCE", "reverse_kl") == []
    weights = [f"WKD.LOSS.WKD_{part}_WEIGHT" for part in ("LOGIT", "FEAT")]
    assert found("WKD") == [("WKD-L", 76.53)]
    assert found("WKD", weights[1], 0.1) == [("WKD-F", 76.77)]
    assert found("WKD", weights[0], 1.0, weights[1], 0.1) == [("WKD-LF", 77.28)]
    assert found("KD", "SOLVER.TRAINER", "crd") == [("KD", 73.33)]
    assert found("DKD", teacher="resnet8x4", student="resnet32x4") == []


def _pair(line):
    return line.teacher, line.student


def test_a_shipped_config_has_the_protocol_of_its_published_line(monkeypatch):
    """Also MLKD's, of 480 and 960 epochs. Of the Knowledge-Distillation-Zoo little is known."""
    cache_yaml(monkeypatch)
    seen, others, load = 0, {}, functools.cache(load_config)
    monkeypatch.setattr("mdistiller.report.published.load_config", load)
    shipped = (_configs(one.dataset, one.type).get(_pair(one), ()) for one in published())
    for path in sorted(set(itertools.chain(*shipped))):
        settings = flat(load(path))
        for line in published_for(settings):
            seen += 1
            if named := departures(settings, line):
                others[path.relative_to(REPO / "configs").as_posix()] = named
    assert seen > 200
    assert others.pop("cifar100/ctkd/res32x4_res8x4_dkd.yaml")  # beside CTKD on KD
    zoo = ("teacher", "self_distillation/res20", "self_distillation/res110")
    assert set(others) == {f"cifar10/{name}.yaml" for name in zoo}


def test_another_protocol_is_named():
    def shipped(*changes, name="cifar100/dkd/res32x4_res8x4"):
        return flat(load_config(f"configs/{name}.yaml", list(changes)))

    (line,) = published_for(shipped())
    for _ in range(2):  # what is remembered of the shipped config stays as it is
        assert departures(shipped(), line, processes=2) == ["images a step 128 instead of 64"]
    other = ("SOLVER.EPOCHS", 10, "SOLVER.ACCUMULATE", 2, "DATASET.VAL_SPLIT", 5000)
    assert sorted(departures(shipped(*other), line)) == [
        "5000 training images held out to select the epoch; published: the test set",
        "epochs 10 instead of 240",
        "images a step 128 instead of 64",
    ]
    other = ("SOLVER.LR", 0.1, "DKD.BETA", 2.0, "DATASET.MIXUP", 1.0, "LOG.TENSORBOARD_FREQ", 7)
    assert sorted(departures(shipped(*other), line)) == [
        "DATASET.MIXUP 1.0 instead of 0.0",
        "DKD.BETA 2.0 instead of 8.0",
        "lr 0.1 instead of 0.05",
    ]
    other = shipped("DISTILLER.STUDENT_ARGS", {"num_filters": [1, 1, 1, 1]})
    assert departures(other, line) == [
        "DISTILLER.STUDENT_ARGS.num_filters [1, 1, 1, 1] instead of the default"
    ]
    large = shipped("SOLVER.LR", 3.0, name="imagenet/r34_r18/kd")
    assert all("lr 3.0 instead of 0.2" in departures(large, line) for line in published_for(large))
    alone = flat(load_config("configs/cifar100/vanilla.yaml", ["DISTILLER.STUDENT", "vgg8"]))
    (line,) = published_for(alone)
    assert departures(alone, line) == [
        "other settings were not compared: no config of this line is shipped"
    ]


def test_the_report_sets_a_run_beside_its_published_number(tmp_path):
    networks = ("DISTILLER.TEACHER", "resnet32x4", "DISTILLER.STUDENT", "resnet8x4")
    make_run(tmp_path / "DKD", [75.0, 74.0], "DISTILLER.TYPE", "DKD", *networks)
    report = build_report([tmp_path])
    found = rows(report, "Beside published numbers")["DKD"]
    assert found[:5] == ["74.00", "75.00", "76.32", "-1.32", "DKD"]
    assert found[5] == "DKD (arXiv 2203.08679)"
    told = found[6].split("; ")
    assert {"epochs 10 instead of 240", "weight_decay 0.0001 instead of 0.0005"} <= set(told)
