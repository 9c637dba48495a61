"""A frozen teacher prepared for inference: batch norms folded, in the fastest memory layout.

The prepared copy is not a child of the distiller. Checkpoints, optimizers and
DistributedDataParallel see the original teacher, and so do methods that read its classifier or its
norms.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from mdistiller.distillers import Distiller
from mdistiller.distillers.helpers.features.shapes import preserve_state
from mdistiller.frozen_teacher.folding import (
    foldable,
    folded_weights,
    replace_child,
    without_norm,
)
from mdistiller.frozen_teacher.fusing import agree, can_fuse, fuse
from mdistiller.preprocessing import input_channels
from mdistiller.registry import UserError

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOSE = 1e-4
"""What the folded copy may be off on random input, as part of the largest value; usually 1e-6."""
SHAPES = 3
"""Shapes of batches for which operations are fused: those of a training, of its last batch, and of
the last batch of a run in lock-step that has merged two."""

_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError)


def prepare_teacher(distiller: Distiller, cfg: Any, image_size: tuple[int, int]) -> None:
    """Prepare the distiller's teacher as DISTILLER.TEACHER_* say.

    The original teacher runs if it is not frozen in eval mode, would gain nothing, cannot be
    copied, or has forward hooks of the method.

    Args:
        image_size: (height, width) of the images.

    Raises:
        UserError: TEACHER_DTYPE is set for a method whose teacher is not frozen.
    """
    settings, asked = cfg.DISTILLER, cfg.DISTILLER.TEACHER_DTYPE
    teacher = getattr(distiller, "teacher", None)
    if not isinstance(teacher, nn.Module):
        return
    if asked == "auto" and not settings.TEACHER_FOLD:
        return
    if distiller.watches_teacher or not is_frozen(distiller):
        if asked != "auto":
            raise UserError(
                f"DISTILLER.TEACHER_DTYPE {asked}: {settings.TYPE} changes or watches its teacher "
                "while it runs; leave it at auto"
            )
        return
    amp = "fp32" if cfg.SOLVER.AMP == "none" else cfg.SOLVER.AMP
    dtype = DTYPES[amp if asked == "auto" else asked]
    frozen = FrozenTeacher.of(teacher, image_size, dtype, fold=settings.TEACHER_FOLD)
    if frozen is not None and (frozen.folded or frozen.channels_last or asked != "auto"):
        for part in distiller.modules():
            if isinstance(part, Distiller) and part.teacher is teacher:
                part.frozen = frozen


def is_frozen(distiller: Distiller) -> bool:
    """Whether all modules of the teacher are in eval mode and none of its parameters is trained."""
    teacher = distiller.teacher
    return (
        distiller.teacher_in_eval_mode
        and teacher is not None
        and not any(param.requires_grad for param in teacher.parameters())
    )


class FrozenTeacher:
    """Computes `teacher(image)` of eval mode, up to rounding, at less cost.

    A batch norm that is the only reader of a convolution or linear layer is folded into it, and
    convolutions run in channels_last where that is faster; on CPUs the ReLUs and sums after them
    are fused into them (:mod:`fusing <mdistiller.frozen_teacher.fusing>`). The copy follows
    the teacher's weights: it notices a change before the next forward pass, or, if autograd does
    not record it (`param.data`), at :meth:`refresh`, which every epoch calls. If the teacher has
    got forward hooks since, it runs itself, as the copy would not call them.

    Args:
        teacher: the network.
        net: a copy of it to be changed.
        pairs: names (layer, norm) to fold.
        dtype: of convolutions and matrix products; None: full precision.

    Attributes:
        folded: number of folded batch norms.
        fuses: whether operations are fused; only after a comparison with the unfused network.
    """

    def __init__(
        self,
        teacher: nn.Module,
        net: nn.Module,
        pairs: list[tuple[str, str]],
        dtype: torch.dtype | None,
    ):
        self.teacher, self.net, self.pairs, self.dtype = teacher, net, pairs, dtype
        self.folded = len(pairs)
        self._hooks = count_hooks(teacher)
        self._seen: list[tuple[int, int]] | None = None
        for layer_name, norm_name in pairs:
            layer: Any = net.get_submodule(layer_name)
            # new parameters: the old one may be tied to another layer's
            layer.weight = nn.Parameter(layer.weight.detach().clone())
            layer.bias = nn.Parameter(layer.weight.detach().new_zeros(len(layer.weight)))
            replace_child(net, norm_name, without_norm(net.get_submodule(norm_name)))
        for param in net.parameters():
            param.requires_grad_(False)
        for layer in net.modules():  # the rest is up to autocast, as ever
            if dtype is not None and isinstance(layer, (nn.Conv2d, nn.Linear)):
                layer.to(dtype)
        self.channels_last = False
        self.fuses = False
        self._fused: dict[torch.Size, Callable[[Tensor], Any] | None] = {}
        self._update()

    @classmethod
    def of(
        cls,
        teacher: nn.Module,
        image_size: tuple[int, int],
        dtype: torch.dtype | None = None,
        fold: bool = True,
    ) -> FrozenTeacher | None:
        """The prepared copy of a network; None if it cannot be made or gives other outputs.

        Args:
            image_size: (height, width) of the images.
            fold: fold and choose the layout; else only `dtype` changes.
        """
        try:
            with preserve_state(teacher), torch.no_grad():
                net = copy.deepcopy(teacher).eval()
                image = _random_image(teacher, image_size)
                exact = cls(teacher, net, foldable(net, image) if fold else [], None)
                if fold:
                    exact.set_layout()
                if not agree(exact(image), teacher(image), CLOSE):
                    return None
        except _FAILURES:  # a network of whatever kind: it then runs as it is
            return None
        if dtype is None:
            exact.fuses = fold
            return exact
        frozen = cls(teacher, copy.deepcopy(teacher).eval(), exact.pairs, dtype)
        if not all(bool(param.isfinite().all()) for param in frozen.net.parameters()):
            # a norm of tiny variance: fp16 cannot hold the weights it would make
            frozen = cls(teacher, copy.deepcopy(teacher).eval(), [], dtype)
        if fold:
            frozen.set_layout()
        frozen.fuses = fold
        return frozen

    def set_layout(self) -> None:
        """Use channels_last where that is faster: on CPUs, and for tensor cores."""
        kind = self._tensors[0].device.type
        convolutions = sum(isinstance(module, nn.Conv2d) for module in self.net.modules())
        self.channels_last = convolutions > 1 and (  # one: that of a transformer's patches
            kind == "cpu" or (kind == "cuda" and self.dtype is not None)
        )
        if self.channels_last:
            self.net.to(memory_format=torch.channels_last)

    def __call__(self, image: Tensor) -> Any:
        """Logits and features of [N, 3, H, W] images."""
        if not torch.compiler.is_compiling() and self._state() != self._seen:
            self._update()
        if self._watched:
            return self.teacher(image)
        if self.channels_last:
            image = image.contiguous(memory_format=torch.channels_last)
        with torch.autocast(image.device.type, dtype=self.dtype, enabled=self.dtype is not None):
            return self._runner(image)(image)

    def _runner(self, image: Tensor) -> Callable[[Tensor], Any]:
        """The copy, or on a CPU its fused graph, one for each of the first few shapes."""
        compiled = torch.compiler.is_compiling() or self.net._compiled_call_impl is not None
        if not self.fuses or compiled or not can_fuse(image):
            return self.net
        if image.shape not in self._fused and len(self._fused) < SHAPES:
            self._fused[image.shape] = fuse(self.net, image)
        return self._fused.get(image.shape) or self.net

    def __getstate__(self) -> dict[str, Any]:
        """State without the fused graphs, which can be neither copied nor pickled."""
        return {**self.__dict__, "_fused": {}}

    def refresh(self) -> None:
        """Copy the teacher's weights before the next forward pass."""
        self._seen = None

    def _state(self) -> list[tuple[int, int]]:
        """A value that changes whenever the teacher's tensors are replaced, or autograd records a
        change of them."""
        state = [(tensor.data_ptr(), tensor._version) for tensor in self._tensors]
        return [(id(next(self.teacher.parameters())), 0), *state]

    @torch.no_grad()
    def _update(self) -> None:
        """Fold the teacher's weights into the copy, in place."""
        source = dict(named_tensors(self.teacher))
        self._tensors = list(source.values())
        self._watched = count_hooks(self.teacher) != self._hooks
        some = self._tensors[0]
        self.net.to(some.device)
        tensors = dict(named_tensors(self.net))
        before = [tensor.clone() for tensor in tensors.values()] if self._fused else []
        values = list(tensors.values())
        for layer_name, norm_name in self.pairs:
            names = [f"{layer_name}.{part}" for part in ("weight", "bias")]
            layer, norm = (self.teacher.get_submodule(name) for name in (layer_name, norm_name))
            for name, value in zip(names, folded_weights(layer, norm), strict=True):
                tensors.pop(name).copy_(value)
        for name, tensor in tensors.items():
            tensor.copy_(source[name])
        if not all(map(torch.equal, before, values)):
            self._fused.clear()  # they have the weights that were
        self._seen = self._state()


def count_hooks(net: nn.Module) -> int:
    """Number of forward hooks on a network's modules."""
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def named_tensors(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones under each name; without batch counters."""
    everything = (
        *net.named_parameters(remove_duplicate=False),
        *net.named_buffers(remove_duplicate=False),
    )
    for name, tensor in everything:
        if not name.endswith("num_batches_tracked"):
            yield name, tensor


def _random_image(net: nn.Module, image_size: tuple[int, int]) -> Tensor:
    some = next(net.parameters())
    shape = (2, input_channels(net), *image_size)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return image.to(some)
