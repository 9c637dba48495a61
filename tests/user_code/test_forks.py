"""A made-up fork of the original, in its layout, run by --fork: methods, trainers and defaults."""

import importlib
import json
import re

import pytest
import torch
import yaml
from made_up_fork import FORK
from support import saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.distillers import DISTILLERS, KD, Distiller
from mdistiller.engine.cfg import load_config
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.registry import UserError
from mdistiller.run.batch_items import BatchItems, wanted_items, with_items
from mdistiller.user_code import forks


@pytest.fixture
def fork(tmp_path):
    """The fork's folder."""
    for name, text in FORK.items():
        path = tmp_path / "forked" / "mdistiller" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "forked"


def train(folder, fork, method, *words):
    """The metrics and the recorded config of a run of one epoch with --fork."""
    teacher = str(saved_teacher(folder))
    config = write_config(folder, method=method, epochs=1, TEACHER="resnet8", TEACHER_CKPT=teacher)
    name = re.sub(r"\W", "_", "_".join([method, *words]))
    words = ["--fork", str(fork), "EXPERIMENT.NAME", name, *words]
    assert train_command.main(["--cfg", str(config), *words]) == 0
    run = folder / "out" / "toy" / name
    (row,) = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return row, yaml.safe_load((run / "config.yaml").read_text())


def notes(fork):
    package = forks.fork_package(forks.fork_folder(fork).resolve())
    return vars(importlib.import_module(f"{package}.engine.utils"))["NOTES"]


def test_a_fork_trains_its_own_methods_by_its_own_defaults(fork, tmp_path, capsys):
    _, recorded = train(tmp_path, fork, "KD")
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("fork ")]
    assert "methods KD, KD_ours, VIEWS" in line
    assert "in place of the library's methods: KD;" in line
    assert "trainers ours, alone, pairs;" in line
    assert recorded["KD"] == {"TEMPERATURE": 2, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9}}
    assert (recorded["SOLVER"]["MY_DECAY"], recorded["AUG"]["DEPTH"]) == (1, 3)
    assert recorded["LOG"]["WANDB"] is False
    assert recorded["IMPORTS"][0] == f"{fork}/"


def test_names_of_its_dictionary_and_its_four_item_trainer(fork, tmp_path, capsys):
    row, recorded = train(tmp_path, fork, "KD_ours", "SOLVER.TRAINER", "ours", "CRD.NCE.K", "5")
    assert row["train_loss"] > 0
    assert recorded["KD"]["LOSS"]["KD_WEIGHT"] == 9  # the node that this class reads
    assert notes(fork) == {"contrast": [32, 6], "first": True}
    assert train_command.main(["--fork", str(fork), "SOLVER.TRAINER", "alone"]) == 2
    assert "SOLVER.TRAINER alone: Alone does not derive from" in capsys.readouterr().err


def test_two_views_by_its_names(fork, tmp_path):
    train(tmp_path, fork, "VIEWS")
    assert notes(fork)["same"] is False


def test_a_plain_step_of_its_base_trainer_is_the_librarys(fork):
    load_config("", imports=[f"{fork}/"])
    assert trainer_dict["base"] is BaseTrainer
    path = fork.with_name("other")
    fork.rename(path)
    text = (path / "mdistiller/engine/trainer.py").read_text()
    text = text.replace("loss.backward()", "(0.5 * loss).backward()", 1)
    (path / "mdistiller/engine/trainer.py").write_text(text)
    load_config("", imports=[f"{path}/"])
    assert issubclass(trainer_dict["base"], BaseTrainer)
    assert "train_iter" in vars(trainer_dict["base"])


INIT = """
        self.cfg = cfg
        self.epoch, self.stage = 7, "of the fork"  # the library has these
        folder = "a local name"
        self.tf_writer = open(folder)
        self.place = folder
        self.decay = cfg.SOLVER.MY_DECAY
"""


def test_attributes_that_only_the_fork_sets_are_there(fork, tmp_path):
    file = fork / "mdistiller" / "engine" / "trainer.py"
    text = file.read_text().replace("        raise NotImplementedError\n", INIT)
    noted = 'note("set", [self.decay, self.stage, hasattr(self, "place")])'
    file.write_text(text.replace('note("first"', f'{noted}\n        note("first"'))
    train(tmp_path, fork, "KD_ours", "SOLVER.TRAINER", "ours", "CRD.NCE.K", "5")
    assert notes(fork)["set"] == [1, "", False]


