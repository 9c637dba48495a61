"""Folding of batch norms into the layer before them: finding them, and the folded weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def foldable(net: nn.Module, image: Tensor) -> list[tuple[str, str]]:
    """Names (layer, norm) of the batch norms that can be folded into the layer before them.

    One forward pass finds them: the layer's output must go to the norm alone and not leave the
    network, and both must run once.
    """
    names = {module: name for name, module in net.named_modules()}
    with _Readers(net) as seen:
        returned = net(image)
    out = {id(leaf) for leaf in tree_leaves(returned)}
    pairs = []
    for norm, inputs in seen.norm_inputs.items():
        layer = seen.made_by.get(id(inputs[0])) if len(inputs) == 1 else None
        if layer is None or len(seen.outputs[layer]) > 1:
            continue
        key = id(inputs[0])
        if key not in out and key not in seen.read:
            pairs.append((names[layer], names[norm]))
    return pairs


class _Readers(TorchDispatchMode):
    """Records outputs of layers, inputs of norms, and which tensors other operations read."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.outputs: dict[nn.Module, list[Tensor]] = {}  # held, so that no id is used twice
        self.norm_inputs: dict[nn.Module, list[Tensor]] = {}
        self.made_by: dict[int, nn.Module] = {}
        self.read: dict[int, Any] = {}  # held as well
        self._inside = False  # a norm's forward
        self._hooks: list[Any] = []
        for module in net.modules():
            if module._forward_hooks or module._forward_pre_hooks:
                continue  # somebody looks at it
            if _is_layer(module):
                self._hooks.append(module.register_forward_hook(self._layer))
            elif _is_norm(module):
                self._hooks.append(module.register_forward_pre_hook(self._enter))
                self._hooks.append(module.register_forward_hook(self._leave))

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _layer(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.outputs.setdefault(module, []).append(output)
        self.made_by[id(output)] = module

    def _enter(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.norm_inputs.setdefault(module, []).append(inputs[0])
        self._inside = True

    def _leave(self, *call: Any) -> None:
        self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self._inside:
            self.read |= {id(leaf): leaf for leaf in tree_leaves((args, kwargs))}
        return func(*args, **(kwargs or {}))


def _is_layer(module: nn.Module) -> bool:
    """Whether it is a plain layer whose weight is a parameter; subclasses may compute theirs."""
    return type(module) in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear) and (
        "weight" in module._parameters
    )


def _is_norm(module: nn.Module) -> bool:
    is_norm = type(module) in _NORMS or _has_activation(module)
    return is_norm and module.running_var is not None and module.running_mean is not None


def _has_activation(module: nn.Module) -> bool:
    """Whether it is timm's batch norm with an activation."""
    return type(module).__name__ == "BatchNormAct2d" and isinstance(module, nn.BatchNorm2d)


def without_norm(norm: nn.Module) -> nn.Module:
    if _has_activation(norm):
        return nn.Sequential(norm.get_submodule("drop"), norm.get_submodule("act"))
    return nn.Identity()


def replace_child(net: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    net.get_submodule(parent)._modules[child] = module


def folded_weights(layer: Any, norm: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the norm after it, in float64 if the device has that."""
    fuse: Any = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    wide = torch.float32 if layer.weight.device.type == "mps" else torch.float64

    def exact(value: Tensor | None) -> Any:
        return None if value is None else value.detach().to(wide)

    parts = (layer.weight, layer.bias, norm.running_mean, norm.running_var)
    weight, bias = fuse(*map(exact, parts), norm.eps, exact(norm.weight), exact(norm.bias))
    return weight, bias
