"""mdistiller: knowledge distillation for vision models, driven by configs."""

__version__ = "0.1.0"
