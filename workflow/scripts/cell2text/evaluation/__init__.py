"""Evaluation: every method scored on the same cells, with 95% confidence intervals."""
