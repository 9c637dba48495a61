"""Networks for ImageNet, at 224x224 pixels by default; a family a file."""

from mdistiller.models.zoo import imagenet_model_dict

__all__ = ["imagenet_model_dict"]
