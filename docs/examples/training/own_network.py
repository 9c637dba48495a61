"""A network of your own: a plain torch module that returns logits."""

from torch import nn

from mdistiller.models import register_model


@register_model("cifar", "small")
def small(num_classes=10):
    layers = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, num_classes))
