"""What a config may hold: defaults, files, values and their checks. The door is engine/cfg.py."""
