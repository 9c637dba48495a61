"""An optimizer of your own: steps by the sign of the gradient alone."""

import torch

from mdistiller import OPTIMIZERS


class SignSGD(torch.optim.Optimizer):
    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in (p for p in group["params"] if p.grad is not None):
                param.sub_(group["lr"] * param.grad.sign())


@OPTIMIZERS.register("sign_sgd")
def sign_sgd(groups, solver):  # solver: the config's SOLVER section
    return SignSGD(groups, {"lr": solver.LR})
