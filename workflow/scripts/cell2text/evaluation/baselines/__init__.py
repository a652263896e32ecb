"""Simple methods that describe the same cells, so that every score of the model has a neighbour."""
