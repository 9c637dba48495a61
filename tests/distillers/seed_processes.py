"""Steps of SEED in one or several processes; `relation_processes.py` starts the latter."""

import torch
from crd_processes import Net
from support import golden_values

from mdistiller.distillers.SEED import SEED
from mdistiller.distributed import sum_over_ranks, wrap
from mdistiller.engine.cfg import default_config
from mdistiller.runtime import rank, world_size

GLOBAL_BATCH = 9


def steps():
    """Losses, gradients and queue after four steps on fixed global batches, of uneven shares."""
    torch.manual_seed(0)
    cfg = default_config()
    cfg.merge_from_list(["SEED.QUEUE", 20, "SEED.TEACHER_TEMPERATURE", 0.1])
    seed = SEED(Net(5), Net(7), cfg, 30, image_size=(1, 2)).train()
    seed.student.head.requires_grad_(False)  # no cross-entropy here
    parallel, losses = wrap(seed), []
    for step in range(4):
        image = golden_values((GLOBAL_BATCH, 3, 1, 2), step).float()
        mine = slice(*[GLOBAL_BATCH * r // world_size() for r in (rank(), rank() + 1)])
        image = image[mine]
        _, terms = parallel(image=image, target=torch.zeros(len(image)).long(), epoch=1)
        # The trainer's weight: DDP then averages gradients to those of the global mean.
        weight = len(image) * world_size() / GLOBAL_BATCH
        loss = weight * terms["loss_kd"]
        parallel.zero_grad()
        loss.backward()
        losses.append(sum_over_ranks(loss.detach() / world_size()).item())
    gradients = [p.grad for p in seed.get_learnable_parameters() if p.requires_grad]
    state = {key: value for key, value in seed.state_dict().items() if key in ("queue", "position")}
    for value in state.values():  # the same in all processes
        assert torch.equal(sum_over_ranks(value.clone()), value * world_size())
    return {"losses": losses, "gradients": gradients, "queue": state}
