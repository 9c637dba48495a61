"""Synchronised batch norm over all processes (SOLVER.SYNC_BN), on GPUs and CPUs.

torch's SyncBatchNorm has kernels for GPUs only. On other devices, this one sums each channel's
values over the processes, then their squared deviations from the mean; the rest is autograd's.
Gradients of weight and bias stay each process's own, for DistributedDataParallel to average.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.distillers import Distiller
from mdistiller.distributed import sum_over_ranks
from mdistiller.registry import UserError
from mdistiller.runtime import world_size


def synchronize_batch_norm(distiller: Distiller) -> None:
    """Synchronise the batch norms of student and method, if there are several processes.

    The modules and their parameters stay the same objects. A teacher in eval mode uses no batch
    statistics; one in train mode is converted as well.

    Raises:
        UserError: a network has a batch norm with a forward pass of its own.
    """
    if world_size() == 1:
        return
    resting = distiller.teacher if distiller.teacher_in_eval_mode else None
    untouched = set() if resting is None else set(resting.modules())
    on_gpu = next(distiller.parameters()).is_cuda
    for name, module in distiller.named_modules():
        if isinstance(module, _BatchNorm) and module not in untouched:
            _convert(module, name, on_gpu)


def _convert(module: _BatchNorm, name: str, on_gpu: bool) -> None:
    if isinstance(module, nn.SyncBatchNorm):
        return
    if type(module).forward is _BatchNorm.forward:
        kind: type = nn.SyncBatchNorm if on_gpu else SyncBatchNorm
    elif hasattr(module, "act") and hasattr(module, "drop"):  # timm's BatchNormAct2d
        kind = GpuBatchNormAct if on_gpu else BatchNormAct
    else:
        raise UserError(
            f"SOLVER.SYNC_BN does not know the batch norm {type(module).__name__} ({name}): set it "
            "to False"
        )
    # In place: methods and their stages hold references to modules.
    module.process_group = None  # type: ignore[assignment]  # torch's: all processes
    module.__class__ = kind


class SyncBatchNorm(_BatchNorm):
    """torch's SyncBatchNorm for any device."""

    def _check_input_dim(self, input: Tensor) -> None:
        """Anything with channels."""

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x if x.dtype == torch.float64 else x.float()
        over, shape = [0, *range(2, x.dim())], (1, -1, *[1] * (x.dim() - 2))
        values = wide.new_full((1,), x.numel() // x.shape[1])
        sums = _SumOverRanks.apply(torch.cat([wide.sum(over), values]))
        mean, count = sums[:-1] / sums[-1], sums[-1]
        centred = wide - mean.view(shape)
        var = _SumOverRanks.apply(centred.square().sum(over)) / count
        scale = (var + self.eps).rsqrt() * (self.weight if self.affine else 1.0)
        y = centred * scale.view(shape)
        if self.affine:
            y += self.bias.view(shape)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, var * (count / (count - 1).clamp(min=1)))
        return y.to(x.dtype)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share: Any = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.float()
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(var.to(self.running_var.dtype), share)


class _Act(nn.Module):
    """Adds dropout and activation as timm's BatchNormAct2d does."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))  # type: ignore[no-any-return,operator,misc]


class BatchNormAct(_Act, SyncBatchNorm):
    """timm's BatchNormAct2d, synchronised on any device."""


class GpuBatchNormAct(_Act, nn.SyncBatchNorm):
    """timm's BatchNormAct2d, synchronised on GPUs."""


class _SumOverRanks(torch.autograd.Function):
    """All-reduce a tensor forward, and its gradient backward."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return sum_over_ranks(values.clone())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return sum_over_ranks(grads[0].clone())
