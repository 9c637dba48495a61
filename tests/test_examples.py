"""The commands of own_code.md, own_backbone.md and examples/, run in a folder of a user."""

import json
import re
import shlex
import shutil

import pytest
import torch
from PIL import Image
from support import REPO, TOY, run_script, saved_teacher

from mdistiller.dataset import AUGMENTS, DATASETS
from mdistiller.distillers import DISTILLERS
from mdistiller.models import cifar_model_dict

DOCS = REPO / "docs"
EXAMPLES = DOCS / "examples"
EXTEND = DOCS / "extend"
PAGES = {name: (EXTEND / name).read_text() for name in ("own_code.md", "own_backbone.md")}
RUN = """
import json, sys, torch
from mdistiller.cli import main
torch.set_num_threads(1)
for words in json.loads(sys.argv[1]):
    print("$", *words, flush=True)
    if main(words):
        sys.exit(1)
"""


def commands(page, config):
    """The words of a page's `mdistiller` commands about a config or its runs."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGES[page], re.DOTALL)
    lines = next(block for block in blocks if f"--cfg {config}" in block).strip().splitlines()
    assert all(line.startswith("mdistiller ") for line in lines)
    return [shlex.split(line)[1:] for line in lines]


def python(folder, script, *words):
    """Run a script in a folder outside the checkout; returns what it printed."""
    done = run_script(folder / script, *words, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def follow(folder, page, config, *more):
    """Do what a section says, training for one epoch and with `more` in each training."""
    return execute(folder, commands(page, config), *more)


def execute(folder, lines, *more):
    """Run words of commands in one process, training as `follow`; returns what they printed."""
    small = [*more, "SOLVER.EPOCHS", "1", "DEVICE", "cpu"]
    extra = {"train": small, "sweep": ["--jobs", "1", *small]}
    extra["export"] = ["--no-latency", "--formats", "safetensors"]
    words = [[*line, *extra.get(line[0], [])] for line in lines]
    script = folder.parent / "run.py"
    script.write_text(RUN)
    done = run_script(script, json.dumps(words), cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def copy_examples(folder):
    """Copy the files of all examples into a new folder."""
    folder.mkdir()
    for path in files_of_examples():
        shutil.copy(path, folder)
    return folder


def files_of_examples():
    return [path for path in EXAMPLES.glob("*/*") if path.suffix in (".py", ".yaml")]


@pytest.fixture
def folder(tmp_path):
    """A user's folder, with the examples copied into it."""
    return copy_examples(tmp_path / "mine")


def metrics(run):
    (row,) = (run / "metrics.jsonl").read_text().splitlines()
    return json.loads(row)


def facts(run):
    return json.loads((run / "run.json").read_text())["data"]


def state(path):
    return torch.load(path, weights_only=True)["model"]


def test_nothing_of_the_examples_is_in_the_package():
    assert "shells" not in DATASETS
    assert "COSINE" not in DISTILLERS
    assert "plain_small" not in cifar_model_dict


def test_own_data(folder):
    python(folder, "draw_shells.py", "data/shells")
    follow(folder, "own_code.md", "own_folder.yaml")
    follow(folder, "own_code.md", "own_dataset.yaml")
    out = folder / "output"
    for run in (out / "folder" / "dkd", out / "shells" / "crd", out / "shells" / "kd"):
        assert facts(run)["classes"] == ["cockle", "limpet", "whelk"]
        assert facts(run)["mean"] == pytest.approx([0.363] * 3, abs=0.01)
        assert metrics(run)["train_loss_kd"] > 0
        teacher = state(run.parent / "teacher" / "student_latest")
        for key, value in state(run / "latest").items():
            if key.startswith("teacher."):
                assert torch.equal(value, teacher[key.removeprefix("teacher.")])
    crd = state(out / "shells" / "crd" / "latest")
    banks = [value for key, value in crd.items() if value.ndim == 2 and len(value) == 120]
    assert len(banks) == 2  # a row for each of the 120 training images, of either network
    assert not any(
        len(value) == 120
        for value in state(out / "shells" / "kd" / "latest").values()
        if value.ndim
    )


def table():
    """The files, their lines as text and the commands of each row of examples/README.md."""
    for line in (EXAMPLES / "README.md").read_text().splitlines():
        if line.startswith("| ") and not line.startswith("| what "):
            _, files, lines, command = line.strip("| ").split(" | ")
            paths = [EXAMPLES / link for link in re.findall(r"\((\S+)\)", files)]
            yield paths, lines, re.findall(r"`([^`]+)`", command)


def test_the_table_of_examples_has_every_file_its_lines_and_its_command():
    for files, lines, found in table():
        texts = [path.read_text().splitlines() for path in files]
        assert lines == " + ".join(str(sum(map(bool, text))) for text in texts), files
        comments = [line[2:] for line in texts[-1] if line.startswith("# ")]
        assert found == comments, files
    assert {path for files, *_ in table() for path in files} == {*files_of_examples()}


def test_each_folder_of_examples_stands_for_itself():
    for path in files_of_examples():
        named = re.findall(r'"(own_\w+\.\w+)"', path.read_text())
        assert [name for name in named if not path.with_name(name).is_file()] == [], path


