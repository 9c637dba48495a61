"""Loaders and transforms of images that worker processes read from files or shards."""
