"""What several methods share: precision, cross-entropy, warm-up, settings, shapes, connectors."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.registry import UserError

IGNORE_INDEX = -100
"""Target value of samples that carry no label; losses that need labels leave them out."""


def full_precision(value: Any) -> Any:
    """`value` with half-precision tensors cast to float32; lists and tuples element by element.

    Losses are computed on the result: 1e-8 is zero in fp16, and bf16 has 3 digits.
    """
    if isinstance(value, Tensor):
        return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
    if isinstance(value, (list, tuple)):
        return [full_precision(item) for item in value]
    return value


def mean_square_error(student: Tensor, teacher: Tensor, reduction: str = "mean") -> Tensor:
    """Mean (or "sum") of squared differences, with a gradient laid out in memory as `student` is.

    That of `F.mse_loss` is in NCHW whatever its input; from there, the backward pass of a batch
    norm in channels_last takes 15 times as long on a CPU.
    """
    if student.is_contiguous():
        return F.mse_loss(student, teacher, reduction=reduction)
    total = (student - teacher).square().sum()  # the gradient of mean() is in NCHW, too
    return total if reduction == "sum" else total / student.numel()


def soften(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """`logits / temperature` in full precision, within ±1e30.

    Beyond that bound, differences of float32 numbers would overflow. A temperature that is a tensor
    has one value, or one for every sample: [N, 1].
    """
    logits = full_precision(logits)
    if isinstance(temperature, Tensor) or temperature != 1:
        logits = logits / temperature
    # not clamp, whose backward takes several passes
    return F.hardtanh(logits, -1e30, 1e30)


def divergence(log_q: Tensor, log_p: Tensor, dim: int | None = -1) -> Tensor:
    """KL(q || p) from log-probabilities, summed over `dim`: the classes' or, with None, all."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=dim)


def weighted_divergence(log_q: Tensor, log_p: Tensor, weights: Tensor) -> Tensor:
    """sum_n weights_n KL(q_n || p_n), a scalar, from log-probabilities [N, C] and weights [N]."""
    shares = log_q.softmax(dim=1) * weights[:, None]  # sooner than exp, which tiny values slow down
    return torch.dot(shares.flatten(), (log_q - log_p).flatten())


