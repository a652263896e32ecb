"""Counts of studies in one form, and the cells of them that are fit for use."""
