import importlib

import pytest
from faults.bad_configs import bad_configs
from support import REPO

from mdistiller.config.files import find_config
from mdistiller.dataset import DATASETS
from mdistiller.distillers import get_distiller
from mdistiller.engine import trainer_dict
from mdistiller.engine.cfg import CFG, default_config, load_config, show_cfg
from mdistiller.models import get_model_entry
from mdistiller.registry import UserError

FOLDERS = ("cifar10", "cifar100", "digits", "imagenet", "tiny_imagenet")


def write(folder, name, text):
    path = folder / name
    path.write_text(text)
    return str(path)


def load_and_look_up(path):
    """Load a config and look up all that it names."""
    cfg = load_config(path)
    zoo = DATASETS[cfg.DATASET.TYPE].zoo
    get_model_entry(cfg.DISTILLER.STUDENT, zoo)
    assert cfg.SOLVER.TRAINER in trainer_dict
    if get_distiller(cfg.DISTILLER.TYPE).uses_teacher:
        teacher = get_model_entry(cfg.DISTILLER.TEACHER, zoo)
        assert teacher.checkpoint or cfg.DISTILLER.TEACHER_CFG or cfg.DISTILLER.TEACHER_CKPT
    if cfg.DISTILLER.TEACHER_CFG:
        assert load_config(cfg.DISTILLER.TEACHER_CFG).DISTILLER.STUDENT == cfg.DISTILLER.TEACHER


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_shipped_config_loads_and_names_things_that_exist(folder):
    """Those of sweeps and of detection have tests of their own."""
    paths = sorted((REPO / "configs" / folder).rglob("*.yaml"))
    paths = [path for path in paths if "\nSWEEP:" not in path.read_text()]  # a sweep's
    failures = []
    for path in paths:
        try:
            load_and_look_up(path)
        except Exception as error:
            failures.append(f"{path.relative_to(REPO)}: {type(error).__name__}: {error}")
    assert paths
    assert not failures, "\n".join(failures)


def test_no_folder_of_configs_is_forgotten():
    elsewhere = {"_base_", "coco", "sweeps"}
    assert {path.name for path in (REPO / "configs").iterdir()} == {*FOLDERS, *elsewhere}


def test_a_config_of_detection_is_refused():
    importlib.import_module("mdistiller.detection")  # registers the task, as every command does
    with pytest.raises(UserError, match=r"run it with tools/train_detection\.py"):
        load_config("configs/coco/dkd/DKD-R18-R101.yaml")


def test_published_recipe_of_a_pair():
    cfg = load_config("configs/cifar100/dkd/vgg13_mv2.yaml")
    assert (cfg.SOLVER.LR, cfg.SOLVER.WEIGHT_DECAY, cfg.SOLVER.EPOCHS) == (0.01, 0.0005, 240)
    assert (cfg.DKD.ALPHA, cfg.DKD.BETA, cfg.DKD.T, cfg.DKD.WARMUP) == (1.0, 6.0, 4.0, 20)
    assert (cfg.DISTILLER.TEACHER, cfg.DISTILLER.STUDENT) == ("vgg13", "MobileNetV2")


def test_file_then_overrides_over_bases(tmp_path):
    write(tmp_path, "a.yaml", "SOLVER:\n  LR: 0.1\n  EPOCHS: 3\n  BATCH_SIZE: 7\n")
    write(tmp_path, "b.yaml", "_BASE_: a.yaml\nSOLVER:\n  EPOCHS: 4\n  BATCH_SIZE: 8\n")
    path = write(tmp_path, "c.yaml", "_BASE_: [b.yaml]\nSOLVER:\n  BATCH_SIZE: 9\n")
    cfg = load_config(path, ["SOLVER.TYPE", "Adam"])
    assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS, cfg.SOLVER.BATCH_SIZE) == (0.1, 4, 9)
    assert cfg.SOLVER.TYPE == "Adam"
    assert cfg.is_frozen()
    assert CFG.SOLVER.EPOCHS == 240  # the global defaults are untouched


def test_numbers_arrive_as_the_type_of_the_default(tmp_path):
    path = write(tmp_path, "a.yaml", "SOLVER:\n  LR: 1\n  WEIGHT_DECAY: 5e-4\nDKD: {T: 2}\n")
    cfg = load_config(path, ["SOLVER.LR_DECAY_STAGES", "(3, 4)", "EXPERIMENT.NAME", "12"])
    assert isinstance(cfg.SOLVER.LR, float)
    assert isinstance(cfg.DKD.T, float)
    assert cfg.SOLVER.WEIGHT_DECAY == 0.0005  # YAML reads 5e-4 as text
    assert cfg.SOLVER.LR_DECAY_STAGES == [3, 4]
    assert cfg.EXPERIMENT.NAME == "12"
    assert load_config("", ["KD.TEMPERATURE", "2.5"]).KD.TEMPERATURE == 2.5


