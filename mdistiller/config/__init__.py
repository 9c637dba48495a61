"""Defaults, YAML files and checks of config values; `engine/cfg.py` is the public module."""
