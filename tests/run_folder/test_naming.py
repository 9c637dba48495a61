"""Names of run folders, and runs that lie where earlier versions put them."""

import json
import shutil

import pytest
from support import TOY, write_config

from mdistiller.cli import train as train_command
from mdistiller.detection.config import load_config as load_detection
from mdistiller.engine.cfg import load_config
from mdistiller.run_folder.naming import experiment_name

DIST = ["DISTILLER.TYPE", "DIST"]
VIT = ["DISTILLER.STUDENT", "timm/vit_tiny_patch16_224"]
FOLDER = ["DATASET.TYPE", "imagefolder", "DATASET.ROOT", "data/my flowers/"]
STEPS = ["SOLVER.LR", "0.1", "LOG.PREFIX", "x", "SOLVER.LR_DECAY_STAGES", "[2, 4]"]
KD = "configs/cifar100/kd.yaml"


def name(file, words=(), load=load_config):
    return experiment_name(load(file, words), words)


def test_folders_are_named_by_method_networks_and_data(tmp_path):
    assert name(KD) == "cifar100_baselines/kd-res32x4-res8x4"
    assert name(KD, STEPS) == "cifar100_baselines/kd-res32x4-res8x4-LR=0.1-LR_DECAY_STAGES=2_4"
    assert name(KD, ["EXPERIMENT.SEED", "1"]).endswith("/kd-res32x4-res8x4-seed=1")
    assert name(KD, [*DIST, *STEPS[:2]]) == "cifar100_baselines/dist-res32x4-res8x4-LR=0.1"
    assert name("", VIT) == "distill/vanilla-vit_tiny_patch16_224-cifar100"
    assert name("", [*DIST, *FOLDER]) == "distill/dist-res50-res32-my_flowers"
    coco = "configs/coco/dkd/DKD-R18-R101.yaml"
    assert name(coco, load=load_detection) == "coco/dkd-R18-R101"
    assert name(coco, DIST, load=load_detection) == "coco/dist-res101-res18"
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: {KD}\nDISTILLER: {{TYPE: DIST}}\n")
    assert name(mine) == "cifar100_baselines/dist-res32x4-res8x4"
    mine.write_text(f"_BASE_: {KD}\nSOLVER: {{LR: 0.1}}\n")
    assert name(mine) == "cifar100_baselines/kd-res32x4-res8x4"


def test_a_name_or_tag_of_your_own_is_taken_as_it_is(tmp_path):
    base, mine = tmp_path / "base.yaml", tmp_path / "mine.yaml"
    base.write_text(f"_BASE_: {KD}\nEXPERIMENT: {{TAG: 'exp:1,b'}}\n")
    mine.write_text("_BASE_: base.yaml\nDISTILLER: {TYPE: DIST}\n")
    for file in (base, mine):
        assert name(file) == "cifar100_baselines/exp:1,b"
        assert name(file, [*VIT, "EXPERIMENT.NAME", "n,1"]) == "cifar100_baselines/n,1"
    assert name(KD, [*DIST, "EXPERIMENT.TAG", "a,b"]) == "cifar100_baselines/a,b-TYPE=DIST"
    assert name(mine, ["EXPERIMENT.NAME", "auto"]).endswith("/dist-res32x4-res8x4")


def test_long_names_end_in_a_hash():
    long = [name(KD, ["DATASET.ROOT", "é" * 300 + end]) for end in "ab"]
    assert long[0] != long[1]
    assert len(long[0].encode()) < 230


def test_runs_of_earlier_versions_are_found_if_they_are_of_the_method(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text(f"_BASE_: {KD}\nDISTILLER: {{TYPE: DIST}}\n")
    words = ["LOG.PREFIX", str(tmp_path), "SOLVER.LR", "0.1", "EXPERIMENT.SEED", "1"]
    old = tmp_path / "cifar100_baselines" / "kd,res32x4,res8x4SOLVER.LR:0.1,EXPERIMENT.SEED:1"
    old.mkdir(parents=True)
    new = "kd-res32x4-res8x4-LR=0.1-seed=1"
    assert name(KD, words).endswith(new)  # nothing has run there
    (old / "config.yaml").write_text(load_config(mine, words).dump())
    assert name(mine, words).endswith(old.name)
    assert name(KD, words).endswith(new)
    (old / "config.yaml").write_text(load_config(KD, words).dump())
    assert name(KD, words).endswith(old.name)
    (tmp_path / "cifar100_baselines" / new).mkdir()
    assert name(KD, words).endswith(new)


def trained(folder, tag, *words):
    """The exit code of a run that is named by a tag, or by what it trains, and an override."""
    text = f"EXPERIMENT: {{NAME: '', TAG: '{tag}'}}\n"
    config = str(write_config(folder, text, epochs=1))
    return train_command.main(["--cfg", config, "SOLVER.LR", "0.02", *words])


def epochs(run):
    return json.loads((run / "summary.json").read_text())["epochs"]


@pytest.mark.parametrize("tag", ["default", "x,res8"])
def test_a_run_of_an_earlier_version_is_resumed_in_its_folder(tmp_path, tag):
    assert trained(tmp_path, tag, "SOLVER.EPOCHS", "1") == 0
    (new,) = (tmp_path / "out" / "toy").iterdir()
    assert not set(new.name.replace(tag, "")) & set(",:")
    old = new.with_name(f"{tag}SOLVER.LR:0.02,SOLVER.EPOCHS:2")
    shutil.move(new, old)
    assert trained(tmp_path, tag, "SOLVER.EPOCHS", "2", "--resume") == 0
    assert epochs(old) == 2
    assert list(old.parent.iterdir()) == [old]


def test_a_folder_is_enough_to_resume_a_run(tmp_path, capsys, monkeypatch):
    """Wherever it has been moved."""
    assert trained(tmp_path, "default") == 0
    (run,) = (tmp_path / "out" / "toy").iterdir()
    monkeypatch.chdir(tmp_path)
    moved = shutil.move(run, tmp_path / "elsewhere")
    capsys.readouterr()
    words = ["--resume", "./elsewhere", "SOLVER.EPOCHS", "2", "--import", TOY]
    assert train_command.main(words) == 0
    assert "epoch 1 done" in capsys.readouterr().out
    assert epochs(moved) == 2
    assert not list(run.parent.iterdir())
    assert train_command.main(["--resume", "out/toy"]) == 2
    assert "--resume: out/toy is not a run folder: it has no config" in capsys.readouterr().err