def test_a_switch_may_take_a_word():
    for words, want in (("true", True), ("False", False), ("max-autotune", "max-autotune")):
        got = load_config("", ["SOLVER.COMPILE", words]).SOLVER.COMPILE
        assert got == want
    assert load_config("", ["SOLVER.COMPILE", "default", "SOLVER.COMPILE", "True"]).SOLVER.COMPILE


BAD = {
    "SOLVER.LRR 0.1": "unknown config key SOLVER.LRR; did you mean 'SOLVER.LR'?",
    "KDD.TEMPERATURE 4": "unknown config key KDD; did you mean 'KD",
    "SOLVER.EPOCHS 2.5": "SOLVER.EPOCHS must be a whole number, got 2.5",
    "SOLVER.EPOCHS many": "SOLVER.EPOCHS must be a whole number, got 'many'",
    "SOLVER.EPOCHS True": "SOLVER.EPOCHS must be a whole number, got True",
    "SOLVER.LR nan": "SOLVER.LR must be a finite number, got 'nan'",
    "SOLVER.LR -0.1": "SOLVER.LR must be positive, got -0.1",
    "SOLVER.NESTEROV 3": "SOLVER.NESTEROV must be True or False, got 3",
    "SOLVER.LR_DECAY_STAGES 30": "SOLVER.LR_DECAY_STAGES must be a list like [150, 180, 210]",
    "SOLVER.LR_DECAY_STAGES ['a']": "SOLVER.LR_DECAY_STAGES must be a list like [150, 180, 210]",
    "SOLVER 3": "SOLVER is a section with keys",
    "SOLVER.LR": "'SOLVER.LR' has no partner",
    "DKD.TEMPERATURE 4": "unknown config key DKD.TEMPERATURE (keys of DKD: CE_WEIGHT, ALPHA,",
    "SOLVER..LR 3": "'SOLVER..LR' is not a config key",
    "SOLVER.EPOCHS 0": "SOLVER.EPOCHS must be at least 1",
    "SOLVER.AMP fp8": "SOLVER.AMP must be one of none, bf16, fp16, got 'fp8'",
    "SOLVER.ACCUMULATE 0": "SOLVER.ACCUMULATE must be at least 1, got 0",
    "SOLVER.ACCUMULATE 1.5": "SOLVER.ACCUMULATE must be a whole number, got 1.5",
    "SOLVER.EMA -0.1": "SOLVER.EMA must be at least 0, got -0.1",
    "SOLVER.EMA 1": "SOLVER.EMA must be below 1 (0.999, say; 0: none), got 1.0",
    "SOLVER.SYNC_BN yes": "SOLVER.SYNC_BN must be True or False, got 'yes'",
    "SOLVER.COMPILE fast": "SOLVER.COMPILE must be one of True, False, default, reduce-overhead",
    "SOLVER.COMPILE 1": "SOLVER.COMPILE must be True, False or text, got 1",
    "SOLVER.SCHEDULE poly": "SOLVER.SCHEDULE must be one of multistep, cosine, plateau, constant",
    "SOLVER.SCHEDULE plateau SOLVER.WARMUP_EPOCHS 2": "SOLVER.SCHEDULE plateau has no warm-up",
    "SOLVER.SCHEDULE plateau SOLVER.LR_DECAY_RATE 1": "between 0 and 1, got 1",
    "IMPORTS nowhere.py": "IMPORTS: no file nowhere.py",
    "IMPORTS [3]": "IMPORTS must name files or modules, got 3",
}


@pytest.mark.parametrize("words", BAD)
def test_a_bad_override_gets_one_line(words):
    with pytest.raises(UserError) as caught:
        load_config("", words.split())
    assert BAD[words] in str(caught.value)
    assert "\n" not in str(caught.value)


