"""From a config to networks and a distiller."""
