"""What the tests of the teacher cache share: runs with it, and their hits."""

import json
from unittest import mock

import torch
from support import saved_teacher, write_config

from mdistiller.cli import train as train_command
from mdistiller.dataset import load_data
from mdistiller.engine.callbacks.teacher_cache import TeacherCache
from mdistiller.engine.cfg import load_config
from mdistiller.run.build import build_distiller

CPU = torch.device("cpu")


def config(folder, method="KD", epochs=2, text=""):
    """The toy config, of 9 views an image, with a teacher; returns its path."""
    folder.mkdir(exist_ok=True)
    teacher = {"TEACHER": "resnet8", "TEACHER_CKPT": str(saved_teacher(folder))}
    return write_config(folder, text, method, "resnet8", epochs, **teacher)


def train(folder, cache="none", *words, name="run", **settings):
    """Train; returns the rows of metrics.jsonl and the student's weights."""
    path = config(folder, **settings)
    words = ["EXPERIMENT.NAME", name, "DISTILLER.TEACHER_CACHE", cache, *map(str, words)]
    assert train_command.main(["--cfg", str(path), *words]) == 0
    run = folder / "out" / "toy" / name
    return rows_of(run), torch.load(run / "student_latest", weights_only=True)["model"]


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def hits(rows):
    return [row["teacher_hits"] for row in rows]


def drawn_hits(path, epochs, kept=160, ranks=1, shared=True):
    """Percentages that a plain count over the drawn views gives."""
    loaders = []
    for rank in range(ranks):
        as_rank = {"rank": lambda rank=rank: rank, "world_size": lambda: ranks}
        with mock.patch.multiple("mdistiller.runtime", **as_rank):
            loaders.append(load_data(load_config(path), CPU).train)
    seen, found = [set() for _ in loaders], []
    for epoch in range(1, epochs + 1):
        drawn = []
        for loader in loaders:
            loader.set_epoch(epoch)
            drawn.append({(int(i), int(loader.views[i])) for _, _, index in loader for i in index})
        known = [
            len(pairs & (set().union(*seen) if shared else own))
            for pairs, own in zip(drawn, seen, strict=True)
        ]
        found.append(100 * sum(known) / 160)
        for own, pairs in zip(seen, drawn, strict=True):
            own |= {pair for pair in pairs if pair[0] < kept}
    return found


def cache_of(folder, cache="disk", method="KD", text="", **changes):
    """The cache of a run, as the trainer has it, after the start of its first epoch."""
    words = [str(word) for pair in changes.items() for word in pair]
    path = config(folder, method, text=text)
    cfg = load_config(path, ["DISTILLER.TEACHER_CACHE", cache, *words])
    data = load_data(cfg, CPU)
    data.train.set_epoch(1)
    cache = TeacherCache(cfg, build_distiller(cfg, data, CPU).train(), data.train)
    cache.begin()
    return cache


def fill(cache):
    """An epoch of its own; the percentage of hits."""
    for step in range(len(cache.loader)):
        cache.rows(step)
    return cache.finish()["teacher_hits"]


def names(folder):
    return {path.name for path in (folder / "out" / "teacher_cache").glob("*.logits")}
