"""Object detection: Faster and Mask R-CNN distilled on COCO-format data, on torchvision's parts."""
