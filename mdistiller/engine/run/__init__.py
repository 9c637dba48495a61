"""A run from start to end: training, run folder, run record, teacher."""
