"""Fusing of convolution, sum and ReLU in a frozen network's forward pass on a CPU.

oneDNN applies both to its output while that is in cache; apart, each reads and writes the map
again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_RELU = (_aten.relu.default, _aten.relu_.default)
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}
"""What a fused network may be off, as part of the largest value, by the type of its weights.
In float32 mostly the same bits; in bfloat16 sums are not rounded before the ReLU."""


def can_fuse(image: Tensor) -> bool:
    """Whether oneDNN runs the convolutions for this image, and no dispatch mode is active."""
    return (
        image.device.type == "cpu"
        and image.dtype == torch.float32
        and torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.is_grad_enabled()
        and _get_current_dispatch_mode() is None
    )


def fuse(net: nn.Module, image: Tensor) -> fx.GraphModule | None:
    """`net` with its present weights, traced and fused for images of this shape; None if that is
    not possible.

    One forward pass in eval mode is traced. A value that the network reads as a Python number would
    become a constant, so a network that reads one is not fused, nor one whose fused output differs
    on a second image. Both images are random, so that the decision does not depend on the data.
    """
    import torch._dynamo  # as make_fx does; in some versions that reads values

    drawn = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
    drawn = drawn.contiguous(memory_format=_memory_format(image))
    other = -0.7 * drawn.flip(0, -1)
    try:
        with torch.random.fork_rng(devices=[]):
            with _NoNumbers():
                module = make_fx(net)(drawn)
            packed = _fuse(module)
            if not packed:
                return None
            _pack(module, packed)
            close = CLOSE[packed[0].weight.dtype]
            same = agree(module(other), net(other), close)
    except Exception:  # of whatever network: it then runs as it is
        return None
    return module if same else None


def _memory_format(image: Tensor) -> torch.memory_format:
    last = image.is_contiguous(memory_format=torch.channels_last) and not image.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


class _NoNumbers(TorchDispatchMode):
    """Raises an error where a tensor's value is read as a Python number."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default:
            raise RuntimeError("a value is read while operations are traced")
        return func(*args, **(kwargs or {}))


def agree(first: Any, second: Any, close: float) -> bool:
    """Whether two outputs are equal, tensors up to `close`, as part of the largest value."""
    pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
    return all(_is_close(a, b, close) for a, b in pairs)


def _is_close(first: Any, second: Any, close: float) -> bool:
    if not isinstance(second, Tensor):
        return bool(first == second)
    same_kind = first.shape == second.shape and first.dtype == second.dtype
    return same_kind and bool((first - second).abs().max() <= close * second.abs().max())


@dataclass
class _Packed:
    """A convolution's weight, and the name of its copy in oneDNN's memory order."""

    name: str
    weight: Tensor
    settings: tuple[Any, ...]
    input_size: list[int]


def _pack(module: fx.GraphModule, packed: list[_Packed]) -> None:
    """Put the weights into oneDNN's memory order, and compile the changed graph."""
    reorder: Callable[..., Tensor] = torch.ops.mkldnn._reorder_convolution_weight
    for one in packed:
        weight = reorder(one.weight.detach(), *one.settings, one.input_size)
        setattr(module, one.name, weight)
    module.graph.lint()
    module.recompile()


def _fuse(module: fx.GraphModule) -> list[_Packed]:
    """Replace convolution and ReLU, and convolution, sum and ReLU, by one operation each."""
    packed: list[_Packed] = []
    order = {node: place for place, node in enumerate(module.graph.nodes)}
    changes = [
        place
        for node, place in order.items()
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    for relu in list(module.graph.nodes):
        if relu.target not in _RELU or not _only_reader(relu, relu.args[0]):
            continue
        before = relu.args[0]
        if before.target is _aten.convolution.default:
            conv, other = before, None
        else:
            conv, other = _summands(before)
            if conv is None or any(order[conv] < place < order[before] for place in changes):
                continue  # what it reads may be another by the time of the sum
        if _is_fusible(conv):
            packed.append(_replace(module, conv, other, relu, f"packed_{len(packed)}"))
    return packed


def _is_fusible(conv: fx.Node) -> bool:
    """Whether it is a 2d convolution with constant weights, of a dtype that oneDNN fuses."""
    source, weight, *_, transposed, _, groups = conv.args
    if transposed or len(_value(source).shape) != 4 or cast(fx.Node, weight).op != "get_attr":
        return False
    dtype = _value(conv).dtype
    return dtype in CLOSE and not (dtype == torch.bfloat16 and groups != 1)  # no such sums


def _replace(module: fx.GraphModule, conv: Any, other: Any, relu: fx.Node, name: str) -> _Packed:
    """Put one operation in the place of `conv`, its sum with `other` if any, and `relu`."""
    graph, before = module.graph, cast(fx.Node, relu.args[0])
    source, weight, bias, stride, padding, dilation, _, _, groups = conv.args
    settings = padding, stride, dilation, groups
    tensor = getattr(module, weight.target)
    module.register_buffer(name, tensor.detach())
    with graph.inserting_before(before):
        held = graph.get_attr(name)
        if other is None:
            operation = torch.ops.mkldnn._convolution_pointwise.default
            arguments: tuple[Any, ...] = (source, held, bias, *settings, "relu", [], "")
        else:
            operation = torch.ops.mkldnn._convolution_pointwise.binary
            arguments = (source, other, held, bias, *settings, "add", 1.0, "relu", [], "")
        new = graph.call_function(operation, arguments)
    new.meta = dict(relu.meta)
    relu.replace_all_uses_with(new)
    for node in dict.fromkeys((relu, before, conv)):
        graph.erase_node(node)
    if not weight.users:
        graph.erase_node(weight)
    return _Packed(name, tensor, settings, list(_value(source).shape))


def _summands(node: Any) -> tuple[Any, Any]:
    """The convolution and the other summand of a sum that can be fused; else (None, None)."""
    if node.target not in (_aten.add.Tensor, _aten.add_.Tensor) or node.kwargs:
        return None, None
    first, second = node.args
    for conv, other in ((first, second), (second, first)):
        if (
            _only_reader(node, conv)
            and conv.target is _aten.convolution.default
            and isinstance(other, fx.Node)
            and other is not conv
            and _value(other).shape == _value(conv).shape
            and _value(other).dtype == _value(conv).dtype
        ):
            return conv, other
        if node.target is _aten.add_.Tensor:  # the other way round, `first` would be written to
            break
    return None, None


def _only_reader(node: fx.Node, source: Any) -> bool:
    return isinstance(source, fx.Node) and list(source.users) == [node]


def _value(node: Any) -> Any:
    """A tensor with shape and dtype of the node's output."""
    return node.meta["val"]
