"""Commands answer at once: keys and files are checked before torch is imported."""

import json
import re
import subprocess
import sys

import pytest
from support import REPO
from yacs.config import CfgNode

from mdistiller.cli import COMMANDS, download
from mdistiller.config.early import STORED, check, stored_config
from mdistiller.detection.config import default_config as detection_defaults
from mdistiller.distillers import DISTILLERS
from mdistiller.engine.cfg import default_config, load_config
from mdistiller.models import zoo
from mdistiller.models.zoo import LIBRARIES
from mdistiller.registry import UserError, is_builtin

WRITE = "PYTHONPATH=.:tests python tests/config/test_early.py"


def plain(node):
    """A node as JSON: sections that take any key are null."""
    if isinstance(node, CfgNode):
        return None if node.is_new_allowed() else {key: plain(node[key]) for key in node}
    return list(node) if isinstance(node, tuple) else node


def registered():
    """The kind, names and names elsewhere of the registries of this package."""
    tables = {"distillers": DISTILLERS, "releases": download.releases(), "libraries": LIBRARIES}
    tables |= {"zoos": zoo._ZOOS, **zoo._ZOOS}
    return {
        key: [
            table.kind,
            [
                name
                for name, item in table.items()
                if is_builtin(getattr(item, "constructor", item))
            ],
            dict(table.elsewhere),
        ]
        for key, table in tables.items()
    }


def rendered():
    """The file's text, one section a line."""
    kinds = {"train": default_config(), "train_detection": detection_defaults()}
    for name in [name for name, cls in DISTILLERS.items() if not is_builtin(cls)]:
        for cfg in kinds.values():
            cfg.pop(name, None)  # of other tests
    texts = []
    for kind, cfg in kinds.items():
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in plain(cfg).items()]
        texts.append(f'"{kind}": {{\n' + ",\n".join(lines) + "\n}")
    names = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in registered().items()]
    texts.append('"names": {\n' + ",\n".join(names) + "\n}")
    return "{\n" + ",\n".join(texts) + "\n}\n"


def test_the_stored_defaults_are_those_of_the_code():
    assert STORED.read_text() == rendered(), f"run: {WRITE}"
    assert stored_config("train").KD == default_config().KD


@pytest.mark.parametrize(
    "words",
    [
        ["SOLVER.LRR", "1"],
        ["KD.TEMP", "4"],
        ["SOLVER.EPOCHS", "many"],
        ["SOLVER.EPOCHS", "0"],
        ["DISTILLER.TEACHER_CACHE_GB"],
    ],
)
def test_the_early_error_is_that_of_the_full_check(words):
    with pytest.raises(UserError) as full:
        load_config("", words)
    with pytest.raises(UserError, match=re.escape(str(full.value))):
        check("", words)


def test_user_code_is_left_to_the_full_check(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("")
    check("", ["MINE.KEY", "1"], [str(file)])
    (tmp_path / "a.yaml").write_text("IMPORTS: [mine.py]\nMINE: {KEY: 1}\n")
    check(tmp_path / "a.yaml", [])


def test_shipped_configs_pass():
    """One of each folder; all are loaded in test_cfg.py, which checks more."""
    wrong = []
    for path in {path.parent: path for path in (REPO / "configs").rglob("*.yaml")}.values():
        kind = "train_detection" if "coco" in path.parts else "train"
        try:
            check(path, [], kind=kind)
        except UserError as error:
            wrong += [str(error)] if "is a sweep" not in str(error) else []
    assert wrong == []


PROBE = """
import contextlib, io, sys
from mdistiller.cli import main
wrong = []
for words, code in {cases!r}:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        try:
            result = main(words)
        except SystemExit as stop:
            result = stop.code
    loaded = [m for m in ("torch", "torchvision", "timm", "optuna", "matplotlib", "numpy")
              if m in sys.modules]
    if result != code or loaded or "Traceback" in text.getvalue():
        wrong.append((words, result, loaded, text.getvalue()[-300:]))
print(wrong)
sys.exit(bool(wrong))
"""


SWEEPS = ("GRDI: {SOLVER.LR: [1]}", "GRID: {SOLVER.LRR: [1]}", "OVERRIDES: {SOLVER: {LRR: 1}}")


def sweep_file(folder, text):
    file = folder / f"{SWEEPS.index(text)}.yaml"
    file.write_text(f"SWEEP: x\nCONFIG: configs/digits/kd.yaml\n{text}\n")
    return file


def test_help_and_bad_input_come_without_torch(tmp_path):
    """All in one process: a module that one of them imports is seen by all behind it."""
    cases = [(["--help"], 0), (["--version"], 0), (["tain"], 2)]
    cases += [([name, "--help"], 0) for name in COMMANDS]
    cases += [
        (["train", "SOLVER.LRR", "1"], 2),
        (["train", "--cfg", "nothing.yaml"], 2),
        (["train", "--resume", "output/nothing"], 2),
        (["train_detection", "--cfg", "nothing.yaml"], 2),
        (["train_detection", "SOLVER.LRR", "1"], 2),
        (["sweep", "--cfg", "nothing.yaml"], 2),
        *((["sweep", "--cfg", str(sweep_file(tmp_path, text))], 2) for text in SWEEPS),
        (["eval", "nothing"], 2),
        (["eval_detection", "-c", "nothing"], 2),
        (["eval_detection", "--cfg", "nothing.yaml"], 2),
        (["predict", "nothing", "a.png"], 2),
        (["predict", "README.md", "nothing.png"], 2),
        (["predict", "README.md", "README.md", "DATASET.EXIV", "1"], 2),
        (["eval", "-c", "nothing.pth", "-m", "resnet8"], 2),
        (["visualize", "tsne", "nothing", "--out", "a.png"], 2),
        (["export", "nothing"], 2),
        (["report", "nothing"], 2),
        (["convert_checkpoint", "nothing", "out.pth"], 2),
        (["convert_detectron2", "nothing", "out.pth"], 2),
        (["methods", "--only", "DKDD"], 2),
        (["methods"], 0),
        (["models", "resnet9"], 2),
        (["models", "tim/resnet18"], 2),
        (["pairs", "--teachers", "resnet57"], 2),
        (["pairs", "--methods", "KD", "DKD+ATT"], 2),
        (["pairs", "--zoo", "mnist"], 2),
        (["download", "resnet57"], 2),
    ]
    words = [sys.executable, "-m", "mdistiller"]
    code = PROBE.format(cases=cases)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run([*words, "--version"], cwd=REPO, capture_output=True, text=True)
    assert re.fullmatch(r"mdistiller \d+\.\d+\.\d+\n", done.stdout)


if __name__ == "__main__":
    STORED.write_text(rendered())
