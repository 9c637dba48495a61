"""The Python API, by the code of docs/extend/python.md and of its notebook.

`python tests/test_python_api.py` writes the notebook from the page.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPO, TOY, saved_teacher

import mdistiller
from mdistiller import api
from mdistiller.distillers import DISTILLERS
from mdistiller.registry import UserError

PAGE, NOTEBOOK = (REPO / "docs" / "extend" / f"python.{kind}" for kind in ("md", "ipynb"))


def notebook():
    """The page as a notebook: its blocks are the code cells, the text between them the others."""
    cells = []
    for k, text in enumerate(re.split(r"```python\n(.*?)```\n", PAGE.read_text(), flags=re.DOTALL)):
        lines = text.strip().splitlines(keepends=True)
        cell = {"cell_type": "markdown", "id": f"cell-{k}", "metadata": {}, "source": lines}
        code = {"cell_type": "code", "execution_count": None, "outputs": []}
        cells += [cell | (code if k % 2 else {})] if lines else []
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    facts = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def test_the_import_loads_neither_torch_nor_the_package():
    code = (
        "import sys, mdistiller; dir(mdistiller); print([m for m in sys.modules if 'torch' in m])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout == "[]\n", done.stderr
    assert {"train", "evaluate", "load", "Distiller", "Hook"} <= set(dir(mdistiller))
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = mdistiller.fit


def test_the_notebook_is_the_page_and_its_cells_run(tmp_path, monkeypatch, capsys):
    """With one epoch on few digits, under an untrained teacher."""
    assert NOTEBOOK.read_text() == notebook(), "run: python tests/test_python_api.py"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(REPO / "configs")
    small = {"DATASET.TYPE": "toy", "SOLVER.EPOCHS": 1, "DEVICE": "cpu"}
    small["DISTILLER.TEACHER_CKPT"] = str(saved_teacher(tmp_path, "resnet20"))
    train = api.train

    def train_small(cfg, overrides, **more):
        return train(cfg, {**overrides, **small}, imports=[TOY], **more)

    monkeypatch.setattr(api, "train", train_small)
    names = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    DISTILLERS.pop("LOGIT_MSE")
    run = names["run"]
    assert run.folder == Path("output/digits/python")
    assert run.summary == json.loads((run.folder / "summary.json").read_text())
    assert not run.student.training
    assert len(names["answer"].top) == 3
    assert names["first"].top == names["second"].top
    assert dict(names["first"].top[:3]) == pytest.approx(dict(names["answer"].top))
    assert names["found"]["top1"] == pytest.approx(run.summary["best_acc"])
    (row,) = (names["hooked"].folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["weight_norm"] > 1
    (row,) = (names["mine"].folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["train_loss_kd"] > 0
    assert names["pupil"][1].weight.grad is not None
    assert names["teacher"][1].weight.grad is None


def test_a_hook_that_a_config_names_wrongly_is_one_line(monkeypatch):
    monkeypatch.setitem(mdistiller.HOOKS, "weight_norm", mdistiller.Hook)
    monkeypatch.setitem(mdistiller.HOOKS, "other", dict)
    monkeypatch.setitem(mdistiller.HOOKS, "asks", lambda number: None)
    for name, message in (
        ("weight_norms", r"unknown hook \(HOOKS\) 'weight_norms'; did you mean 'weight_norm'"),
        ("other", "HOOKS: other is a dict, not a mdistiller.Hook"),
        ("asks", "HOOKS: asks must take no arguments"),
    ):
        with pytest.raises(UserError, match=message):
            mdistiller.train({"HOOKS": [name]})


if __name__ == "__main__":
    NOTEBOOK.write_text(notebook())
