"""Annotation of new cells: what a description rests on."""
