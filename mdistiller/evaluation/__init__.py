"""Evaluation of trained networks: accuracy, calibration, agreement with a teacher, plots."""
