"""The contract of all networks: StagedNet."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch.nn.functional as F
from torch import Tensor, nn

from mdistiller.models._neck import Neck, read_neck, with_inputs
from mdistiller.registry import UserError

#: What a stage gives: its output, and that before its last ReLU (None where there is no ReLU).
Staged = tuple[Tensor, Tensor | None]


class UnsupportedError(UserError, NotImplementedError):
    """A network is asked for something that its architecture does not have."""


class StageInfo(NamedTuple):
    """One stage after the stem: the modules that are run in turn, and what comes out of them."""

    paths: tuple[str, ...]
    channels: int
    norm: str | None


class StagedNet(nn.Module):
    """A network that gives `(logits, features)`; its stages are declared where they are built.

    `features` holds
        feats: list of the stem's and every stage's output;
        preact_feats: the same before each stage's last ReLU; the stem's entry is its output once
            more. Left out where stages have no such ReLU (MobileNetV2's linear bottlenecks);
        final_map: the map that becomes `pooled_feat`;
        pooled_feat: the classifier's input.

    A family registers its layers under the names of the released checkpoints, in their order, and
    calls :meth:`declare_stage` for each stage. It defines :meth:`stem`, and overrides
    :meth:`last_map` or :meth:`embed` where its head is more than pooling.

    :meth:`add_neck` gives a network another head; `final_map` is then what the neck returns.

    No ReLU or sum here works in place: a tensor in `features` stays what it was.
    """

    #: Name of the child that makes the logits.
    head = "fc"
    #: Whether pooled_feat is the average of final_map over positions.
    globally_pooled = True
    #: Whether stages are made of tokens (transformers, mixers) rather than of channels.
    tokens = False
    #: Whether the classifier has initial weights beside trained ones of the rest (`load_network`).
    untrained_head = False
    #: Names of modules in other libraries' files, and the names here, for reading their weights.
    key_aliases: Mapping[str, str] = MappingProxyType({})

    def __init__(self, stem_channels: int):
        super().__init__()
        self.stem_channels = stem_channels
        self.stages: list[StageInfo] = []
        self.neck: Neck | None = None

    def declare_stage(self, *paths: str, channels: int, norm: str | None = None) -> None:
        """Declare the next stage.

        Args:
            paths: submodules that are run in turn; each maps a tensor to a :data:`Staged` pair.
            channels: width of the stage's output.
            norm: the batch norm right before the stage's last ReLU, if there is one.
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
        """What is pooled, from the last stage's pair."""
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
        features: dict[str, Any] = {"feats": [out for out, _ in outputs]}
        if all(preact is not None for _, preact in outputs):
            features["preact_feats"] = [preact for _, preact in outputs]
        return logits, features | {"pooled_feat": pooled, "final_map": final_map}

    def classifier(self) -> nn.Linear | nn.Conv2d:
        """The layer that makes the logits.

        Checkpoints of two families (vgg, CIFAR MobileNetV2) call that child `classifier` as well.
        This method hides it from reading by attribute (`get_submodule`, `functional_call`);
        assignment, state dicts and `named_modules` see it as ever.
        """
        layer = self._modules[self.head]
        return cast(
            "nn.Linear | nn.Conv2d", layer[-1] if isinstance(layer, nn.Sequential) else layer
        )

    def add_neck(self, hidden: int, outputs: int, size: tuple[int, int]) -> None:
        """Put a :class:`Neck` behind the last map, and a new classifier of its width after it.

        Files of such a network load into a plain one of its kind by :func:`load_network`.

        Raises:
            UnsupportedError: the head is more than a linear layer on an average, or has a neck.
        """
        if not self.globally_pooled or self.neck is not None:
            raise UnsupportedError(
                f"{type(self).__name__} takes no neck: its head has to be one linear layer on the "
                "average of its last map; choose another network"
            )
        self._insert_neck(Neck(self.classifier().weight.shape[1], hidden, outputs, size))

    def accept_neck(self, state: Mapping[str, Tensor]) -> None:
        """Take on the neck that a state dict brings, if the whole of it then fits."""
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
        """Register `neck`, and behind it a fresh classifier of its width in place of the old."""
        head = self._modules.pop(self.head)
        self.neck = neck.to(next(self.parameters()))
        if isinstance(head, nn.Sequential):
            head[-1] = with_inputs(head[-1], neck.outputs)
        else:
            head = with_inputs(head, neck.outputs)
        self._modules[self.head] = head

    def adapt_state(self, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`state`, which does not fit as it is, made to: position embeddings resampled, say."""
        return state

    def get_stage_channels(self) -> list[int]:
        """Width of every entry of `feats`, the stem's first."""
        return [self.stem_channels, *(stage.channels for stage in self.stages)]

    def get_bn_before_relu(self) -> list[nn.Module]:
        """The batch norms right before the stages' last ReLUs, stem excluded.

        Raises:
            UnsupportedError: no stage of this network ends so.
        """
        norms = [stage.norm for stage in self.stages if stage.norm is not None]
        if not norms:
            raise UnsupportedError(
                f"{type(self).__name__} has no batch norm over all channels before the last ReLU "
                "of its stages; methods that read one (OFD) need another teacher"
            )
        return [self.get_submodule(norm) for norm in norms]
