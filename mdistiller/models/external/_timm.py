"""Networks of timm, through its `forward_intermediates`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from mdistiller.models.external._wrapper import (
    MOST_WITHOUT_STEM,
    Collected,
    ExternalNet,
    as_map,
    keep_input,
    keep_output,
    stage_indices,
    take,
)


class TimmNet(ExternalNet):
    """A classification network of timm.

    Its `feature_info` says what the stages are. The first of five and more counts as the stem;
    where there are fewer, the output of the network's first layer does.
    """

    def prepare(self, net: Any, image: Tensor) -> nn.Module:
        if not hasattr(net, "forward_intermediates") or not net.feature_info:
            raise self.unsupported("timm gives no features of it")
        if not hasattr(net, "get_classifier"):
            raise self.unsupported("it has no classifier (timm gives its tokens alone)")
        if not isinstance(net.get_classifier(), nn.Linear):
            raise self.unsupported("its head is not a single linear layer")
        self.normed_head = normalises_first(net, net.get_classifier())
        if self.normed_head:
            keep_input(net.get_classifier())
        reductions = [info["reduction"] for info in net.feature_info]
        self.indices = stage_indices(reductions)
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"
        self.tokens = self.channels_last or len(set(reductions)) == 1
        settings = inspect.signature(net.forward_intermediates).parameters
        self.has_class_tokens = (
            getattr(net, "num_prefix_tokens", 0) > 0 and "return_prefix_tokens" in settings
        )
        token = getattr(net, "cls_token", None)
        self.class_tokens = token.shape[1] if isinstance(token, Tensor) else 0
        self.first_layer = ""
        if len(self.indices) <= MOST_WITHOUT_STEM:
            self.first_layer, layer = next(net.named_children())
            while isinstance(layer, nn.ModuleList) or hasattr(layer, "forward_intermediates"):
                name, layer = next(layer.named_children())  # of a list, or of an encoder within
                self.first_layer = f"{self.first_layer}.{name}"
            keep_output(layer)
        return net

    def collect(self, x: Tensor) -> Collected:
        settings = {"return_prefix_tokens": True} if self.has_class_tokens else {}
        net: Any = self.net
        last, maps = net.forward_intermediates(x, indices=self.indices, **settings)
        class_tokens = []
        if self.has_class_tokens:
            maps, class_tokens = (list(part) for part in zip(*maps, strict=True))
        if self.first_layer:
            stem = take(net.get_submodule(self.first_layer))
            maps = [self._stem_map(stem, maps[0].shape[2:]), *maps]
        logits, pooled = self._head(last)
        if last.ndim == 3 and last.shape[1] == self.class_tokens:
            last = maps[-1]  # the patches' tokens end there
        elif last.ndim == 3:
            if last.shape[1] < maps[-1].shape[2:].numel():
                raise self.unsupported("its last tokens are merged, fewer than those of its stages")
            last = as_map(last, maps[-1].shape[2:])
        elif self.channels_last:
            last = last.permute(0, 3, 1, 2)
        return Collected(logits, maps, class_tokens, last, pooled)

    def _head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """Logits, and the input of the linear layer that makes them."""
        net: Any = self.net
        if self.normed_head:
            logits: Tensor = net.forward_head(last)
            return logits, take(self.classifier())
        pooled: Tensor = net.forward_head(last, pre_logits=True)
        return self.classifier()(pooled), pooled

    def adapt_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """As timm reads its own files: positions resampled, names of older releases changed."""
        adapt = getattr(sys.modules[type(self.net).__module__], "checkpoint_filter_fn", None)
        if adapt is None:
            return state
        try:
            adapted: dict[str, Tensor] = adapt(dict(state), self.net)
        except (KeyError, RuntimeError, AttributeError, ValueError):  # of another architecture
            return state
        return adapted

    def parameter_depths(self) -> dict[str, int]:
        """Layers as timm's own layer decay counts them: a block each."""
        from timm.models import group_parameters

        matcher = getattr(self.net, "group_matcher", None)
        depths = group_parameters(self.net, matcher(coarse=False), reverse=True) if matcher else {}
        return dict(depths)

    def _stem_map(self, stem: Tensor, grid: Sequence[int]) -> Tensor:
        """The first layer's output in the form of a map, of the first stage's size if of tokens."""
        if stem.ndim == 3:
            return as_map(stem, grid)
        channels_last = stem.shape[1:3] == grid and stem.shape[2:] != grid
        return stem.permute(0, 3, 1, 2) if channels_last else stem

    def classifier(self) -> nn.Linear:
        net: Any = self.net
        layer: nn.Linear = net.get_classifier()
        return layer


def normalises_first(net: nn.Module, classifier: nn.Module) -> bool:
    """Whether the classifier's parent is a pair of batch norm and linear layer (`NormLinear`).

    What timm calls `pre_logits` is then the input of the norm.
    """
    for parent in net.modules():
        parts = list(parent.children())
        if parent is not net and any(part is classifier for part in parts):
            return any(isinstance(part, nn.BatchNorm1d) for part in parts)
    return False
