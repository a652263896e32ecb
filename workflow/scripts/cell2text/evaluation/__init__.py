"""Descriptions of every method scored on the same cells, with intervals."""
