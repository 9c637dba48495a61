"""Runs that must not depend on how many processes share them.

Arguments: a folder, which has a teacher in `resnet8_10.pth`, and numbers of processes. The first
process of W leaves in `FOLDER/W/` a run folder for every case, and `seen.json`. Processes are
forked, as importing takes longer than all runs.
"""

import json
import multiprocessing
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from support import golden_values, write_config
from torch import nn

from mdistiller.dataset import DATASETS, load_data
from mdistiller.dataset.sampler import rank_slice
from mdistiller.distillers import Vanilla
from mdistiller.distributed import sum_over_ranks
from mdistiller.engine.cfg import load_config
from mdistiller.engine.trainer import BaseTrainer, trainer_dict
from mdistiller.networks.sync_bn import synchronize_batch_norm
from mdistiller.run.train import train
from mdistiller.runtime import rank, world_size

MICRO_BATCH = 24  # of all processes; 54 images: two of them and one of 6, in groups of 2
CRD = "CRD:\n  NCE: {K: 16}\n  FEAT: {DIM: 8}\n"
CASES = {
    "KD": {"method": "KD", "text": "  EMA: 0.5\n"},
    "CRD": {"method": "CRD", "text": CRD},
    "SP": {"method": "SP", "text": "SP:\n  LOSS: {FEAT_WEIGHT: 10.0}\n"},
    "PSKD": {"method": "PSKD"},
    "DML": {"method": "DML", "text": "DISTILLER: {PEERS: [BabyStudent, BabyStudentReLU]}\n"},
    "TEACHERS": {"method": "CRD", "text": f"{CRD}DISTILLER: {{TEACHERS: [TEACHER, TEACHER]}}\n"},
    "DOT": {"method": "KD", "trainer": "dot"},
    "DEEPKD": {"method": "KD", "trainer": "deepkd", "text": "  DEEPKD: {TOPK: 4}\n", "rate": 0.02},
    "SYNC_BN": {"method": "KD", "student": "resnet8", "text": "  SYNC_BN: True\n", "rate": 0.01},
}
MANY = ("SYNC_BN",)  # of four processes, this alone: it takes most
SEEN = []


@trainer_dict.register("recorded")
class Recorded(BaseTrainer):
    """Keeps which samples came, and settles CRD's negatives by the sample, not by the process."""

    def measure(self, output, inputs):
        SEEN.extend(inputs["index"].tolist())
        return super().measure(output, inputs)

    def batch_inputs(self, data, epoch):
        inputs = super().batch_inputs(data, epoch)
        rows = []
        for index in inputs["index"].tolist():
            generator = torch.Generator().manual_seed(1000 * epoch + index)
            others = torch.randint(1, self.train_loader.num_data, (16,), generator=generator)
            rows.append([index, *((index + others) % self.train_loader.num_data).tolist()])
        return {**inputs, "contrastive_index": torch.tensor(rows)}


def config(folder, method, student="BabyStudent", text="", trainer="recorded", rate=0.1):
    folder.mkdir(parents=True, exist_ok=True)
    file = str(folder.parents[1] / "resnet8_10.pth")
    text = text.replace("TEACHER,", f"{{NAME: resnet8, CKPT: '{file}', WEIGHT: 3}},")
    text = text.replace("TEACHER]", f"{{NAME: resnet8, CKPT: '{file}'}}]")
    write_config(
        folder,
        method=method,
        student=student,
        epochs=1,
        TEACHER="resnet8",
        TEACHER_CKPT=file,
        text="DATASET: {TYPE: few, VAL_SPLIT: 10}\n"
        f"SOLVER:\n  TRAINER: {trainer}\n  LR: {rate}\n"
        f"  BATCH_SIZE: {MICRO_BATCH // world_size()}\n  ACCUMULATE: 2\n"
        f"  CLIP_GRAD_NORM: 1.0\n{text}",
    )


def from_all(items):
    """The items of all processes, in rank order."""
    parts = [None] * world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]


def normalized():
    """Three batch norms on 9 rows, in float64: what one step of them gives.

    The second has neither parameters nor running statistics.
    """
    torch.manual_seed(0)
    last = nn.BatchNorm1d(16, momentum=None, affine=False)
    bare = nn.BatchNorm2d(4, affine=False, track_running_stats=False)
    layers = [nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), bare, nn.Flatten(), last]
    net = nn.Sequential(*layers).double()
    synchronize_batch_norm(Vanilla(net))
    image, weight = golden_values((9, 3, 4, 4), 1), golden_values((9, 16), 2)
    mine = slice(*rank_slice(9, rank(), world_size()))
    own = image[mine].clone().requires_grad_()
    output = net(own)
    (output * weight[mine]).sum().backward()
    gradients = [sum_over_ranks(parameter.grad) for parameter in net.parameters()]
    rows = from_all(list(zip(output.detach(), own.grad, strict=True)))
    values = [torch.stack(column) for column in zip(*rows, strict=True)]
    values += gradients + [buffer.double() for buffer in net.buffers()]
    net.eval()
    return [*values, net(image).detach()]


def main(folder):
    folder.mkdir(exist_ok=True)
    torch.save(normalized(), folder / f"normalized{rank()}")
    seen = {}
    for name in CASES if world_size() < 4 else MANY:
        case = CASES[name]
        SEEN.clear()
        if rank() == 0:
            config(folder / name, **case)
        dist.barrier()
        cfg = load_config(folder / name / "toy.yaml")
        train(cfg)
        seen[name] = from_all(SEEN)
    held_out = load_data(cfg, torch.device("cpu")).val
    seen["validated"] = from_all([image.sum().item() for x, _ in held_out for image in x])
    seen["held out"] = [x.sum().item() for x in held_out.normalize(held_out.dataset.images)]
    if rank() == 0:
        (folder / "seen.json").write_text(json.dumps(seen))


def start(folder, number, world):
    torch.set_num_threads(1)  # before any other thread asks for the pool
    os.environ["LOCAL_RANK"] = str(number)
    meeting = f"file://{folder}/meeting{world}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=world)
    main(folder / str(world))
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    DATASETS["digits"]().load(None, "train", None)  # imports what reads them, once
    fork = multiprocessing.get_context("fork")
    for world in map(int, sys.argv[2:]):
        processes = [
            fork.Process(target=start, args=(Path(sys.argv[1]), number, world))
            for number in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            sys.exit(1)
