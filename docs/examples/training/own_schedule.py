"""A schedule of your own: after the warm-up a straight line down to a hundredth of SOLVER.LR."""

from torch.optim.lr_scheduler import LinearLR

from mdistiller import SCHEDULES


@SCHEDULES.register("linear")
def linear(optimizer, solver, per_epoch):  # per_epoch: its steps in an epoch
    steps = (solver.EPOCHS - solver.WARMUP_EPOCHS) * per_epoch
    return LinearLR(optimizer, start_factor=1.0, end_factor=0.01, total_iters=steps)
