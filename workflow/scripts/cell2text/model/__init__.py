"""Projectors, alignment and the model that joins them to a language model."""