def cross_entropy(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy over the labelled samples; 0 if there are none.

    Args:
        logits: [N, C].
        target: [N] class indices, IGNORE_INDEX where unlabelled; or [N, C] class probabilities.
        smoothing: part of the probability that is spread evenly over all classes.
    """
    logits = soften(logits, 1.0)
    if target.is_floating_point():
        return F.cross_entropy(logits, target, label_smoothing=smoothing)
    total = F.cross_entropy(
        logits, target, reduction="sum", ignore_index=IGNORE_INDEX, label_smoothing=smoothing
    )
    return total / (target != IGNORE_INDEX).sum().clamp(min=1)


def unit(x: Tensor, dim: int = -1) -> Tensor:
    """`x` with vectors of length 1 along `dim`; those shorter than 1e-12 become 0.

    The usual division by max(length, 1e-12) gives a zero vector a gradient of 1e12; here it is 0.
    """
    length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
    return x / length.masked_fill(length <= 1e-12, math.inf)


def centre(x: Tensor, dim: int) -> Tensor:
    """`x` minus its mean along `dim`; 0, without gradient, where `x` is constant up to rounding.

    What is left there is noise, which a division by its own length would blow up.
    """
    centred = x - x.mean(dim=dim, keepdim=True)
    largest, spread = (v.detach().abs().amax(dim=dim, keepdim=True) for v in (x, centred))
    return centred.masked_fill(spread <= 8 * torch.finfo(x.dtype).eps * largest, 0.0)


class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        return rows @ rows.T

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        return (grads[0] + grads[0].T) @ rows


def gram(rows: Tensor) -> Tensor:
    """Scalar products of all rows [N, D] with each other, [N, N].

    `rows @ rows.T`, but the backward pass needs one product instead of two.
    """
    product: Tensor = _Gram.apply(rows)
    return product


def warmup_factor(epoch: int, warmup: int) -> float:
    """Linear warm-up of a loss weight: min(epoch / warmup, 1), epochs counted from 1."""
    return min(epoch / warmup, 1.0) if warmup > 0 else 1.0


def require_positive(key: str, value: float) -> float:
    """`value` if it is above zero; the error names the config key."""
    if not value > 0:
        raise UserError(f"{key} must be positive, got {value}")
    return value


def require_one_of(key: str, value: str, known: Sequence[str]) -> str:
    """`value` if it is among `known`; the error names the config key."""
    if value not in known:
        raise UserError(f"{key} {value!r} is none of {', '.join(known)}")
    return value


def missing_feature(name: str, known: Iterable[str]) -> UserError:
    """The error for a feature that a network does not return."""
    return UserError(
        f"this method needs {name!r}, which the network does not return "
        f"(it returns {', '.join(known) or 'no features'}; docs/own_backbone.md)"
    )


class FeatureShapes(dict[str, Any]):
    """Name of a feature -> its shape, or the list of its shapes; what is absent is named.

    Flat features [N, D] among the stages' are refused: methods that ask for them need maps.
    """

    def __getitem__(self, name: str) -> Any:
        shapes = super().__getitem__(name)
        if name in ("feats", "preact_feats"):
            require_maps(name, shapes)
        return shapes

    def __missing__(self, name: str) -> Any:
        raise missing_feature(name, self)


def require_maps(name: str, shapes: Iterable[Sequence[int]]) -> None:
    """Refuse flat features where a method compares maps."""
    flat = next((shape for shape in shapes if len(shape) < 3), None)
    if flat is not None:
        raise UserError(
            f"this method needs maps [N, C, H, W], but the network returns {name!r} of shape "
            f"{list(flat)} (docs/own_backbone.md)"
        )


@contextlib.contextmanager
def undisturbed(net: nn.Module) -> Iterator[None]:
    """`net` in eval mode; afterwards its parts' modes and the random generators are as before."""
    modes = [(module, module.training) for module in net.modules()]
    gpus = {param.device for param in net.parameters() if param.is_cuda}
    net.eval()
    try:
        with torch.random.fork_rng(devices=list(gpus)):
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def blank_image(net: nn.Module, image_size: Sequence[int] | None = None) -> Tensor:
    """An image [1, 3, height, width] of zeros as `net` takes it; 32 x 32 without a size."""
    height, width = image_size or (32, 32)
    some = next(net.parameters(), torch.empty(0))
    return torch.zeros(1, 3, height, width, dtype=some.dtype, device=some.device)


@torch.no_grad()
def probe(net: nn.Module, image_size: Sequence[int] | None = None) -> FeatureShapes:
    """Shapes of what `net` returns for one image, found by running it on a blank one.

    They go by the features' names; "logits" is that of the logits. The network runs in eval mode.
    Parameters, buffers, the modes of its parts and the global random generators are afterwards as
    they were.

    Args:
        image_size: (height, width); None: 32 x 32, enough where only channels are asked for.
    """
    with undisturbed(net):
        logits, features = net(blank_image(net, image_size))
    outputs = {"logits": logits, **features}
    return FeatureShapes({name: _shapes(value) for name, value in outputs.items()})


def _shapes(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_shapes(item) for item in value]
    return value.shape


def get_feat_shapes(
    student: nn.Module, teacher: nn.Module, input_size: Sequence[int]
) -> tuple[list[torch.Size], list[torch.Size]]:
    """Shapes of the `feats` of both networks for one image of `input_size` (height, width)."""
    shapes = [probe(net, input_size) for net in (student, teacher)]
    first, second = (found.get("feats") or found["feats"] for found in shapes)
    return first, second


def settle(key: str, value: Any, default: Any, found: Any) -> Any:
    """What to use for a setting that the networks determine: `found`.

    Raises:
        UserError: `value` is neither that nor the default, so somebody meant something else.
    """
    if isinstance(found, (list, tuple)):
        value, default, found = list(value), list(default), list(found)
    if value not in (found, default):
        raise UserError(
            f"{key} is {value}, but these networks need {found}; set that, or leave the key out"
        )
    return found


def probe_size(
    method: str, cfg: Any, default: Sequence[int], image_size: Sequence[int] | None
) -> Sequence[int]:
    """(height, width) of the images: `image_size`, or what the method's INPUT_SIZE says."""
    if image_size is None:
        return cfg[method].INPUT_SIZE
    return settle(f"{method}.INPUT_SIZE", cfg[method].INPUT_SIZE, default, image_size)


def pool_to(x: Tensor, like: Tensor) -> Tensor:
    """`x` [N, C, H, W] averaged to the height and width of `like`; itself where they agree."""
    height, width = like.shape[2:]
    return x if x.shape[2:] == like.shape[2:] else F.adaptive_avg_pool2d(x, (height, width))


class ConvReg(nn.Module):
    """Convolution, batch norm and ReLU that bring a student's map to the shape of a teacher's.

    Twice the teacher's size: 3x3, stride 2. Half of it: transposed 4x4, stride 2. Not smaller on
    either side: a kernel that just fits, without padding. Otherwise 1x1; the map keeps its size,
    and the teacher's is to be pooled to it.

    Args:
        s_shape, t_shape: [N, C, H, W] of student and teacher.
        use_relu: end with a ReLU.
    """

    def __init__(self, s_shape: Sequence[int], t_shape: Sequence[int], use_relu: bool = True):
        super().__init__()
        (_, s_width, *s_size), (_, t_width, *t_size) = s_shape, t_shape
        self.conv: nn.Module
        if s_size == [2 * side for side in t_size]:
            self.conv = nn.Conv2d(s_width, t_width, 3, stride=2, padding=1)
        elif [2 * side for side in s_size] == t_size:
            self.conv = nn.ConvTranspose2d(s_width, t_width, 4, stride=2, padding=1)
        else:
            height, width = (1 + s - t for s, t in zip(s_size, t_size, strict=True))
            fits = min(height, width) >= 1
            self.conv = nn.Conv2d(s_width, t_width, (height, width) if fits else (1, 1))
        self.bn = nn.BatchNorm2d(t_width)
        self.relu = nn.ReLU()
        self.use_relu = use_relu

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(self.conv(x))
        return self.relu(x) if self.use_relu else x
