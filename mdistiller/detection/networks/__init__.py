"""Detectors and their components, with torchvision's or detectron2's conventions."""
