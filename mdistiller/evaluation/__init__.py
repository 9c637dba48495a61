"""Evaluation of trained networks: accuracy, calibration, agreement with the teacher, features, plots."""
