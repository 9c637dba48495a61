"""A whole run, its folder and its record."""
