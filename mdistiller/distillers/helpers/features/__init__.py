"""Shapes, stages and maps of networks, and modules between them."""
