"""Building networks and distillers from a config."""
