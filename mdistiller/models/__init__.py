"""Model zoos: `cifar_model_dict`, `tiny_imagenet_model_dict` and `imagenet_model_dict`.

An entry unpacks as `(constructor, checkpoint path or None)` and can be called:

    net = get_model_entry("resnet8x4", "cifar")(num_classes=10)
    logits, features = net(images)   # see mdistiller.models.StagedNet

A new family is one file in a sub-package that registers its networks with `@register_model`: every
module whose name has no leading underscore is imported.
"""

import importlib
import pkgutil

from mdistiller.models.channels import with_channels
from mdistiller.models.cost import count_cost
from mdistiller.models.external.plain import as_staged
from mdistiller.models.staged import StagedNet
from mdistiller.models.zoo import (
    ModelEntry,
    cifar_model_dict,
    get_model_entry,
    imagenet_model_dict,
    library_names,
    register_model,
    tiny_imagenet_model_dict,
    zoo_names,
)

__all__ = [
    "ModelEntry",
    "StagedNet",
    "as_staged",
    "cifar_model_dict",
    "count_cost",
    "get_model_entry",
    "imagenet_model_dict",
    "library_names",
    "register_model",
    "tiny_imagenet_model_dict",
    "with_channels",
    "zoo_names",
]

for _module in pkgutil.walk_packages(__path__, f"{__name__}."):
    if not _module.name.rpartition(".")[2].startswith("_"):
        importlib.import_module(_module.name)
