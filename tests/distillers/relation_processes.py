"""Losses that relate samples, in several processes: under torchrun, the first one saves them."""

import sys
from datetime import timedelta

import seed_processes
import torch
import torch.distributed as dist
from support import golden_values
from torch import nn

from mdistiller.dataset.sampler import DistributedBatchSampler
from mdistiller.distillers import distiller_dict
from mdistiller.distillers.helpers.losses.split import Split
from mdistiller.distributed import sum_over_ranks, wrap
from mdistiller.engine.cfg import default_config
from mdistiller.runtime import rank, world_size

METHODS = {
    "SP": ("SP", []),
    "RKD": ("RKD", []),
    "PKT": ("PKT", []),
    "CC neighbour": ("CC", ["CC.LOSS.FEAT_WEIGHT", 1.0]),
    "CC kernel": ("CC", ["CC.FORM", "kernel", "CC.LOSS.FEAT_WEIGHT", 100.0]),
    "NST": ("NST", []),
    "RADIO": ("RADIO", []),
    "AT": ("AT", []),
    "KDSVD": ("KDSVD", ["KDSVD.SIGNS", "canonical"]),
    "SEMCKD": ("SEMCKD", []),
    "SEMCKD short": ("SEMCKD", []),
    "DIST": ("DIST", []),
    "USKD": ("USKD", []),
    "DGKD log": ("DGKD", ["DGKD.WARMUP", 0]),
    "DGKD plain": ("DGKD", ["DGKD.TERM", "plain", "DGKD.EPSILON", 1000.0]),
    "CTKD": ("CTKD", []),
    "CTKD instance": ("CTKD", ["CTKD.MODE", "instance", "CTKD.BASE", "dkd"]),
    "MLKD as coded": ("MLKD", []),
    "RLD": ("RLD", []),
    "CRLD": ("CRLD", ["CRLD.TAU_W", 0.3]),
    "CORRECTEDKD revision": ("CORRECTEDKD", ["CORRECTEDKD.MODE", "revision"]),
    "MLKD split": ("MLKD", []),
    "MLKD per item": ("MLKD", ["MLKD.MASK", "per_item", "LSKD.ENABLE", True]),
}
GLOBAL_BATCH = 9
EXPECTED = {"SEMCKD": 8, "SEMCKD short": 12}  # SOLVER.BATCH_SIZE of all processes


class Net(nn.Module):
    """Image [N, 3, 8, 8] -> logits, two maps and their pooled feature."""

    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, width, 3), nn.Conv2d(width, 2 * width, 3)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, image):
        first = self.first(image).tanh()
        second = self.second(first).tanh()
        pooled = second.mean((2, 3))
        features = {"feats": [image, first, second], "pooled_feat": pooled, "final_map": second}
        return self.head(pooled), features


def step(name):
    """KD loss and its gradients on a fixed global batch, as the trainer weights shares of it."""
    torch.manual_seed(0)
    method, settings = METHODS[name]
    cfg = default_config()
    cfg.merge_from_list(settings)
    cfg.SOLVER.BATCH_SIZE = EXPECTED.get(name, GLOBAL_BATCH) // world_size()
    size = (8, 8)
    distiller = distiller_dict[method].build(Net(3), Net(5), cfg, 0, size).double().train()
    if name.endswith("split"):
        distiller.split = Split(batch_weight=True)
    parallel = wrap(distiller)
    for module in distiller.modules():
        if isinstance(module, nn.BatchNorm2d):  # its statistics are each process's own
            module.eval()
    plan = DistributedBatchSampler(GLOBAL_BATCH, GLOBAL_BATCH // world_size(), rank(), world_size())
    start, stop = plan.local_batch(0)
    views = golden_values((2, GLOBAL_BATCH, 3, 8, 8), 7)[:, start:stop]
    image = list(views) if distiller.two_views else views[0]
    _, losses = parallel(image=image, target=torch.arange(GLOBAL_BATCH)[start:stop] % 4, epoch=1)
    weight = plan.loss_weight(0)
    (weight * sum(losses.values())).backward()
    gradients = [parameter.grad for parameter in distiller.get_learnable_parameters()]
    target = torch.zeros(stop - start).long()
    parallel(image=image, target=target, epoch=1)  # DDP complains here of what was left unused
    loss = sum_over_ranks(sum(losses.values()).detach() * weight / world_size())
    return {"loss": loss.item(), "gradients": gradients, "share": stop - start}


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    results = {name: step(name) for name in METHODS}
    results["SEED"] = seed_processes.steps()
    if rank() == 0:
        torch.save(results, sys.argv[1])
    dist.destroy_process_group()