@pytest.fixture(scope="module")
def researcher(tmp_path_factory):
    """A user's folder in which the table's commands have run; `still` is `cosine` at no rate."""
    folder = copy_examples(tmp_path_factory.mktemp("researcher") / "mine")
    lines = [shlex.split(line)[1:] for *_, found in table() for line in found]
    assert [line[0] for line in lines] == ["train", "sweep", "report", "train", "train"]
    assert lines[0][-1] == "cosine"
    lines.append([*lines[0][:-1], "still", "SOLVER.LR", "1e-12"])
    teacher = ["DISTILLER.TEACHER_CKPT", str(saved_teacher(folder, "resnet20"))]
    execute(folder, lines, "DATASET.TYPE", "tiny16", "--import", TOY, *teacher)
    return folder


def test_own_method(researcher):
    runs = researcher / "output" / "digits"
    row = metrics(runs / "cosine")
    assert row["train_loss_kd"] == pytest.approx(3.0 * (1 - row["train_cosine"]), rel=1e-4)
    trained, start = (state(runs / name / "latest")["embed.weight"] for name in ("cosine", "still"))
    assert 1e-4 < (trained - start).abs().max() < 0.1  # two draws differ by up to 0.25
    teacher = state(researcher / "resnet20_10.pth")
    assert set(state(runs / "cosine" / "student_latest")) == set(teacher) - _deeper(teacher)


def test_own_study(researcher):
    latex = (researcher / "study.tex").read_text()
    body = re.search(
        r"\\begin\{tabular\}\{lrrrr\}\n.*\\midrule\n(.*)\\bottomrule\n\\end\{tabular\}\n$",
        latex,
        re.S,
    )[1]
    rows = [re.fullmatch(r"(\w+) & 3( & [^&]+){3} \\\\", line) for line in body.splitlines()]
    assert sorted(row[1] for row in rows) == ["COSINE", "DKD", "KD", "NONE"]
    assert all(row[0].count("$") % 2 == 0 and r"\pm" in row[0] for row in rows)
    runs = [path.parent for path in researcher.glob("output/sweeps/study/*/*/metrics.jsonl")]
    assert len(runs) == 12
    assert sum("train_cosine" in metrics(run) for run in runs) == 3


def test_own_hook(researcher):
    run = researcher / "output" / "digits" / "hook"
    weights = state(run / "student_latest")
    norms = [v.norm() for k, v in weights.items() if k.endswith(("weight", "bias"))]
    assert metrics(run)["weight_norm"] == pytest.approx(float(torch.stack(norms).norm()), rel=1e-4)


def test_own_optimizer_schedule_augmentation_network_and_trainer(researcher):
    run = researcher / "output" / "digits" / "training"
    latest = torch.load(run / "latest", weights_only=True)
    assert latest["settings"]["optimizer"] == "SignSGD"
    assert latest["scheduler"]["end_factor"] == 0.01
    assert metrics(run)["lr"] == pytest.approx(0.001 * (1 - 0.99 * 2 / 3))  # of the third step
    config = (run / "config.yaml").read_text()
    assert "AUGMENT: crop_negative" in config
    assert "TRAINER: noisy" in config
    assert state(run / "student_latest")["6.weight"].shape == (10, 64)  # own_network.py's
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(AUGMENTS, "crop_negative", None)
        del AUGMENTS["crop_negative"]
        exec((EXAMPLES / "training" / "own_augment.py").read_text(), {})
        augment = AUGMENTS["crop_negative"]((8, 8))
    image = torch.arange(3 * 64, dtype=torch.uint8).view(1, 3, 8, 8)
    parameters = torch.tensor([[1, 1, 0], [1, 1, 1]])
    same, negative = augment.apply(
        augment.store(image.expand(2, 3, 8, 8)), parameters, torch.arange(2)
    )
    assert torch.equal(same, image[0])
    assert torch.equal(negative, 255 - image[0])
    assert augment.num_views == 18
    assert augment.views(parameters).tolist() == [8, 9]


def _deeper(of_resnet20):
    """What a resnet20 has and a resnet8 has not: all but the first block of each stage."""
    return {key for key in of_resnet20 if re.match(r"layer\d\.[1-9]", key)}


def test_own_backbone(folder):
    toy = ["DATASET.TYPE", "toy", "--import", TOY]
    printed = follow(folder, "own_backbone.md", "own_backbone.yaml", *toy)
    runs = folder / "output" / "plain"
    teacher = state(runs / "teacher" / "student_latest")
    assert teacher["stage3.3.weight"].shape == (128, 128, 3, 3)
    for method in ("reviewkd", "fitnet", "ofd"):
        assert metrics(runs / method)["train_loss_kd"] > 0
        whole = state(runs / method / "latest")
        assert torch.equal(whole["teacher.stage3.3.weight"], teacher["stage3.3.weight"])
        assert whole["student.stage3.0.weight"].shape == (32, 16, 3, 3)
    assert "plain_small on digits (360 images): top-1" in printed
    deploy = folder / "deploy"
    text = (deploy / "README.md").read_text()
    assert "import_user_modules(['own_backbone.py'])  # where plain_small is registered" in text
    shutil.copy(folder / "own_backbone.py", deploy)
    Image.new("RGB", (32, 32)).save(deploy / "image.jpg")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (deploy / "use.py").write_text("\n".join([*blocks, "print(tuple(logits.shape))"]))
    assert python(deploy, "use.py").endswith("\n(1, 10)\n")