def test_fork_in_a_config_lies_under_its_values(fork, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("FORK: forked\nDISTILLER: {TYPE: KD}\nKD: {LOSS: {KD_WEIGHT: 7.5}}\n")
    cfg = load_config(path, ["KD.TEMPERATURE", "2.5"])
    assert (cfg.KD.TEMPERATURE, cfg.KD.LOSS.KD_WEIGHT, cfg.SOLVER.EPOCHS) == (2.5, 7.5, 2)
    path.write_text("KD: {LOSS: {KD_WEIGHT: 7}}\n")
    assert load_config(path, ["FORK", str(fork)]).KD.LOSS.KD_WEIGHT == 7
    with pytest.raises(UserError, match=r"KD\.TEMPRATURE; did you mean 'KD\.TEMPERATURE'"):
        load_config(path, ["FORK", str(fork), "KD.TEMPRATURE", "3"])


def test_each_config_of_a_process_gets_the_classes_that_it_names(fork, tmp_path, capsys):
    """A sweep loads all its configs before it trains the first one."""
    other = tmp_path / "other"
    for path in sorted(fork.rglob("*.py")):
        copy = other / path.relative_to(fork)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text().replace("KD_ours", "KD_theirs"))
    file = fork / "mdistiller" / "distillers" / "Views.py"
    configs = [load_config("", imports=names) for names in ([f"{fork}/"], [f"{other}/"], [])]
    assert capsys.readouterr().out.count("in place of the library's methods: KD;") == 2
    configs.append(load_config("", imports=[str(file)]))
    found = []
    for cfg in [*configs, *configs]:
        with forks.active(cfg.IMPORTS):
            found.append((DISTILLERS["KD"], *(f"KD_{x}" in DISTILLERS for x in ("ours", "theirs"))))
    first, second, library, single = found[:4]
    assert found[4:] == found[:4]
    assert first[1:] == (True, False)
    assert second[1:] == (False, True)
    assert first[0] is not second[0]
    assert library == single == (KD, False, False)
    forks.activate(())
    assert DISTILLERS.config["KD"]["TEMPERATURE"] == 4.0
    assert trainer_dict["base"] is BaseTrainer


def test_a_trainer_of_another_method_ends_in_a_line(fork, tmp_path, capsys):
    config = write_config(tmp_path, method="NONE", epochs=1)
    assert (
        train_command.main(
            [
                "--cfg",
                str(config),
                "--fork",
                str(fork),
                "DISTILLER.TYPE",
                "NONE",
                "SOLVER.TRAINER",
                "pairs",
            ]
        )
        == 2
    )
    error = capsys.readouterr().err
    assert "Vanilla.forward_train needs image, but the trainer gives it a, b, target" in error


BROKEN = {
    "FORK nowhere": "FORK: no folder nowhere",
    "FORK {empty}": "empty/ has no folder mdistiller/distillers",
    "FORK /": "FORK must be the folder of a fork",
    "FORK {syntax}": "distillers fails when imported: SyntaxError",
    "FORK {typed}": "cfg.py: SOLVER.LR must be a finite number, got 'fast'",
}


@pytest.mark.parametrize("words", BROKEN)
def test_what_is_no_fork_is_refused_in_a_line(words, fork, tmp_path):
    (tmp_path / "empty").mkdir()
    places = {"empty": tmp_path / "empty"}
    for name, file, text in (
        ("syntax", "distillers/KD.py", "class KD(:\n"),
        ("typed", "engine/cfg.py", "CFG = {'SOLVER': {'LR': 'fast'}}\n"),
    ):
        places[name] = tmp_path / name
        for path in sorted(fork.rglob("*.py")):
            copy = places[name] / path.relative_to(fork)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text if path.match(file) else path.read_text())
    with pytest.raises(UserError) as caught:
        load_config("", words.format(**places).split(" ", 1))
    assert BROKEN[words] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_file_of_a_fork_has_its_helpers_and_defaults(fork, tmp_path, capsys):
    """Under IMPORTS: nothing else of the fork is taken."""
    file = fork / "mdistiller" / "distillers" / "KD.py"
    cfg = load_config("", imports=[str(file)])
    assert cfg.KD == {"TEMPERATURE": 2, "LOSS": {"CE_WEIGHT": 0.1, "KD_WEIGHT": 9}}
    assert "AUG" not in cfg
    assert "KD_ours" not in DISTILLERS
    assert "in place of the library's methods: KD" in capsys.readouterr().out
    assert load_config("", imports=[str(file)]).KD.TEMPERATURE == 2  # nothing is imported anew


