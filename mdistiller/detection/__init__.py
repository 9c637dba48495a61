"""Object detection: distilling Faster and Mask R-CNN on COCO-format data, on torchvision's detectors."""
