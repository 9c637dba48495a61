"""CRD in several processes: under torchrun, the first one saves what :func:`steps` gives."""

import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from support import golden_values
from torch import nn

from mdistiller.distillers.CRD import CRD
from mdistiller.distributed import sum_over_ranks, wrap
from mdistiller.engine.cfg import default_config
from mdistiller.runtime import rank, world_size

NUM_DATA, GLOBAL_BATCH = 30, 9


class Net(nn.Module):
    """Image [N, 3, 1, 2] -> two logits and a feature of `width`."""

    def __init__(self, width):
        super().__init__()
        self.body, self.head = nn.Linear(6, width), nn.Linear(width, 2)

    def forward(self, image):
        pooled = self.body(image.flatten(1)).tanh()
        return self.head(pooled), {"pooled_feat": pooled}


def steps():
    """Losses, gradients and bank after three steps on fixed global batches."""
    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(["CRD.NCE.K", 6, "CRD.FEAT.DIM", 8])
    crd = CRD(Net(5), Net(7), cfg, NUM_DATA, image_size=(1, 2)).train()
    parallel, losses = wrap(crd), []
    generator = torch.Generator().manual_seed(1)
    for step in range(3):
        index = torch.randperm(NUM_DATA, generator=generator)[:GLOBAL_BATCH]
        others = torch.randint(NUM_DATA, (GLOBAL_BATCH, 6), generator=generator)
        contrast = torch.cat([index[:, None], others], dim=1)
        image = golden_values((GLOBAL_BATCH, 3, 1, 2), step).float()
        mine = slice(*[GLOBAL_BATCH * r // world_size() for r in (rank(), rank() + 1)])
        _, terms = parallel(
            image=image[mine],
            target=index[mine] % 2,
            index=index[mine],
            contrastive_index=contrast[mine],
            epoch=1,
        )
        # The trainer's weight: DDP then averages gradients to those of the global mean.
        weight = len(index[mine]) * world_size() / GLOBAL_BATCH
        loss = weight * sum(terms.values())
        parallel.zero_grad()
        loss.backward()
        losses.append(sum_over_ranks(loss.detach() / world_size()).item())
        gradients = [parameter.grad for parameter in crd.get_learnable_parameters()]
        with torch.no_grad():
            for parameter in crd.get_learnable_parameters():
                parameter -= 0.1 * parameter.grad
    return {"losses": losses, "gradients": gradients, "bank": crd.contrast.state_dict()}


if __name__ == "__main__":
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    result = steps()
    banks = [None] * world_size()
    dist.all_gather_object(banks, result["bank"])
    assert all(torch.equal(bank[key], banks[0][key]) for bank in banks for key in bank)
    if rank() == 0:
        torch.save(result, sys.argv[1])
    dist.destroy_process_group()
