"""A hook of your own: the length of the student's weight vector, in the record of every epoch."""

import torch

from mdistiller import HOOKS, Hook


@HOOKS.register("weight_norm")
class WeightNorm(Hook):
    def after_epoch(self, trainer, epoch, record):
        norms = [weight.detach().norm() for weight in trainer.model.student.parameters()]
        record["weight_norm"] = float(torch.stack(norms).norm())