def test_a_users_class_takes_a_built_in_name_but_not_its_defaults(fork, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from ._base import Distiller\n"
        "class DKD(Distiller):\n"
        "    def __init__(self, student, teacher, cfg):\n"
        "        super().__init__(student, teacher)\n"
        "        self.alpha = cfg.DKD.ALPHA\n"
    )
    cfg = load_config("", ["DKD.BETA", "2"], imports=[str(tmp_path / "mine.py")])
    assert cfg.DKD == {"BETA": 2}
    assert "in place of the library's methods: DKD" in capsys.readouterr().out
    with pytest.raises(UserError, match="DKD reads the config key ALPHA, which is not set"):
        DISTILLERS["DKD"].build(None, None, cfg, 10)


def test_trainers_that_cannot_be_imported_leave_methods_and_defaults(fork, capsys):
    (fork / "mdistiller" / "engine" / "trainer.py").write_text("import of_nobody\n")
    assert load_config("", imports=[f"{fork}/"]).KD.LOSS.KD_WEIGHT == 9
    assert "no trainers: FORK: " in capsys.readouterr().out
    assert "ours" not in trainer_dict


TAKEN_APART = {
    "image, target, index = data": BatchItems(),
    "image, target, index, sample_idx = data": BatchItems(contrast=True),
    "(image_w, image_s), target, index = data": BatchItems(two_views=True),
    "image_w, image_s, target, index = data": BatchItems(two_views=True, flat=True),
    "img1, img2, y, i, contrast = data": BatchItems(two_views=True, flat=True, contrast=True),
    "image, target, index = data; weak, strong = image": BatchItems(two_views=True),
    "image, target, index = data; image_a, image_b = image[0], image[1]": BatchItems(
        two_views=True
    ),
    "self.distiller(image_weak=1, image_strong=2)": BatchItems(two_views=True),
}


def made(tmp_path, line):
    """A user's trainer with this line in its step."""
    text = f"class T(Base):\n    def train_iter(self, data, epoch, meters):\n        {line}\n"
    (tmp_path / "step.py").write_text(text)
    scope = {"Base": BaseTrainer, "__name__": "step"}
    exec(compile(text, tmp_path / "step.py", "exec"), scope)
    return scope["T"]


@pytest.mark.parametrize("line", TAKEN_APART)
def test_a_trainer_gets_the_items_that_it_takes_a_batch_apart_into(line, tmp_path):
    want = TAKEN_APART[line]
    assert wanted_items(made(tmp_path, line), KD) == want
    weak, strong, target, index = (
        torch.zeros(4, 3, 1, 1),
        torch.ones(4),
        torch.ones(4),
        torch.arange(4),
    )
    data = TensorItems([((weak, strong) if want.two_views else weak, target, index)])
    (batch,) = with_items(data, want, load_config("", ["CRD.NCE.K", "2"]))
    assert len(batch) == 3 + want.flat + want.contrast
    assert batch[-1].shape == ((4, 3) if want.contrast else (4,))
    if want.contrast:  # the image itself, then images of other classes
        assert torch.equal(batch[-1][:, 0], index)
        assert (data.dataset.targets[batch[-1][:, 1:]] != data.dataset.targets[index, None]).all()


class Targets:
    targets = torch.tensor([0, 0, 1, 1])

    def __len__(self):
        return 4


class TensorItems(list):
    dataset = Targets()


def test_items_that_no_loader_gives_are_refused_and_a_method_may_ask_too(tmp_path):
    with pytest.raises(UserError, match="T takes a batch apart into 6 items"):
        wanted_items(made(tmp_path, "image, target, index, a, b, c = data"), KD)

    class Asks(Distiller):
        def forward_train(self, image, target, contrastive_index, **kwargs):
            raise NotImplementedError

    assert wanted_items(BaseTrainer, Asks) == BatchItems(contrast=True)
    assert not wanted_items(BaseTrainer, DISTILLERS["CRD"]).contrast  # draws its own


def test_what_a_program_puts_into_the_tables_itself_stays(fork, monkeypatch):
    """As a test does that replaces a class, in a process that has loaded a fork before."""

    class Mine(KD):
        pass

    load_config("", ["FORK", str(fork)])
    forks.activate(())
    assert DISTILLERS["KD"] is KD
    monkeypatch.setitem(DISTILLERS, "KD", Mine)
    with forks.active(()):
        assert DISTILLERS["KD"] is Mine
    assert DISTILLERS["KD"] is Mine
