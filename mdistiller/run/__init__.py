"""A run from a config to a trained student: the teacher, the distiller, the trainer."""
