"""StagedNet, the base class of all networks: logits and the features of every stage."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._neck import Neck, read_neck, with_inputs
from mdistiller.registry import UserError

#: What a stage returns: its output, and the same before its last ReLU (None without ReLU).
Staged = tuple[Tensor, Tensor | None]


class UnsupportedError(UserError, NotImplementedError):
    """A network is asked for something that its architecture lacks."""


class StageInfo(NamedTuple):
    """One stage after the stem: its modules in order, its width and its last batch norm."""

    paths: tuple[str, ...]
    channels: int
    norm: str | None


class StagedNet(nn.Module):
    """A network that returns `(logits, features)`; its stages are declared where they are built.

    `features` holds
        feats: list of the stem's and every stage's output;
        preact_feats: the same before each stage's last ReLU; the stem's entry is its output again.
            Absent where stages do not end in a ReLU (MobileNetV2's linear bottlenecks);
        final_map: the map that becomes `pooled_feat`;
        pooled_feat: the classifier's input.

    A family registers its layers under the names of the released checkpoints, in their order, and
    calls :meth:`declare_stage` for each stage. It defines :meth:`stem`, and overrides
    :meth:`last_map` or :meth:`embed` if its head does more than pooling.

    After :meth:`add_neck`, `final_map` is the output of the neck. No ReLU or sum works in place, so
    tensors in `features` keep their values.
    """

    #: Name of the child that makes the logits.
    head = "fc"
    #: Whether pooled_feat is the average of final_map over positions.
    globally_pooled = True
    #: Whether stages consist of tokens (transformers, mixers).
    tokens = False
    #: Whether the classifier is untrained while the rest has loaded weights (`load_network`).
    untrained_head = False
    #: Module names in other libraries' checkpoints -> names here.
    key_aliases: Mapping[str, str] = MappingProxyType({})

    def __init__(self, stem_channels: int):
        super().__init__()
        self.stem_channels = stem_channels
        self.stages: list[StageInfo] = []
        self.neck: Neck | None = None

    def declare_stage(self, *paths: str, channels: int, norm: str | None = None) -> None:
        """Declare the next stage.

        Args:
            paths: submodules, run in order; each maps a tensor to a :data:`Staged` pair.
            channels: width of the stage's output.
            norm: name of the batch norm right before the stage's last ReLU, if any.
        """
        self.stages.append(StageInfo(paths, channels, norm))

    def stem(self, x: Tensor) -> Tensor:
        """The layers before the first stage."""
        raise NotImplementedError

    def run_stages(self, x: Tensor) -> list[Staged]:
        """Output and pre-activation of the stem and of every stage."""
        out = self.stem(x)
        preact: Tensor | None = out
        outputs: list[Staged] = [(out, preact)]
        for stage in self.stages:
            for path in stage.paths:
                out, preact = self.get_submodule(path)(out)
            outputs.append((out, preact))
        return outputs

    def last_map(self, out: Tensor, preact: Tensor | None) -> Tensor:
        """The map to pool, from the last stage's output and pre-activation."""
        return out

    def embed(self, final_map: Tensor) -> Tensor:
        """The classifier's input, from the last map."""
        return F.adaptive_avg_pool2d(final_map, 1).flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Logits [N, classes] and the features described above."""
        outputs = self.run_stages(x)
        final_map = self.last_map(*outputs[-1])
        if self.neck is not None:
            final_map = self.neck(final_map)
        pooled = self.embed(final_map)
        logits = self.classifier()(pooled).flatten(1)
        feats, preact_feats = map(list, zip(*outputs, strict=True))
        features: dict[str, Any] = {"feats": feats, "preact_feats": preact_feats}
        for preact in preact_feats:
            if preact is None:  # a stage without a last ReLU
                del features["preact_feats"]
                break
        return logits, features | {"pooled_feat": pooled, "final_map": final_map}

    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The layer that makes the logits.

        Checkpoints of two families (vgg, CIFAR MobileNetV2) name that child `classifier`, too.
        This method then hides it from attribute access (`get_submodule`, `functional_call`), but
        not from assignment, state dicts and `named_modules`.
        """
        layer = self._modules[self.head]
        return cast(
            "nn.Linear | nn.Conv2d", layer[-1] if isinstance(layer, nn.Sequential) else layer
        )

    def add_neck(self, hidden: int, outputs: int, size: tuple[int, int]) -> None:
        """Insert a :class:`Neck` after the last map, and a new classifier of its width.

        :func:`load_network` loads the weights of such a network into one without neck, too.

        Raises:
            UnsupportedError: the head is not one linear layer on an average, or has a neck already.
        """
        if not self.globally_pooled or self.neck is not None:
            raise UnsupportedError(
                f"{type(self).__name__} takes no neck: its head has to be one linear layer on the "
                "average of its last map; choose another network"
            )
        self._insert_neck(Neck(self.classifier().weight.shape[1], hidden, outputs, size))

    def accept_neck(self, state: Mapping[str, Tensor]) -> None:
        """Insert the neck that a state dict contains, if the whole state dict then fits."""
        neck = read_neck(state)
        if neck is not None and self._fits_with_neck(neck, state):
            self._insert_neck(neck)

    def _fits_with_neck(self, neck: Neck, state: Mapping[str, Tensor]) -> bool:
        """Whether a state dict is that of this network with `neck`, for the same classes."""
        if not self.globally_pooled or neck.inputs != self.classifier().weight.shape[1]:
            return False
        expected = self.state_dict()

        def fits(key: str) -> bool:
            axes = 1 if key.startswith(f"{self.head}.") else None  # the classifier's inputs differ
            return key in state and state[key].shape[:axes] == expected[key].shape[:axes]

        return self.neck is None and all(map(fits, expected))

    def _insert_neck(self, neck: Neck) -> None:
        """Register `neck` and replace the classifier by a fresh one of its width."""
        head = self._modules.pop(self.head)
        self.neck = neck.to(next(self.parameters()))
        if isinstance(head, nn.Sequential):
            head[-1] = with_inputs(head[-1], neck.outputs)
        else:
            head = with_inputs(head, neck.outputs)
        self._modules[self.head] = head

    def adapt_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Adapt a state dict that does not fit, for example by resampling position embeddings."""
        return state

    def get_stage_channels(self) -> list[int]:
        """Width of every entry of `feats`, the stem's first."""
        return [self.stem_channels, *(stage.channels for stage in self.stages)]

    def parameter_depths(self) -> dict[str, int]:
        """The layer of each parameter by its name in the state dict: 0 for the stem, then by stage,
        last what follows them. Empty if the stages do not name their modules.
        """
        place = {path: k for k, stage in enumerate(self.stages, 1) for path in stage.paths}
        depths: dict[str, int] = {}
        for name in [name for name, _ in self.named_parameters()] if place else []:
            inside = (k for path, k in place.items() if name.startswith(f"{path}."))
            behind = len(self.stages) + 1 if any(depths.values()) else 0
            depths[name] = next(inside, behind)
        return depths

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norms right before the stages' last ReLUs, stem excluded.

        Raises:
            UnsupportedError: no stage ends in a batch norm and a ReLU.
        """
        norms = [stage.norm for stage in self.stages if stage.norm is not None]
        if not norms:
            raise UnsupportedError(
                f"{type(self).__name__} has no batch norm over all channels before the last ReLU "
                "of its stages; methods that read one (OFD) need another teacher"
            )
        return [self.get_submodule(norm) for norm in norms]
