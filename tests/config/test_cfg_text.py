"""Text of a config stays as it is written, and no number is read as another."""

import json

import pytest
import yaml

from mdistiller.config.values import flatten, lookup
from mdistiller.engine.cfg import dump_cfg, load_config
from mdistiller.registry import UserError
from mdistiller.run_folder.record import recorded_settings

WORDS = [
    "2024_11_29",
    "010",
    "1.10",
    "12:30",
    "1e-3",
    "2024-11-29",
    "no",
    "On",
    "true",
    "0x1F",
    "=",
]


def write(folder, text, name="a.yaml"):
    (folder / name).write_text(text)
    return str(folder / name)


def texts(cfg):
    return cfg.EXPERIMENT.TAG, cfg.DATASET.SHARDS.IMAGE


@pytest.mark.parametrize("word", WORDS)
def test_text_keys_keep_the_written_text(tmp_path, word):
    write(tmp_path, f"EXPERIMENT: {{TAG: {word}}}\nDATASET: {{SHARDS: {{IMAGE: {word}}}}}\n")
    path = write(tmp_path, "_BASE_: a.yaml\n", "b.yaml")
    cfg = load_config(path)
    assert texts(cfg) == (word, word)
    cfg = load_config("", ["EXPERIMENT.TAG", word])
    assert texts(cfg) == (word, "jpg;jpeg;png;webp")
    write(tmp_path, dump_cfg(load_config(path)), "config.yaml")  # as a run records it
    assert recorded_settings(tmp_path)["EXPERIMENT"]["TAG"] == word
    cfg = load_config(tmp_path / "config.yaml")
    assert texts(cfg) == (word, word)


def test_lists_of_text_keep_it_too(tmp_path):
    path = write(tmp_path, "IMPORTS: [2024_11_29]\n")
    with pytest.raises(UserError, match="2024_11_29"):
        load_config(path)


@pytest.mark.parametrize("key", ["EPOCHS", "LR", "LR_DECAY_STAGES"])
@pytest.mark.parametrize("number", ["010", "-010", "1:30", "1:30.5", "1_000", "1_0.5", "0o17"])
def test_numbers_that_yaml_reads_otherwise_are_refused(tmp_path, key, number):
    given = f"[150, {number}]" if key == "LR_DECAY_STAGES" else number
    path = write(tmp_path, f"SOLVER:\n  TYPE: SGD\n  {key}: {given}\n")
    with pytest.raises(UserError) as caught:
        load_config(path)
    message = str(caught.value)
    assert f"SOLVER.{key}" in message
    assert number in message
    assert "\n" not in message
    if number != "0o17":  # for YAML 1.1 that is text
        assert f"{path}, line 3: SOLVER.{key}: YAML reads {number} as " in message
        assert "without leading zeros, _ and :" in message
    with pytest.raises(UserError, match=f"SOLVER.{key} must be .*{number}"):
        load_config("", [f"SOLVER.{key}", given])


def test_other_spellings_of_numbers_and_switches_are_read(tmp_path):
    path = write(tmp_path, "SOLVER: {EPOCHS: 0x10, LR: 1e-3, WEIGHT_DECAY: .5, COMPILE: off}\n")
    cfg = load_config(path)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.LR, cfg.SOLVER.WEIGHT_DECAY) == (16, 0.001, 0.5)
    assert cfg.SOLVER.COMPILE is False


def test_keys_without_default(tmp_path):
    head = "DISTILLER:\n  TEACHER_ARGS:\n"
    path = write(
        tmp_path,
        f"{head}    sizes: [1, 2.5, {{deep: yes}}]\n    tag: '1_0'\n    when: 2024-11-29\n",
    )
    args = load_config(path).DISTILLER.TEACHER_ARGS
    assert dict(args) == {"sizes": [1, 2.5, {"deep": True}], "tag": "1_0", "when": "2024-11-29"}
    path = write(tmp_path, f"{head}    sizes: [{{deep: 010}}]\n")
    with pytest.raises(
        UserError, match=r"a\.yaml, line 3: .*ARGS\.sizes\.deep: YAML reads 010 as 8"
    ):
        load_config(path)
    key = "DISTILLER.TEACHER_ARGS.tag"
    assert lookup(load_config("", [key, "2024_11_29"]), key) == "2024_11_29"


def test_nothing_but_plain_values_leaves_a_config(tmp_path):
    text = "SOLVER: {EPOCHS: 3, LR: 1, LR_DECAY_STAGES: [1, 2], COMPILE: no}\n"
    text += "DISTILLER: {TEACHER_ARGS: {a: 1, b: [1.5, yes], c: {d: 2}}, TEACHER_NORM: "
    text += "[[0.1, 0.2, 0.3], [1, 1, 1]]}\nDATASET: {MEAN: [0, 0.5, 1]}\n"
    cfg = load_config(write(tmp_path, text))
    values = [lookup(cfg, key) for key in flatten(cfg)]
    kinds = {bool, int, float, str, list, tuple, type(None), dict}
    assert {type(item) for v in values for item in (v if isinstance(v, list) else [v])} <= kinds
    assert yaml.safe_load(dump_cfg(cfg))["DISTILLER"]["TEACHER_ARGS"]["b"] == [1.5, True]
    json.dumps(values)


def test_a_key_that_is_no_text_is_shown_as_written(tmp_path):
    with pytest.raises(UserError, match="line 2: 010 is not a config key"):
        load_config(write(tmp_path, "SOLVER:\n  010: 1\n"))


def test_class_names_keep_the_written_text(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("DATASET: {CLASSES: [010, no, 1.10]}\n")
    assert load_config(path).DATASET.CLASSES == ["010", "no", "1.10"]
