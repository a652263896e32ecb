"""Models fetched once, from where the config says, as safetensors."""
