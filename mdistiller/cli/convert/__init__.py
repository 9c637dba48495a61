"""Commands that convert files of weights."""
