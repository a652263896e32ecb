"""Faster training of common language models, with the same result; a newcomer may skip this folder."""
