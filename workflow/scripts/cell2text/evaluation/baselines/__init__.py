"""Simple methods that describe the same cells, so that every score of the model can be compared."""
