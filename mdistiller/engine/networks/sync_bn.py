"""Synchronised batch norm over all processes (SOLVER.SYNC_BN), on GPUs and CPUs.

torch's SyncBatchNorm has kernels for GPUs only. This one computes the same on other devices: with
n_r values per channel in process r, their mean m_r and squared deviations s_r, n the sum of n_r,

    mean = sum n_r m_r / n,    var = sum (s_r + n_r (m_r - mean)^2) / n

so that no large sums cancel. In the backward pass the two means over the batch are those of all
processes; gradients of weight and bias stay each process's own, for DistributedDataParallel to
average.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mdistiller.distillers import Distiller
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
        y, mean, var, count = _Normalize.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats and self.running_mean is not None:
            self._track(mean, var * (count / (count - 1).clamp(min=1)))
        return y

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


class _Normalize(torch.autograd.Function):
    """(x - mean) / std * weight + bias over all processes; x is [N, C, ...], perhaps without rows.

    Also returns mean, variance and number of values, without gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Any, bias: Any, eps: float) -> tuple[Tensor, ...]:
        wide = x if x.dtype == torch.float64 else x.float()
        over = [0, *range(2, x.dim())]
        count = wide.new_full((1,), x.numel() // x.shape[1])
        own_mean = wide.sum(over) / count.clamp(min=1)
        squares = (wide - _per_channel(own_mean, x)).square().sum(over)
        mine = torch.cat([count, own_mean, squares])
        all_of = [torch.empty_like(mine) for _ in range(world_size())]
        dist.all_gather(all_of, mine)
        counts, means, deviations = torch.stack(all_of).split([1, len(own_mean), len(own_mean)], 1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (deviations + counts * (means - mean).square()).sum(0) / total
        inverse = (var + eps).rsqrt()
        normal = (wide - _per_channel(mean, x)) * _per_channel(inverse, x)
        ctx.save_for_backward(normal, weight, inverse, total)
        ctx.mark_non_differentiable(mean, var, total)
        y = normal if weight is None else normal * _per_channel(weight, x)
        return (y if bias is None else y + _per_channel(bias, x)).to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        normal, weight, inverse, total = ctx.saved_tensors
        grad = grads[0].to(normal.dtype)
        over = [0, *range(2, grad.dim())]
        local_sums = torch.stack([grad.sum(over), (grad * normal).sum(over)])
        sums = local_sums.clone()
        dist.all_reduce(sums)
        scale = inverse if weight is None else inverse * weight
        to_x = grad - _per_channel(sums[0] / total, grad)
        to_x = (to_x - normal * _per_channel(sums[1] / total, grad)) * _per_channel(scale, grad)
        to_weight, to_bias = (None, None) if weight is None else (local_sums[1], local_sums[0])
        return to_x.to(grads[0].dtype), to_weight, to_bias, None


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))
