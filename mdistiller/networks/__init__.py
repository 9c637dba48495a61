"""The networks of a config: made, their weights found and loaded, compiled, batch norms joined."""
