"""Networks of torchvision, through hooks on their blocks.

torchvision's own `create_feature_extractor` would do for a forward pass, but copies of what it
makes no longer know training from evaluation.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torchvision.models.swin_transformer import SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer, interpolate_embeddings
from torchvision.ops import Permute

from mdistiller.models.external._wrapper import (
    MOST_WITHOUT_STEM,
    Collected,
    HookedNet,
    as_map,
    recorded_outputs,
    stage_indices,
)
from mdistiller.models.released import released_file
from mdistiller.weights import load_checkpoint, load_state, network_state, with_own_head

# Where families keep their blocks, if not at the top level.
_BODIES = ("features", "trunk_output", "blocks", "layers", "encoder.layers")
_NO_BLOCKS = (nn.AdaptiveAvgPool2d, nn.LayerNorm, nn.Linear, nn.Flatten, nn.Dropout, Permute)


class TorchvisionNet(HookedNet):
    """A classification network of torchvision.

    Its blocks are tried on an image; the last of each resolution are the stages. The first of five
    and more counts as the stem; where there are fewer, the first block does.
    """

    def prepare(self, net: nn.Module, image: Tensor) -> nn.Module:
        if getattr(net, "aux_logits", False):
            raise self.unsupported(
                "it has auxiliary logits (if it takes aux_logits, set that to False)"
            )
        self.channels_last = isinstance(net, SwinTransformer)
        linear = [name for name, layer in net.named_modules() if isinstance(layer, nn.Linear)]
        if not linear:
            raise self.unsupported("its head is not a linear layer")
        self.head = linear[-1]
        outputs = try_maps(net, image)
        self.stage_names = self._choose(
            {name: outputs[name] for name in blocks(net) if name in outputs}
        )
        last = outputs[self.stage_names[-1]]
        self.tokens = self.channels_last or last.ndim == 3
        place = slice(1, -1) if self.tokens else slice(2, None)  # the dimensions of h and w, or L
        self.final_name = [
            name
            for name, value in outputs.items()
            if value.ndim == last.ndim and value.shape[place] == last.shape[place]
        ][-1]
        return self.keep_layers(net)

    def _choose(self, outputs: dict[str, Tensor]) -> list[str]:
        """The stem and the stages among the blocks, by their outputs."""
        heights: list[int] = []
        for value in outputs.values():  # tokens have the height of the map they were made of
            heights.append(self._map(value).shape[2] if value.ndim == 4 else heights[-1])
        chosen = stage_indices(heights)
        if len(chosen) <= MOST_WITHOUT_STEM:
            chosen = [0, *(k + 1 for k in stage_indices(heights[1:]))]
        return [list(outputs)[k] for k in chosen]

    def _map(self, value: Tensor) -> Tensor:
        return value.permute(0, 3, 1, 2) if self.channels_last else value

    def collect(self, x: Tensor) -> Collected:
        logits = self.net(x)
        stages, last, pooled = self.take_layers()
        if last.ndim == 4:
            return Collected(logits, list(map(self._map, stages)), [], self._map(last), pooled)
        stem, *rest = stages
        grid = stem.shape[2:]
        class_tokens = [tokens[:, : -grid.numel()] for tokens in rest]
        maps = [stem, *(as_map(tokens, grid) for tokens in rest)]
        return Collected(logits, maps, class_tokens, as_map(last, grid), pooled)

    def adapt_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """With the position embeddings of a VisionTransformer resampled for its image size."""
        net = self.net
        if not isinstance(net, VisionTransformer) or "encoder.pos_embedding" not in state:
            return state
        try:
            adapted: dict[str, Tensor] = interpolate_embeddings(
                net.image_size, net.patch_size, OrderedDict(state)
            )
        except ValueError:  # those of an image that is not square
            return state
        return adapted


def try_maps(net: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Outputs of all submodules for an image that are maps or tokens, in order of the calls."""
    with recorded_outputs(net) as outputs:
        net(image)
    return {k: v for k, v in outputs.items() if isinstance(v, Tensor) and v.ndim in (3, 4)}


def blocks(net: nn.Module) -> Iterator[str]:
    """Names of the submodules that stages are chosen from, in order."""
    for name, _ in net.named_children():
        body = next((body for body in _BODIES if body.split(".")[0] == name), None)
        inside = net.get_submodule(body).named_children() if body else ()
        for path in [f"{body}.{child}" for child, _ in inside] if body else [name]:
            if not isinstance(net.get_submodule(path), _NO_BLOCKS):
                yield path


def load_released(net: TorchvisionNet, release: str) -> None:
    """Load `torchvision:...` weights, which are downloaded if they are not there.

    A classifier of another number of classes stays as it is; position embeddings are interpolated.

    Raises:
        UserError: they cannot be had, or belong to a network of another shape.
    """
    path = released_file(release, net.name)
    state = network_state(load_checkpoint(path), path)
    state = dict(net.adapt_state(state))
    load_state(net, with_own_head(net, state), f"{release} and {net.name} as it is built here")
