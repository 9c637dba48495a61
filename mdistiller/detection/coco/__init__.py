"""COCO-format data: annotation files, checked and repaired, data sets and their evaluation."""
