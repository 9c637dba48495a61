"""MobileNetV1 for ImageNet (Howard et al., "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications", 2017, arXiv 1704.04861). No weights of it were released.

`feats` and `preact_feats` begin with the first stage (128 channels, a quarter of the image's side):
there is no entry for the stem, as in the original library. What drops the stem by `feats[1:]` sees
the other three stages.

The original called this network `MobileNetV2` until July 2022: that name is kept for its configs
and files.
"""

from __future__ import annotations

from torch import Tensor, nn

from mdistiller.models._layers import ActivatedStage, conv1x1, conv3x3
from mdistiller.models.staged import Staged, StagedNet
from mdistiller.models.zoo import register_model

#: (width, stride) of the depth-wise separable blocks, which are `model.1` and on.
BLOCKS = (
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1)),
    *((512, 2), (512, 1), (512, 1), (512, 1), (512, 1), (512, 1)),
    *((1024, 2), (1024, 1)),
)
#: Blocks that make one stage.
STAGES = (range(1, 4), range(4, 6), range(6, 12), range(12, 14))


class Separable(ActivatedStage):
    """3x3 depth-wise and 1x1 convolution, each with batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__(
            conv3x3(inputs, inputs, stride, groups=inputs),
            nn.BatchNorm2d(inputs),
            nn.ReLU(),
            conv1x1(inputs, outputs),
            nn.BatchNorm2d(outputs),
        )


@register_model("imagenet", "MobileNetV1")
@register_model("imagenet", "MobileNetV2")
class MobileNetV1(StagedNet):
    """3x3 stem with stride 2, and thirteen separable blocks in four stages."""

    def __init__(self, num_classes: int = 1000):
        super().__init__(stem_channels=32)
        self.model = nn.ModuleList([ActivatedStage(conv3x3(3, 32, 2), nn.BatchNorm2d(32))])
        inputs = 32
        for outputs, stride in BLOCKS:
            self.model.append(Separable(inputs, outputs, stride))
            inputs = outputs
        for blocks in STAGES:
            last = blocks[-1]
            paths = [f"model.{i}" for i in blocks]
            self.declare_stage(*paths, channels=BLOCKS[last - 1][0], norm=f"model.{last}.4")
        self.fc = nn.Linear(inputs, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return self.model[0](x)[0]

    def run_stages(self, x: Tensor) -> list[Staged]:
        return super().run_stages(x)[1:]

    def get_stage_channels(self) -> list[int]:
        return super().get_stage_channels()[1:]