BAD_FILES = {
    "SOLVER:\n  LRR: 1\n": "unknown config key SOLVER.LRR",
    "SOLVER: 3\n": "SOLVER is a section",
    "SOLVER:\n  LR: 1\n  LR: 2\n": "line 3: LR is given twice",
    "SOLVER: [1\n": "is not valid YAML",
    "": "is not a config (expected",
    "- 1\n": "is not a config (expected",
    "1: 2\n": "1 is not a config key",
    "_BASE_: nowhere.yaml\n": "nowhere.yaml' not found",
    "_BASE_: bad.yaml\n": "leads back to itself",
    "_BASE_: 3\n": "_BASE_ must name a file",
    "A: !!python/object/apply:os.system ['true']\n": "is not valid YAML",
    "SOLVER: {LR: .inf}\n": "SOLVER.LR must be a finite number",
}


BAD_FILES |= {
    "SOLVER: &a {LR: *a}\n": "SOLVER.LR must be a finite number",
    "KD: " + "[" * 3000: "is not valid YAML",
    "KD: " + "[" * 60 + "]" * 60: "KD is a section with keys",
    "KD: " + "[" * 999 + "]" * 999: "nested too deeply",
    "SOLVER: {LR: !!float x}\n": "is not valid YAML",
    "SOLVER: {EPOCHS: 0x" + "F" * 5000 + "}\n": "a int too large to print",
    "SOLVER: {LR: 1" + "0" * 400 + "}\n": "SOLVER.LR must be a finite number",
    "DATASET: {MEAN: [a, b, c]}\n": "DATASET.MEAN must be numbers",
    "DATASET: {MEAN: [.nan, .1, .1]}\n": "DATASET.MEAN must be a list",
    "DISTILLER: {STUDENT_ARGS: {a: !!timestamp 2001-01-01}}\n": "STUDENT_ARGS.a must be a number",
    "_BASE_: " + "x" * 300 + ".yaml\n": "not found",
}


