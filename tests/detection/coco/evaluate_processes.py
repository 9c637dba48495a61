"""Evaluates the same detections in one process and in several; run by test_evaluate."""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from detections import noisy

from mdistiller.detection.batches import ValBatches
from mdistiller.detection.coco.dataset import CocoDetectionSet
from mdistiller.detection.coco.evaluate import CocoEvaluator
from mdistiller.registry import UserError
from mdistiller.runtime import rank, world_size


def measure(folder):
    """Numbers of all processes; the last image is seen by each, as a padded sampler would do."""
    data = CocoDetectionSet(folder / "val", folder / "val.json", masks=True)
    evaluator = CocoEvaluator(data, masks=True)
    for _, targets in ValBatches(data, 2, min_size=48):
        evaluator.add(targets, [noisy(data, target["image_id"]) for target in targets])
    last = data.image_id(len(data) - 1)
    evaluator.add([{"image_id": last}], [noisy(data, last)])
    numbers = evaluator.summarize()
    (folder / f"numbers{world_size()}_{rank()}.json").write_text(json.dumps(numbers))
    return evaluator


def fail(folder, evaluator):
    """The first process cannot read the truth: the others hear of it."""
    if rank() == 0:
        evaluator.dataset.annotations.path = folder / "none.json"
    try:
        evaluator.summarize()
    except UserError as error:
        (folder / f"error_{rank()}").write_text(str(error))


def start(folder, number, world):
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(number)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=world)
    fail(folder, measure(folder))
    dist.destroy_process_group()


if __name__ == "__main__":
    place, world = Path(sys.argv[1]), int(sys.argv[2])
    measure(place)
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=start, args=(place, n, world)) for n in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(any(process.exitcode for process in processes))
