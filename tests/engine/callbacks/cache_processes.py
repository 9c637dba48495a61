"""Runs in several processes that share a teacher cache. Argument: a folder with the toy config.

Processes are forked, as importing takes longer than all runs.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from mdistiller.cli import sweep
from mdistiller.dataset import DATASETS
from mdistiller.engine.cfg import load_config
from mdistiller.run.train import train

FORK = multiprocessing.get_context("fork")


def rank(folder, cache, number):
    """One of two processes of a run."""
    torch.set_num_threads(1)  # before any other thread asks for the pool
    os.environ["LOCAL_RANK"] = str(number)
    meeting = f"file://{folder}/meeting_{cache}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=2)
    words = ["DISTILLER.TEACHER_CACHE", cache, "EXPERIMENT.NAME", cache]
    train(load_config(folder / "toy.yaml", words))
    dist.destroy_process_group()


def trials(folder, jobs, *temperatures):
    """A sweep over temperatures, by `jobs` processes."""
    path = folder / "s.yaml"
    path.write_text(f"SWEEP: s\nCONFIG: toy.yaml\nGRID:\n  KD.TEMPERATURE: {list(temperatures)}\n")
    words = ["DATASET.AUGMENT", "none", "DISTILLER.TEACHER_CACHE", "disk"]
    out = str(folder / "sweep")
    return sweep.main(["--cfg", str(path), "--out", out, "--jobs", str(jobs), *words])


if __name__ == "__main__":
    torch.set_num_threads(1)
    DATASETS["digits"]().load(None, "train", None)  # imports what reads them, once
    multiprocessing.get_context = lambda kind: FORK
    folder = Path(sys.argv[1])
    codes = []
    for cache in ("disk", "memory"):
        ranks = [FORK.Process(target=rank, args=(folder, cache, number)) for number in (0, 1)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
            codes.append(process.exitcode)
    codes += [trials(folder, 2, 1, 4), trials(folder, 1, 1, 4, 2)]
    sys.exit(any(codes))
