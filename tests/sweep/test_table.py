"""The table of a sweep: means and deviations over seeds."""

import csv

import pytest
from support import unpadded
from sweep_runs import names

from mdistiller.sweep import table
from mdistiller.sweep.plan import read_plan
from mdistiller.sweep.trial_state import Status


def result(last, best, first_loss=2.0, last_loss=1.0):
    return {
        "last_acc": last,
        "best_acc": best,
        "selected_on": "test set",
        "first": {"train_loss": first_loss, "train_acc": 10.0},
        "last": {"train_loss": last_loss, "train_acc": 20.0},
    }


def test_the_table_is_mean_and_sample_deviation_over_seeds(sweep):
    text = "SEEDS: 3\nVARIANTS: [{NAME: a}, {NAME: b}, {NAME: c}]\nLOSS_FALLS: True\n"
    plan = read_plan(sweep(text), out=sweep.out)
    numbers = {
        "a,seed:0": (90, 91),
        "a,seed:1": (92, 93),
        "a,seed:2": (97, 98),
        "b,seed:0": (50, 60),
    }
    status = {
        name: Status("done", [result(*numbers[name])], {})
        if name in numbers
        else Status("open", [], {})
        for name in names(plan)
    }
    status["b,seed:1"] = Status("failed", [], {}, "non-finite loss")
    rows = table.rows(plan, status)
    text = unpadded(table.markdown(plan, rows))
    # mean 93, squared deviations 9 + 1 + 16, over n - 1 = 2
    assert (
        "| a | 93.00 ± 3.61 | 94.00 ± 3.61 | test set | 2 → 1 | 10.0 → 20.0 | yes | 3 | 0 |" in text
    )
    assert "| b | 50.00 | 60.00 | test set | 2 → 1 | 10.0 → 20.0 | yes | 1 | 1 |" in text
    assert "| c | - | - | - | - | - | - | 0 | 0 |" in text
    assert "- b,seed:1 failed: non-finite loss" in text
    assert "Not finished: 4 open." in text
    assert "over the runs of a row" in text
    first = next(csv.DictReader(table.csv_text(plan, rows).splitlines()))
    assert float(first["last_acc_std"]) == pytest.approx(13**0.5)
    assert float(first["train_loss_last"]) == 1.0
    assert not table.all_well(plan, rows)


def test_a_loss_that_did_not_fall_in_one_run_is_no_success(sweep):
    plan = read_plan(sweep("SEEDS: 2\nLOSS_FALLS: True\n"), out=sweep.out)
    runs = [result(1, 1), result(1, 1, last_loss=2.0)]
    status = {name: Status("done", [run], {}) for name, run in zip(names(plan), runs, strict=True)}
    rows = table.rows(plan, status)
    assert "| NO | 2 | 0 |" in unpadded(table.markdown(plan, rows))
    assert not table.all_well(plan, rows)
    assert table.all_well(read_plan(sweep("SEEDS: 2\n"), out=sweep.out), rows)


def test_runs_without_labels_have_no_accuracy(sweep):
    plan = read_plan(sweep("METRIC: best_knn\nLOSS_FALLS: True\n"), out=sweep.out)
    curve = {"first": {"train_loss": 2.0}, "last": {"train_loss": 1.0}}
    run = {"best_loss": 1.0, "best_knn": 80.0, "selected_on": "training images", **curve}
    rows = table.rows(plan, {names(plan)[0]: Status("done", [run], {})})
    text = unpadded(table.markdown(plan, rows))
    assert "| 80.00 | training images | 2 → 1 | - | yes | 1 | 0 |" in text
    assert next(csv.DictReader(table.csv_text(plan, rows).splitlines()))["train_acc_last"] == ""


def test_held_out_images_add_the_test_columns(sweep):
    plan = read_plan(sweep("OVERRIDES: {DATASET.VAL_SPLIT: 40}\nMETRIC: test_acc_best\n"))
    run = {**result(80, 82), "test_acc_last": 70.0, "test_acc_best": 71.0, "selected_on": "40 held"}
    rows = table.rows(plan, {names(plan)[0]: Status("done", [run], {})})
    lines = unpadded(table.markdown(plan, rows)).splitlines()
    assert lines[0].split(" | ")[1:5] == [
        *("best, on the test set", "last top-1 %", "best top-1 %", "last, on the test set")
    ]
    assert lines[2].split(" | ")[1:6] == ["71.00", "80.00", "82.00", "70.00", "40 held"]
