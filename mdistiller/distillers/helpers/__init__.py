"""Functions and modules that several methods use, by subject; no methods."""
