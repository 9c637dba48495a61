"""COCO-format data: annotation files (checked and repaired), data sets, evaluation."""