@pytest.mark.parametrize("text", BAD_FILES, ids=lambda text: text[:30])
def test_a_bad_file_gets_one_line(tmp_path, text):
    path = write(tmp_path, "bad.yaml", text)
    with pytest.raises(UserError) as caught:
        load_config(path)
    assert BAD_FILES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sign", ["[", "(", "{1:", "-", "~", "9"])
def test_a_monstrous_override_gets_one_line(sign):
    free = "DISTILLER.STUDENT_ARGS.a"  # takes any text as it is, if it is not too long to look at
    for times in (190, 1500, 100_000):
        for key in ("SOLVER.EPOCHS", "SOLVER.LR_DECAY_STAGES", *([free] if times > 10_000 else [])):
            with pytest.raises(UserError) as caught:
                load_config("", [key, sign * times + "1"])
            assert len(str(caught.value).splitlines()) == 1
            assert len(str(caught.value)) < 300
    assert load_config("", [free, "[[1"]).DISTILLER.STUDENT_ARGS.a == "[[1"


def test_bases_that_multiply_are_given_up(tmp_path):
    for a, b in zip("abcdef", "bcdefg", strict=True):
        write(tmp_path, f"{a}.yaml", f"_BASE_: [{', '.join([f'{b}.yaml'] * 9)}]\n")
    write(tmp_path, "g.yaml", "SOLVER: {EPOCHS: 3}\n")
    with pytest.raises(UserError, match="_BASE_ reads more than 100 files"):
        load_config(tmp_path / "a.yaml")


def test_malformed_configs_load_as_they_say_or_get_one_line():
    """Hypothesis makes them; `python -m faults.bad_configs` tries thousands."""
    results = list(bad_configs(seed=7, count=200))
    assert len(results) >= 200
    assert [name for name, passed in results if not passed] == []


def test_the_check_of_malformed_configs_sees_what_is_wrong(tmp_path, monkeypatch):
    from faults import bad_configs

    case = (b"SOLVER: {EPOCHS: 3}", ["KD.TEMPERATURE", "2"])
    assert bad_configs.verdict(case, tmp_path) == ""
    for wrong, says in (
        (lambda *_: CFG, "SOLVER.EPOCHS: given 3, read 240"),
        (lambda path, _: load_config(path), "KD.TEMPERATURE: given '2', read 4.0"),
        (lambda *_: 1 / 0, "ZeroDivisionError"),
        (lambda *_: find_config("a\nb.yaml".join("xy") * 900), "not one line"),
    ):
        monkeypatch.setattr(bad_configs, "load_config", wrong)
        if says == "not one line":
            monkeypatch.setattr(bad_configs, "LONGEST", 10)
        assert says in bad_configs.verdict(case, tmp_path)


def test_missing_and_python_configs_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"not found; did you mean 'cifar100/kd\.yaml'"):
        find_config("configs/cifar100/kdd.yaml")
    with pytest.raises(UserError, match="Python configs would run code"):
        find_config(write(tmp_path, "evil.py", "raise SystemExit"))


def test_a_method_without_declared_defaults_takes_any_key(tmp_path):
    write(
        tmp_path,
        "mine.py",
        "from ._base import Distiller\n"
        "class Plain(Distiller):\n"
        "    def __init__(self, student, teacher, cfg):\n"
        "        super().__init__(student, teacher)\n"
        "        self.weight = cfg.Plain.LOSS.WEIGHT\n",
    )
    text = "IMPORTS: [mine.py]\nDISTILLER: {TYPE: Plain}\nPlain:\n  LOSS: {WEIGHT: 2.0}\n"
    cfg = load_config(write(tmp_path, "mine.yaml", text), ["Plain.LOSS.WEIGHT", "3.5"])
    assert cfg.Plain.LOSS.WEIGHT == 3.5


def test_a_failing_import_is_named_with_its_error(tmp_path):
    path = write(tmp_path, "broken.py", "1 / 0\n")
    with pytest.raises(UserError, match=r"broken\.py fails when imported: ZeroDivisionError"):
        load_config("", ["IMPORTS", f"['{path}']"])


def test_empty_values_leave_the_defaults_and_merge_keys_work(tmp_path):
    path = write(
        tmp_path, "a.yaml", "EXPERIMENT:\n  TAG:\nKD:\nSOLVER:\n  <<: {LR: 0.3}\n  EPOCHS: 3\n"
    )
    cfg = load_config(path)
    assert (cfg.EXPERIMENT.TAG, cfg.KD.TEMPERATURE) == ("default", 4.0)
    assert (cfg.SOLVER.LR, cfg.SOLVER.EPOCHS) == (0.3, 3)


def test_imports_of_a_base_are_beside_it_and_add_up(tmp_path):
    (tmp_path / "sub").mkdir()
    for folder, name in (("sub", "one"), (".", "two")):
        code = "from mdistiller.distillers import DISTILLERS, KD\n"
        code += f"DISTILLERS.add('{name}', type('{name}', (KD,), {{}}), config={{'X': 1}})\n"
        write(tmp_path / folder, f"{name}.py", code)
    write(tmp_path / "sub", "base.yaml", "IMPORTS: [one.py]\none: {X: 2}\n")
    path = write(tmp_path, "a.yaml", "_BASE_: sub/base.yaml\nIMPORTS: [two.py]\ntwo: {X: 3}\n")
    cfg = load_config(path)
    assert (cfg.one.X, cfg.two.X) == (2, 3)
    assert [str(tmp_path / "sub" / "one.py"), str(tmp_path / "two.py")] == cfg.IMPORTS


def test_a_teacher_config_beside_the_config_is_found(tmp_path):
    write(tmp_path, "teacher.yaml", "SOLVER: {EPOCHS: 1}\n")
    path = write(tmp_path, "a.yaml", "DISTILLER: {TEACHER_CFG: teacher.yaml}\n")
    assert str(tmp_path / "teacher.yaml") == load_config(path).DISTILLER.TEACHER_CFG


def test_defaults_of_an_undecorated_class(tmp_path):
    code = "from mdistiller.distillers import Distiller\n"
    code += "class Plainer(Distiller):\n    config = {'LOSS': {'WEIGHT': 2.0}}\n"
    write(tmp_path, "mine2.py", code)
    path = write(tmp_path, "mine2.yaml", "IMPORTS: [mine2.py]\n")
    assert load_config(path).Plainer.LOSS.WEIGHT == 2.0
    with pytest.raises(
        UserError, match=r"Plainer\.LOSS\.WEIHT; did you mean 'Plainer\.LOSS\.WEIGHT'"
    ):
        load_config(path, ["Plainer.LOSS.WEIHT", "1"])


def test_frozen_configs_do_not_change():
    cfg = load_config()
    with pytest.raises(AttributeError, match="frozen"):
        cfg.merge_from_list(["SOLVER.LR", "1"])


def test_show_cfg_names_the_run_and_its_method_only(capsys):
    cfg = default_config()
    cfg.merge_from_list(["DISTILLER.TYPE", "DKD"])
    text = show_cfg(cfg)
    assert capsys.readouterr().out.strip() == text.strip()
    assert "WARMUP: 20" in text
    assert "TEMPERATURE" not in text
