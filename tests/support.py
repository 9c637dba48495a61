"""What several test files share."""

import copy
import functools
import json
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import torch
import warm_start
from PIL import Image

from mdistiller.config.safe_yaml import parse_yaml

REPO = Path(__file__).resolve().parents[1]
TOY = str(REPO / "tests" / "toy.py")
DATA = "toy"  # write_config trains on it; in some folders (conftest.py) on tiny16


def unpadded(text):
    """Markdown tables with one space around each cell."""
    return re.sub("[|] +", "| ", re.sub(" +[|]", " |", text))


@functools.cache
def _parsed(text, source=None):
    return parse_yaml(text, source)


def cache_yaml(patch):
    """Parse each YAML text once: for tests that load hundreds of configs on a few bases."""

    def parse(text, source=None):
        return copy.deepcopy(_parsed(text, source))

    patch.setattr("mdistiller.config.files.parse_yaml", parse)


def golden_values(shape, seed):
    """The reference numbers' input generator: values in [-1, 1] from exact integers."""
    count, period = torch.Size(shape).numel(), 1000003
    k = torch.arange(min(count, period), dtype=torch.int64)
    values = 2 * ((7919 * k * k + 104729 * k + 15485863 * seed) % period).double() / period - 1
    return values.repeat(-(-count // period))[:count].reshape(shape)


def write_config(folder, text="", method="NONE", student="resnet8", epochs=2, **distiller):
    """A config over the toy data that trains in seconds; returns its path.

    The run folder is `folder/out/toy/run`. The Baby networks take images of 32 pixels alone.
    """
    data = "toy" if "Baby" in f"{student} {distiller.get('TEACHER')}" else DATA
    lines = "".join(f"  {key}: {json.dumps(value)}\n" for key, value in distiller.items())
    folder = Path(folder)
    (folder / "toy_base.yaml").write_text(
        f"IMPORTS: [{json.dumps(TOY)}]\nDEVICE: cpu\n"
        "EXPERIMENT:\n  PROJECT: toy\n  NAME: run\n"
        f"DATASET:\n  TYPE: {data}\n  TEST:\n    BATCH_SIZE: 60\n"
        f"DISTILLER:\n  TYPE: {method}\n  STUDENT: {student}\n{lines}"
        f"SOLVER:\n  BATCH_SIZE: 32\n  EPOCHS: {epochs}\n  LR: 0.05\n"
        "  LR_DECAY_STAGES: [1]\n  WEIGHT_DECAY: 0.0005\n"
        f"LOG:\n  PREFIX: {json.dumps(str(folder / 'out'))}\n"
    )
    path = folder / "toy.yaml"
    path.write_text(f"_BASE_: toy_base.yaml\n{text}")
    return path


def command(*words, module="train", prefix=(), processes=0, cwd=None):
    """Run tools/MODULE.py in a process of its own, one thread; returns the finished process.

    Args:
        prefix: words before the script; a new Python then runs it.
        processes: how many share the run; without torchrun, which takes seconds to start them.
    """
    script = REPO / "tools" / f"{module}.py"
    if not prefix:
        return run_script(script, *words, cwd=cwd, processes=processes)
    return subprocess.run(
        [*prefix, str(script), *map(str, words)],
        capture_output=True,
        text=True,
        env=_environment(),
        timeout=300,
        cwd=cwd,
    )


def run_script(script, *words, cwd=None, processes=0):
    """As :func:`command`, for a script anywhere, which finds what the tests import."""
    server = _server()
    if server.process.poll() is not None:  # a test was broken off
        _server.cache_clear()
        server = _server()
    environment = _environment()
    assert environment["PYTHONPATH"] == server.environment["PYTHONPATH"], "give it a prefix"
    return server.run([str(script), *map(str, words)], environment, cwd, processes)


def _environment():
    paths = os.pathsep.join(map(str, (REPO, REPO / "tests")))
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    return {**os.environ, **own}


@functools.cache
def _server():
    return warm_start.Server(_environment())


def saved_teacher(folder, model="resnet8", num_classes=10, seed=1, zoo="cifar"):
    """A file with the weights of an untrained network, as a run leaves it; returns its path."""
    from mdistiller.models import get_model_entry

    torch.manual_seed(seed)
    net = get_model_entry(model, zoo)(num_classes=num_classes)
    path = Path(folder) / f"{model}_{num_classes}.pth"
    torch.save({"model": net.state_dict()}, path)
    return path


def image_folder(root, classes=("cat", "dog", "eel"), size=32):
    """Eight training and four validation images a class, each class of its own colour."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 8), ("val", 4)):
        for k, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (size, size, 3), dtype=np.uint8)
                pixels[..., k % 3] += 150
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def same_state(first, second):
    """Whether two state dicts are equal to the bit."""
    return first.keys() == second.keys() and all(
        torch.equal(first[key], second[key]) for key in first
    )
