"""The names under which forks of the original import shared code; see `helpers`."""

from mdistiller.distillers.helpers.features.connectors import ConvReg
from mdistiller.distillers.helpers.features.shapes import get_feat_shapes, probe

__all__ = ["ConvReg", "get_feat_shapes", "probe"]
