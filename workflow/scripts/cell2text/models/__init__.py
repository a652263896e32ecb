"""Pretrained models, downloaded once from the sources in the config and stored as safetensors."""
