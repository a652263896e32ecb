"""Descriptions written by the fine-tuned model."""
