"""Networks for 32x32 images (CIFAR), and their 64x64 relatives (Tiny-ImageNet); a family a file."""

from mdistiller.models.zoo import cifar_model_dict, tiny_imagenet_model_dict

__all__ = ["cifar_model_dict", "tiny_imagenet_model_dict"]
